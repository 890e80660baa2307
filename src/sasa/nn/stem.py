"""The paper's attention stem: attention inside blocks of 4x4 pixels, with values that depend on the place in it."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from .._compat import has_hooks
from ..ops import checks
from ..ops.attend import attend
from ..ops.block_attention import block_attention, is_fast
from ..ops.precision import autocast, without_autocast
from .convolution_like import ConvolutionLike, is_plain, runs_alone

# Bytes of one part of the batch when no gradient is needed: outputs that are pooled before they leave the cache.
PART_BYTES = 2**24


class AttentionStem(ConvolutionLike):
    r"""Attention that replaces a network's first convolution and the max pool after it.

    Pixels of an image carry little content of their own, so a pixel's value depends on its place (a, b) in the block:

    .. math::
        y_p = \sum_{(a, b)} \operatorname{softmax}_{(a, b)}(q_p \cdot k_{ab}) \, v_{ab}, \qquad
        v_{ab} = \Bigl(\sum_m p(a, b, m) \, W_V^m\Bigr) x_{ab}, \qquad
        p(a, b, m) = \operatorname{softmax}_m\bigl((\mathrm{row}_a + \mathrm{col}_b) \cdot \nu_m\bigr)

    over the pixels (a, b) of the block that holds pixel p, for each head on its own share of the channels; then batch
    norm, and the maximum of each block and channel. Blocks cut off by the right or lower edge of the image are smaller.
    Source: Ramachandran et al. 2019 (arXiv 1906.05909), section 3.2.

    Args:
        in_channels: channels of the image.
        out_channels: channels of the output, divisible by ``num_heads``.
        num_heads: heads; a head has ``out_channels / num_heads`` channels.
        block_size: pixels along a block; also the factor by which the output is smaller.
        mixtures: M, number of value projections that are mixed. With 1, values don't depend on their place.
        implementation: None for the fastest, or a name: see :func:`sasa.local_attention`.
        device: where to create the parameters.
        dtype: of the parameters.

    Shape:
        - Input: (B, in_channels, H, W), contiguous or channels_last.
        - Output: (B, out_channels, ceil(H / block_size), ceil(W / block_size)), channels_last in memory.

    Attributes:
        qk: queries and keys as one 1x1 convolution of 2·out_channels outputs.
        value: the M value projections as one 1x1 convolution of M·out_channels outputs.
        row_embedding: row_a, (out_channels, block_size).
        col_embedding: col_b, likewise.
        mixture_embedding: nu, (out_channels, mixtures).
        norm: the batch norm.

    Raises:
        ValueError: an argument is out of range or the input doesn't fit; the message names it.
        TypeError: an argument has the wrong Python type.

    Example:
        >>> sasa.AttentionStem(3, 64)(torch.randn(8, 3, 224, 224)).shape
        torch.Size([8, 64, 56, 56])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        num_heads: int = 8,
        *,
        block_size: int = 4,
        mixtures: int = 4,
        implementation: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        sizes = {"in_channels": in_channels, "out_channels": out_channels, "num_heads": num_heads}
        sizes |= {"block_size": block_size, "mixtures": mixtures}
        self.in_channels, self.out_channels, self.num_heads, self.block_size, self.mixtures = (
            checks.positive(name, size) for name, size in sizes.items()
        )
        if out_channels % num_heads:
            raise ValueError(f"out_channels: expected a multiple of num_heads = {num_heads}, got {out_channels}")
        checks.implementation(implementation)
        del sizes["num_heads"]
        checks.parameters(out_channels * ((2 + mixtures) * in_channels + 2 * block_size + mixtures), **sizes)
        self.implementation = implementation
        options = {"device": device, "dtype": dtype}
        self.qk = nn.Conv2d(in_channels, 2 * out_channels, 1, bias=False, **options)
        self.value = nn.Conv2d(in_channels, mixtures * out_channels, 1, bias=False, **options)
        self.row_embedding = nn.Parameter(torch.empty(out_channels, block_size, **options))
        self.col_embedding = nn.Parameter(torch.empty(out_channels, block_size, **options))
        self.mixture_embedding = nn.Parameter(torch.empty(out_channels, mixtures, **options))
        self.norm = nn.BatchNorm2d(out_channels, **options)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new parameters such that q·k starts with variance 1 for an input of variance 1, and the mixtures are
        soft: the logits of p have variance 2.
        """
        std = self.in_channels**-0.5
        nn.init.normal_(self.qk.weight, std=std)
        with torch.no_grad():
            self.qk.weight[: self.out_channels] *= (self.out_channels / self.num_heads) ** -0.5
        nn.init.normal_(self.value.weight, std=std)
        nn.init.normal_(self.row_embedding)
        nn.init.normal_(self.col_embedding)
        nn.init.normal_(self.mixture_embedding, std=self.out_channels**-0.5)
        self.norm.reset_parameters()

    @property
    def kernel_size(self) -> tuple[int, int]:
        """That of a convolution that sees what the stem sees: a block."""
        return self.block_size, self.block_size

    @property
    def stride(self) -> tuple[int, int]:
        """How many times smaller the output is."""
        return self.block_size, self.block_size

    padding: ClassVar[tuple[int, int]] = (0, 0)
    dilation: ClassVar[tuple[int, int]] = (1, 1)

    def _projection(self) -> nn.Module:
        return self.value

    def mixture_weights(self) -> Tensor:
        """p(a, b, m): (block_size, block_size, mixtures), summing to 1 over the mixtures."""
        return mixture_weights(self.row_embedding, self.col_embedding, self.mixture_embedding)

    def forward(self, x: Tensor) -> Tensor:
        """Attend and pool: (B, in_channels, H, W) to (B, out_channels, ceil(H / block_size), ceil(W / block_size))."""
        if isinstance(x, fx.Proxy):  # torch.fx.symbolic_trace: the shape is unknown, the mode may change
            y = attend_in_blocks(x, *self._tensors(), None, *self._options())
            return max_of_blocks(self.norm(y), self.block_size)
        alone = runs_alone(self.qk, globally=False) and runs_alone(self.value, globally=False)
        checks.layer_input(x, self.in_channels, self.qk.weight if is_plain(self.qk) else None)
        if x.dim() == 3:
            return self.forward(x.unsqueeze(0)).squeeze(0)
        if not alone:  # hooks, and whatever replaced a convolution, are respected
            tensors = self.row_embedding, self.col_embedding, self.mixture_embedding
            y = attend_in_blocks(self._projected(x), None, None, *tensors, None, *self._options())
            return max_of_blocks(self.norm(y), self.block_size)
        given = autocast(x)[0]
        if self._runs_in_one_pass(given):
            with without_autocast(given):
                return self._in_one_pass(given)
        if self._wants_parts(x):
            images = max(1, PART_BYTES // (self.out_channels * x.shape[2] * x.shape[3] * x.element_size()))
            return torch.cat([self._pooled(part) for part in x.split(images)])
        return self._pooled(x)

    def _projected(self, x: Tensor) -> Tensor:
        """Queries, keys and mixed values of every pixel: (B, 3·out_channels, H, W)."""
        qk, values = self.qk(x), self.value(x).unflatten(1, (self.mixtures, self.out_channels))
        row, col = (
            embedding[:, torch.arange(pixels, device=x.device) % self.block_size]
            for embedding, pixels in ((self.row_embedding, x.shape[2]), (self.col_embedding, x.shape[3]))
        )
        place = mixture_weights(row, col, self.mixture_embedding).to(values.dtype)
        return torch.cat((qk, torch.einsum("bmchw,hwm->bchw", values, place)), 1)

    def _tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        return self.qk.weight, self.value.weight, self.row_embedding, self.col_embedding, self.mixture_embedding

    def _options(self) -> tuple[int, int, str | None]:
        return self.num_heads, self.block_size, self.implementation

    def _wants_parts(self, x: Tensor) -> bool:
        """Whether the images may be processed one by one, which saves memory and time without gradients."""
        return not (self.training or torch.is_grad_enabled() or torch.compiler.is_compiling() or x.device.type != "cpu")

    def _runs_in_one_pass(self, x: Tensor) -> bool:
        """Whether there is a kernel for it: all in one dtype, or images in half precision with parameters in float32,
        and PyTorch's own batch norm.
        """
        norm, pixels = self.norm, x.numel() // self.in_channels
        return (
            is_fast(x, self.block_size, self.implementation)
            and self._has_plain_norm()
            and (norm.momentum is not None or not norm.training)
            and pixels > (1 if norm.training else 0)  # PyTorch's batch norm raises for a single number
            and all(
                y.dtype in (x.dtype, torch.float32) and y.device == x.device
                for y in (*self.parameters(), *norm.buffers())
                if y.dim()
            )
        )

    def _in_one_pass(self, x: Tensor) -> Tensor:
        """The same by :func:`sasa.ops.block_attention.block_attention`: the extreme of each block is what the max pool
        lets through, the largest number where the batch norm's weight is positive, the smallest where it is negative.
        Images and outputs may be in half precision; all else is computed in float32.
        """
        norm, size = self.norm, self.block_size
        qk, value, row, col, mixture = (y.float() for y in self._tensors())
        query, key = qk.view(2, self.num_heads, -1, self.in_channels)
        form = torch.einsum("ndc,nde->nce", query, key)
        values = torch.einsum(
            "abm,moc->aboc", mixture_weights(row, col, mixture), value.view(self.mixtures, -1, self.in_channels)
        )
        weight, bias = values.new_ones(self.out_channels), values.new_zeros(self.out_channels)
        if norm.affine:
            weight, bias = norm.weight.float(), norm.bias.float()
        extreme, mean, variance = block_attention(x, form, values.flatten(0, 1), weight.detach().sign(), size)
        running_mean, running_var, momentum = norm.running_mean, norm.running_var, norm.momentum
        if running_mean is not None and running_var is not None:
            if not norm.training:
                mean, variance = running_mean.float(), running_var.float()
            elif norm.num_batches_tracked is not None and momentum is not None:
                pixels = x.numel() // self.in_channels
                norm.num_batches_tracked.add_(1)
                unbiased = variance.detach() * (pixels / (pixels - 1))
                running_mean.copy_(running_mean.float().lerp(mean.detach(), momentum))
                running_var.copy_(running_var.float().lerp(unbiased, momentum))
        factor = weight * (variance + norm.eps).rsqrt()
        return torch.addcmul((bias - mean * factor)[:, None, None], extreme, factor[:, None, None]).to(x.dtype)

    def _pooled(self, x: Tensor) -> Tensor:
        """Attention, batch norm and max pool."""
        if torch.compiler.is_exporting() and not self.norm.training:
            y, seen = attend_in_padded_blocks(x, *self._tensors(), self.num_heads, self.block_size)
            y = self.norm(y).masked_fill(~seen, float("-inf")).amax(2)
            # Not -(-pixels // size): ONNX rounds quotients towards zero.
            return y.unflatten(2, [(pixels + self.block_size - 1) // self.block_size for pixels in x.shape[2:]])
        factor, offset = self._normalisation()
        heights, widths = cuts(x.shape[2], self.block_size), cuts(x.shape[3], self.block_size)
        if len(heights) == len(widths) == 1 and not torch.compiler.is_compiling():
            # Equal blocks need not be assembled into an image, which would cost another write and read.
            (rows, height), (cols, width) = heights[0], widths[0]
            y = attend_in_equal_blocks(blocks_of(x, *heights, *widths), *self._tensors(), factor, *self._options())
            y = F.max_pool2d(y if offset is not None else self.norm(y), (height, width))
            y = y.view(len(x), rows, cols, self.out_channels).permute(0, 3, 1, 2)
            y = y.clone() if offset is None else y  # reentrant checkpointing forbids changing views in place
        else:
            y = attend_in_blocks(x, *self._tensors(), factor, *self._options())
            y = max_of_blocks(y if offset is not None else self.norm(y), self.block_size)
        return y if offset is None else y + offset.to(y.dtype)  # batch norms are often left in float32

    def _normalisation(self) -> tuple[Tensor | None, Tensor | None]:
        """Batch norm as a factor on the values and an offset on the output, where that is all it does: in evaluation
        mode, without gradients. The attention weights sum to 1, and the offset commutes with the maximum. (None, None)
        if it has to be computed.
        """
        norm = self.norm
        if self.training or norm.training or torch.is_grad_enabled() or not self._has_plain_norm():
            return None, None
        if norm.running_mean is None or norm.running_var is None or norm.weight is None:
            return None, None
        factor = norm.weight * (norm.running_var + norm.eps).rsqrt()
        offset = norm.bias - norm.running_mean * factor
        return factor[:, None], offset[:, None, None]

    def _has_plain_norm(self) -> bool:
        """Whether calling the batch norm computes just what its parameters and buffers imply."""
        return type(self.norm) is nn.BatchNorm2d and "forward" not in self.norm.__dict__ and not has_hooks(self.norm)

    def extra_repr(self) -> str:
        """Arguments as given to the constructor."""
        text = f"{self.in_channels}, {self.out_channels}, num_heads={self.num_heads}, block_size={self.block_size}"
        return f"{text}, mixtures={self.mixtures}"


def mixture_weights(row: Tensor, col: Tensor, mixture: Tensor) -> Tensor:
    """p(a, b, m) of embeddings (C, a), (C, b) and (C, m)."""
    place = row[:, :, None] + col[:, None, :]
    return torch.einsum("cab,cm->abm", place, mixture).softmax(-1)


def cuts(pixels: int, size: int) -> list[tuple[int, int]]:
    """An axis as a number of complete blocks and one cut off by the image's edge: (blocks, pixels of a block) each."""
    whole = pixels // size
    # One of a few values, so that compiled code is specialised on it and on nothing else.
    rest = next(n for n in range(size) if pixels % size == n)
    return ([(whole, size)] if whole else []) + ([(1, rest)] if rest else [])


