"""ONNX translations of the registered operators: what ``torch.onnx.export`` calls for each of them in a program."""

# ruff: noqa: UP045  (onnxscript reads annotations, and supports only Optional)
from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Optional

import numpy as np
import onnx_ir as ir
import torch
from onnxscript.function_libs.torch_lib.registration import torch_op

from .blocks import block_attention
from .lowering import Heads, Value, attention, constant, op

if TYPE_CHECKING:
    TTensor = Any  # its attributes depend on what it is bound to
else:
    from onnxscript.function_libs.torch_lib.tensor_typing import TTensor


def local_attention(
    query: TTensor,
    key: TTensor,
    value: TTensor,
    row: Optional[TTensor],
    col: Optional[TTensor],
    table: Optional[TTensor],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    border: str,
    scale: float,
    implementation: Optional[str] = None,
) -> tuple[TTensor, TTensor]:
    """``sasa::local_attention``."""
    count, width, value_width = query.shape[1], query.shape[2], value.shape[2]
    dtype = _sum_dtype(query.dtype)

    def pixels(x: TTensor, channels: int) -> Value:
        flat = op.Reshape(x, constant([0, 0, channels, -1]))
        return _cast(op.Transpose(flat, perm=[0, 1, 3, 2]), query.dtype, dtype)

    images = [pixels(query, width), pixels(key, width), pixels(value, value_width)]
    heads = _heads(images, (row, col, table), (count, width, value_width), query.dtype, scale)
    size, batch = op.Shape(query, start=3), op.Shape(query, start=0, end=1)
    y = attention(heads, size, batch, kernel_size, stride, dilation, border)
    shape = op.Concat(batch, constant([count, value_width]), op.Shape(y, start=2), axis=0)
    return op.Reshape(_cast(y, dtype, query.dtype), shape), _no_sums()


def projected_attention(
    input: TTensor,  # noqa: A002  (the operator's schema)
    weight: Optional[TTensor],
    bias: Optional[TTensor],
    row: Optional[TTensor],
    col: Optional[TTensor],
    table: Optional[TTensor],
    num_heads: int,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    border: str,
    scale: float,
    implementation: Optional[str] = None,
    pool: int = 1,
) -> tuple[TTensor, TTensor]:
    """``sasa::projected_attention``: projection, attention, average pooling."""
    given, channels = input.dtype, input.shape[1]
    dtype = _sum_dtype(given)
    out = (channels if weight is None else weight.shape[0]) // 3
    width = out // num_heads
    pixels = op.Transpose(op.Reshape(input, constant([0, channels, -1])), perm=[0, 2, 1])
    heads_last = constant([0, 0, num_heads, width])

    def projection(part: int) -> Value:
        first, last = constant([part * out]), constant([(part + 1) * out])
        if weight is None:
            x = op.Slice(pixels, first, last, constant([2]))
        else:
            own = op.Reshape(op.Slice(weight, first, last, constant([0])), constant([out, channels]))
            x = op.MatMul(pixels, op.Transpose(own, perm=[1, 0]))
            if bias is not None:
                x = op.Add(x, op.Slice(bias, first, last, constant([0])))
        return _cast(op.Transpose(op.Reshape(x, heads_last), perm=[0, 2, 1, 3]), given, dtype)

    images = [projection(part) for part in range(3)]
    heads = _heads(images, (row, col, table), (num_heads, width, width), given, scale)
    size, batch = op.Shape(input, start=2), op.Shape(input, start=0, end=1)
    y = attention(heads, size, batch, kernel_size, stride, dilation, border)
    if pool > 1:
        y = op.AveragePool(y, kernel_shape=[pool, pool], strides=[pool, pool], ceil_mode=1)
    return _cast(y, dtype, given), _no_sums()


def _heads(
    images: list[Value],
    position: tuple[Value | None, ...],
    sizes: tuple[int, int, int],
    given: ir.DataType,
    scale: float,
) -> Heads:
    dtype = _sum_dtype(given)
    zero_pixel = constant([0, 0, 0, 0, 0, 0, 1, 0])
    query, key, value = (op.Pad(image, zero_pixel) for image in images)
    if scale != 1:
        query = op.Mul(query, constant(scale, np.float64 if dtype == ir.DataType.DOUBLE else np.float32))
    row, col, table = (None if x is None or 0 in x.shape else _cast(x, given, dtype) for x in position)
    return Heads(query, key, value, row, col, table, *sizes, dtype)


def _sum_dtype(given: ir.DataType) -> ir.DataType:
    """Half precision is computed in float32 and rounded once, as everywhere else."""
    return given if given == ir.DataType.DOUBLE else ir.DataType.FLOAT


def _cast(x: Value, given: ir.DataType, dtype: ir.DataType) -> Value:
    if given == dtype:
        return x
    cast = op.Cast(x, to=dtype)
    cast.shape = x.shape
    return cast


def _no_sums() -> Value:
    """In place of the log-sum-exp, which only backwards read: it is not exported."""
    return constant(np.nan, np.float32)


TRANSLATIONS: dict[Any, Callable] = {
    torch.ops.sasa.local_attention.default: local_attention,
    torch.ops.sasa.projected_attention.default: projected_attention,
    torch.ops.sasa.block_attention.default: block_attention,
}


# Registers them with this process's exporter, so that ``torch.onnx.export`` needs no table.
for _operator, _translation in TRANSLATIONS.items():
    torch_op(_operator.name(), trace_only=True)(_translation)
