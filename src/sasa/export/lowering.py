"""The operators in ONNX: local attention by blocks of queries, strip by strip.

A block of b x b queries sees (b + kh - 1) x (b + kw - 1) keys, of which each query has its own kh x kw. The logits of a
block's queries and keys are one matrix product, and so is the weighted sum; large negative numbers restrict each query
to its window. That is more arithmetic than the equation needs, yet faster than a pass over the image for each tap:
runtimes have fast matrix products and slow element-wise passes.

An ONNX Scan iterates over the strips of the image, each a row of blocks, so that only one strip's keys, values and
logits exist at a time. Around it are a few nodes per layer, and small tables of indices.

Along an axis, with stride s, dilation d and g = gcd(s, d), query (i·b + t)·d/g + ρ of block i and phase ρ has its tap u
at pixel ((i·b + t)·s/g + u)·d + ρ·s - before: contiguous in j = t·s/g + u, so that one scheme serves all windows.

Shapes: B batch, N heads, D width of a head (Dv of values), P = H·W pixels, m blocks of a strip, span keys of a block
along an axis.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import onnx_ir as ir
from onnxscript import opset18

op: Any = opset18  # its operators' annotations allow one type each
Value = Any  # ir.Value, or what onnxscript's operators return
FAR = 2**40  # beyond the last pixel of any image
HIDDEN = -1e30  # added to the logits of keys outside a window; infinity times zero would be NaN in the products


class Axis(NamedTuple):
    """One axis of the window in blocks: what is known at export, and values that are known when the network runs.

    Attributes:
        block: b, queries along a block.
        phases: d / g.
        taps: (b, span) which tap each key is for each query, from 0 to k - 1.
        hidden: (b, span) 0 for keys in a query's window, HIDDEN for others.
        blocks: value (1,), number of blocks.
        outputs: value (1,), H' or W'.
        queries: value (blocks · phases, b), pixels; FAR for those beyond the image.
        keys: value (blocks · phases, span), likewise.
    """

    block: int
    phases: int
    taps: np.ndarray
    hidden: np.ndarray
    blocks: Value
    outputs: Value
    queries: Value
    keys: Value


class Heads(NamedTuple):
    """The inputs of attention: values (B, N, P + 1, D), whose last pixel is zero, embeddings (N, Dr, kh), (N, Dc, kw)
    and a table (N, kh, kw).
    """

    query: Value
    key: Value
    value: Value
    row: Value | None
    col: Value | None
    table: Value | None
    number: int
    width: int
    value_width: int
    dtype: ir.DataType


def constant(values: Any, dtype: Any = np.int64) -> Value:
    """A constant of the graph."""
    return op.Constant(value=ir.tensor(np.array(values, dtype=dtype, order="C")))


def axis_of(size: Value, kernel: int, stride: int, dilation: int, border: str) -> Axis:
    """Tables for an axis of ``size`` pixels, a value of shape (1,)."""
    block = 4 if kernel < 9 else 8
    common = math.gcd(stride, dilation)
    phases, step = dilation // common, stride // common
    centre = (kernel - 1) // 2 * dilation
    before, unused = (0, (kernel - 1) * dilation) if border == "valid" else (centre, 0)
    outputs = op.Add(op.Div(op.Sub(size, constant([1 + unused])), constant([stride])), constant([1]))
    blocks = op.Div(op.Add(outputs, constant([block * phases - 1])), constant([block * phases]))
    numbers = op.Range(constant(0), op.Squeeze(blocks, constant([0])), constant(1))
    starts = op.Reshape(op.Mul(numbers, constant([block * step * dilation])), constant([-1, 1, 1]))
    first_of_phase = np.arange(phases)[:, None] * stride

    def pixels(offsets: np.ndarray) -> Value:
        found = op.Reshape(op.Add(starts, constant(offsets[None])), constant([-1, offsets.shape[-1]]))
        inside = op.And(op.GreaterOrEqual(found, constant([0])), op.Less(found, size))
        return op.Where(inside, found, constant([FAR]))

    taps = np.arange((block - 1) * step + kernel) - np.arange(block)[:, None] * step
    hidden = np.where((taps >= 0) & (taps < kernel), 0, HIDDEN)
    queries = pixels(np.arange(block) * phases * stride + first_of_phase + centre - before)
    keys = pixels(np.arange(taps.shape[1]) * dilation + first_of_phase - before)
    return Axis(block, phases, taps.clip(0, kernel - 1), hidden, blocks, outputs, queries, keys)


class Body:
    """Records the nodes of a Scan's body, which may use values of the enclosing graph."""

    def __init__(self, name: str) -> None:
        self.tape, self.name, self.inputs, self.count = ir.tape.Tape(), name, [], 0

    def take(self, dtype: ir.DataType, size: int) -> Value:
        """A vector, one row of what is scanned."""
        name = f"{self.name}_input_{len(self.inputs)}"
        self.inputs.append(ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape([size])))
        return self.inputs[-1]

    def __call__(self, kind: str, *inputs: Value, **attributes: Any) -> Value:
        """The output of another node."""
        self.count += 1
        name = f"{self.name}_{self.count}"
        return self.tape.op(kind, inputs, attributes, output=ir.Value(name=name), name=f"node_{name}")

    def graph(self, output: Value, dtype: ir.DataType) -> ir.Graph:
        """The body, with its output of five dimensions."""
        output.type, output.shape = ir.TensorType(dtype), ir.Shape([None] * 5)
        return ir.Graph(self.inputs, [output], nodes=self.tape.nodes, name=self.name)


