"""The implementations of the operator and the choice between them.

Each takes the same arguments and computes the same equation. A kernel is added by appending an
:class:`Implementation` to :data:`IMPLEMENTATIONS`; no caller changes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from . import cpu, reference, triton


class Implementation(NamedTuple):
    """One way to compute local attention.

    Attributes:
        name: what users pass as ``implementation=``.
        summary: what it is and what it supports, for ``sasa info``.
        forward: as :func:`sasa.ops.reference.forward`.
        backward: as :func:`sasa.ops.reference.backward`.
        unsupported: given query and value, why they can't be computed this way; None when they can.
    """

    name: str
    summary: str
    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]]
    unsupported: Callable[[Tensor, Tensor], str | None]


def _supports_everything(query: Tensor, value: Tensor) -> str | None:
    return None


# Fastest first: None takes the first that supports the call.
IMPLEMENTATIONS: list[Implementation] = [
    Implementation(
        "cpu",
        "compiled kernels; CPU tensors, float16 to float64, any window",
        cpu.forward,
        cpu.backward,
        cpu.unsupported,
    ),
    Implementation(
        "triton",
        "GPU kernels; CUDA, ROCm and XPU tensors, float16 to float32, heads of up to 128 channels, any window",
        triton.forward,
        triton.backward,
        triton.unsupported,
    ),
    Implementation(
        "reference",
        "plain PyTorch; any device, float16 to float64, any window",
        reference.forward,
        reference.backward,
        _supports_everything,
    ),
]


def names() -> list[str]:
    """Names of the implementations, fastest first."""
    return [implementation.name for implementation in IMPLEMENTATIONS]


def choose(name: str | None, query: Tensor, value: Tensor | None = None) -> Implementation:
    """The implementation called ``name``, or the fastest that supports the call when ``name`` is None.

    Args:
        name: of an implementation, or None.
        query: (B, N, D, H, W).
        value: (B, N, Dv, H, W); as wide as the query where not given.

    Raises:
        ValueError: no implementation has that name, or it doesn't support the call. There is no silent substitute.
    """
    reasons = []
    for implementation in IMPLEMENTATIONS:
        if name is not None and name != implementation.name:
            continue
        if name is None and query.device.type == "cpu" and implementation.name == "triton":
            continue  # its interpreter is for tests: only when asked for
        reason = implementation.unsupported(query, query if value is None else value)
        if reason is None:
            return implementation
        reasons.append(f"{implementation.name} does not support this call: {reason}")
    if not reasons:
        reasons.append(f"expected None or one of {', '.join(map(repr, names()))}, got {name!r}")
    raise ValueError(f"implementation: {'; '.join(reasons)}")
