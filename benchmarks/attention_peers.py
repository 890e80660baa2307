"""Ways to compute attention over a window in plain PyTorch, forward and, except FlexAttention on a CPU, backward.

Each is ``build(size, kernel_size)``, which prepares what depends only on the shape, and returns a function of queries,
keys and values (B, N, D, size, size) and of row and column embeddings (N, D, kernel_size). Those that are meant for
torch.compile also take ``compiled``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

Attention = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def slices(size: int, kernel_size: int, compiled: bool = True) -> Attention:
    """The padded keys and values are sliced once per tap, k² times: products, softmax and sums of shifted images.

    It takes memory for k² logits per pixel, none for copies of keys and values. The form best suited to a compiler.
    """
    reach = kernel_size // 2
    taps = [(dy, dx) for dy in range(kernel_size) for dx in range(kernel_size)]

    def attention(query: Tensor, key: Tensor, value: Tensor, row: Tensor, col: Tensor) -> Tensor:
        keys, values = (F.pad(x, (reach,) * 4) for x in (key, value))
        of_row = torch.einsum("bndhw,ndk->kbnhw", query, row)
        of_col = torch.einsum("bndhw,ndk->kbnhw", query, col)
        logits = [
            (query * keys[..., dy : dy + size, dx : dx + size]).sum(2) + of_row[dy] + of_col[dx] for dy, dx in taps
        ]
        weights = torch.stack(logits).softmax(0)
        output = torch.zeros_like(value)
        for weight, (dy, dx) in zip(weights, taps, strict=True):
            output = output + weight.unsqueeze(2) * values[..., dy : dy + size, dx : dx + size]
        return output

    return torch.compile(attention, fullgraph=True, dynamic=False) if compiled else attention


def unfolded_sdpa(size: int, kernel_size: int) -> Attention:
    """``unfold`` lays out the k² keys and values of every pixel; scaled_dot_product_attention sees one query a pixel.

    The position terms are its ``attn_mask``.
    """

    def attention(query: Tensor, key: Tensor, value: Tensor, row: Tensor, col: Tensor) -> Tensor:
        heads = query.shape[1]

        def windows(x: Tensor) -> Tensor:  # (B·N, pixels, taps, D)
            columns = F.unfold(x.flatten(1, 2), kernel_size, padding=kernel_size // 2)
            return columns.view(len(x) * heads, -1, kernel_size**2, size**2).permute(0, 3, 2, 1)

        of_row = torch.einsum("bndhw,ndk->bnhwk", query, row)
        of_col = torch.einsum("bndhw,ndk->bnhwk", query, col)
        position = (of_row[..., :, None] + of_col[..., None, :]).reshape(-1, size**2, 1, kernel_size**2)
        queries = query.flatten(0, 1).flatten(2).mT.unsqueeze(2)
        output = F.scaled_dot_product_attention(queries, windows(key), windows(value), attn_mask=position, scale=1.0)
        return output.squeeze(2).mT.reshape(value.shape)

    return attention


def flex(size: int, kernel_size: int, compiled: bool = True, device: str = "cpu") -> Attention:
    """FlexAttention over the pixels as one sequence, with a block mask that selects the window.

    Pixels outside the image are not in the sequence, so only the border ``"mask"`` can be expressed. The position terms
    q·row and q·col are computed first, outside the compiler; ``score_mod`` indexes them.
    """
    reach = kernel_size // 2

    def tap(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        return key // size - query // size + reach, key % size - query % size + reach

    def inside(b: Tensor, n: Tensor, query: Tensor, key: Tensor) -> Tensor:
        dy, dx = tap(query, key)
        return (dy >= 0) & (dy < kernel_size) & (dx >= 0) & (dx < kernel_size)

    mask = create_block_mask(inside, None, None, size**2, size**2, device=device)
    attend = torch.compile(flex_attention, fullgraph=True, dynamic=False) if compiled else flex_attention

    def attention(query: Tensor, key: Tensor, value: Tensor, row: Tensor, col: Tensor) -> Tensor:
        q, k, v = (x.flatten(3).mT for x in (query, key, value))
        of_row, of_col = q @ row, q @ col

        def with_position(score: Tensor, b: Tensor, n: Tensor, query: Tensor, key: Tensor) -> Tensor:
            # Scores of a block are computed before its mask is applied, so the taps must exist for all of them.
            dy, dx = (index.clamp(0, kernel_size - 1) for index in tap(query, key))
            return score + of_row[b, n, query, dy] + of_col[b, n, query, dx]

        output = attend(q, k, v, score_mod=with_position, block_mask=mask, scale=1.0)
        return output.mT.unflatten(3, (size, size))

    return attention


def natten(kernel_size: int) -> Attention:
    """NATTEN's neighbourhood attention, its window moved inside at the border, without positions."""
    from natten import na2d  # type: ignore[import-not-found]

    def attention(query: Tensor, key: Tensor, value: Tensor, row: Tensor, col: Tensor) -> Tensor:
        qkv = (x.permute(0, 3, 4, 1, 2) for x in (query, key, value))
        return na2d(*qkv, kernel_size=(kernel_size, kernel_size), scale=1.0).permute(0, 3, 4, 1, 2)

    return attention
