"""The layer: projections to queries, keys and values, then local attention. It can replace a convolution."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, fx, nn

from .._extras import require
from ..ops import checks
from ..ops.attend import attend, attend_weights
from ..ops.memory_format import like_image
from ..ops.projected import split_heads
from ..ops.window import BORDERS
from .convolution_like import ConvolutionLike, is_plain, runs_alone
from .notebook import read_notebook_weights
from .position import (
    POSITION_SPLITS,
    POSITIONS,
    WITH_EMBEDDINGS,
    embedding_rows,
    embeddings_by_head,
    sinusoidal_encoding,
)
from .start import CONTENT, STRENGTH, soft_table, soft_taps

if TYPE_CHECKING:
    from torchinfo import ModelStatistics

_LEAST_SCALE = 2**-10  # that initial weights compensate for: below it they would overflow half precision

fx.wrap("attend")  # torch.fx.symbolic_trace records the call and does not look inside
fx.wrap("like_image")


@fx.wrap
def prepare(x: Tensor, in_channels: int, weight: Tensor | None, position: str) -> Tensor:
    """The input with the position encoding, if any, added; raises if it doesn't fit the layer."""
    checks.layer_input(x, in_channels, weight)
    return x + sinusoidal_encoding(x) if position == "absolute" else x


@fx.wrap
def with_zero_keys(x: Tensor) -> Tensor:
    """(B, 2·C, H, W) of queries and values with zero keys between them, (B, 3·C, H, W), in the same memory format."""
    query, value = x.chunk(2, -3)
    return like_image(torch.cat((query, torch.zeros_like(query), value), -3), x)


