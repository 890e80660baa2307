"""PyTorch's derivatives of a function with optional tensors: used to differentiate the equation itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Tensors = Sequence[Tensor | None]


def gradients(
    function: Callable[..., Tensor], options: tuple[Any, ...], grad: Tensor, tensors: Tensors
) -> tuple[Tensor | None, ...]:
    """Gradients of ``function(*tensors, *options)`` w.r.t. its tensors, again differentiable; None for missing ones."""

    def of_present(*present: Tensor) -> Tensor:
        return function(*_like(tensors, present), *options)

    pull = torch.func.vjp(of_present, *_present(tensors))[1]
    return _like(tensors, pull(grad))


def second_gradients(
    function: Callable[..., Tensor], options: tuple[Any, ...], grad: Tensor, tensors: Tensors, grad_grads: Tensors
) -> tuple[Tensor | None, ...]:
    """Gradients of :func:`gradients` w.r.t. ``grad`` and the tensors.

    Args:
        function: of tensors and options.
        options: its further arguments.
        grad: gradient of its result.
        tensors: its tensors, None for missing ones.
        grad_grads: gradients of the results of :func:`gradients`; those of missing tensors are ignored.
    """

    def of_present(grad: Tensor, *present: Tensor) -> tuple[Tensor, ...]:
        return _present(gradients(function, options, grad, _like(tensors, present)))

    pull = torch.func.vjp(of_present, grad, *_present(tensors))[1]
    given = tuple(g for g, x in zip(grad_grads, tensors, strict=True) if x is not None)
    first, *rest = pull(given)
    return first, *_like(tensors, rest)


def _present(tensors: Tensors) -> tuple[Tensor, ...]:
    return tuple(x for x in tensors if x is not None)


def _like(tensors: Tensors, present: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    """``present`` put back at the positions of the tensors that are not None."""
    rest = iter(present)
    return tuple(None if x is None else next(rest) for x in tensors)
