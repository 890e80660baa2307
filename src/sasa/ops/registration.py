"""The one registered operator, ``torch.ops.sasa.local_attention``, and its backward.

Schema, shapes for tracing (fake and meta tensors), autograd and vmap are stated here once, FLOPs in ``flops.py``, and
hold for every implementation. ``local_attention.py`` is what users call.

The operator also returns the log-sum-exp of the logits, from which the backward recomputes the weights. That second
output carries no gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import reference
from .implementations import choose
from .memory_format import empty, in_format_of
from .window import Window, window

_TENSORS = "Tensor query, Tensor key, Tensor value, Tensor? row_embedding, Tensor? col_embedding"
_OPTIONS = "int[2] kernel_size, int[2] stride, int[2] dilation, str border, float scale, str? implementation"
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)

torch.library.define("sasa::local_attention", f"({_TENSORS}, {_OPTIONS}) -> (Tensor output, Tensor lse)", tags=_TAGS)
torch.library.define(
    "sasa::local_attention_backward",
    f"(Tensor grad_output, {_TENSORS}, Tensor output, Tensor lse, {_OPTIONS})"
    " -> (Tensor query, Tensor key, Tensor value, Tensor row_embedding, Tensor col_embedding)",
    tags=_TAGS,
)


def _window(query: Tensor, kernel_size: list[int], stride: list[int], dilation: list[int], border: str) -> Window:
    def pair(x: list[int]) -> tuple[int, int]:
        return x[0], x[-1]

    return window(query.shape[3], query.shape[4], pair(kernel_size), pair(stride), pair(dilation), border)


@torch.library.impl("sasa::local_attention", "default")
def _forward(query, key, value, row, col, kernel_size, stride, dilation, border, scale, implementation):
    geometry = _window(query, kernel_size, stride, dilation, border)
    run = choose(implementation, query, value).forward
    with reference.without_autocast(query):
        output, lse = run(query, key, value, row, col, geometry, border, scale)
    return in_format_of(query, output), lse


@torch.library.impl("sasa::local_attention_backward", "default")
def _backward(
    grad_output, query, key, value, row, col, output, lse, kernel_size, stride, dilation, border, scale, implementation
):
    geometry = _window(query, kernel_size, stride, dilation, border)
    run = choose(implementation, query, value).backward
    with reference.without_autocast(query):
        grads = run(grad_output, query, key, value, row, col, output, lse, geometry, border, scale)
    dense = [in_format_of(x, grad) for x, grad in zip((query, key, value), grads[:3], strict=True)]
    # An operator can't return None: a missing embedding's gradient is an empty tensor.
    return (*dense, *(query.new_empty(0) if grad is None else grad for grad in grads[3:]))


@torch.library.register_fake("sasa::local_attention")
def _forward_shapes(query, key, value, row, col, kernel_size, stride, dilation, border, scale, implementation):
    geometry = _window(query, kernel_size, stride, dilation, border)
    height, width = geometry.rows.outputs, geometry.cols.outputs
    lse_dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    return (
        empty(query, value.shape[2], height, width),
        query.new_empty((*query.shape[:2], height, width), dtype=lse_dtype),
    )


@torch.library.register_fake("sasa::local_attention_backward")
def _backward_shapes(grad_output, query, key, value, row, col, output, lse, *options):
    dense = [empty(x, *x.shape[2:]) for x in (query, key, value)]
    embeddings = [query.new_empty(0 if x is None else x.shape) for x in (row, col)]
    return (*dense, *embeddings)


def _setup_context(ctx, inputs, output):
    *tensors, ctx.kernel_size, ctx.stride, ctx.dilation, ctx.border, ctx.scale, ctx.implementation = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _gradients(ctx, grad_output, grad_lse):
    if grad_output is None:
        return (None,) * 11
    *tensors, output, lse = ctx.saved_tensors
    options = ctx.kernel_size, ctx.stride, ctx.dilation, ctx.border, ctx.scale, ctx.implementation
    *grads, grad_row, grad_col = torch.ops.sasa.local_attention_backward(grad_output, *tensors, output, lse, *options)
    return (
        *grads,
        None if tensors[3] is None else grad_row,
        None if tensors[4] is None else grad_col,
        *(None,) * 6,
    )


torch.library.register_autograd("sasa::local_attention", _gradients, setup_context=_setup_context)


def _setup_second(ctx, inputs, output):
    grad_output, query, key, value, row, col, _, _, *options = inputs
    ctx.kernel_size, ctx.stride, ctx.dilation, ctx.border, ctx.scale, _ = options
    ctx.save_for_backward(grad_output, query, key, value, row, col)


def _second_gradients(ctx, *grad_grads):
    def attention(query, key, value, row, col):
        geometry = _window(query, ctx.kernel_size, ctx.stride, ctx.dilation, ctx.border)
        return reference.attention(query, key, value, row, col, geometry, ctx.border, ctx.scale)

    return *reference.second_derivatives(ctx.saved_tensors, grad_grads, attention), *(None,) * 8


torch.library.register_autograd("sasa::local_attention_backward", _second_gradients, setup_context=_setup_second)


def _vmap(info, in_dims, query, key, value, row, col, *options):
    """Vmap adds the mapped dimension to the heads, which are independent of each other."""

    def fold(x: Tensor | None, dim: int | None, heads_at: int) -> Tensor | None:
        if x is None:
            return None
        x = x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)
        return x.movedim(0, heads_at).flatten(heads_at, heads_at + 1)

    dense = [fold(x, dim, 1) for x, dim in zip((query, key, value), in_dims[:3], strict=True)]
    embeddings = [fold(x, dim, 0) for x, dim in zip((row, col), in_dims[3:5], strict=True)]
    output, lse = torch.ops.sasa.local_attention(*dense, *embeddings, *options)
    heads = output.shape[1] // info.batch_size
    return (output.unflatten(1, (info.batch_size, heads)), lse.unflatten(1, (info.batch_size, heads))), (1, 1)


torch.library.register_vmap("sasa::local_attention", _vmap)
