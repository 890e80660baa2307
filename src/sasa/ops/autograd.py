"""How PyTorch differentiates the operators: one ``autograd.Function`` over a forward and a backward operator.

torch.func transforms the Function, but would lose derivatives defined only on an operator. Exported programs call an
operator directly, so each forward operator has the Function's derivatives too: see :func:`register`. The output is not
saved, so it may be changed in place. Derivatives of the backward are those of the equation, in plain ATen operations;
so is all of forward mode: see :func:`is_transformed_forward`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .._compat import OpOverload, below_autograd, is_recorded, transforms_active
from .derivatives import gradients, second_gradients
from .precision import without_autocast

TENSORS = 6  # that a forward operator takes before its options


class Registered(NamedTuple):
    """A registered operator and the function behind it.

    Attributes:
        operator: what compilers, tracers, modes and profilers see.
        function: what it calls in the end.
    """

    operator: OpOverload
    function: Callable[..., tuple[Tensor, ...]]

    def __call__(self, *arguments: Any) -> tuple[Tensor, ...]:
        """Call the function unless the call is observed: PyTorch's dispatcher takes longer than a small layer."""
        return self.operator(*arguments) if is_observed(arguments) else self.function(*arguments)


class Operator(NamedTuple):
    """A pair of operators and what they compute.

    Attributes:
        forward: of tensors and options, to the output and the log-sum-exp of the logits.
        backward: of the output's gradient, the tensors, the log-sum-exp and the options, to a gradient for each tensor,
            empty for missing ones.
        equation: of tensors and options, to the output, in plain ATen operations.
        fold: the vmap rule, of Function, number of samples, mapped dimensions, tensors and options; None to process the
            samples one by one.
    """

    forward: Callable[..., tuple[Tensor, ...]]
    backward: Callable[..., tuple[Tensor, ...]]
    equation: Callable[..., Tensor]
    fold: Callable[..., tuple[tuple[Tensor, ...], tuple[int, ...]]] | None


def apply(operator: Operator, options: tuple[Any, ...], *tensors: *tuple[Tensor, *tuple[Tensor | None, ...]]) -> Tensor:
    """The operator's output, differentiable in every mode and to any order."""
    # torch.compile traces no vmap rule of a Function.
    if is_transformed_forward() or (torch.compiler.is_compiling() and is_transformed()):
        with without_autocast(tensors[0]):
            return operator.equation(*tensors, *options)
    if torch.compiler.is_compiling():
        return operator.forward(*tensors, *options)[0]
    if is_transformed():
        return _Attention.apply(operator, options, *tensors)[0]
    if needs_gradient(*tensors):
        return apply_here(operator, *tensors, options=options)
    return operator.forward(*tensors, *options)[0]


def apply_here(operator: Operator, *tensors: Tensor | None, options: tuple[Any, ...] = ()) -> Tensor:
    """The operator's output, differentiable, when no transform is active and nothing is being compiled."""
    return _Untransformed.apply(operator, options, *tensors)


def register(forward: OpOverload, operator: Operator) -> None:
    """Give an operator derivatives for direct calls, by an exported program or as ``torch.ops.sasa``."""

    def differentiable(*arguments: Any) -> tuple[Tensor, ...]:
        tensors, options = arguments[:TENSORS], arguments[TENSORS:]
        transformed = is_transformed() or is_transformed_forward()
        if needs_gradient(*tensors) and not transformed:
            return _Attention.apply(operator, options, *tensors)
        with below_autograd():
            output, lse = forward(*arguments)
        if transformed:  # PyTorch applies no Function while a transform dispatches an operator
            with without_autocast(tensors[0]):
                output = operator.equation(*tensors, *options)
        return output, lse

    torch.library.impl(forward.name(), "Autograd", differentiable)


