"""Optional dependencies: imported when first used, and named with their extra when missing."""

from __future__ import annotations

import importlib
from types import ModuleType


def require(module: str, extra: str) -> ModuleType:
    """Import ``module``, which the optional dependencies ``extra`` bring.

    Raises:
        ImportError: it isn't installed; the message has the command that installs it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module.partition(".")[0]:
            raise
        raise ImportError(
            f"this needs {error.name}, which is not installed: pip install 'sasa-torch[{extra}]'", name=error.name
        ) from error
