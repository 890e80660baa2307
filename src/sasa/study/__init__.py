"""Studies: grids of short trainings, run with Optuna and gathered. Needs the extra ``study``."""

from .._extras import require

require("lightning", extra="train")
for _module in ("optuna", "matplotlib"):
    require(_module, extra="study")

from .gather import gather  # noqa: E402
from .plan import StudyError  # noqa: E402
from .run import TrainingsFailed, study  # noqa: E402

__all__ = ["StudyError", "TrainingsFailed", "gather", "study"]
