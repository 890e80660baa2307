"""Networks. Knows nothing of training. Needs the extra ``models``; importing it registers the networks in timm."""

from .._extras import require

for _module in ("timm", "safetensors", "huggingface_hub"):
    require(_module, extra="models")

from .create import create_model  # noqa: E402
from .flops import count_flops  # noqa: E402
from .presets import MODELS, SmallResNetSize  # noqa: E402
from .pretrained import shipped_weights  # noqa: E402
from .sasa_resnet import SasaResNet  # noqa: E402
from .small_resnet import SmallResNet  # noqa: E402

__all__ = [
    "MODELS",
    "SasaResNet",
    "SmallResNet",
    "SmallResNetSize",
    "count_flops",
    "create_model",
    "shipped_weights",
]
