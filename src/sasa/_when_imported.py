"""Calls that wait until another library's module is imported, where importing it here would take seconds."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Sequence
from types import ModuleType


def when_imported(name: str, call: Callable[[ModuleType], object]) -> None:
    """Call with the module of that name: now if it is imported, else when it is."""
    if name in sys.modules:
        call(sys.modules[name])
    else:
        sys.meta_path.insert(0, _WhenImported(name, call))


class _WhenImported(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Lets the module be found and loaded as ever, then calls, and steps aside."""

    _loader: importlib.abc.Loader

    def __init__(self, name: str, call: Callable[[ModuleType], object]) -> None:
        self._name, self._call = name, call

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """As the path finder does; for this module alone, with this loader."""
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
        """As the module's own loader does, and the call."""
        module.__loader__ = self._loader
        self._loader.exec_module(module)
        self._call(module)
