"""FLOPs of the operator, for :mod:`torch.utils.flop_counter`. A multiply-add is 2 FLOPs; the softmax is not counted."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import math
import sys
from collections.abc import Sequence
from types import ModuleType

import torch

_COUNTER = "torch.utils.flop_counter"


def forward_flops(query, key, value, row, col, kernel_size, *args, out_shape, **kwargs) -> int:
    """FLOPs of the forward: 2·D a query, head and tap for q·k, as many for q·(row + col), 2·Dv for the weighted sum.

    So 6·k²·D a query and head for the layer of the paper, and 4·k²·D without embeddings.
    """
    batch, heads, width = query[:3]
    _, _, value_width, *outputs = out_shape[0]
    terms = 1 + (row is not None or col is not None)
    return 2 * batch * heads * math.prod(outputs) * math.prod(kernel_size) * (terms * width + value_width)


def backward_flops(grad_output, query, key, value, row, col, output, lse, kernel_size, *args, **kwargs) -> int:
    """FLOPs of the backward: twice the forward's, for two gradients of each product, plus the logits once more."""
    batch, heads, width = query[:3]
    terms = 1 + (row is not None or col is not None)
    taps = batch * heads * math.prod(grad_output[3:]) * math.prod(kernel_size)
    return 2 * taps * (3 * terms * width + 2 * value[2])


def projected_forward_flops(x, weight, bias, row, col, num_heads, kernel_size, *args, out_shape, **kwargs) -> int:
    """FLOPs of the layer's forward: three projections, then as :func:`forward_flops`; pooled or not."""
    batch, inputs, height, width = x
    heads = batch, num_heads, weight[0] // 3 // num_heads
    outputs = (*heads, *out_shape[1][2:])  # of the log-sum-exp, which is not pooled
    attention = forward_flops(heads, None, heads, row, col, kernel_size, out_shape=(outputs,))
    return 2 * batch * height * width * inputs * weight[0] + attention


def projected_backward_flops(
    grad_output, x, weight, bias, row, col, lse, num_heads, kernel_size, *args, **kwargs
) -> int:
    """FLOPs of the layer's backward: the projections once more and their two gradients, then the attention's."""
    batch, inputs, height, width = x
    heads = batch, num_heads, weight[0] // 3 // num_heads
    gradient = (*heads, *lse[2:])
    attention = backward_flops(gradient, heads, None, heads, row, col, None, None, kernel_size)
    return 3 * 2 * batch * height * width * inputs * weight[0] + attention


def register() -> None:
    """Give the formulas to the counter: now if it is imported, else when it is.

    Importing it here would import Triton with it, which takes five times as long as all of sasa.
    """
    if _COUNTER in sys.modules:
        _register_with(sys.modules[_COUNTER])
    else:
        sys.meta_path.insert(0, _WhenImported())


def _register_with(counter: ModuleType) -> None:
    counter.register_flop_formula(torch.ops.sasa.local_attention)(forward_flops)
    counter.register_flop_formula(torch.ops.sasa.local_attention_backward)(backward_flops)
    counter.register_flop_formula(torch.ops.sasa.projected_attention)(projected_forward_flops)
    counter.register_flop_formula(torch.ops.sasa.projected_attention_backward)(projected_backward_flops)


class _WhenImported(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Lets the counter be found and loaded as ever, then registers, and steps aside."""

    _loader: importlib.abc.Loader

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != _COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            self._loader = spec.loader
            spec.loader = self
        return spec

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self._loader
        self._loader.exec_module(module)
        _register_with(module)
