"""How a query knows where its neighbours are: relative embeddings, or an absolute encoding of pixel positions.

Sources: the paper (arXiv 1906.05909), section 3.1 for the relative embeddings and the ablation of position encodings
for the absolute one, which takes the sinusoids of Vaswani et al. 2017 (arXiv 1706.03762), section 3.5.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

POSITIONS = ("relative", "bias", "absolute", "none", "only")
WITH_EMBEDDINGS = ("relative", "only")
POSITION_SPLITS = ("per_head", "across_heads", "last_head")


def embedding_rows(channels: int, num_heads: int, position_split: str) -> int:
    """How many of the channels the row embedding fills; the column embedding fills the rest."""
    if position_split == "per_head":
        return num_heads * (channels // num_heads // 2)
    return channels // 2


def embeddings_by_head(row: Tensor, col: Tensor, num_heads: int, position_split: str) -> tuple[Tensor, Tensor]:
    """The two halves of r by head.

    r is the concatenation of a row half and a column half; the splits differ in where the halves fall once the
    channels are divided among N heads of width D.

    Args:
        row: (channels of the row half, kh).
        col: (channels of the column half, kw).
        num_heads: N.
        position_split: ``"per_head"``: every head has a row half and a column half; ``"across_heads"``: the halves
            are cut first, so the first half of the heads sees rows only and the second columns only;
            ``"last_head"``: as ``"across_heads"``, but every head gets the last head's r.

    Returns:
        (N·Dr, kh) of every head's first Dr channels and (N·Dc, kw) of its last Dc. Split across heads, (N, D, kh) and
        (N, D, kw), zero in the heads of the other half.
    """
    if position_split == "per_head":
        return row, col
    by_head = (
        F.pad(row, (0, 0, 0, col.shape[0])).unflatten(0, (num_heads, -1)),
        F.pad(col, (0, 0, row.shape[0], 0)).unflatten(0, (num_heads, -1)),
    )
    if position_split == "last_head":
        return by_head[0][-1:].expand(num_heads, -1, -1), by_head[1][-1:].expand(num_heads, -1, -1)
    return by_head


def sinusoidal_encoding(x: Tensor) -> Tensor:
    """Fixed encoding of every pixel's row and column, to be added to ``x``.

    Half of the channels encode the row and half the column; each half is sines and cosines of wavelengths that
    grow geometrically from 2π to 10000·2π pixels.

    Args:
        x: (B, C, H, W) or (C, H, W).

    Returns:
        (C, H, W) in the dtype and on the device of ``x``.
    """
    channels, height, width = x.shape[-3:]

    def axis(half: int, size: int) -> Tensor:
        waves = (half + 1) // 2
        rates = 10000 ** (-torch.arange(waves, device=x.device, dtype=torch.float32) / max(1, waves))
        angles = rates[:, None] * torch.arange(size, device=x.device)
        return torch.cat((angles.sin(), angles.cos()))[:half]

    rows, cols = axis(channels // 2, height), axis(channels - channels // 2, width)
    return torch.cat((rows[:, :, None].expand(-1, -1, width), cols[:, None, :].expand(-1, height, -1))).to(x.dtype)
