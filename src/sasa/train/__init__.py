"""Training on images with Lightning. Needs the extra ``train``."""

from .._extras import require

for _module in ("lightning", "torchmetrics", "torchvision", "timm", "safetensors", "rich", "tensorboard"):
    require(_module, extra="train")

from .callbacks import NonFiniteLoss, Stopped  # noqa: E402
from .errors import DataError, OptionError, OutputError, UserError  # noqa: E402
from .export import load_model  # noqa: E402
from .fit import Result, train  # noqa: E402
from .recipe import Recipe  # noqa: E402

__all__ = [
    "DataError",
    "NonFiniteLoss",
    "OptionError",
    "OutputError",
    "Recipe",
    "Result",
    "Stopped",
    "UserError",
    "load_model",
    "train",
]
