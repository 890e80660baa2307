"""Attention that starts as a convolution, whose function it has exactly, and learns from there."""

from __future__ import annotations

import functools
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

from ..ops import checks
from ..ops.attend import attend_heads
from ..ops.autograd import is_transformed, needs_gradient
from ..ops.memory_format import like_image
from ..ops.precision import autocast
from .convolution_like import ConvolutionLike

STRENGTH = 2.0
_PLANES = 8  # heads times images that fill the vectors of every instruction set


Pads = tuple[int, int, int, int]  # left, right, above, below


def _pads(conv: nn.Conv2d) -> Pads | None:
    """The padding of a convolution; None for zeros that keep the size, which the operator has beyond the border."""
    pads: list[int] = []
    for axis in (1, 0):
        total = conv.dilation[axis] * (conv.kernel_size[axis] - 1)
        if isinstance(conv.padding, str):
            before, after = (total // 2, total - total // 2) if conv.padding == "same" else (0, 0)
        else:
            before = after = conv.padding[axis]
        pads += before, after
    kept = []
    for taps, dilation in zip(conv.kernel_size[::-1], conv.dilation[::-1], strict=True):
        kept += (taps - 1) // 2 * dilation, taps // 2 * dilation
    return None if conv.padding_mode == "zeros" and pads == kept else (pads[0], pads[1], pads[2], pads[3])


@fx.wrap
def pad(x: Tensor, in_channels: int, weight: Tensor, pads: Pads | None, mode: str) -> Tensor:
    """The image with a convolution's padding; raises if it doesn't fit the layer."""
    checks.layer_input(x, in_channels, weight)
    if pads is None or not any(pads):
        return x
    return F.pad(x, pads, mode="constant" if mode == "zeros" else mode)


@fx.wrap
def attend_by_taps(
    x: Tensor,
    query: Tensor,
    key: Tensor,
    row: Tensor | None,
    col: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    dilation: tuple[int, int],
    border: str,
    groups: int,
    implementation: str | None,
    recompute: bool,
) -> Tensor:
    """The output of :class:`AttentionConv2d`: of a few heads at a time, each of which sees the whole input."""
    if x.dim() == 3:
        x, query, key = x.unsqueeze(0), query.unsqueeze(0), key.unsqueeze(0)
        rest = row, col, weight, bias, kernel_size, stride, dilation, border, groups, implementation, recompute
        return attend_by_taps(x, query, key, *rest).squeeze(0)
    heads = weight.shape[0]
    x, query, key, row, col = autocast(x, like_image(query, x), like_image(key, x), row, col)
    query, key = (y.unflatten(1, (heads, y.shape[1] // heads)) for y in (query, key))
    some = functools.partial(_some_heads, kernel_size, stride, dilation, border, groups, implementation)
    if recompute and needs_gradient(x, query, key, row, col, weight) and not is_transformed():
        some = functools.partial(checkpoint, some, use_reentrant=False, preserve_rng_state=False)
    step = max(1, -(-_PLANES // max(1, x.shape[0])))
    output = None
    for first in range(0, heads, step):
        part = slice(first, first + step)
        halves = (None if half is None else half[part] for half in (row, col))
        y = some(x, query[:, part], key[:, part], *halves, weight[part])
        output = y if output is None else output + y
    assert output is not None  # noqa: S101  (for the type checker: there is a head)
    return output if bias is None else output + bias.to(output.dtype)[:, None, None]


def _some_heads(
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    dilation: tuple[int, int],
    border: str,
    groups: int,
    implementation: str | None,
    x: Tensor,
    query: Tensor,
    key: Tensor,
    row: Tensor | None,
    col: Tensor | None,
    weight: Tensor,
) -> Tensor:
    value = x.unsqueeze(1).expand(-1, query.shape[1], -1, -1, -1)
    sizes = kernel_size, stride, dilation, border, 1.0
    seen = attend_heads(query, key, value, row, col, *sizes, implementation)
    parts = [F.conv2d(seen[:, head], weight[head], groups=groups) for head in range(weight.shape[0])]
    return functools.reduce(torch.add, parts)


class AttentionConv2d(nn.Module):
    r"""Local attention of one head for each tap of a convolution, computing that convolution until it is trained on.

    .. math::
        y_p = \beta + \sum_h M_h \sum_t P_{pht} \, x_{p+t}, \qquad
        P_{pht} = \operatorname{softmax}_t\bigl(q_{ph} \cdot (k_{p+t,h} + r_{ht})\bigr), \qquad
        q = W_Q x + b, \quad k = W_K x

    over the taps t of the window; the values are the input itself. At the start :math:`W_Q = W_K = 0` and
    :math:`b \cdot r_{ht} = s \, [t_y = h_y] + s \, [t_x = h_x]`, so that head h looks mostly at tap h, in every pixel
    alike: P is the Kronecker product of two matrices :math:`A = (1 - a) / (1 + (k - 1) a) \, I + a / (1 + (k - 1) a)
    \, 1 1^T` with :math:`a = e^{-s}`. With :math:`M P = C` the layer is the convolution C, for every strength s > 0:
    a large one leaves the softmax no gradient, a small one makes M large (the condition number of A for k = 3 is 7.5
    at s = 1, 2.2 at s = 2, 1.3 at s = 3). That attention can be a convolution in the limit of s is by Cordonnier et
    al. 2020 (arXiv 1911.03584).

    Args:
        conv: the convolution: any kernel size, stride, padding, ``padding_mode``, dilation and groups.
        strength: s.
        implementation: as in :func:`sasa.local_attention`.
        recompute: compute the heads again in the backward, a few at a time, rather than keep their outputs, each as
            large as the input.
        device: where to create the parameters; None: where the convolution's are.

    Shape:
        - Input and output as those of the convolution.

    Attributes:
        query: projection to the queries, N·D channels, with a bias; N = kh·kw, D = 2, or 1 for a window of one row or
            column.
        key: projection to the keys; it has no bias, which would add the same to the logits of all taps.
        row_embedding: (N, 1, kh), added to the keys' first channel by row of the window; None if kh is 1.
        col_embedding: (N, 1, kw), added to the last channel by column; None if kw is 1.
        weight: M, (N, out_channels, in_channels / groups, 1, 1).
        bias: the convolution's.

    Raises:
        TypeError: ``conv`` is no ``nn.Conv2d``, or an argument of the wrong type.
        ValueError: an argument out of range, or a convolution that sees only one pixel.
    """

    transposed: ClassVar[bool] = False  # this and the next are what networks read of a convolution
    output_padding: ClassVar[tuple[int, int]] = (0, 0)
    __prepare_scriptable__ = ConvolutionLike.__prepare_scriptable__

    bias: nn.Parameter | None
    row_embedding: nn.Parameter | None
    col_embedding: nn.Parameter | None

    def __init__(
        self,
        conv: nn.Conv2d,
        strength: float = STRENGTH,
        *,
        implementation: str | None = None,
        recompute: bool = True,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(conv, nn.Conv2d):
            raise TypeError(f"conv: expected an nn.Conv2d, got {type(conv).__name__}")
        if max(conv.kernel_size) == 1:
            raise ValueError("conv: expected a kernel larger than 1x1, which sees one pixel, got 1x1")
        self.strength = checks.number("strength", strength)
        if not 0 < strength <= 10:
            raise ValueError(f"strength: expected more than 0 and at most 10, got {strength}")
        checks.implementation(implementation)
        self.implementation = implementation
        self.recompute = checks.flag("recompute", recompute)
        self.in_channels, self.out_channels, self.groups = conv.in_channels, conv.out_channels, conv.groups
        self.kernel_size, self.stride, self.dilation = conv.kernel_size, conv.stride, conv.dilation
        self.padding, self.padding_mode = conv.padding, conv.padding_mode
        self.pads = _pads(conv)
        self.num_heads = conv.kernel_size[0] * conv.kernel_size[1]
        where: dict[str, Any] = {"device": conv.weight.device if device is None else device, "dtype": conv.weight.dtype}
        width = self.num_heads * sum(taps > 1 for taps in self.kernel_size)
        self.query = nn.Conv2d(self.in_channels, width, 1, **where)
        self.key = nn.Conv2d(self.in_channels, width, 1, bias=False, **where)
        for name, taps in zip(("row_embedding", "col_embedding"), self.kernel_size, strict=True):
            shape = self.num_heads, 1, taps
            self.register_parameter(name, nn.Parameter(torch.empty(shape, **where)) if taps > 1 else None)
        shape = self.num_heads, self.out_channels, self.in_channels // self.groups, 1, 1
        self.weight = nn.Parameter(torch.empty(shape, **where))
        bias = None if conv.bias is None else nn.Parameter(torch.empty(self.out_channels, **where))
        self.register_parameter("bias", bias)
        if not self.weight.is_meta:
            self.take(conv)

    @torch.no_grad()
    def take(self, conv: nn.Conv2d) -> None:
        """Compute what ``conv``, of the same sizes, computes: queries and keys start anew."""
        nn.init.zeros_(self.query.weight)
        nn.init.zeros_(self.key.weight)
        assert self.query.bias is not None  # noqa: S101  (for the type checker)
        nn.init.ones_(self.query.bias)
        inverse = torch.ones(1, 1, dtype=torch.float64)
        heads = torch.arange(self.num_heads)
        own = heads // self.kernel_size[1], heads % self.kernel_size[1]  # each head's row and column of the window
        for embedding, mine, taps in zip((self.row_embedding, self.col_embedding), own, self.kernel_size, strict=True):
            if embedding is not None:
                embedding.copy_(self.strength * F.one_hot(mine, taps)[:, None])
            shares = (self.strength * torch.eye(taps, dtype=torch.float64)).softmax(1)
            inverse = torch.kron(inverse, torch.linalg.inv(shares))
        kernel = conv.weight.detach().to("cpu", torch.float64).flatten(2)  # (out, in / groups, taps)
        self.weight.copy_((kernel @ inverse).permute(2, 0, 1)[..., None, None])
        if self.bias is not None and conv.bias is not None:
            self.bias.copy_(conv.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Attend: (B, in_channels, H, W) to (B, out_channels, H', W'); without the batch, likewise."""
        x = pad(x, self.in_channels, self.weight, self.pads, self.padding_mode)
        embeddings = self.row_embedding, self.col_embedding
        sizes = self.kernel_size, self.stride, self.dilation, "valid" if self.pads is not None else "zero"
        options = self.groups, self.implementation, self.recompute
        return attend_by_taps(x, self.query(x), self.key(x), *embeddings, self.weight, self.bias, *sizes, *options)

    def extra_repr(self) -> str:
        """As the convolution's, with what is its own."""
        text = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
        defaults = {"padding": (0, 0), "dilation": (1, 1), "groups": 1, "padding_mode": "zeros", "strength": STRENGTH}
        defaults |= {"implementation": None, "recompute": True}
        given = {name: getattr(self, name) for name in defaults}
        text += "".join(f", {name}={value!r}" for name, value in given.items() if value != defaults[name])
        return text + (", bias=False" if self.bias is None else "")

    def __repr__(self) -> str:
        # One line, as a convolution has, so that a printed network stays readable.
        return f"{type(self).__name__}({self.extra_repr()})"