def strips(heads: Heads, rows: Axis, cols: Axis, width: Value, border: str) -> Value:
    """(S, B, N, m, b·b, Dv): outputs of the S strips of m blocks each. ``width`` is W."""
    real = np.float64 if heads.dtype == ir.DataType.DOUBLE else np.float32
    spans = rows.taps.shape[1], cols.taps.shape[1]
    padding = op.Sub(op.Shape(heads.query, start=2, end=3), constant([1]))  # the zero pixel
    last, join = constant([-1]), constant([0, 0, 0, rows.block * cols.block, -1])
    flat, flat_value = constant([0, 0, 0, -1, heads.width]), constant([0, 0, 0, -1, heads.value_width])
    query_cols, key_cols = (op.Unsqueeze(pixels, constant([1])) for pixels in (cols.queries, cols.keys))
    tables = _table(heads, heads.row, rows, True), _table(heads, heads.col, cols, False)
    hidden_row = constant(rows.hidden[None, :, None], real)  # (1, b, 1, span)
    hidden_col = constant(cols.hidden[None, :, None], real)
    shown, beyond, far = constant(0, real), constant(HIDDEN, real), constant(FAR)
    if border == "mask":
        outside = op.Where(op.Less(cols.keys, far), shown, beyond)
        hidden_col = op.Add(hidden_col, op.Unsqueeze(outside, constant([1, 2])))  # (m, b, 1, span)
    # A product with this adds what belongs to rows and what belongs to columns of a block's keys: an outer sum.
    sums = np.concatenate([np.repeat(np.eye(spans[0]), spans[1], 1), np.tile(np.eye(spans[1]), spans[0])])
    sums = constant(sums, real)

    body = Body(_unique("local_attention"))
    query_row = body.take(ir.DataType.INT64, rows.block)
    key_row = body.take(ir.DataType.INT64, spans[0])

    def gather(x: Value, row: Value, columns: Value) -> Value:
        index = body("Min", body("Add", body("Unsqueeze", row, last), columns), padding)
        return body("Gather", x, index, axis=2)

    q = gather(heads.query, query_row, query_cols)  # (B, N, m, b, b, D)
    k = body("Reshape", gather(heads.key, key_row, key_cols), flat)
    v = body("Reshape", gather(heads.value, key_row, key_cols), flat_value)
    by_row, by_col = hidden_row, hidden_col
    if border == "mask":
        by_row = body("Add", by_row, body("Where", body("Less", key_row, far), shown, beyond))
    if tables[0] is not None:
        by_row = body("Add", body("MatMul", q, tables[0]), by_row)
    if tables[1] is not None:
        turned = body("Transpose", q, perm=[0, 1, 2, 4, 3, 5])
        by_col = body("Transpose", body("Add", body("MatMul", turned, tables[1]), by_col), perm=[0, 1, 2, 4, 3, 5])
    else:
        by_col = body("Transpose", by_col, perm=[0, 2, 1, 3])
    if tables[0] is None or tables[1] is None:
        sizes = body("Shape", q, start=0, end=5)
        by_row, by_col = (
            part if table is not None else body("Expand", part, body("Concat", sizes, constant([span]), axis=0))
            for part, table, span in zip((by_row, by_col), tables, spans, strict=True)
        )
    added = body("MatMul", body("Reshape", body("Concat", by_row, by_col, axis=-1), join), sums)
    logits = body("MatMul", body("Reshape", q, flat), body("Transpose", k, perm=[0, 1, 2, 4, 3]))
    logits = body("Add", logits, added)
    if heads.table is not None:
        logits = body("Add", logits, _of_pairs(heads.table, rows, cols))
    weights = body("Softmax", logits, axis=-1)
    graph = body.graph(body("MatMul", weights, v), heads.dtype)
    return op.Scan(op.Mul(rows.queries, width), op.Mul(rows.keys, width), body=graph, num_scan_inputs=2)