def blocks_of(x: Tensor, height: tuple[int, int], width: tuple[int, int]) -> Tensor:
    """(B, C, H, W) as (blocks, height, width, C) of equal blocks, row by row of each image."""
    return x.unflatten(2, height).unflatten(4, width).permute(0, 2, 4, 3, 5, 1).flatten(0, 2)


@fx.wrap
def max_of_blocks(y: Tensor, size: int) -> Tensor:
    """Maximum of each block and channel."""
    if not torch.compiler.is_compiling():
        size = min(size, max(y.shape[2:]))  # blocks larger than the image are cropped to it
    return F.max_pool2d(y, size, size, ceil_mode=True)


@fx.wrap
def attend_in_blocks(
    x: Tensor,
    qk: Tensor | None,
    value: Tensor | None,
    row: Tensor,
    col: Tensor,
    mixture: Tensor,
    factor: Tensor | None,
    num_heads: int,
    size: int,
    implementation: str | None,
) -> Tensor:
    """Attention inside the blocks of an image, (B, C, H, W) to (B, out_channels, H, W); its values times ``factor``.

    Without weights the image is the projections: queries, keys and mixed values.
    """
    rows, top = [], 0
    for height in cuts(x.shape[2], size):
        parts, left = [], 0
        for width in cuts(x.shape[3], size):
            region = x.narrow(2, top, height[0] * height[1]).narrow(3, left, width[0] * width[1])
            blocks = blocks_of(region, height, width)
            y = attend_in_equal_blocks(blocks, qk, value, row, col, mixture, factor, num_heads, size, implementation)
            y = y.permute(0, 2, 3, 1).unflatten(0, (-1, height[0], width[0]))
            parts.append(y.permute(0, 1, 3, 2, 4, 5).flatten(3, 4).flatten(1, 2))
            left += width[0] * width[1]
        rows.append(torch.cat(parts, 2))
        top += height[0] * height[1]
    return torch.cat(rows, 1).permute(0, 3, 1, 2)


