"""What the layer is measured against."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class UnfoldSelfAttention(nn.Module):
    """The same layer by ``unfold``: every query's kh·kw keys and values laid out in memory, then two matrix products.

    This is the formulation of most public implementations, with the embeddings split across heads as in those.
    Parameters have the names of the notebook's module, so that ``RelativeSelfAttention.from_notebook`` reads them;
    ``last_head_embedding`` makes every head use the last one's embedding, as that module does.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        num_heads: int,
        stride: int = 1,
        last_head_embedding: bool = False,
    ) -> None:
        super().__init__()
        self.kernel_size, self.num_heads, self.stride = kernel_size, num_heads, stride
        self.last_head_embedding = last_head_embedding
        self.qx, self.kx, self.vx = (nn.Sequential(nn.Conv2d(in_channels, out_channels, 1)) for _ in range(3))
        self.row_embeddings = nn.Parameter(torch.randn(out_channels // 2, kernel_size))
        self.col_embeddings = nn.Parameter(torch.randn(out_channels // 2, kernel_size))

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) to (B, out_channels, H, W)."""
        k, heads = self.kernel_size, self.num_heads
        query = self.qx(x)[..., :: self.stride, :: self.stride]
        size, pixels = query.shape[2:], query.shape[2] * query.shape[3]

        def windows(image: Tensor) -> Tensor:  # (B, pixels, N, D, k*k)
            columns = F.unfold(image, k, padding=k // 2, stride=self.stride)
            return columns.view(len(x), heads, -1, k * k, pixels).permute(0, 4, 1, 2, 3)

        rows = self.row_embeddings[:, :, None].expand(-1, -1, k)
        cols = self.col_embeddings[:, None, :].expand(-1, k, -1)
        embedding = torch.cat((rows, cols)).reshape(heads, -1, k * k)
        if self.last_head_embedding:
            embedding = embedding[-1]
        query = query.reshape(len(x), heads, -1, pixels).permute(0, 3, 1, 2).unsqueeze(-2)
        weights = (query @ (windows(self.kx(x)) + embedding)).softmax(-1)
        output = weights @ windows(self.vx(x)).transpose(-2, -1)
        return output.squeeze(-2).permute(0, 2, 3, 1).reshape(len(x), -1, *size)
