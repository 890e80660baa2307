"""Figures of what attention sees and of how training went. Needs the extra ``viz``."""

from .._extras import require

require("matplotlib", extra="viz")

from .attention_maps import plot_attention  # noqa: E402
from .curves import plot_curves  # noqa: E402
from .figures import plot_distances, plot_embeddings, plot_position, plot_receptive_field, receptive_field  # noqa: E402
from .looking import Seen, attention_layers, layer_weights, look  # noqa: E402
from .module import plot_module  # noqa: E402
from .page import Explorer, explorer  # noqa: E402
from .rollout import roll_out  # noqa: E402

__all__ = [
    "Explorer",
    "Seen",
    "attention_layers",
    "explorer",
    "layer_weights",
    "look",
    "plot_attention",
    "plot_curves",
    "plot_distances",
    "plot_embeddings",
    "plot_module",
    "plot_position",
    "plot_receptive_field",
    "receptive_field",
    "roll_out",
]
