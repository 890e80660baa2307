"""The figure of the module: what one pixel and one head of a layer compute, from the actual tensors."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle
from torch import Tensor, nn

from ..nn import RelativeSelfAttention
from ..ops import equation
from ..ops.projected import split_heads
from .attention_maps import View
from .looking import attention_layers, look
from .payload import as_bytes

SIGNED, WEIGHT = "PuOr", "viridis"


class Tensors(NamedTuple):
    """One head at one pixel: K = kh·kw taps, row by row; D channels per head.

    Attributes:
        view: where the window lies on the image.
        query: q, (D,).
        keys: k under the window, (K, D), zeros outside the image.
        relative: r of every tap, (K, D).
        values: v under the window, (K, D).
        content: q·k, (kh, kw).
        position: q·r, (kh, kw).
        weights: softmax of their sum, (kh, kw).
        output: y, (D,): the weighted sum of the values.
    """

    view: View
    query: Tensor
    keys: Tensor
    relative: Tensor
    values: Tensor
    content: Tensor
    position: Tensor
    weights: Tensor
    output: Tensor


def module_tensors(network: nn.Module, image: Tensor, layer: str, pixel: tuple[int, int], head: int) -> Tensors:
    """What a head of a layer computes at the query nearest to a pixel of the image.

    Raises:
        ValueError: as :func:`plot_attention`; or there is no such head, or the layer has no relative position.
    """
    layers = attention_layers(network)
    if layer not in layers:
        raise ValueError(f"layer: expected one of {', '.join(layers)}, got {layer!r}")
    module, inputs = layers[layer], []
    if not 0 <= head < module.num_heads:
        raise ValueError(f"head: expected 0 to {module.num_heads - 1}, got {head}")
    handle = module.register_forward_pre_hook(lambda _, given: inputs.append(given[0].detach()))
    try:
        (seen,) = [one for one in look(network, image)[0] if one.name == layer]
    finally:
        handle.remove()
    if seen.row is None or seen.col is None:
        raise ValueError(f"layer: expected one with embeddings, got position {module.position!r} in {layer}")
    size = image.shape[1], image.shape[2]
    query, window = seen.query_of(pixel, size), seen.window
    values = _values(module, inputs[0])[head]
    at = (..., *query)
    q, kernel = seen.query[head][at], (window.rows.kernel, window.cols.kernel)
    keys, values = (
        torch.stack([y[0, 0][:, rows, cols][at] for rows, cols in window.taps])
        for y in (equation.pad(one[None, None], window) for one in (seen.key[head], values))
    )
    relative = torch.zeros(*kernel, len(q))
    relative[..., : seen.row.shape[1]] += seen.row[head].T[:, None]
    relative[..., len(q) - seen.col.shape[1] :] += seen.col[head].T[None]
    content, position = (part[head][at].unflatten(0, kernel) for part in (seen.content(), seen.position()))
    weights = seen.weights()[head][at]
    output = weights @ values
    parts = q, keys, relative.flatten(0, 1), values, content, position, weights.unflatten(0, kernel), output
    return Tensors(View(seen, pixel, size), *parts)


def _values(module: RelativeSelfAttention, x: Tensor) -> Tensor:
    with torch.no_grad():
        return split_heads(module.projected(x), module.num_heads)[2][0].float().cpu()


def plot_module(
    network: nn.Module,
    image: Tensor,
    layer: str,
    pixel: tuple[int, int],
    head: int = 0,
    *,
    picture: Tensor | None = None,
) -> Figure:
    """Draw the module at work on one pixel: x, q, k, v and r, logits, softmax, and the sum that is y.

    Args:
        network: with the layer.
        image: (C, H, W) as the network expects it.
        layer: name of a :class:`sasa.RelativeSelfAttention` with relative position.
        pixel: (row, column) in the image.
        head: from 0.
        picture: (C, H, W) to draw instead of ``image``.

    Raises:
        ValueError: as :func:`module_tensors`.
    """
    found = module_tensors(network, image, layer, pixel, head)
    kh, kw = found.weights.shape
    figure = Figure(figsize=(13, 5.2))
    sheet = figure.add_axes((0, 0, 1, 1))
    sheet.set(xlim=(0, 13), ylim=(0, 5.2))
    sheet.axis("off")

    def panel(x: float, y: float, width: float, height: float, title: str, below: str = "") -> Axes:
        axes = figure.add_axes((x / 13, y / 5.2, width / 13, height / 5.2))
        axes.set_xticks([])
        axes.set_yticks([])
        axes.set_title(title, fontsize=11, pad=4)
        axes.set_xlabel(below, fontsize=8, color="0.35", labelpad=3)
        return axes

    def arrow(start: tuple[float, float], end: tuple[float, float], text: str = "", bend: float = 0.0) -> None:
        style = {"arrowstyle": "-|>", "mutation_scale": 11, "color": "0.3", "linewidth": 1.2}
        sheet.add_patch(FancyArrowPatch(start, end, connectionstyle=f"arc3,rad={bend}", **style))
        middle = (start[0] + 2 * end[0]) / 3 - 0.12, (start[1] + 2 * end[1]) / 3 + 0.09
        sheet.text(*middle, text, ha="center", va="bottom", fontsize=10)

    channels = len(found.query)
    strip = 0.13 * channels if channels <= 12 else 1.5  # width of panels with a column per channel
    _draw_input(
        panel(0.2, 1.55, 2.1, 2.1, "x", f"{layer}, query of pixel {pixel[0]}, {pixel[1]}"), image, picture, found
    )
    rows = {"q": (4.45, 0.2), "k": (2.95, 1.05), "r": (1.6, 1.05), "v": (0.25, 1.05)}
    shapes = {"q": "D", "k": f"{kh}·{kw} taps × D", "r": "row half | column half", "v": f"{kh}·{kw} taps × D"}
    tensors = {"q": found.query[None], "k": found.keys, "r": found.relative, "v": found.values}
    for name, (y, height) in rows.items():
        _draw_signed(panel(3.45, y, strip, height, "", ""), tensors[name])
        sheet.text(3.4, y + height / 2, name, fontsize=12, ha="right", va="center", fontweight="bold")
        sheet.text(3.45 + strip / 2, y - 0.05, shapes[name], fontsize=7, color="0.35", ha="center", va="top")
        if name != "r":
            arrow((2.4, 2.6), (3.15, y + height / 2), f"$W_{name.upper()}$")
    right = 3.45 + strip
    most = max(part.abs().max().item() for part in (found.content, found.position, found.content + found.position))
    maps = {
        "q·k": (5.75, 2.75, found.content, "content"),
        "q·r": (5.75, 0.75, found.position, "position"),
        "logit": (7.75, 1.75, found.content + found.position, "their sum"),
    }
    for title, (x, y, values, below) in maps.items():
        _draw_numbers(panel(x, y, 1.45, 1.45 * kh / kw, title, below), values, SIGNED, -most, most)
    _draw_numbers(panel(9.75, 1.75, 1.45, 1.45 * kh / kw, "softmax", "weights, sum 1"), found.weights, WEIGHT, 0, None)
    arrow((right + 0.05, 4.58), (5.68, 4.05), "", -0.12)
    arrow((right + 0.05, 4.5), (5.68, 1.9), "", -0.08)
    arrow((right + 0.05, 3.45), (5.68, 3.45))
    arrow((right + 0.05, 2.1), (5.68, 1.5))
    arrow((7.25, 3.35), (7.7, 2.75))
    arrow((7.25, 1.55), (7.7, 2.25))
    arrow((9.25, 2.47), (9.7, 2.47))
    _draw_signed(panel(11.95, 1.9, 0.32, 1.2, "y", f"head {head + 1}"), found.output[:, None])
    arrow((11.25, 2.47), (11.85, 2.47), "Σ")
    arrow((right + 0.05, 0.4), (12.1, 1.62), "", 0.2)
    equation_text = r"$y_p = \sum_t \, \mathrm{softmax}_t\,(\,q_p \cdot (k_{p+t} + r_t)\,)\; v_{p+t}$"
    sheet.text(7.6, 5.05, equation_text, fontsize=14, ha="center", va="top")
    return figure


def _draw_input(axes: Axes, image: Tensor, picture: Tensor | None, found: Tensors) -> None:
    pixels = as_bytes(image if picture is None else picture).permute(1, 2, 0).numpy()
    axes.imshow(pixels, cmap="gray")
    view = found.view
    corner, size = (view.cols[0], view.rows[0]), (view.cols[-1] - view.cols[0], view.rows[-1] - view.rows[0])
    axes.add_patch(Rectangle(corner, *size, fill=False, edgecolor="white", linewidth=3, clip_on=False))
    axes.add_patch(Rectangle(corner, *size, fill=False, edgecolor="tab:red", linewidth=1.5, clip_on=False))
    for edges, draw, ends in ((view.rows, axes.hlines, corner[0]), (view.cols, axes.vlines, corner[1])):
        draw(edges[1:-1], ends, ends + size[0 if edges is view.rows else 1], color="white", linewidth=0.4)
    axes.plot(view.centre[1], view.centre[0], "o", color="tab:red", markeredgecolor="white", markersize=6)


def _draw_signed(axes: Axes, values: Tensor) -> None:
    most = values.abs().max().item() or 1.0
    axes.imshow(values.numpy(), cmap=SIGNED, vmin=-most, vmax=most, aspect="auto", interpolation="nearest")


def _draw_numbers(axes: Axes, values: Tensor, colours: str, low: float, high: float | None) -> None:
    """A map of the window, with its numbers if there is room."""
    drawn = axes.imshow(values.numpy(), cmap=colours, vmin=low, vmax=high, interpolation="nearest")
    if max(values.shape) > 7:
        return
    for (row, col), value in np.ndenumerate(values.numpy()):
        luminance = np.dot(drawn.cmap(drawn.norm(value))[:3], (0.3, 0.59, 0.11))
        text = f"{value:.2f}" if colours == WEIGHT else f"{round(float(value), 1) + 0:.1f}"
        size = 6.5 if max(values.shape) <= 5 else 4.5
        axes.text(
            col,
            row,
            text.replace("-", "−"),
            ha="center",
            va="center",
            fontsize=size,
            color="black" if luminance > 0.5 else "white",
        )
