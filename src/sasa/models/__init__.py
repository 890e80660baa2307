"""Networks. Knows nothing of training. Needs the extra ``models``; importing it registers the networks in timm.

``retinanet`` and ``SasaRetinaNet``, detectors, also need the extra ``detection``, and are imported when first used.
"""

from typing import TYPE_CHECKING, Any

from .._extras import require

for _module in ("timm", "safetensors", "huggingface_hub"):
    require(_module, extra="models")

from .create import create_model  # noqa: E402
from .flops import count_flops  # noqa: E402
from .presets import MODELS, SmallResNetSize  # noqa: E402
from .pretrained import shipped_weights  # noqa: E402
from .sasa_resnet import SasaResNet  # noqa: E402
from .small_resnet import SmallResNet  # noqa: E402

if TYPE_CHECKING:
    from .detection import SasaRetinaNet, retinanet

__all__ = [
    "MODELS",
    "SasaResNet",
    "SasaRetinaNet",
    "SmallResNet",
    "SmallResNetSize",
    "count_flops",
    "create_model",
    "retinanet",
    "shipped_weights",
]

_DETECTION = ("SasaRetinaNet", "retinanet")


def __getattr__(name: str) -> Any:
    if name in _DETECTION:
        require("torchvision", extra="detection")
        return getattr(require("sasa.models.detection", extra="detection"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
