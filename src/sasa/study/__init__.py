"""Studies: grids of short training runs, and their combined results. Needs the extra ``study``."""

from .gather import gather
from .plan import StudyError
from .run import TrainingsFailed, study

__all__ = ["StudyError", "TrainingsFailed", "gather", "study"]
