"""Attention that starts out computing exactly what a convolution computes, and learns from there."""

from __future__ import annotations

import functools
from collections.abc import Sequence
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
from ..ops.window import Pair
from .convolution_like import ConvolutionLike
from .read_convolution import Convolution, Pads, read, same_pads

STRENGTH = 2.0
MARGIN = 10.0
_PLANES = 8  # heads times images, enough to fill the vectors of every instruction set


@fx.wrap
def pad(
    x: Tensor,
    in_channels: int,
    weight: Tensor,
    pads: Pads | None,
    mode: str,
    kernel_size: Pair,
    stride: Pair,
    dilation: Pair,
    beyond: Pads,
) -> Tensor:
    """The image with a convolution's padding, and zeros beyond it; raises if it doesn't fit the layer."""
    checks.layer_input(x, in_channels, weight)
    if pads is None:
        height, width = x.shape[-2:]
        pads = same_pads((height, width), kernel_size, stride, dilation)
    if any(pads) and mode != "zeros":
        x, pads = F.pad(x, pads, mode=mode), (0, 0, 0, 0)
    total = [a + b for a, b in zip(pads, beyond, strict=True)]
    return F.pad(x, total) if any(total) else x


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
    """The output of :class:`AttentionConv2d`, computed a few heads at a time, each of which sees the whole input."""
    batched = x.dim() == 4
    if not batched:
        x, query, key = x.unsqueeze(0), query.unsqueeze(0), key.unsqueeze(0)
    heads = weight.shape[0]
    x, query, key, row, col = autocast(x, like_image(query, x), like_image(key, x), row, col)
    query, key = (y.unflatten(1, (heads, y.shape[1] // heads)) for y in (query, key))
    some = functools.partial(_some_heads, kernel_size, stride, dilation, border, groups, implementation)
    if recompute and needs_gradient(x, query, key, row, col, weight) and not is_transformed():
        some = functools.partial(checkpoint, some, use_reentrant=False, preserve_rng_state=False)
    # Exported programs compute all heads at once: a loop would specialize them to the batch size.
    step = heads if torch.compiler.is_exporting() else max(1, -(-_PLANES // max(1, x.shape[0])))
    output = None
    for first in range(0, heads, step):
        part = slice(first, first + step)
        rows, cols = (None if half is None else half[part] for half in (row, col))
        y = some(x, query[:, part], key[:, part], rows, cols, weight[part])
        output = y if output is None else output.add_(y)  # no backward needs its previous value
    assert output is not None  # noqa: S101  (for the type checker: there is a head)
    if bias is not None:
        output = output + bias.to(output.dtype)[:, None, None]
    return output if batched else output.squeeze(0)


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
    seen = attend_heads(query, key, value, row, col, None, *sizes, implementation)
    parts = [F.conv2d(seen[:, head], weight[head], groups=groups) for head in range(weight.shape[0])]
    return functools.reduce(torch.add, parts)


class AttentionConv2d(nn.Module):
    r"""Local attention with one head per tap of a convolution, computing that convolution until it is trained.

    .. math::
        y_p = \beta + \sum_h M_h \sum_t P_{pht} \, x_{p+t}, \qquad
        P_{pht} = \operatorname{softmax}_t\bigl(q_{ph} \cdot (k_{p+t,h} + r_{ht})\bigr), \qquad
        q = W_Q x + b, \quad k = W_K x

    over the taps t of the window; the values are the input itself. At the start :math:`W_Q = W_K = 0` and
    :math:`b \cdot r_{ht} = s \, [t_y = h_y] + s \, [t_x = h_x]`, so that head h looks mostly at tap h, equally at every
    pixel: P is the Kronecker product of two matrices :math:`A = (1 - a) / (1 + (k - 1) a) \, I + a / (1 + (k - 1) a) \,
    1 1^T` with :math:`a = e^{-s}`. With :math:`M P = C` the layer is the convolution C, for every strength s > 0: a
    large one leaves the softmax with no gradient, a small one makes M large (the condition number of A for k = 3 is 7.5
    at s = 1, 2.2 at s = 2, 1.3 at s = 3). That attention can express a convolution in the limit of large s was shown by
    Cordonnier et al. 2020 (arXiv 1911.03584).

    A window larger than the kernel starts with the logit :math:`-L` (``margin``) at each row and column beyond it.
    These taps are then the only difference from the convolution: their weights, and the gradients they learn from, are
    about :math:`e^{-L}` times those of the others.

    Args:
        conv: the convolution: any kernel size, stride, padding, ``padding_mode``, dilation and groups; also a subclass
            that standardizes its weight, or whose padding depends on the image size (TensorFlow's "same").
        strength: s.
        kernel_size: window of the attention, int or (height, width), at least the convolution's; None: the
            convolution's.
        margin: L.
        implementation: as in :func:`sasa.local_attention`.
        recompute: recompute the heads in the backward, a few at a time, instead of saving their outputs, each as large
            as the input.
        device: where to create the parameters; None: where the convolution's are.

    Shape:
        - Input and output as those of the convolution.

    Attributes:
        query: projection to the queries, N·D channels, with a bias; N is the number of the convolution's taps, D = 2,
            or 1 for a window of one row or column.
        key: projection to the keys, without a bias, which would add the same value to the logits of all taps.
        row_embedding: (N, 1, height of the window), added to the keys' first channel; None if that is 1.
        col_embedding: (N, 1, width of the window), added to their last channel; None if that is 1.
        weight: M, (N, out_channels, in_channels / groups, 1, 1).
        bias: the convolution's.
        kernel_size, stride, padding, padding_mode, dilation, groups: the convolution's.
        window: (height, width) of the attention.

    Raises:
        TypeError: ``conv`` is not an ``nn.Conv2d``, or an argument has the wrong type.
        ValueError: an argument is out of range, or the convolution sees only one pixel or is not understood.
    """

    transposed: ClassVar[bool] = False  # this and the next are attributes that networks read from a convolution
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
        kernel_size: int | Sequence[int] | None = None,
        margin: float = MARGIN,
        implementation: str | None = None,
        recompute: bool = True,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(conv, nn.Conv2d):
            raise TypeError(f"conv: expected an nn.Conv2d, got {type(conv).__name__}")
        if max(conv.kernel_size) == 1:
            raise ValueError("conv: expected a kernel larger than 1x1, which sees one pixel, got 1x1")
        found = read(conv)
        if isinstance(found, str):
            raise ValueError(f"conv: expected a convolution that can be rebuilt, got one where {found}")
        self.strength, self.margin = checks.number("strength", strength), checks.number("margin", margin)
        if not 0 < strength <= 10:
            raise ValueError(f"strength: expected more than 0 and at most 10, got {strength}")
        if not 0 < margin <= 100:
            raise ValueError(f"margin: expected more than 0 and at most 100, got {margin}")
        checks.implementation(implementation)
        self.implementation = implementation
        self.recompute = checks.flag("recompute", recompute)
        self.in_channels, self.out_channels, self.groups = conv.in_channels, conv.out_channels, found.groups
        self.kernel_size, self.stride, self.dilation = found.kernel_size, found.stride, found.dilation
        self.padding, self.padding_mode = conv.padding, found.padding_mode
        self.window = self.kernel_size if kernel_size is None else checks.pair("kernel_size", kernel_size)
        if any(w < k for w, k in zip(self.window, self.kernel_size, strict=True)):
            raise ValueError(f"kernel_size: expected at least the convolution's {self.kernel_size}, got {self.window}")
        self._place(found)
        self.num_heads = self.kernel_size[0] * self.kernel_size[1]
        where: dict[str, Any] = {"device": conv.weight.device if device is None else device, "dtype": conv.weight.dtype}
        width = self.num_heads * sum(taps > 1 for taps in self.window)
        self.query = nn.Conv2d(self.in_channels, width, 1, **where)
        self.key = nn.Conv2d(self.in_channels, width, 1, bias=False, **where)
        for name, taps in zip(("row_embedding", "col_embedding"), self.window, strict=True):
            shape = self.num_heads, 1, taps
            self.register_parameter(name, nn.Parameter(torch.empty(shape, **where)) if taps > 1 else None)
        shape = self.num_heads, self.out_channels, self.in_channels // self.groups, 1, 1
        self.weight = nn.Parameter(torch.empty(shape, **where))
        bias = None if found.bias is None else nn.Parameter(torch.empty(self.out_channels, **where))
        self.register_parameter("bias", bias)
        if not self.weight.is_meta:
            self._take(found)

    def _place(self, conv: Convolution) -> None:
        """How to pad for a window with the kernel at its centre."""
        kept: list[int] = []
        beyond: list[int] = []
        for axis in (1, 0):
            kernel, window, dilation = conv.kernel_size[axis], self.window[axis], conv.dilation[axis]
            kept += (kernel - 1) // 2 * dilation, kernel // 2 * dilation
            before = (window - 1) // 2 - (kernel - 1) // 2
            beyond += before * dilation, (window - kernel - before) * dilation
        none = 0, 0, 0, 0
        # Zero padding that keeps the size is what the operator itself assumes beyond the border of the image.
        self.border = "zero" if conv.padding_mode == "zeros" and conv.pads == tuple(kept) else "valid"
        self._pads: Pads | None = none if self.border == "zero" else conv.pads
        self._beyond: Pads = none if self.border == "zero" else (beyond[0], beyond[1], beyond[2], beyond[3])

    @torch.no_grad()
    def _take(self, conv: Convolution) -> None:
        """Compute what ``conv`` computes."""
        nn.init.zeros_(self.query.weight)
        nn.init.zeros_(self.key.weight)
        assert self.query.bias is not None  # noqa: S101  (for the type checker)
        nn.init.ones_(self.query.bias)
        inverse = torch.ones(1, 1, dtype=torch.float64)
        heads = torch.arange(self.num_heads)
        own = heads // self.kernel_size[1], heads % self.kernel_size[1]  # each head's row and column of the kernel
        embeddings = self.row_embedding, self.col_embedding
        for embedding, mine, kernel, window in zip(embeddings, own, self.kernel_size, self.window, strict=True):
            first = (window - 1) // 2 - (kernel - 1) // 2
            inside = slice(first, first + kernel)
            logits = torch.full((kernel, window), -self.margin, dtype=torch.float64)
            logits[:, inside] = self.strength * torch.eye(kernel, dtype=torch.float64)
            if embedding is not None:
                embedding.copy_(logits[mine][:, None])
            inverse = torch.kron(inverse, torch.linalg.inv(logits.softmax(1)[:, inside]))
        kernel = conv.weight.detach().to("cpu", torch.float64).flatten(2)  # (out, in / groups, taps)
        self.weight.copy_((kernel @ inverse).permute(2, 0, 1)[..., None, None])
        if self.bias is not None and conv.bias is not None:
            self.bias.copy_(conv.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Attend: (B, in_channels, H, W) to (B, out_channels, H', W'); without the batch, likewise."""
        sizes = self.kernel_size, self.stride, self.dilation
        x = pad(x, self.in_channels, self.weight, self._pads, self.padding_mode, *sizes, self._beyond)
        embeddings = self.row_embedding, self.col_embedding
        sizes = self.window, self.stride, self.dilation, self.border
        options = self.groups, self.implementation, self.recompute
        return attend_by_taps(x, self.query(x), self.key(x), *embeddings, self.weight, self.bias, *sizes, *options)

    def extra_repr(self) -> str:
        """Like the convolution's, plus the layer's own arguments."""
        text = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
        defaults = {"padding": (0, 0), "dilation": (1, 1), "groups": 1, "padding_mode": "zeros", "strength": STRENGTH}
        defaults |= {"window": self.kernel_size, "margin": MARGIN, "implementation": None, "recompute": True}
        given = {name: getattr(self, name) for name in defaults}
        text += "".join(f", {name}={value!r}" for name, value in given.items() if value != defaults[name])
        return text + (", bias=False" if self.bias is None else "")

    def __repr__(self) -> str:
        # One line, as a convolution has, so that a printed network stays readable.
        return f"{type(self).__name__}({self.extra_repr()})"
