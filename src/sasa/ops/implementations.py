"""The implementations of the operator and the choice between them.

Each takes the same arguments and computes the same equation. A kernel is added by appending an
:class:`Implementation` to :data:`IMPLEMENTATIONS`; no caller changes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from . import cpu, reference


class Implementation(NamedTuple):
    """One way to compute local attention.

    Attributes:
        name: what users pass as ``implementation=``.
        summary: what it is and what it supports, for ``sasa info``.
        forward: as :func:`sasa.ops.reference.forward`.
        backward: as :func:`sasa.ops.reference.backward`.
        unsupported: given the query, why it can't be computed this way; None when it can.
    """

    name: str
    summary: str
    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]]
    unsupported: Callable[[Tensor], str | None]


def _supports_everything(query: Tensor) -> str | None:
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


def choose(name: str | None, query: Tensor) -> Implementation:
    """The implementation called ``name``, or the fastest that supports the call when ``name`` is None.

    Raises:
        ValueError: no implementation has that name, or it doesn't support the call. There is no silent substitute.
    """
    reasons = []
    for implementation in IMPLEMENTATIONS:
        if name is not None and name != implementation.name:
            continue
        reason = implementation.unsupported(query)
        if reason is None:
            return implementation
        reasons.append(f"{implementation.name} does not support this call: {reason}")
    if not reasons:
        reasons.append(f"expected None or one of {', '.join(map(repr, names()))}, got {name!r}")
    raise ValueError(f"implementation: {'; '.join(reasons)}")
