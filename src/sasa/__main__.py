"""``python -m sasa``, the same as the command ``sasa``."""

import sys

from sasa_command import main

sys.exit(main())
