"""Pictures: what attention sees, and how training went. Needs the extra ``viz``."""

from .._extras import require

require("matplotlib", extra="viz")

from .attention_maps import attention_layers, layer_weights, plot_attention  # noqa: E402
from .curves import plot_curves  # noqa: E402

__all__ = ["attention_layers", "layer_weights", "plot_attention", "plot_curves"]
