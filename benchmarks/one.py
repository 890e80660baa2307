"""One measurement in this process, as JSON: ``python -m benchmarks.one PART CASE PEER``."""

from __future__ import annotations

import json
import sys

from . import attention, calls, kept, layer, networks, scaling, stages

PARTS = {
    "attention": attention,
    "layer": layer,
    "kept": kept,
    "stages": stages,
    "scaling": scaling,
    "networks": networks,
    "calls": calls,
}


def main() -> None:
    """Measure and print."""
    part, case, peer = sys.argv[1:]
    print(json.dumps(PARTS[part].measured(case, peer)))


if __name__ == "__main__":
    main()
