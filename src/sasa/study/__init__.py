"""Studies: grids of short trainings, run and gathered. Needs the extra ``study``."""

from .gather import gather
from .plan import StudyError
from .run import TrainingsFailed, study

__all__ = ["StudyError", "TrainingsFailed", "gather", "study"]