def attend_in_padded_blocks(
    x: Tensor, qk: Tensor, value: Tensor, row: Tensor, col: Tensor, mixture: Tensor, num_heads: int, size: int
) -> tuple[Tensor, Tensor]:
    """Attention inside blocks in plain PyTorch, for exported programs: the same code for every image size.

    Each place in a block has its own projection to q, k and the mixed v, so that all are one grouped convolution of the
    blocks. The image is padded to whole blocks; no pixel attends to the padding.

    Returns:
        (B, out_channels, size², blocks), and (size², blocks) whether a pixel is inside the image.
    """
    height, width = x.shape[-2:]
    rows, cols = (height + size - 1) // size, (width + size - 1) // size
    x = F.pixel_unshuffle(F.pad(x, (0, cols * size - width, 0, rows * size - height)), size)
    x = x.unflatten(1, (-1, size * size)).transpose(1, 2).flatten(1, 2)  # place by place
    places, channels = size * size, value.shape[1]
    mixed = torch.einsum(
        "abm,moc->aboc", mixture_weights(row, col, mixture), value.view(mixture.shape[1], -1, channels)
    )
    weight = torch.cat((qk.flatten(1).expand(places, -1, -1), mixed.flatten(0, 1).to(qk.dtype)), 1)
    qkv = F.conv2d(x, weight.reshape(-1, channels, 1, 1), groups=places).flatten(2)
    qkv = qkv.unflatten(1, (places, 3 * num_heads, -1)).permute(0, 4, 2, 1, 3)  # (B, blocks, 3·N, size², D)
    query, key, value = qkv.clone(memory_format=torch.contiguous_format).chunk(3, 2)
    inside_ah = torch.arange(size, device=x.device)[:, None] + torch.arange(rows, device=x.device) * size < height
    inside_bw = torch.arange(size, device=x.device)[:, None] + torch.arange(cols, device=x.device) * size < width
    seen = (inside_ah[:, None, :, None] & inside_bw[None, :, None, :]).flatten(2).flatten(0, 1)
    logits = (query @ key.transpose(3, 4)).to(torch.promote_types(x.dtype, torch.float32))
    p = logits.masked_fill(~seen.t()[:, None, None, :], float("-inf")).softmax(-1).to(x.dtype)
    return (p @ value).permute(0, 2, 4, 3, 1).clone(memory_format=torch.contiguous_format).flatten(1, 2), seen


