"""Convolutions that a network also references outside its module tree, where a conversion can't reach them."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from .replace import is_spatial

_DEPTH = 4  # of nested containers


def not_reached(modules: Mapping[str, nn.Module], replaced: Mapping[int, str]) -> list[str]:
    """One sentence for each attribute holding a convolution that a conversion won't replace.

    Args:
        modules: of the network, by name.
        replaced: names of the modules that will be replaced, by ``id``.
    """
    registered = {id(module) for module in modules.values()}
    found = []
    for name, module in modules.items():
        for attribute, value in vars(module).items():
            if attribute in ("_modules", "_parameters", "_buffers") or attribute.endswith("_hooks"):
                continue
            for path, held in _modules_in(value, ".".join(filter(None, (name, attribute))), _DEPTH):
                if id(held) in replaced:
                    found.append(f"{path} keeps the convolution {replaced[id(held)]}, outside the module tree")
                elif id(held) not in registered:
                    found += [
                        f"{path} holds {' '.join(filter(None, (type(m).__name__, inner)))}, outside the module tree"
                        for inner, m in held.named_modules()
                        if is_spatial(m)
                    ]
    return found


def _modules_in(value: Any, path: str, depth: int) -> Iterator[tuple[str, nn.Module]]:
    """Modules in a value, including those in containers and bound methods, each with the path to it."""
    if isinstance(value, nn.Module):
        yield path, value
    elif depth == 0:
        return
    elif isinstance(value, (list, tuple, set, frozenset)):
        for i, item in enumerate(value):
            yield from _modules_in(item, f"{path}[{i}]", depth - 1)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _modules_in(item, f"{path}[{key!r}]", depth - 1)
    elif isinstance(value, functools.partial):
        for part in (value.func, value.args, value.keywords):
            yield from _modules_in(part, path, depth - 1)
    elif isinstance(owner := getattr(value, "__self__", None), nn.Module):
        yield path, owner
