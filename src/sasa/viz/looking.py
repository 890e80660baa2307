"""What the attention layers of a network see in an image: queries, keys and positions, and all that follows.

For a query at pixel p, a head and the taps t of its window, the logit is the sum of two parts::

    content_t = scale · q[p]·k[p + t]         position_t = scale · q[p]·(row[dy] + col[dx])

Source: Ramachandran et al. 2019 (arXiv 1906.05909), section 3.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..nn import AttentionConv2d, AttentionStem, RelativeSelfAttention
from ..nn.attention_conv import pad
from ..nn.convolution_like import is_plain
from ..nn.position import embeddings_by_head
from ..nn.read_convolution import same_pads
from ..nn.relative_self_attention import prepare
from ..ops import equation
from ..ops.projected import split_heads
from ..ops.window import Window, window_of

Layer = RelativeSelfAttention | AttentionConv2d


def attention_layers(network: nn.Module) -> dict[str, RelativeSelfAttention]:
    """The attention layers of a network by name, in the order of its modules."""
    return {name: module for name, module in network.named_modules() if isinstance(module, RelativeSelfAttention)}


def stems(network: nn.Module) -> list[str]:
    """Names of the attention stems, whose blocks of pixels are not windows: :func:`look` omits them."""
    return [name for name, module in network.named_modules() if isinstance(module, AttentionStem)]


def layer_weights(network: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Attention weights of every layer when the network looks at ``images``.

    Args:
        network: any network with attention layers; run in evaluation mode without gradients.
        images: a batch as the network expects it, (B, C, H, W).

    Returns:
        For each layer (B, N, kh·kw, H', W'), summing to 1 over the taps, which are ordered row by row.

    Raises:
        ValueError: the network has no attention layer.
    """
    layers = attention_layers(network)
    if not layers:
        raise ValueError("network: expected at least one RelativeSelfAttention layer, found none")
    found: dict[str, Tensor] = {}

    def keep(name: str, x: Tensor) -> None:
        found[name] = layers[name].attention_weights(x)

    _run(network, images, dict(layers), keep)
    return found