def needs_gradient(*tensors: Tensor | None) -> bool:
    """Whether a result computed from these may need a backward pass."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def is_transformed() -> bool:
    """Whether a transform of torch.func is active."""
    return transforms_active()


_PLAIN = frozenset({Tensor, torch.nn.Parameter, torch.Size, tuple, int, float, str, bool, type(None)})


def is_observed(arguments: tuple[Any, ...]) -> bool:
    """Whether an operator call is observed, so that more than its result matters: it is traced, profiled, transformed
    or counted by a mode, or its tensors are not plain tensors with storage.
    """
    return (
        torch.compiler.is_compiling()
        or is_transformed()
        or is_transformed_forward()
        or is_recorded(arguments[0])
        or not _PLAIN.issuperset(map(type, arguments))
        or arguments[0].is_meta
    )


def is_transformed_forward() -> bool:
    """Whether derivatives in forward mode are being taken, by torch.func or dual numbers.

    A forward-mode derivative costs as much as the equation it is computed along with, so a kernel would save nothing;
    and a Function's own ``jvp`` cannot be nested: PyTorch then silently loses the outer tangents.
    """
    return forward_ad._current_level >= 0


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(operator: Operator, options: tuple[Any, ...], *tensors: Tensor | None) -> tuple[Tensor, ...]:
        return operator.forward(*tensors, *options)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.operator, ctx.options, *tensors = inputs
        ctx.save_for_backward(*tensors, output[1])
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, *grad_outputs):
        grad = grad_outputs[0]
        *tensors, lse = ctx.saved_tensors
        if grad is None:
            return (None,) * (2 + len(tensors))
        if is_transformed_forward():
            with without_autocast(grad):
                return None, None, *gradients(ctx.operator.equation, ctx.options, grad, tensors)
        if not (torch.is_grad_enabled() or is_transformed()):
            grads = ctx.operator.backward(grad, *tensors, lse, *ctx.options)
        else:
            grads = _Backward.apply(ctx.operator, ctx.options, grad, *tensors, lse)
        return None, None, *(None if x is None else g for x, g in zip(tensors, grads, strict=True))

    @staticmethod
    def vmap(info, in_dims, *args):
        return _vmap(_Attention, info.batch_size, in_dims[2:], *args)


class _Untransformed(torch.autograd.Function):
    """The same without ``setup_context``, which only transforms need and which costs as much as a small layer."""

    @staticmethod
    def forward(ctx, operator: Operator, options: tuple[Any, ...], *tensors: Tensor | None) -> Tensor:
        ctx.operator, ctx.options = operator, options
        output, lse = operator.forward(*tensors, *options)
        ctx.save_for_backward(*tensors, lse)
        ctx.set_materialize_grads(False)
        return output

    backward = _Attention.backward


class _Backward(torch.autograd.Function):
    @staticmethod
    def forward(operator: Operator, options: tuple[Any, ...], grad: Tensor, *tensors: Tensor | None):
        return operator.backward(grad, *tensors, *options)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.operator, ctx.options, grad, *tensors, _ = inputs
        ctx.save_for_backward(grad, *tensors)

    @staticmethod
    def backward(ctx, *grad_grads):
        grad, *tensors = ctx.saved_tensors
        with without_autocast(grad):
            seconds = second_gradients(ctx.operator.equation, ctx.options, grad, tensors, grad_grads)
        return None, None, *seconds, None

    @staticmethod
    def vmap(info, in_dims, *args):
        return _vmap(_Backward, info.batch_size, in_dims[2:], *args)


def _vmap(function, samples, in_dims, operator, options, *tensors):
    """A Function of many samples: folded together, or one by one."""
    if operator.fold is not None:
        return operator.fold(function, samples, in_dims, operator, options, tensors)
    unbound = [
        [x] * samples if x is None or dim is None else x.unbind(dim) for x, dim in zip(tensors, in_dims, strict=True)
    ]
    results = [function.apply(operator, options, *one) for one in zip(*unbound, strict=True)]
    stacked = tuple(torch.stack(result) for result in zip(*results, strict=True))
    return stacked, (0,) * len(stacked)
