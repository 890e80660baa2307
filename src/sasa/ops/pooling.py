"""Average pooling whose last windows may be cut off by the border, like ``nn.AvgPool2d(size, ceil_mode=True)``.

That module is not used because Inductor's backward of ``avg_pool2d(ceil_mode=True)`` divides the gradients of cut
windows by the size of full ones (seen with PyTorch 2.15). Here the image is padded to full windows, and the means of
those that are cut are corrected.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def average_pool(x: Tensor, size: int | tuple[int, int]) -> Tensor:
    """Means over windows of ``size`` with the same stride: (..., H, W) to (..., ceil(H / size), ceil(W / size))."""
    height, width = x.shape[-2:]
    rows, cols = (size, size) if isinstance(size, int) else size
    if rows == cols == 1:
        return x
    if not torch.compiler.is_compiling():  # compiled code must work for every size
        rows, cols = min(rows, height), min(cols, width)
        if height % rows == 0 and width % cols == 0:
            return F.avg_pool2d(x, (rows, cols))
    missing = (cols - width % cols) % cols, (rows - height % rows) % rows
    y = F.avg_pool2d(F.pad(x, (0, missing[0], 0, missing[1])), (rows, cols))
    return y * (_correction(height, rows, y.shape[-2], y)[:, None] * _correction(width, cols, y.shape[-1], y))


def _correction(length: int, size: int, windows: int, like: Tensor) -> Tensor:
    """Size of each window divided by the number of its pixels inside the image."""
    starts = torch.arange(windows, device=like.device) * size
    return (size / (length - starts).clamp(max=size)).to(like.dtype)
