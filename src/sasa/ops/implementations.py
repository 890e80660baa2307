"""The implementations of the operators and the choice between them.

Each takes the same arguments and computes the same equation. A kernel is added by appending an
:class:`Implementation` to :data:`IMPLEMENTATIONS`; it declares what it supports, so callers need not change.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from . import cpu, cpu_call, cpu_projected, eager, triton
from .projected import LayerGradients
from .triton import projections as triton_projections

Forward = Callable[..., tuple[Tensor, Tensor]]
Backward = Callable[..., tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]]


class Projected(NamedTuple):
    """Projection and attention in one step: queries, keys and values need not be stored in memory.

    Attributes:
        supports: given a layer's input, weight and number of heads, whether it computes them.
        preferred: given the same, whether projecting again in the backward is faster
            than keeping queries, keys and values.
        prepare: the part of forward that is computed only once for inputs of one layout: see
            :func:`sasa.ops.cpu_projected.prepare`.
        forward: of input, weight, bias, row, col, table, number of heads, window, scale and pool: the output
            (B, N·D, H', W') and the log-sum-exp (B, N, h, w).
        backward: of the output's gradient, input, weight, bias, row, col, table, log-sum-exp, number of heads, window,
            scale and pool: gradients of input, weight, bias, row, col and table.
    """

    supports: Callable[[Tensor, Tensor | None, int], bool]
    preferred: Callable[[Tensor, Tensor, int], bool]
    prepare: Callable[..., Forward]
    forward: Forward
    backward: Callable[..., LayerGradients]


class Implementation(NamedTuple):
    """One way to compute local attention.

    Attributes:
        name: what users pass as ``implementation=``.
        summary: what it is and what it supports, for ``sasa info``.
        forward: as :func:`sasa.ops.eager.forward`; None for the equation itself, which needs no operator: PyTorch
            differentiates and traces it.
        backward: as :func:`sasa.ops.eager.backward`; likewise.
        unsupported: given a tensor of images (..., H, W) and the channels of the widest head, of queries or values, why
            they can't be computed this way; None if they can.
        automatic: given such a tensor, whether it may be chosen when none is requested by name.
        projected: its support for a layer's projections; None if it has none.
    """

    name: str
    summary: str
    forward: Forward | None
    backward: Backward | None
    unsupported: Callable[[Tensor, int], str | None]
    automatic: Callable[[Tensor], bool]
    projected: Projected | None = None


def _always(images: Tensor) -> bool:
    return True


def _supports_everything(images: Tensor, widest: int) -> str | None:
    return None


# Fastest first: None takes the first that supports the call.
IMPLEMENTATIONS: tuple[Implementation, ...] = (
    Implementation(
        "cpu",
        "compiled kernels; CPU tensors, float16 to float64, any window",
        cpu.forward,
        cpu.backward,
        cpu.unsupported,
        _always,
        Projected(
            cpu_projected.can_project,
            cpu_projected.prefers_projected,
            cpu_projected.prepare,
            cpu_projected.forward,
            cpu_projected.backward,
        ),
    ),
    Implementation(
        "triton",
        "GPU kernels; CUDA, ROCm and XPU tensors, float16 to float32, heads of up to 128 channels, any window",
        triton.forward,
        triton.backward,
        triton.unsupported,
        triton.automatic,
        Projected(
            triton_projections.supports,
            triton_projections.preferred,
            triton_projections.prepare,
            triton_projections.forward,
            triton_projections.backward,
        ),
    ),
    Implementation(
        "eager",
        "plain PyTorch in chunks; any device, float16 to float64, any window",
        eager.forward,
        eager.backward,
        _supports_everything,
        _always,
    ),
    Implementation(
        "reference",
        "the equation in plain PyTorch operations, differentiated by PyTorch, exported without sasa's operators; slow",
        None,
        None,
        _supports_everything,
        _always,
    ),
)
_BY_NAME = {implementation.name: implementation for implementation in IMPLEMENTATIONS}


def machine() -> tuple[int, ...]:
    """What implementations depend on besides their arguments."""
    return cpu_call.machine()


def names() -> list[str]:
    """Names of the implementations, fastest first."""
    return list(_BY_NAME)


def is_the_equation(name: str | None) -> bool:
    """Whether ``name`` means the equation itself, which is called without an operator."""
    return name is not None and _BY_NAME[name].forward is None


def choose(name: str | None, images: Tensor, widest: int = 1) -> Implementation:
    """The implementation called ``name``, or the fastest that supports the call when ``name`` is None.

    Args:
        name: of an implementation, or None.
        images: (..., H, W), with the dtype and device of the call.
        widest: channels of the widest head, of queries or values.

    Raises:
        ValueError: no implementation has that name, or it doesn't support the call. It is never replaced by another.
    """
    if name is not None:
        if name not in _BY_NAME:
            raise ValueError(f"implementation: expected None or one of {', '.join(map(repr, names()))}, got {name!r}")
        reason = _BY_NAME[name].unsupported(images, widest)
        if reason is not None:
            raise ValueError(f"implementation: {name} does not support this call: {reason}")
        return _BY_NAME[name]
    for implementation in IMPLEMENTATIONS:
        if implementation.unsupported(images, widest) is None and implementation.automatic(images):
            return implementation
    raise ValueError("implementation: none supports this call")  # cannot happen: eager supports every call
