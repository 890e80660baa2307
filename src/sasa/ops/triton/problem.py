"""What a kernel is compiled for: everything except pointers, strides and image sizes.

One compilation serves images of all sizes, except those whose offsets need 64 bits.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from .. import window

# What is known of a tensor's strides when a kernel is compiled.
ANY = 0
CHANNELS = 1  # a pixel's channels follow each other and begin at a multiple of 16 bytes
COLUMNS = 2  # the pixels of a row follow each other


class TiledAxis(NamedTuple):
    """Window along one axis. Tap t of query i falls on pixel i · stride - before + t · dilation; the query itself lies
    under tap (kernel - 1) // 2.

    With a dilation, neighbouring queries share no keys, but those of one phase do: tap t of query
    i = phase + phases · u falls on pixel phase · stride - before + dilation · (step · u + t). In units of ``dilation``
    that is a window without dilation and with stride ``step``.

    A window of ``moved`` taps that is moved inside the image reaches at most moved - 1 taps to either side: it is
    treated as a window of 2 · moved - 1 taps of which the others are hidden, as are those outside the image.

    Attributes:
        kernel: taps.
        stride: pixels between two queries.
        dilation: pixels between two taps.
        before: pixels of padding before the first pixel.
        phases: dilation / gcd(stride, dilation).
        step: stride / gcd(stride, dilation).
        centre: pixels from the first tap to the centre.
        moved: taps of a window that is moved inside the image, else 0.
    """

    kernel: int
    stride: int
    dilation: int
    before: int
    phases: int
    step: int
    centre: int
    moved: int

    @classmethod
    def of(cls, axis: window.Axis) -> TiledAxis:
        """The part of the geometry that does not depend on the size of the image.

        A stride or dilation beyond the image is equivalent to one of its size: there is one window, or only its centre
        falls inside. So the number of phases, and of programs, stays within the number of pixels.

        Raises:
            ValueError: the window is so large that its pixels can't be numbered in 32 bits.
        """
        stride, dilation = min(axis.stride, axis.size), min(axis.dilation, axis.size)
        kernel = axis.offsets
        if kernel * dilation + axis.size >= 2**31:
            raise ValueError(
                f"kernel_size: expected a window that spans fewer than 2**31 pixels, got {axis.kernel} taps with "
                f"dilation {axis.dilation} on an image of {axis.size} pixels"
            )
        common = math.gcd(stride, dilation)
        centre = (kernel - 1) // 2 * dilation
        before = centre if axis.shifted else axis.before // axis.dilation * dilation
        moved = axis.kernel if axis.shifted else 0
        return cls(kernel, stride, dilation, before, dilation // common, stride // common, centre, moved)


class Problem(NamedTuple):
    """What is computed. Some field names, such as ``value``, can't be used: they mean something else to Triton.

    Attributes:
        y: rows.
        x: columns.
        zero: whether taps outside the image take part, as zeros.
        channels: D.
        channels_pad: the next power of two; on tensor cores 16 at least.
        value_channels: Dv.
        value_pad: as channels_pad.
        row_channels: channels of the row embedding, the first of a head's; 0 where there is none.
        col_channels: channels of the column embedding, the last of a head's; 0 where there is none.
        has_table: whether a table (kh, kw) is added to the logits.
        query_layout: what is known of the strides of the query and, in the backward, of its gradient.
        key_layout: likewise of the key.
        value_layout: likewise of the value.
        output_layout: of the output in the forward, of its gradient in the backward.
        wide: whether offsets inside a plane need 64 bits.
        heads_first: whether programs that run together are for the heads of one tile.
        element_size: bytes of a number.
        tensor_cores: whether products run on tensor cores, over the halo of a tile, or tap by tap.
        precision: of float32 products on tensor cores: "ieee" or "tf32".
        sum_precision: likewise, for the few products of values summed in float32: the embeddings' gradients.
    """

    y: TiledAxis
    x: TiledAxis
    zero: bool
    channels: int
    channels_pad: int
    value_channels: int
    value_pad: int
    row_channels: int
    col_channels: int
    has_table: bool
    query_layout: int
    key_layout: int
    value_layout: int
    output_layout: int
    wide: bool
    heads_first: bool
    element_size: int
    tensor_cores: bool
    precision: str
    sum_precision: str
