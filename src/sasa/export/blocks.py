"""Attention inside blocks, ``sasa::block_attention``, in ONNX.

``sasa.export`` and ``torch.onnx.export`` of a module trace the stem's equation. A program made by
``torch.export.export`` contains the operator, and can be exported to ONNX later.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from .lowering import HIDDEN, Value, constant, op

if TYPE_CHECKING:
    TTensor = Any  # its attributes depend on what it is bound to
else:
    from onnxscript.function_libs.torch_lib.tensor_typing import TTensor


def block_attention(
    input: TTensor,  # noqa: A002  (the operator's schema)
    form: TTensor,
    values: TTensor,
    sign: TTensor,
    block_size: int,
) -> tuple[TTensor, TTensor, TTensor]:
    """``sasa::block_attention``: the extreme of each block, mean and variance over all pixels.

    Shapes: B batch, R x S blocks, n pixels of a block, C channels of the image, N heads of D channels, O = N·D.
    """
    real = np.float64 if form.dtype == ir.DataType.DOUBLE else np.float32
    image = op.Cast(input, to=form.dtype)  # which may be in half precision
    heads, channels, places = form.shape[0], form.shape[2], block_size**2
    size, zero = constant([block_size]), constant(0, real)
    pixels = op.Shape(input, start=2)
    blocks = op.Div(op.Add(pixels, constant([block_size - 1])), size)
    rows, cols = op.Split(blocks, num_outputs=2, axis=0)
    pads = op.Concat(constant([0] * 6), op.Sub(op.Mul(blocks, size), pixels), axis=0)

    def in_blocks(image: Value, width: int) -> Value:
        """(B, width, H, W), padded with zeros, as (B, R, S, n, width)."""
        shape = op.Concat(constant([0, width]), rows, size, cols, size, axis=0)
        split = op.Transpose(op.Reshape(op.Pad(image, pads), shape), perm=[0, 2, 4, 3, 5, 1])
        return op.Reshape(split, constant([0, 0, 0, places, width]))

    x = in_blocks(image, channels)
    ones = op.Expand(constant(1, real), op.Concat(constant([1, 1]), pixels, axis=0))
    inside = in_blocks(ones, 1)  # (1, R, S, n, 1)
    seen = op.Greater(inside, zero)
    by_head = op.Unsqueeze(x, constant([3]))  # (B, R, S, 1, n, C)
    hidden = op.Where(op.Unsqueeze(seen, constant([3])), zero, constant(HIDDEN, real))
    logits = op.MatMul(op.MatMul(by_head, form), op.Transpose(by_head, perm=[0, 1, 2, 3, 5, 4]))
    weights = op.Softmax(op.Add(logits, op.Transpose(hidden, perm=[0, 1, 2, 3, 5, 4])), axis=-1)

    v = op.MatMul(op.Unsqueeze(x, constant([4])), op.Transpose(values, perm=[0, 2, 1]))  # (B, R, S, n, 1, O)
    v = op.Transpose(op.Reshape(v, constant([0, 0, 0, places, heads, -1])), perm=[0, 1, 2, 4, 3, 5])
    y = op.Transpose(op.MatMul(weights, v), perm=[0, 1, 2, 4, 3, 5])
    y = op.Reshape(y, constant([0, 0, 0, places, values.shape[1]]))  # (B, R, S, n, O)

    place = constant([3])
    low, high = constant(-np.inf, real), constant(np.inf, real)
    largest = op.ReduceMax(op.Where(seen, y, low), place, keepdims=0)
    smallest = op.ReduceMin(op.Where(seen, y, high), place, keepdims=0)
    first = op.Squeeze(op.Slice(y, constant([0]), constant([1]), place), place)
    extreme = op.Where(op.Greater(sign, zero), largest, op.Where(op.Less(sign, zero), smallest, first))

    count = op.Cast(op.Mul(op.Shape(input, start=0, end=1), op.ReduceProd(pixels)), to=form.dtype)
    everywhere = constant([0, 1, 2, 3])
    mean = op.Div(op.ReduceSum(op.Mul(y, inside), everywhere, keepdims=0), count)
    deviation = op.Mul(op.Sub(y, mean), inside)
    variance = op.Div(op.ReduceSum(op.Mul(deviation, deviation), everywhere, keepdims=0), count)
    return op.Cast(op.Transpose(extreme, perm=[0, 3, 1, 2]), to=input.dtype), mean, variance