@dataclass(frozen=True)
class Seen:
    """What one layer sees in one image. h x w windows over a map of H x W pixels, N heads of D channels, kh x kw taps.

    Attributes:
        name: of the layer in its network.
        query: q at the centres of the windows, times the layer's scale: (N, D, h, w).
        key: k of every pixel, with the padding that the layer itself adds: (N, D, H + pads, W + pads).
        row: (N, Dr, kh), on the first Dr channels; None without relative position.
        col: (N, Dc, kw), on the last Dc channels; None likewise.
        window: geometry over the padded map.
        size: (H, W), without the padding.
        offset: rows and columns of padding before the first pixel.
    """

    name: str
    query: Tensor
    key: Tensor
    row: Tensor | None
    col: Tensor | None
    table: Tensor | None
    window: Window
    size: tuple[int, int]
    offset: tuple[int, int] = (0, 0)

    def content(self) -> Tensor:
        """The part of the logits that is q·k: (N, kh·kw, h, w). Taps that a ``"mask"`` border hides are -inf."""
        return self._logits(self.key, None, None, None)

    def position(self) -> Tensor:
        """The part of the logits that is q·r or a learned table, likewise; 0 without relative position."""
        return self._logits(torch.zeros_like(self.key), self.row, self.col, self.table)

    def weights(self) -> Tensor:
        """The attention weights, summing to 1 over the taps: (N, kh·kw, h, w)."""
        return self._logits(self.key, self.row, self.col, self.table).softmax(1)

    def _logits(self, key: Tensor, row: Tensor | None, col: Tensor | None, table: Tensor | None) -> Tensor:
        # The equation samples the queries itself, so they are placed at the windows' centres.
        rows, cols = self.window.rows, self.window.cols
        query = key.new_zeros(*self.query.shape[:2], *key.shape[2:])
        query[..., rows.centres, cols.centres] = self.query
        return equation.logits(query[None], key[None], row, col, table, self.window, 1.0)[0]

    def centre(self, query: tuple[int, int]) -> tuple[int, int]:
        """Row and column of the map, without its padding, at the centre of a query's window."""
        axes = zip((self.window.rows, self.window.cols), query, self.offset, strict=True)
        row, col = (axis.centres.start + place * axis.stride - before for axis, place, before in axes)
        return row, col

    def query_of(self, pixel: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
        """Row and column of the query whose window's centre is nearest to a pixel of an image of ``size``."""
        found = []
        for i, axis in enumerate((self.window.rows, self.window.cols)):
            place = (
                int(pixel[i] / cell(size[i], self.size[i])) + self.offset[i]
            )  # the map may be smaller than the image
            nearest = (2 * (place - axis.centres.start) + axis.stride) // (2 * axis.stride)
            found.append(min(max(nearest, 0), axis.outputs - 1))
        return found[0], found[1]

    def distances(self) -> Tensor:
        """Distance of every tap from the window's centre, in pixels of the map: (kh·kw,)."""
        rows, cols = self.window.rows, self.window.cols
        dy = (torch.arange(rows.kernel) - (rows.kernel - 1) // 2) * float(rows.dilation)
        dx = (torch.arange(cols.kernel) - (cols.kernel - 1) // 2) * float(cols.dilation)
        return torch.hypot(dy[:, None], dx).flatten()


def cell(size: int, places: int) -> float:
    """Pixels along an axis of ``size`` that one of the ``places`` of a map covers.

    Networks halve their maps and round up: 27 pixels become 14 places of 2, the last of which is half padding. If no
    whole number of pixels gives that many places, they are evenly spaced.
    """
    whole = -(-size // places)
    if -(-size // whole) != places:
        return size / places
    power = 1 << (whole - 1).bit_length()
    return float(power if -(-size // power) == places else whole)


def entropy(weights: Tensor, dim: int) -> Tensor:
    """Entropy in bits over the taps: 0 if all the weight is on one, log2(K) if it is uniform over K."""
    return torch.special.entr(weights).sum(dim) / torch.log(torch.tensor(2.0))


def look(network: nn.Module, image: Tensor) -> tuple[list[Seen], Any]:
    """Run the network on one image and record what its attention layers see.

    Args:
        network: with at least one :class:`sasa.RelativeSelfAttention` or :class:`sasa.AttentionConv2d`; run in
            evaluation mode without gradients, and left unchanged. For a layer that runs more than once, the first run
            is recorded.
        image: as the network expects it, (C, H, W).

    Returns:
        What each layer saw, in the order in which they ran, on the CPU in float32; and the network's output.

    Raises:
        ValueError: the image has the wrong rank, there is no attention layer, none ran, or what one saw has NaN or
            infinity.
    """
    if image.dim() != 3:
        raise ValueError(f"image: expected shape (channels, height, width), got {tuple(image.shape)}")
    layers = {name: module for name, module in network.named_modules() if isinstance(module, Layer)}
    if not layers:
        raise ValueError("network: expected at least one RelativeSelfAttention layer, found none")
    found: dict[str, Seen] = {}

    def keep(name: str, x: Tensor) -> None:
        if name not in found:
            layer, x = layers[name], x if x.dim() == 4 else x[None]
            found[name] = (
                _of_layer(name, layer, x) if isinstance(layer, RelativeSelfAttention) else _of_conv(name, layer, x)
            )

    output = _run(network, image[None], layers, keep)
    if not found:
        raise ValueError(f"network: expected an attention layer to run, none of {', '.join(layers)} did")
    for seen in found.values():
        if not (seen.query.isfinite().all() and seen.key.isfinite().all()):
            raise ValueError(f"network: expected finite queries and keys, got NaN or infinity in layer {seen.name}")
    return list(found.values()), output


def _of_layer(name: str, layer: RelativeSelfAttention, x: Tensor) -> Seen:
    if layer.border == "shift":
        raise ValueError(f"network: windows that are moved can't be drawn yet, got border='shift' in layer {name}")
    weight = layer.qkv.weight if is_plain(layer.qkv) else None
    qkv = layer.projected(prepare(x, layer.in_channels, weight, layer.position))
    query, key, _ = split_heads(qkv, layer.num_heads)
    row, col = layer.row_embedding, layer.col_embedding
    if row is not None and col is not None:
        halves = embeddings_by_head(row, col, layer.num_heads, layer.position_split)
        row, col = (half if half.dim() == 3 else half.unflatten(0, (layer.num_heads, -1)) for half in halves)
    window = window_of(key, layer.kernel_size, layer.stride, layer.dilation, layer.border)
    return _seen(
        name, query * layer.scale, key, row, col, layer.position_bias, window, (x.shape[2], x.shape[3]), (0, 0)
    )


def _of_conv(name: str, layer: AttentionConv2d, x: Tensor) -> Seen:
    size = x.shape[2], x.shape[3]
    sizes = layer.kernel_size, layer.stride, layer.dilation
    pads = layer._pads if layer._pads is not None else same_pads(size, *sizes)
    x = pad(x, layer.in_channels, layer.weight, layer._pads, layer.padding_mode, *sizes, layer._beyond)
    query, key = (y.unflatten(1, (layer.num_heads, -1)) for y in (layer.query(x), layer.key(x)))
    window = window_of(key, layer.window, layer.stride, layer.dilation, layer.border)
    offset = pads[2] + layer._beyond[2], pads[0] + layer._beyond[0]
    return _seen(name, query, key, layer.row_embedding, layer.col_embedding, None, window, size, offset)


def _seen(
    name: str,
    query: Tensor,
    key: Tensor,
    row: Tensor | None,
    col: Tensor | None,
    table: Tensor | None,
    window: Window,
    size: tuple[int, int],
    offset: tuple[int, int],
) -> Seen:
    query = query[0][..., window.rows.centres, window.cols.centres]
    tensors = [None if y is None else y.detach().float().cpu() for y in (query, key[0], row, col, table)]
    return Seen(name, *tensors, window, size, offset)  # type: ignore[arg-type]


def _run(network: nn.Module, images: Tensor, layers: dict[str, Any], keep: Callable[[str, Tensor], None]) -> Any:
    """The network's output in evaluation mode; ``keep`` is called with the input of each layer that runs."""

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda module, inputs: keep(name, inputs[0])

    handles = [layer.register_forward_pre_hook(hook(name)) for name, layer in layers.items()]
    modes = [(module, module.training) for module in network.modules()]
    try:
        with torch.no_grad():
            return network.eval()(images)
    finally:
        for module, training in modes:
            module.training = training
        for handle in handles:
            handle.remove()
