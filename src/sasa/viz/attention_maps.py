"""What a pixel attends to: one heat map per head, over the image, for any layer of a network."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor, nn

from .looking import Seen, cell, look
from .payload import as_bytes

_MARGIN = 0.2  # of the image's side, drawn beyond it for windows that reach that far


def plot_attention(
    network: nn.Module,
    image: Tensor,
    pixel: tuple[int, int],
    *,
    picture: Tensor | None = None,
    layers: Sequence[str] | None = None,
    title: str = "",
) -> Figure:
    """Draw what one pixel attends to: the image with the pixel and its window, then one heat map per head.

    All panels show the image at the same scale. Windows that reach beyond its border are drawn up to a fifth of its
    side.

    Args:
        network: with attention layers.
        image: (C, H, W) as the network expects it.
        pixel: (row, column) in the image. Layers on smaller maps show the position of the map that contains the pixel.
        picture: (C, H, W) to draw instead of ``image``, e.g. the image before normalisation.
        layers: names as returned by :func:`look`; all of them by default.
        title: of the figure.

    Raises:
        ValueError: there is no attention layer, a layer is unknown, the image has the wrong rank, or the pixel lies
            outside it.
    """
    seen, size = chosen(network, image, layers)
    if not (0 <= pixel[0] < size[0] and 0 <= pixel[1] < size[1]):
        raise ValueError(f"pixel: expected (row, column) inside the {size[0]}x{size[1]} image, got {pixel}")
    background = as_bytes(image if picture is None else picture).permute(1, 2, 0).numpy()
    background = background if background.shape[2] == 3 else background[:, :, 0]
    views = [View(one, pixel, size) for one in seen]
    # As many columns as the layer with the fewest heads needs, so that no panel stays empty; others take several rows.
    columns = max(4, min(min(len(view.weights) for view in views), 8))
    lines = [math.ceil(len(view.weights) / columns) for view in views]
    figure = Figure(figsize=(1.6 * (columns + 1) + 0.9, 1.66 * sum(lines) + 0.6), layout="compressed")
    grid = figure.add_gridspec(sum(lines), columns + 1)
    limits, mesh, panels, row = _limits(views, size), None, [], 0
    for view, height in zip(views, lines, strict=True):
        panels.append(panel := figure.add_subplot(grid[row, 0]))
        _draw_image(panel, background, view, limits)
        panel.set_title(view.label, fontsize=7)
        for head in range(len(view.weights)):
            panels.append(panel := figure.add_subplot(grid[row + head // columns, 1 + head % columns]))
            mesh = _draw_head(panel, background, view, head, limits)
            panel.set_title(f"head {head + 1}, largest {view.weights[head].max():.2f}", fontsize=7)
        row += height
    if mesh is not None:
        bar = figure.colorbar(mesh, ax=panels, shrink=0.8, aspect=30, pad=0.01)
        bar.set_label("attention weight / the head's largest", fontsize=8)
        bar.ax.tick_params(labelsize=7)
    if title:
        figure.suptitle(title, fontsize=10)
    return figure


def chosen(network: nn.Module, image: Tensor, layers: Sequence[str] | None) -> tuple[list[Seen], tuple[int, int]]:
    """What the named layers see (all layers for None), and the image's size.

    Raises:
        ValueError: as :func:`look`; or a layer is unknown.
    """
    seen, _ = look(network, image)
    known = {one.name: one for one in seen}
    for name in layers or ():
        if name not in known:
            raise ValueError(f"layers: expected names among {', '.join(known)}, got {name!r}")
    return [known[name] for name in layers or known], (image.shape[1], image.shape[2])


class View:
    """Where the window of one query lies on the image, in pixels of the image."""

    def __init__(self, seen: Seen, pixel: tuple[int, int], size: tuple[int, int]) -> None:
        query = seen.query_of(pixel, size)
        window = seen.window
        self.size = size
        edges, self.centre = [], []
        for i, (axis, middle) in enumerate(zip((window.rows, window.cols), seen.centre(query), strict=True)):
            pixels = cell(size[i], seen.size[i])  # the layer's map may be smaller than the image
            taps = middle + (np.arange(axis.kernel + 1) - (axis.kernel - 1) // 2) * axis.dilation
            edges.append((taps - (axis.dilation - 1) / 2) * pixels - 0.5)
            self.centre.append((middle + 0.5) * pixels - 0.5)
        self.rows, self.cols = edges
        kernel = window.rows.kernel, window.cols.kernel
        self.weights = seen.weights()[:, :, query[0], query[1]].unflatten(1, kernel).numpy()
        self.label = f"{seen.name}\n{kernel[0]}x{kernel[1]} on {seen.size[0]}x{seen.size[1]}"


def _limits(views: Sequence[View], size: tuple[int, int]) -> tuple[tuple[float, float], tuple[float, float]]:
    """Ends of the columns and the rows that every panel shows."""
    ends = []
    for side, edges in ((size[1], [view.cols for view in views]), (size[0], [view.rows for view in views])):
        first, last = min(edge[0] for edge in edges), max(edge[-1] for edge in edges)
        margin = _MARGIN * side
        ends.append((max(min(first, -0.5), -margin) - 0.5, min(max(last, side - 0.5), side + margin) + 0.5))
    return ends[0], ends[1]


def _draw_image(panel: Axes, background: np.ndarray, view: View, limits) -> None:
    _backdrop(panel, background, view, limits, alpha=1.0)
    left, top = view.cols[0], view.rows[0]
    size = view.cols[-1] - left, view.rows[-1] - top
    panel.add_patch(Rectangle((left, top), *size, fill=False, edgecolor="white", linewidth=2.4))
    panel.add_patch(Rectangle((left, top), *size, fill=False, edgecolor="black", linewidth=1))
    _mark(panel, view)


def _draw_head(panel: Axes, background: np.ndarray, view: View, head: int, limits):
    _backdrop(panel, background, view, limits, alpha=0.45)
    weights = view.weights[head]
    mesh = panel.pcolormesh(view.cols, view.rows, weights / weights.max(), cmap="viridis", vmin=0, vmax=1, alpha=0.85)
    _mark(panel, view)
    return mesh


def _backdrop(panel: Axes, background: np.ndarray, view: View, limits, alpha: float) -> None:
    height, width = view.size
    panel.set_facecolor("0.88")  # what lies outside the image
    panel.imshow(np.zeros((1, 1)), cmap="gray", extent=(-0.5, width - 0.5, height - 0.5, -0.5), vmin=-1, vmax=0)
    panel.imshow(background, cmap="gray", alpha=alpha, extent=(-0.5, width - 0.5, height - 0.5, -0.5), vmin=0, vmax=255)
    panel.set_xlim(*limits[0])
    panel.set_ylim(*limits[1][::-1])
    panel.set_aspect("equal")
    panel.set_xticks([])
    panel.set_yticks([])


def _mark(panel: Axes, view: View) -> None:
    panel.plot(
        view.centre[1], view.centre[0], "o", markersize=3.5, color="white", markeredgecolor="black", markeredgewidth=1
    )
