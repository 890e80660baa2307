"""Calls deferred until another library's module is imported, when importing it here would take seconds."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Sequence
from types import ModuleType


def when_imported(name: str, call: Callable[[ModuleType], object]) -> None:
    """Call with the module of that name: now if it is already imported, else when it is."""
    if name in sys.modules:
        call(sys.modules[name])
    else:
        sys.meta_path.insert(0, _WhenImported(name, call))


class _WhenImported(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Lets the module be found and loaded as usual, makes the call, and removes itself."""

    _loader: importlib.abc.Loader

    def __init__(self, name: str, call: Callable[[ModuleType], object]) -> None:
        self._name, self._call = name, call

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """As the path finder does, but only for this module, with this loader."""
        if fullname != self._name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            self._loader = spec.loader
            spec.loader = self
        return spec

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        """As the module's own loader does."""
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """As the module's own loader does, followed by the call."""
        module.__loader__ = self._loader
        self._loader.exec_module(module)
        self._call(module)