def _table(heads: Heads, embedding: Value | None, axis: Axis, first: bool) -> Value | None:
    """(N, 1, b, D, span): for each query along a block, each key's embedding, in the first or last channels."""
    if embedding is None:
        return None
    channels = embedding.shape[0] * (embedding.shape[1] if len(embedding.shape) == 3 else 1) // heads.number
    missing = heads.width - channels
    by_head = op.Reshape(embedding, constant([heads.number, channels, -1]))
    by_head = op.Pad(by_head, constant([0, 0 if first else missing, 0, 0, missing if first else 0, 0]))
    by_query = op.Transpose(op.Gather(by_head, constant(axis.taps), axis=2), perm=[0, 2, 1, 3])
    return op.Unsqueeze(by_query, constant([1]))


def _of_pairs(table: Value, rows: Axis, cols: Axis) -> Value:
    """(N, 1, b·b, span·span): what a table adds to the logit of each pair of a block's queries and keys."""
    across = op.Gather(table, constant(cols.taps), axis=2)  # (N, kh, b, span)
    pairs = op.Gather(across, constant(rows.taps), axis=1)  # (N, b, span, b, span)
    sizes = [0, 1, rows.taps.shape[0] * cols.taps.shape[0], rows.taps.shape[1] * cols.taps.shape[1]]
    return op.Reshape(op.Transpose(pairs, perm=[0, 1, 3, 2, 4]), constant(sizes))


_count = iter(range(2**62))


def _unique(name: str) -> str:
    """A name unique among the values of all Scans, which share the enclosing graph's namespace."""
    return f"{name}_{next(_count)}"


def attention(
    heads: Heads,
    size: Value,
    batch: Value,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    border: str,
) -> Value:
    """(B, N·Dv, H', W'). ``size`` is (H, W), ``batch`` (B,)."""
    if border == "shift":
        raise ValueError(
            "border: 'shift' can't be exported to ONNX: windows at the edge would need tables of their own"
        )
    height, width = op.Split(size, num_outputs=2, axis=0)
    rows = axis_of(height, kernel_size[0], stride[0], dilation[0], border)
    cols = axis_of(width, kernel_size[-1], stride[-1], dilation[-1], border)
    y = strips(heads, rows, cols, width, border)
    known = constant([cols.phases, rows.block, cols.block, heads.value_width])
    shape = op.Concat(constant([-1, rows.phases]), batch, constant([heads.number]), cols.blocks, known, axis=0)
    y = op.Transpose(op.Reshape(y, shape), perm=[2, 3, 8, 0, 6, 1, 4, 7, 5])
    height = op.Mul(rows.blocks, constant([rows.block * rows.phases]))
    shape = op.Concat(batch, constant([heads.number * heads.value_width]), height, constant([-1]), axis=0)
    ends = op.Concat(rows.outputs, cols.outputs, axis=0)
    return op.Slice(op.Reshape(y, shape), constant([0, 0]), ends, constant([2, 3]))
