"""Geometry of the window: which neighbours each query sees, and how many queries there are.

Along one axis a window of ``k`` taps, ``dilation`` pixels apart, reaches ``(k - 1) // 2`` taps before its centre and
``k // 2`` after: an even window reaches one tap further after than before.

With the border ``"shift"`` a window that reaches out of the image is moved inside, along the pixels that its dilation
steps on: those of the query's phase, p mod dilation. A tap is then at an offset of -(k - 1) to k - 1 from the query.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

BORDERS = ("zero", "mask", "valid", "shift")  # in the order of sasa_border
Pair = tuple[int, int]

# Taps along an axis that a window may always have. Behind a "zero" border every tap takes part in the softmax, also
# those that no image reaches, so a longer window would need memory that grows with the window, not with the image.
MOST_TAPS = 255


class Axis(NamedTuple):
    """One axis of the window, rows or columns.

    Attributes:
        size: pixels of the image along the axis.
        kernel: taps of the window.
        stride: pixels between two window centres.
        dilation: pixels between two taps.
        before: pixels of padding before the first pixel, so that every window has all of its taps; 0 for ``"valid"``.
        after: pixels of padding after the last pixel.
        outputs: number of windows, H' or W'.
        shifted: whether windows that reach out of the image are moved inside.
    """

    size: int
    kernel: int
    stride: int
    dilation: int
    before: int
    after: int
    outputs: int
    shifted: bool = False

    @property
    def offsets(self) -> int:
        """Positions that a tap can have relative to its query; each has its own embedding entry."""
        return 2 * self.kernel - 1 if self.shifted else self.kernel

    @property
    def centres(self) -> slice:
        """Pixels of the image at the centres of the windows: where the queries are sampled."""
        return self._one_a_window((self.kernel - 1) // 2 * self.dilation - self.before)

    def tap(self, index: int) -> slice:
        """Pixels of the padded image that tap ``index`` falls on, one a window."""
        return self._one_a_window(index * self.dilation)

    def _one_a_window(self, start: int) -> slice:
        return slice(start, start + (self.outputs - 1) * self.stride + 1, self.stride)

    def inside(self, device: torch.device) -> Tensor:
        """(kernel, outputs) booleans: whether a tap of a window falls inside the image."""
        taps = torch.arange(self.kernel, device=device)[:, None] * self.dilation - self.before
        pixels = taps + torch.arange(self.outputs, device=device) * self.stride
        return (pixels >= 0) & (pixels < self.size)

    def under_taps(self, device: torch.device) -> Tensor:
        """(kernel, outputs) pixels under the taps of windows that are moved inside the image."""
        queries = torch.arange(self.outputs, device=device) * self.stride
        phase, place = queries % self.dilation, queries // self.dilation
        last = (self.size - 1 - phase) // self.dilation - (self.kernel - 1)  # place of the last window's first tap
        first = torch.minimum((place - (self.kernel - 1) // 2).clamp(min=0), last)
        return (first + torch.arange(self.kernel, device=device)[:, None]) * self.dilation + phase

    def offsets_of_taps(self, device: torch.device) -> Tensor:
        """(kernel, outputs) the taps' entries of an embedding, for windows that are moved inside the image."""
        queries = torch.arange(self.outputs, device=device) * self.stride
        steps = torch.div(self.under_taps(device) - queries, self.dilation, rounding_mode="trunc")  # without rest
        return steps + (self.kernel - 1)


