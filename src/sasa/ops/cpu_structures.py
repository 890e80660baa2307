"""The structures of the C++ library's interface, ``csrc/local_attention.h`` and
``csrc/block_attention.h``, declared for ctypes field by field.
"""

from __future__ import annotations

import ctypes

INTERFACE_VERSION = 7  # SASA_INTERFACE_VERSION of the header
UNSUPPORTED = 3  # of sasa_status


class CTensor(ctypes.Structure):
    """sasa_tensor: address and strides in elements of (B, N, D, H, W)."""

    _fields_ = (("data", ctypes.c_void_p), ("stride", ctypes.c_int64 * 5))


class CEmbedding(ctypes.Structure):
    """sasa_embedding: address and strides of (N, channels, taps), where ``channels`` of each head's D are covered, from
    ``first`` on; no address for no embedding.
    """

    _fields_ = (
        ("data", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("first", "channels")),
        ("stride", ctypes.c_int64 * 3),
    )


class CAxis(ctypes.Structure):
    """sasa_axis: rows or columns of the window."""

    _fields_ = tuple(
        (name, ctypes.c_int64) for name in ("size", "outputs", "kernel", "stride", "dilation", "before", "shifted")
    )


class CProjection(ctypes.Structure):
    """sasa_projection: a layer's input, weight and bias."""

    _fields_ = (
        ("input", CTensor),
        ("in_channels", ctypes.c_int64),
        ("weight", ctypes.c_void_p),
        ("weight_stride", ctypes.c_int64 * 2),
        ("bias", ctypes.c_void_p),
    )


class CProblem(ctypes.Structure):
    """sasa_problem: sizes and inputs of a call."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in ("dtype", "border", "threads", "capability")),
        ("scale", ctypes.c_double),
        *((name, ctypes.c_int64) for name in ("batch", "heads", "channels", "value_channels")),
        *((name, CAxis) for name in ("rows", "cols")),
        *((name, CTensor) for name in ("query", "key", "value")),
        ("projection", ctypes.POINTER(CProjection)),
        *((name, CEmbedding) for name in ("row", "col", "table")),
        ("lse", ctypes.c_void_p),
        ("pool", ctypes.c_int64),
    )


class CGradients(ctypes.Structure):
    """sasa_gradients: where a backward reads and writes gradients."""

    _fields_ = (
        *((name, CTensor) for name in ("output", "query", "key", "value")),
        *((name, CEmbedding) for name in ("row", "col", "table")),
    )


class CLinear(ctypes.Structure):
    """sasa_linear: the gradients of a projection."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in ("threads", "capability")),
        *((name, ctypes.c_int64) for name in ("pixels", "outputs", "inputs")),
        *((name, ctypes.c_void_p) for name in ("grad", "input", "weight", "grad_input", "grad_weight", "grad_bias")),
    )


class CBlocks(ctypes.Structure):
    """sasa_blocks: sizes and inputs of attention inside blocks."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in ("threads", "capability")),
        *((name, ctypes.c_int64) for name in ("batch", "channels", "height", "width", "outputs", "heads", "block")),
        ("input", ctypes.c_void_p),
        ("stride", ctypes.c_int64 * 4),
        *((name, ctypes.c_void_p) for name in ("form", "values", "sign", "mean")),
    )


class CBlockResults(ctypes.Structure):
    """sasa_block_results: where its forward writes."""

    _fields_ = tuple((name, ctypes.c_void_p) for name in ("extreme", "mean", "variance"))


class CBlockGradients(ctypes.Structure):
    """sasa_block_gradients: where its backward reads and writes gradients."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("grad", "slope", "offset", "input")),
        ("stride", ctypes.c_int64 * 4),
        *((name, ctypes.c_void_p) for name in ("form", "values")),
    )


# In the order of sasa_structure_size of the header.
STRUCTURES = (
    CTensor, CEmbedding, CAxis, CProjection, CProblem, CGradients, CLinear, CBlocks, CBlockResults, CBlockGradients,
)  # fmt: skip
