"""The layer as one registered operator: projections and local attention, keeping only the input for the backward.

    q, k, v = W x + b per pixel,        y = local attention of q, k, v

Queries, keys and values are three times the output. Where they must not be kept for a backward they need not all exist
at once: the CPU kernels project them tile by tile, any other implementation a few images at a time. The backward
projects them again. Numbers are those of the projection and :func:`sasa.local_attention`, one after the other.

The output may be pooled: each number then is the mean of ``pool`` by ``pool`` of them, at the lower and right border of
those there are. The CPU kernels add the weights of such queries before they meet the values: the output at full size
never exists.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from . import checks, cpu, flops, memory_format, reference
from .implementations import choose
from .window import Window, window

_TENSORS = "Tensor input, Tensor weight, Tensor? bias, Tensor? row_embedding, Tensor? col_embedding"
_OPTIONS = (
    "int num_heads, int[2] kernel_size, int[2] stride, int[2] dilation, str border, float scale, str? implementation, "
    "int pool=1"
)
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)

torch.library.define(
    "sasa::projected_attention", f"({_TENSORS}, {_OPTIONS}) -> (Tensor output, Tensor lse)", tags=_TAGS
)
torch.library.define(
    "sasa::projected_attention_backward",
    f"(Tensor grad_output, {_TENSORS}, Tensor lse, {_OPTIONS})"
    " -> (Tensor input, Tensor weight, Tensor bias, Tensor row_embedding, Tensor col_embedding)",
    tags=_TAGS,
)

# Bytes of queries, keys and values that exist at once where they are projected a few images at a time: large enough for
# all cores, small enough that the memory is used again from one part to the next.
PART_BYTES = 2**26


def projected_attention(
    input: Tensor,  # noqa: A002  (as torch.nn.functional.linear calls it)
    weight: Tensor,
    bias: Tensor | None,
    row_embedding: Tensor | None,
    col_embedding: Tensor | None,
    num_heads: int,
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    dilation: tuple[int, int],
    border: str,
    scale: float,
    implementation: str | None,
    pool: int = 1,
) -> Tensor:
    """Local attention of the projections of ``input``: (B, C, H, W) to (B, N·D, H', W'), the size over ``pool``.

    Args:
        input: (B, C, H, W).
        weight: (3·N·D, C): rows of queries, of keys, of values.
        bias: (3·N·D) or None.
        row_embedding: (N, D, kh) or None; this and the rest as in :func:`sasa.local_attention`.
        col_embedding: (N, D, kw) or None.
        num_heads: N.
        kernel_size: (kh, kw).
        stride: (height, width).
        dilation: (height, width).
        border: ``"zero"``, ``"mask"`` or ``"valid"``.
        scale: factor on the logits.
        implementation: a name or None.
        pool: size and stride of the average pooling of the output, ``nn.AvgPool2d(pool, ceil_mode=True)``; 1 for none.
    """
    checks.positive("pool", pool)
    output, _ = torch.ops.sasa.projected_attention(
        input, weight, bias, row_embedding, col_embedding, num_heads, kernel_size, stride, dilation, border, scale,
        implementation, pool,
    )  # fmt: skip
    return output


def _window(x: Tensor, kernel_size: list[int], stride: list[int], dilation: list[int], border: str) -> Window:
    sizes = [(pair[0], pair[-1]) for pair in (kernel_size, stride, dilation)]
    return window(x.shape[2], x.shape[3], sizes[0], sizes[1], sizes[2], border)


def _parts(x: Tensor, weight: Tensor) -> Iterator[slice]:
    """Slices of the batch, equally large, whose queries, keys and values take up to PART_BYTES each."""
    image = weight.shape[0] * x.shape[2] * x.shape[3] * x.element_size()
    parts = min(-(-x.shape[0] * image // PART_BYTES), x.shape[0])
    bounds = [x.shape[0] * part // max(1, parts) for part in range(parts + 1)]
    yield from map(slice, bounds[:-1], bounds[1:])


def like_query(x: Tensor, weight: Tensor, num_heads: int) -> Tensor:
    """The input as a tensor of the queries' shape, for what asks for no more."""
    return x[:, None, :1].expand(-1, num_heads, weight.shape[0] // 3 // num_heads, -1, -1)


def _pixels(x: Tensor) -> Tensor:
    """(B, C, H, W) as a matrix with a row for each pixel; a view for channels_last."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def _heads(pixels: Tensor, shape: torch.Size, num_heads: int) -> tuple[Tensor, ...]:
    """Rows of a pixel's queries, keys and values each as (B, N, D, H, W): views. ``shape`` is that of the input."""
    images = pixels.view(shape[0], shape[2], shape[3], 3 * num_heads, -1).permute(0, 3, 4, 1, 2)
    return images.chunk(3, dim=1)


def _project(x: Tensor, weight: Tensor, bias: Tensor | None, num_heads: int) -> tuple[Tensor, ...]:
    return _heads(F.linear(_pixels(x), weight, bias), x.shape, num_heads)


@torch.library.impl("sasa::projected_attention", "default")
def _forward(
    x, weight, bias, row, col, num_heads, kernel_size, stride, dilation, border, scale, implementation, pool=1
):
    geometry = _window(x, kernel_size, stride, dilation, border)
    chosen = choose(implementation, like_query(x, weight, num_heads))
    projection = cpu.Projection(x, weight, bias)
    if chosen.name == "cpu" and cpu.can_project(projection, num_heads):
        inside = pool if cpu.can_pool(geometry, pool) else 1
        output, lse = cpu.forward_projected(projection, num_heads, row, col, geometry, border, scale, inside)
        return _pool(output.flatten(1, 2), pool // inside), lse
    output, lse = _empty_results(x, weight, num_heads, geometry, pool)
    with reference.without_autocast(x):
        for part in _parts(x, weight):
            q, k, v = _project(x[part], weight, bias, num_heads)
            y, lse[part] = chosen.forward(q, k, v, row, col, geometry, border, scale)
            output[part] = _pool(y.flatten(1, 2), pool)
    return output, lse


def _pool(y: Tensor, pool: int) -> Tensor:
    return y if pool == 1 else F.avg_pool2d(y, pool, ceil_mode=True)


def _before_pool(grad: Tensor, geometry: Window, pool: int) -> Tensor:
    """Gradient of what was pooled."""
    if pool == 1:
        return grad
    pooled = grad.new_empty((*grad.shape[:2], geometry.rows.outputs, geometry.cols.outputs))
    if grad.is_contiguous(memory_format=torch.channels_last):
        pooled = pooled.to(memory_format=torch.channels_last)
    size = [pool, pool]
    return torch.ops.aten.avg_pool2d_backward(grad, pooled, size, size, [0, 0], True, True, None)


def _empty_results(x: Tensor, weight: Tensor, num_heads: int, geometry: Window, pool: int) -> tuple[Tensor, Tensor]:
    channels, size = weight.shape[0] // 3, (geometry.rows.outputs, geometry.cols.outputs)
    like = x[:, None].expand(-1, num_heads, -1, -1, -1)
    pooled = (-(-length // pool) for length in size)
    output = memory_format.empty(like, channels // num_heads, *pooled).flatten(1, 2)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return output, x.new_empty((x.shape[0], num_heads, *size), dtype=dtype)


@torch.library.impl("sasa::projected_attention_backward", "default")
def _backward(
    grad_output, x, weight, bias, row, col, lse,
    num_heads, kernel_size, stride, dilation, border, scale, implementation, pool=1,
):  # fmt: skip
    geometry = _window(x, kernel_size, stride, dilation, border)
    chosen = choose(implementation, like_query(x, weight, num_heads))
    fused = chosen.name == "cpu" and cpu.can_project(cpu.Projection(x, weight, bias), num_heads)
    sums = torch.float32 if weight.dtype in (torch.float16, torch.bfloat16) else weight.dtype
    grad_weight = weight.new_zeros(weight.shape, dtype=sums)
    grad_bias = weight.new_zeros(0 if bias is None else bias.shape, dtype=sums)
    grads_row = [] if row is None else [row.new_zeros(row.shape, dtype=sums)]
    grads_col = [] if col is None else [col.new_zeros(col.shape, dtype=sums)]
    grad_input = cpu.in_huge_pages(torch.empty_like(x))
    inside = pool if fused and cpu.can_pool(geometry, pool) else 1
    g = _before_pool(grad_output, geometry, pool // inside).unflatten(1, (num_heads, -1))
    memory = x.new_empty(0)
    with reference.without_autocast(x):
        for part in _parts(x, weight):
            images = x[part]
            pixels = _pixels(images)
            if memory.shape != (pixels.shape[0], weight.shape[0]):
                memory = cpu.in_huge_pages(x.new_empty((pixels.shape[0], weight.shape[0])))
            dense = _heads(memory, images.shape, num_heads)
            options = row, col, lse[part], geometry, border, scale
            if fused:
                projection = cpu.Projection(images, weight, bias)
                embeddings = cpu.backward_projected(g[part], projection, dense, *options, inside)
            else:
                dense_inputs = _project(images, weight, bias, num_heads)
                *grads, grad_row, grad_col = chosen.backward(g[part], *dense_inputs, row, col, None, *options[2:])
                embeddings = grad_row, grad_col
                for to, grad in zip(dense, grads, strict=True):
                    to.copy_(grad)
            for total, grad in zip((grads_row, grads_col), embeddings, strict=True):
                if grad is not None:
                    total[0] += grad
            linear = memory, pixels, weight, grad_input[part], grad_weight, None if bias is None else grad_bias
            _linear_gradients(*linear, fused=fused)
    embeddings = [total[0].to(weight.dtype) if total else weight.new_empty(0) for total in (grads_row, grads_col)]
    return grad_input, grad_weight.to(weight.dtype), grad_bias.to(weight.dtype), *embeddings


def _linear_gradients(
    grad: Tensor,
    pixels: Tensor,
    weight: Tensor,
    grad_images: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor | None,
    fused: bool,
) -> None:
    """Gradients of the projections: writes that of the input, adds to those of the weight and bias."""
    images = grad_images.permute(0, 2, 3, 1)
    if images.is_contiguous():
        grad_pixels = images.view(-1, weight.shape[1])
        if fused and cpu.linear_gradients(grad, pixels, weight, grad_pixels, grad_weight, grad_bias):
            return
        torch.mm(grad, weight, out=grad_pixels)
    else:
        images.copy_((grad @ weight).view(images.shape))
    grad_weight += grad.mT @ pixels
    if grad_bias is not None:
        grad_bias += grad.sum(0)


@torch.library.register_fake("sasa::projected_attention")
def _forward_shapes(
    x, weight, bias, row, col, num_heads, kernel_size, stride, dilation, border, scale, implementation, pool=1
):
    return _empty_results(x, weight, num_heads, _window(x, kernel_size, stride, dilation, border), pool)


@torch.library.register_fake("sasa::projected_attention_backward")
def _backward_shapes(grad_output, x, weight, bias, row, col, lse, *options):
    others = [weight.new_empty(0 if t is None else t.shape) for t in (bias, row, col)]
    return torch.empty_like(x), torch.empty_like(weight), *others


def _setup_context(ctx, inputs, output):
    tensors, ctx.options = inputs[:5], inputs[5:]
    ctx.save_for_backward(*tensors, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _gradients(ctx, grad_output, grad_lse):
    if grad_output is None:
        return (None,) * 13
    *tensors, lse = ctx.saved_tensors
    grads = torch.ops.sasa.projected_attention_backward(grad_output, *tensors, lse, *ctx.options)
    return *(None if x is None else grad for x, grad in zip(tensors, grads, strict=True)), *(None,) * 8


torch.library.register_autograd("sasa::projected_attention", _gradients, setup_context=_setup_context)


def _setup_second(ctx, inputs, output):
    *tensors, _, ctx.num_heads, ctx.kernel_size, ctx.stride, ctx.dilation, ctx.border, ctx.scale, _, ctx.pool = inputs
    ctx.save_for_backward(*tensors)


def _second_gradients(ctx, *grad_grads):
    def layer(x, weight, bias, row, col):
        geometry = _window(x, ctx.kernel_size, ctx.stride, ctx.dilation, ctx.border)
        query, key, value = _project(x, weight, bias, ctx.num_heads)
        output = reference.attention(query, key, value, row, col, geometry, ctx.border, ctx.scale)
        return _pool(output.flatten(1, 2), ctx.pool)

    return *reference.second_derivatives(ctx.saved_tensors, grad_grads, layer), *(None,) * 9


torch.library.register_autograd("sasa::projected_attention_backward", _second_gradients, setup_context=_setup_second)


def _vmap(info, in_dims, x, *others):
    """Vmap over the input alone adds the mapped dimension to the batch; over parameters it goes one by one."""
    run = torch.ops.sasa.projected_attention
    if all(dim is None for dim in in_dims[1:5]):
        output, lse = run(x.movedim(in_dims[0], 0).flatten(0, 1), *others)
        return tuple(y.unflatten(0, (info.batch_size, -1)) for y in (output, lse)), (0, 0)
    tensors = [
        [t] * info.batch_size if dim is None else t.unbind(dim)
        for t, dim in zip((x, *others[:4]), in_dims[:5], strict=True)
    ]
    results = [run(*one, *others[4:]) for one in zip(*tensors, strict=True)]
    return tuple(torch.stack(ys) for ys in zip(*results, strict=True)), (0, 0)


torch.library.register_vmap("sasa::projected_attention", _vmap)


flops.register()  # of both operators
