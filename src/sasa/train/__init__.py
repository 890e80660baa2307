"""Training on images with Lightning. Needs the extra ``train``."""

from .._extras import require

for _module in ("lightning", "torchmetrics", "torchvision", "timm", "safetensors", "rich"):
    require(_module, extra="train")

from .errors import DataError, OptionError, OutputError, UserError  # noqa: E402
from .export import load_model  # noqa: E402
from .fit import Result, train  # noqa: E402

__all__ = ["DataError", "OptionError", "OutputError", "Result", "UserError", "load_model", "train"]
