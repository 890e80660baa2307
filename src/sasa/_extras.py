"""Optional dependencies: imported when first used, and named with their extra when missing."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterable
from types import ModuleType

_MISSING = "this needs {}, which is not installed: pip install 'sasa-torch[{}]'"


def require(module: str, extra: str) -> ModuleType:
    """Import ``module``, provided by the optional dependencies ``extra``.

    Raises:
        ImportError: it isn't installed; the message has the command that installs it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module.partition(".")[0]:
            raise
        raise ImportError(_MISSING.format(error.name, extra), name=error.name) from error


def check_installed(modules: Iterable[str], extra: str) -> None:
    """Check for ``modules``, provided by the optional dependencies ``extra``, without importing them.

    Raises:
        ImportError: one isn't installed; the message has the command that installs it.
    """
    for module in modules:
        try:
            found = module in sys.modules or importlib.util.find_spec(module) is not None
        except ModuleNotFoundError:
            found = False
        if not found:
            raise ImportError(_MISSING.format(module, extra), name=module)
