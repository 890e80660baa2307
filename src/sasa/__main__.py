"""``python -m sasa``, the same as the command ``sasa``."""

import sys

from .cli import main

sys.exit(main())