class Window(NamedTuple):
    """The window over both axes of an image, and what lies beyond the image's border.

    Attributes:
        rows: geometry of the rows.
        cols: geometry of the columns.
        border: ``"zero"``, ``"mask"``, ``"valid"`` or ``"shift"``: see :func:`sasa.local_attention`.
    """

    rows: Axis
    cols: Axis
    border: str

    @property
    def taps(self) -> list[tuple[slice, slice]]:
        """The padded pixels under each of the kh·kw taps, row by row: the order of the attention weights."""
        taps = []
        for dy in range(self.rows.kernel):  # no comprehension: torch.export(strict=True) would fix its symbolic sizes
            for dx in range(self.cols.kernel):
                taps.append((self.rows.tap(dy), self.cols.tap(dx)))  # noqa: PERF401
        return taps

    @property
    def skips_pixels(self) -> bool:
        """Whether some pixels are no window's centre, so that their queries are unused."""
        return (self.rows.outputs, self.cols.outputs) != (self.rows.size, self.cols.size)

    @property
    def sizes(self) -> tuple[Pair, Pair, Pair]:
        """Kernel size, stride and dilation, as the operators take them."""
        rows, cols = self.rows, self.cols
        return (rows.kernel, cols.kernel), (rows.stride, cols.stride), (rows.dilation, cols.dilation)


def axis(size: int, kernel: int, stride: int, dilation: int, border: str) -> Axis:
    """Geometry along one axis.

    H' = floor((H - 1) / stride) + 1 for ``"zero"``, ``"mask"`` and ``"shift"``, and
    floor((H - (kh - 1)·dilation - 1) / stride) + 1 for ``"valid"``, whose first window starts at the corner.
    """
    if isinstance(size, int) and not torch.compiler.is_compiling():  # no guards on symbolic sizes
        # All steps longer than the image are equivalent: one window, and every tap but the centre outside the image.
        stride, dilation = min(stride, size), min(dilation, size)
    if border == "valid":
        return Axis(size, kernel, stride, dilation, 0, 0, (size - (kernel - 1) * dilation - 1) // stride + 1)
    before, after = (kernel - 1) // 2 * dilation, kernel // 2 * dilation
    return Axis(size, kernel, stride, dilation, before, after, (size - 1) // stride + 1, border == "shift")


def window(height: int, width: int, kernel_size: Pair, stride: Pair, dilation: Pair, border: str) -> Window:
    """Geometry of the window over a height x width image.

    Raises:
        ValueError: the border is ``"shift"`` and the image is smaller than the window.
    """
    if border == "shift" and isinstance(height, int) and isinstance(width, int):
        must_hold((height, width), kernel_size, dilation)
    return Window(
        axis(height, kernel_size[0], stride[0], dilation[0], border),
        axis(width, kernel_size[1], stride[1], dilation[1], border),
        border,
    )


_cached_window = functools.lru_cache(maxsize=1024)(window)


def window_of(x: Tensor, kernel_size, stride, dilation, border: str) -> Window:
    """Geometry of the window over the last two dimensions of ``x``, from arguments of the operators."""
    height, width = x.shape[-2:]
    pairs = [(pair[0], pair[-1]) for pair in (kernel_size, stride, dilation)]
    if torch.compiler.is_compiling() or not isinstance(height, int) or not isinstance(width, int):
        return window(height, width, pairs[0], pairs[1], pairs[2], border)
    return _cached_window(height, width, *pairs, border)


def must_hold(size: Pair, kernel_size: Pair, dilation: Pair) -> None:
    """Raise ValueError unless every phase of the dilation has as many pixels as the window has taps."""
    least = [k * d for k, d in zip(kernel_size, dilation, strict=True)]
    if size[0] < least[0] or size[1] < least[1]:
        raise ValueError(
            f"query: expected an image of at least {least[0]}x{least[1]} pixels, kernel_size times dilation, "
            f"for border='shift', got {size[0]}x{size[1]}"
        )


def reach(size: int, dilation: int) -> int:
    """Taps on one side of a window's centre that can lie inside the image."""
    return (size - 1) // dilation


def cropped(kernel: int, size: int, dilation: int) -> slice:
    """The taps of an axis that lie inside the image for at least one pixel; the window keeps its centre."""
    most = reach(size, dilation)
    if kernel // 2 <= most:
        return slice(0, kernel)
    return slice((kernel - 1) // 2 - most, (kernel - 1) // 2 + most + 1)
