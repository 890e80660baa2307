"""The compiled kernels on queries, keys and values."""

from __future__ import annotations

import functools
import warnings

from torch import Tensor

from . import memory_format
from .cpu_call import DTYPES, call, in_huge_pages, layout, machine
from .cpu_library import capabilities, capability, library, set_capability, why_missing
from .eager import sum_dtype
from .memory_format import layout_of, strides_of
from .window import Window

__all__ = ["CpuLibraryWarning", "backward", "capabilities", "capability", "forward", "set_capability", "why_missing"]


class CpuLibraryWarning(UserWarning):
    """The compiled CPU kernels are missing: local attention on the CPU runs in plain PyTorch, which is slow."""


@functools.cache
def _warn_once(reason: str) -> None:
    warnings.warn(
        f"{reason}. Local attention on the CPU runs in plain PyTorch, slowly.", CpuLibraryWarning, stacklevel=2
    )


def unsupported(images: Tensor, widest: int) -> str | None:
    """Why the kernels can't compute these; None if they can. Heads may have any width."""
    if images.device.type != "cpu":
        return f"it computes on the CPU, the query is on {images.device}"
    if images.dtype not in DTYPES:
        return f"it computes {', '.join(map(str, DTYPES))}, the query is {images.dtype}"
    reason = why_missing()
    if reason is not None:
        _warn_once(reason)
    return reason


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    row: Tensor | None,
    col: Tensor | None,
    table: Tensor | None,
    window: Window,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Output (B, N, Dv, h, w) in the memory format of ``query``, and log-sum-exp of the logits (B, N, h, w)."""
    height, width = window.rows.outputs, window.cols.outputs
    output = in_huge_pages(memory_format.empty(query, value.shape[2], height, width))
    lse = query.new_empty((*query.shape[:2], height, width), dtype=sum_dtype(query))
    if query.shape[0] > 0:
        kept = layout(
            query.shape[:3], value.shape[2], query.dtype, window, scale, 1, *machine(),
            (query.stride(), key.stride(), value.stride()), None,
            layout_of(row, query.shape[1]), layout_of(col, query.shape[1]), strides_of(table), (output.stride(),),
        )  # fmt: skip
        call(library().sasa_forward, kept, query, key, value, row, col, table, lse, output)
    return output, lse


def backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    row: Tensor | None,
    col: Tensor | None,
    table: Tensor | None,
    lse: Tensor,
    window: Window,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of query, key and value in their memory formats, and of row, col and table."""
    images = query, key, value
    grads = [in_huge_pages(memory_format.empty(x, *x.shape[2:])) for x in images]
    others = [None if x is None else x.new_zeros(x.shape) for x in (row, col, table)]
    if window.skips_pixels:
        grads[0].zero_()
    if query.shape[0] > 0:
        kept = layout(
            query.shape[:3], value.shape[2], query.dtype, window, scale, 1, *machine(),
            tuple(x.stride() for x in images), None, layout_of(row, query.shape[1]), layout_of(col, query.shape[1]),
            strides_of(table), tuple(x.stride() for x in (grad_output, *grads)),
        )  # fmt: skip
        tensors = row, col, table, lse.contiguous(), grad_output, *grads, *others
        call(library().sasa_backward, kept, *images, *tensors)
    return grads[0], grads[1], grads[2], others[0], others[1], others[2]