class RelativeSelfAttention(ConvolutionLike):
    r"""Local self-attention with relative row and column embeddings, a drop-in for ``nn.Conv2d``.

    .. math::
        y_p = \sum_{t} \operatorname{softmax}_t\bigl(q_p \cdot (k_{p+t} + r_t)\bigr) \, v_{p+t}, \qquad
        q = W_Q x, \; k = W_K x, \; v = W_V x

    over the taps t of the window around pixel p, for each head on its own share of the channels; r is learned.
    Source: Ramachandran et al. 2019 (arXiv 1906.05909), section 3.

    The number of parameters, ``3·in·out`` (+ ``3·out`` biases) + ``out·k`` embeddings, hardly grows with the window.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output, divisible by ``num_heads``.
        kernel_size: window, int or (height, width).
        num_heads: N; each head has ``out_channels / N`` channels.
        stride: distance between the pixels that attend; the output shrinks as a convolution's would.
        dilation: distance between the taps of the window.
        border: ``"zero"``, ``"mask"``, ``"valid"`` or ``"shift"``: see :func:`sasa.local_attention`.
        position: ``"relative"``: r as above; ``"bias"``: r = 0, and a learned table is added to each head's logits, as
            in Swin (arXiv 2103.14030) and the first neighborhood attention (arXiv 2204.07143); ``"absolute"``: r = 0,
            and a fixed sinusoidal encoding of row and column is added to the input; ``"none"``: r = 0; ``"only"``: the
            logits are q·r alone, the ablation of table 6. There are then no keys: the projections have 2·out channels.
        position_split: where the row and column halves of r fall: in every head (``"per_head"``), or row halves in
            the first heads and column halves in the last (``"across_heads"``). ``"last_head"`` gives all heads the last
            head's r, a bug in a well-known notebook, reproduced so that its weights can be used.
        bias: whether the projections have biases.
        scale: factor on the logits; the paper has none.
        pool: average the outputs over pool x pool windows with stride pool: how the paper (section 3.2) replaces a
            convolution of that stride by attention. Unlike with ``stride``, every pixel attends.
        implementation: None for the fastest, or a name: see :func:`sasa.local_attention`.
        recompute: whether to save only the input for the backward, as a convolution does, and project queries, keys and
            values again there, for a fraction of the memory. None does so where the implementation reports that it is
            also faster: the CPU kernels, in float32, for numbers of heads that fill vectors.
        device: where to create the parameters.
        dtype: of the parameters.

    Shape:
        - Input: (B, in_channels, H, W), contiguous or channels_last; or (in_channels, H, W).
        - Output: (B, out_channels, H', W') in the same memory format, or (out_channels, H', W').
          H' = floor((H - 1) / stride) + 1 unless the border is ``"valid"``, then divided by ``pool`` and rounded up
          (``nn.AvgPool2d(pool, ceil_mode=True)``).

    Attributes:
        qkv: the three projections as one 1x1 convolution of 3·out_channels outputs: queries, keys, values; with
            position ``"only"`` 2·out_channels, queries and values.
        row_embedding: row half of r, (channels of the half, kh), with the border ``"shift"`` of 2kh - 1 offsets; None
            unless position is ``"relative"`` or ``"only"``.
        col_embedding: column half of r, (channels of the half, kw); likewise.
        position_bias: table added to the logits, (num_heads, kh, kw), with the border ``"shift"``
            (num_heads, 2kh - 1, 2kw - 1); None unless position is ``"bias"``.
        weight, bias, padding, padding_mode, groups, transposed, output_padding: attributes that other code reads from a
            convolution: weight and bias are those of ``qkv``, the others are those of a convolution that keeps the
            size.

    Raises:
        ValueError: an argument is out of range or the input doesn't fit; the message names it.
        TypeError: an argument has the wrong Python type.

    Example:
        >>> layer = sasa.RelativeSelfAttention(64, 128, kernel_size=7, num_heads=8)
        >>> layer(torch.randn(32, 64, 56, 56)).shape
        torch.Size([32, 128, 56, 56])
    """

    row_embedding: nn.Parameter | None
    col_embedding: nn.Parameter | None
    position_bias: nn.Parameter | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        num_heads: int,
        stride: int | Sequence[int] = 1,
        *,
        dilation: int | Sequence[int] = 1,
        border: str = "zero",
        position: str = "relative",
        position_split: str = "per_head",
        bias: bool = True,
        scale: float = 1.0,
        pool: int = 1,
        implementation: str | None = None,
        recompute: bool | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        sizes = {"in_channels": in_channels, "out_channels": out_channels, "num_heads": num_heads, "pool": pool}
        self.in_channels, self.out_channels, self.num_heads, self.pool = (
            checks.positive(name, size) for name, size in sizes.items()
        )
        if out_channels % num_heads:
            raise ValueError(f"out_channels: expected a multiple of num_heads = {num_heads}, got {out_channels}")
        checks.choice("border", border, BORDERS)
        checks.choice("position", position, POSITIONS)
        checks.choice("position_split", position_split, POSITION_SPLITS)
        checks.implementation(implementation)
        checks.choice("recompute", recompute, (None, True, False))
        self.kernel_size = checks.pair("kernel_size", kernel_size)
        self.stride = checks.pair("stride", stride)
        self.dilation = checks.pair("dilation", dilation)
        self.border = border
        self.position = position
        self.position_split = position_split
        self.scale = checks.number("scale", scale)
        self.implementation = implementation
        self.recompute = recompute
        checks.parameters(
            3 * in_channels * out_channels
            + out_channels * max(self.offsets) * (position in WITH_EMBEDDINGS)
            + num_heads * self.offsets[0] * self.offsets[1] * (position == "bias"),
            in_channels=in_channels,
            out_channels=out_channels,
            kernel_size=self.kernel_size,
        )
        halves = position in WITH_EMBEDDINGS and position_split == "per_head" and self.kernel_size[0] > 1
        if halves and out_channels == num_heads > 1:
            warnings.warn(
                f"num_heads: {num_heads} heads of {out_channels} channels are one channel wide, which leaves no "
                "channel for the rows of the window: they can't tell up from down. Use fewer heads.",
                UserWarning,
                stacklevel=2,
            )

        bias = checks.flag("bias", bias)
        projections = 2 if position == "only" else 3
        self.qkv = nn.Conv2d(in_channels, projections * out_channels, 1, bias=bias, device=device, dtype=dtype)
        if position in WITH_EMBEDDINGS:
            rows = embedding_rows(out_channels, num_heads, position_split)
            self.row_embedding = nn.Parameter(torch.empty(rows, self.offsets[0], device=device, dtype=dtype))
            self.col_embedding = nn.Parameter(
                torch.empty(out_channels - rows, self.offsets[1], device=device, dtype=dtype)
            )
        else:
            self.register_parameter("row_embedding", None)
            self.register_parameter("col_embedding", None)
        if position == "bias":
            self.position_bias = nn.Parameter(torch.empty(num_heads, *self.offsets, device=device, dtype=dtype))
        else:
            self.register_parameter("position_bias", None)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, strength: float | None = STRENGTH) -> None:
        r"""Draw new parameters: each head starts softly on its own tap, and activations keep their variance.

        Args:
            strength: s below, 2.5 by default; 0: no head prefers a tap; None: as described in the last paragraph.

        With b the queries' bias and :math:`t_h` the tap of head h, one of the central 3x3 of the window,

        .. math::
            b \cdot r_t = -s \, |t - t_h|_1, \qquad P_{ht} \approx \prod_{y, x} e^{-s |t - t_h|} / Z

        At s = 2.5 a head gives 0.85 of its weight to its own row, and as much to its own column, whatever the
        window. So together the heads act like a 3x3 convolution (Cordonnier et al. 2020, arXiv 1911.03584). A flat
        softmax is a blur: over k x k uncorrelated pixels it divides the variance by k², so the signal vanishes with
        depth, or is restored by batch norm, whose gradients then explode; and near the border of a small map the window
        would see mostly zeros. The softmax stays soft enough to learn from.

        Values have variance 2, for ReLUs that halve it, as in He et al. 2015 (arXiv 1502.01852). It is not increased to
        compensate for the variance that averaging loses, :math:`1 / \sum_t P_t^2`: neighbouring pixels are correlated,
        more so with depth, and correlated signals aren't averaged out. With correlated images and maps the variance
        would grow without bound.

        q·k starts small: it grows with the square of the input, which grows along residual branches.

        With ``position="bias"`` the table itself holds :math:`-s\,|t - t_h|`. Otherwise, without a strength, a bias or
        embeddings, or with ``position_split="last_head"``, no head can prefer its own tap at every pixel. Then
        q·k and q·r start with variance 1 each for an input of variance 1, where the usual initialisation would give D:
        the factor by which scaled dot-product attention scales the logits is folded into W_Q (as in T5, arXiv
        1910.10683). Half of the queries' variance is their bias, if they have one.
        """
        scale = self.scale if abs(self.scale) >= _LEAST_SCALE else 1.0
        width = self.out_channels // self.num_heads
        weight, bias, row, col = self.qkv.weight, self.qkv.bias, self.row_embedding, self.col_embedding
        queries, values = slice(self.out_channels), slice(-self.out_channels, None)
        nn.init.normal_(weight, std=self.in_channels**-0.5)
        weight[values] *= 2**0.5
        if self.position_bias is not None and strength is not None:
            weight[queries] *= CONTENT * width**-0.5 / scale
            if bias is not None:
                nn.init.zeros_(bias)
            self.position_bias.copy_(soft_table(self.num_heads, self.offsets, checks.number("strength", strength)))
            return
        if strength is None or bias is None or row is None or col is None or self.position_split == "last_head":
            share = 1.0 if bias is None else 0.5**0.5
            weight[queries] *= share * width**-0.5 / scale
            if bias is not None:
                nn.init.zeros_(bias)
                nn.init.normal_(bias[queries], std=share * width**-0.5 / abs(scale))
            for embedding in (row, col):
                if embedding is not None and embedding.numel():
                    nn.init.normal_(embedding)
            if self.position_bias is not None:
                nn.init.zeros_(self.position_bias)
            return
        weight[queries] *= CONTENT * width**-0.5 / scale
        sizes = self.out_channels, self.num_heads, self.offsets, self.position_split
        pull, rows, cols = soft_taps(*sizes, weight.device, checks.number("strength", strength))
        nn.init.zeros_(bias)
        bias[queries] = pull.to(bias.dtype) / scale
        row.copy_(rows)
        col.copy_(cols)

    def forward(self, x: Tensor) -> Tensor:
        """Attend: (B, in_channels, H, W) to (B, out_channels, H', W'); without the batch, likewise."""
        qkv = self.qkv
        alone = runs_alone(qkv)
        if not alone or self.position == "absolute":
            if isinstance(x, Tensor) and x.dim() == 3:
                return self.forward(x.unsqueeze(0)).squeeze(0)
            x = prepare(x, self.in_channels, qkv.weight if is_plain(qkv) else None, self.position)
        if alone and self.position != "only":
            weight, bias = qkv.weight, qkv.bias
        else:  # hooks, and whatever replaced the convolution, are respected
            x, weight, bias = like_image(self.projected(x), x), None, None
        sizes = self.kernel_size, self.stride, self.dilation, self.border
        options = self.scale, self.pool, self.implementation, self.recompute
        return attend(x, weight, bias, *self._embeddings(), self.position_bias, self.num_heads, *sizes, *options)

    def attention_weights(self, x: Tensor) -> Tensor:
        """What each pixel attends to, before any pooling: (B, num_heads, kh·kw, H', W'), taps row by row, summing to 1
        over the taps.
        """
        weight = self.qkv.weight if is_plain(self.qkv) else None
        qkv = self.projected(prepare(x, self.in_channels, weight, self.position))
        sizes = self.kernel_size, self.stride, self.dilation, self.border
        query, key, _ = split_heads(qkv if x.dim() == 4 else qkv.unsqueeze(0), self.num_heads)
        weights = attend_weights(query, key, *self._embeddings(), self.position_bias, *sizes, self.scale)
        return weights if x.dim() == 4 else weights.squeeze(0)

    def projected(self, x: Tensor) -> Tensor:
        """Queries, keys and values, (B, 3·out_channels, H, W), of an input with any position encoding added; keys that
        the layer doesn't have are zero.
        """
        qkv = self.qkv(x)
        return with_zero_keys(qkv) if self.position == "only" else qkv

    def _embeddings(self) -> tuple[Tensor | None, Tensor | None]:
        """The halves of r by head."""
        row, col = self.row_embedding, self.col_embedding
        if row is None or col is None:
            return None, None
        return embeddings_by_head(row, col, self.num_heads, self.position_split)

    @property
    def offsets(self) -> tuple[int, int]:
        """Number of positions relative to a query, vertical and horizontal, that the layer distinguishes."""
        height, width = self.kernel_size
        return (2 * height - 1, 2 * width - 1) if self.border == "shift" else (height, width)

    @property
    def padding(self) -> tuple[int, int]:
        """That of a convolution with this window and the same output size: 0 for the border ``"valid"``."""
        if self.border == "valid":
            return 0, 0
        height, width = ((k - 1) * d // 2 for k, d in zip(self.kernel_size, self.dilation, strict=True))
        return height, width

    def _projection(self) -> nn.Module:
        return self.qkv

    def summary(self, x: Tensor) -> ModelStatistics:
        """Print a table of the layer's parts, output shapes and parameters for the input ``x`` (torchinfo).

        Returns:
            torchinfo's statistics, which a notebook shows as that table.
        """
        torchinfo = require("torchinfo", extra="models")
        return torchinfo.summary(self, input_data=x, col_names=("output_size", "num_params", "trainable"), depth=2)

    @classmethod
    def from_notebook(
        cls,
        state_dict: Mapping[str, Tensor],
        num_heads: int,
        stride: int = 1,
        last_head_embedding: bool = False,
    ) -> RelativeSelfAttention:
        """The layer with the weights of the notebook's module of the same name, giving its output.

        Args:
            state_dict: ``qx.0.weight``, ``qx.0.bias``, the same of ``kx`` and ``vx``, ``row_embeddings``,
                ``col_embeddings``.
            num_heads: the module's ``groups``, which can't be inferred from its weights.
            stride: the module's stride.
            last_head_embedding: reproduce the module's bug of using the last head's embedding for every head. False
                gives every head its own, as in the paper.

        Raises:
            ValueError: keys missing or unknown, shapes that don't fit each other, or an even window, which the module
                can't run.
        """
        arguments, weights = read_notebook_weights(state_dict)
        split = "last_head" if last_head_embedding else "across_heads"
        like = weights["qkv.weight"]
        layer = cls(
            num_heads=num_heads, stride=stride, position_split=split, device=like.device, dtype=like.dtype, **arguments
        )
        layer.load_state_dict(weights)
        return layer

    def extra_repr(self) -> str:
        """Arguments as given to the constructor, omitting defaults except those that ``nn.Conv2d`` shows."""
        parts = [f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}"]
        parts += [f"num_heads={self.num_heads}, stride={self.stride}"]
        defaults = {"dilation": (1, 1), "border": "zero", "position": "relative", "position_split": "per_head"}
        defaults |= {"scale": 1.0, "pool": 1, "implementation": None, "recompute": None}
        for name, default in defaults.items():
            if getattr(self, name) != default:
                parts.append(f"{name}={getattr(self, name)!r}")
        if self.qkv.bias is None:
            parts.append("bias=False")
        return ", ".join(parts)

    def __repr__(self) -> str:
        # One line, as a convolution has, so that a printed network stays readable.
        return f"{type(self).__name__}({self.extra_repr()})"
