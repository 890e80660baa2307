"""What a kernel is compiled for: everything that is no pointer, stride or size of an image.

Nothing here depends on the height and width of an image, so one compilation serves all.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from .. import window

# What is known of a tensor's strides when a kernel is compiled.
ANY = 0
CHANNELS = 1  # a pixel's channels follow each other and begin at a multiple of 16 bytes
COLUMNS = 2  # the pixels of a row follow each other


class Axis(NamedTuple):
    """Window along one axis. Tap t of query i falls on pixel i · stride - before + t · dilation; the query itself lies
    under tap (kernel - 1) // 2.

    With a dilation, neighbouring queries share no keys, but those of one phase do: tap t of query
    i = phase + phases · u falls on pixel phase · stride - before + dilation · (step · u + t). In units of ``dilation``
    that is a window without dilation and with stride ``step``.

    Attributes:
        kernel: taps.
        stride: pixels between two queries.
        dilation: pixels between two taps.
        before: pixels of padding before the first pixel.
        phases: dilation / gcd(stride, dilation).
        step: stride / gcd(stride, dilation).
        centre: pixels from the first tap to the centre.
    """

    kernel: int
    stride: int
    dilation: int
    before: int
    phases: int
    step: int
    centre: int

    @classmethod
    def of(cls, axis: window.Axis) -> Axis:
        """The part of the geometry that does not depend on the size of the image."""
        common = math.gcd(axis.stride, axis.dilation)
        centre = (axis.kernel - 1) // 2 * axis.dilation
        return cls(
            axis.kernel,
            axis.stride,
            axis.dilation,
            axis.before,
            axis.dilation // common,
            axis.stride // common,
            centre,
        )


class Problem(NamedTuple):
    """What is computed.

    Attributes:
        y: rows.
        x: columns.
        zero: whether taps outside the image take part, as zeros.
        channels: D.
        channels_pad: the next power of two, of 16 at least.
        value_channels: Dv.
        value_pad: as channels_pad.
        has_row: whether there is a row embedding.
        has_col: whether there is a column embedding.
        query: layout of that tensor; likewise the next four.
        key: ..
        value: ..
        output: ..
        grad_output: ..
        wide: whether offsets inside a plane need 64 bits.
        heads_first: whether programs that run together are for the heads of one tile.
        tensor_cores: whether products are taken by tensor cores, over the halo of a tile, or tap by tap.
        precision: of float32 products on tensor cores: "ieee" or "tf32".
    """

    y: Axis
    x: Axis
    zero: bool
    channels: int
    channels_pad: int
    value_channels: int
    value_pad: int
    has_row: bool
    has_col: bool
    query: int
    key: int
    value: int
    output: int
    grad_output: int
    wide: bool
    heads_first: bool
    tensor_cores: bool
    precision: str