def attend_in_equal_blocks(
    blocks: Tensor,
    qk: Tensor | None,
    value: Tensor | None,
    row: Tensor,
    col: Tensor,
    mixture: Tensor,
    factor: Tensor | None,
    num_heads: int,
    size: int,
    implementation: str | None,
) -> Tensor:
    """Attention inside each of equal blocks: (blocks, height, width, C) to (blocks, out_channels, height, width).

    This is a layer on images the size of a block, with masked borders and windows that cover the whole block from every
    pixel. Its input is the image weighted by p, M·C numbers per pixel, whereas weighting the values would take M maps
    of the output's size: v = sum over m of W^m (p_m x), and since the p_m sum to 1, W_Q x is the sum of W_Q (p_m x).
    """
    height, width, channels = blocks.shape[1:]
    reach = 2 * size - 1
    options = num_heads, (reach, reach)
    if qk is None or value is None:
        return attend(
            blocks.permute(0, 3, 1, 2),
            None,
            None,
            None,
            None,
            None,
            *options,
            border="mask",
            implementation=implementation,
        )
    mixtures = mixture.shape[1]
    place = mixture_weights(row[:, :height], col[:, :width], mixture).to(blocks.dtype).flatten(0, 1)
    weigh = torch.einsum("pm,cd->pcmd", place, torch.eye(channels, dtype=place.dtype, device=place.device))
    x = torch.bmm(blocks.flatten(1, 2).transpose(0, 1), weigh.flatten(2))  # pixel by pixel of the block
    x = x.unflatten(0, (height, width)).permute(2, 3, 0, 1)
    value = value.view(mixtures, -1, channels)
    value = (value if factor is None else (value * factor).to(value.dtype)).transpose(0, 1).flatten(1)
    weight = torch.cat((qk.flatten(1).repeat(1, mixtures), value))[:, :, None, None]
    return attend(x, weight, None, None, None, None, *options, border="mask", implementation=implementation)
