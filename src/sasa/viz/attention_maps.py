"""What a pixel attends to: one heat map a head, over the image, for any layer of a network."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor, nn

from ..nn import RelativeSelfAttention
from ..ops.window import axis
from .looking import attention_layers


def _look(network: nn.Module, images: Tensor) -> dict[str, tuple[Tensor, tuple[int, int]]]:
    """Attention weights of every layer, and the height and width of the map it looked at."""
    layers = attention_layers(network)
    if not layers:
        raise ValueError("network: expected at least one RelativeSelfAttention layer, found none")
    seen: dict[str, tuple[Tensor, tuple[int, int]]] = {}

    def keep(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            seen[name] = layers[name].attention_weights(inputs[0]), (inputs[0].shape[2], inputs[0].shape[3])

        return hook

    handles = [layer.register_forward_pre_hook(keep(name)) for name, layer in layers.items()]
    training = network.training
    try:
        with torch.no_grad():
            network.eval()(images)
    finally:
        network.train(training)
        for handle in handles:
            handle.remove()
    return seen


def plot_attention(
    network: nn.Module,
    image: Tensor,
    pixel: tuple[int, int],
    *,
    picture: Tensor | None = None,
    layers: Sequence[str] | None = None,
    title: str = "",
) -> Figure:
    """Draw what one pixel attends to: the image with the pixel and its window, then one heat map a head.

    Args:
        network: with attention layers.
        image: (C, H, W) as the network takes it.
        pixel: (row, column) in the image. Layers on smaller maps show the place of the map that the pixel falls in.
        picture: (C, H, W) to draw in place of ``image``, say before normalisation.
        layers: names from :func:`attention_layers`, one row of the figure each; all of them by default.
        title: over the figure.

    Raises:
        ValueError: no attention layer, an unknown layer, an image of another rank, or a pixel outside of it.
    """
    if image.dim() != 3:
        raise ValueError(f"image: expected shape (channels, height, width), got {tuple(image.shape)}")
    height, width = image.shape[1:]
    if not (0 <= pixel[0] < height and 0 <= pixel[1] < width):
        raise ValueError(f"pixel: expected (row, column) inside the {height}x{width} image, got {pixel}")
    seen = _look(network, image[None])
    weights = {name: weight for name, (weight, _) in seen.items()}
    names = list(weights) if layers is None else list(layers)
    modules = attention_layers(network)
    for name in names:
        if name not in weights:
            raise ValueError(f"layers: expected names among {', '.join(weights)}, got {name!r}")
    background = _as_picture(image if picture is None else picture)

    heads = max(weights[name].shape[1] for name in names)
    figure = Figure(figsize=(1.7 * (heads + 1) + 0.8, 1.72 * len(names) + 0.5), layout="compressed")
    axes = figure.subplots(len(names), heads + 1, squeeze=False)
    mesh = None
    for row, name in zip(axes, names, strict=True):
        view = _View(modules[name], weights[name][0], seen[name][1], pixel, (height, width))
        _draw_image(row[0], background, view)
        row[0].set_ylabel(_label(name, modules[name], weights[name]), fontsize=7)
        for head, panel in enumerate(row[1:]):
            if head >= weights[name].shape[1]:
                panel.axis("off")
                continue
            mesh = _draw_head(panel, background, view, head)
            if name == names[0]:
                panel.set_title(f"head {head + 1}", fontsize=8)
    axes[0][0].set_title("image, pixel, window", fontsize=8)
    if mesh is not None:
        bar = figure.colorbar(mesh, ax=axes, shrink=0.8, aspect=30, pad=0.01)
        bar.set_label("attention weight / the head's largest", fontsize=8)
        bar.ax.tick_params(labelsize=7)
    if title:
        figure.suptitle(title, fontsize=10)
    return figure


class _View:
    """Where the window of one query lies on the image, in pixels of the image."""

    def __init__(
        self,
        layer: RelativeSelfAttention,
        weights_NKhw: Tensor,
        map_size: tuple[int, int],
        pixel: tuple[int, int],
        size: tuple[int, int],
    ) -> None:
        self.size = size
        edges, self.centre, query = [], [], []
        for i in range(2):
            kernel, stride, dilation = layer.kernel_size[i], layer.stride[i], layer.dilation[i]
            geometry = axis(map_size[i], kernel, stride, dilation, layer.border)
            cell = size[i] / map_size[i]  # the layer's map may be smaller than the image
            nearest = round((int(pixel[i] / cell) - geometry.centres.start) / stride)
            query.append(min(max(nearest, 0), geometry.outputs - 1))
            centre = geometry.centres.start + query[i] * stride
            taps = centre + (np.arange(kernel + 1) - (kernel - 1) // 2) * dilation
            edges.append((taps - (dilation - 1) / 2) * cell - 0.5)
            self.centre.append((centre + 0.5) * cell - 0.5)
        self.rows, self.cols = edges
        weights_NK = weights_NKhw[:, :, query[0], query[1]].detach().float().cpu()
        self.weights = weights_NK.unflatten(1, layer.kernel_size).numpy()


def _draw_image(panel: Axes, background: np.ndarray, view: _View) -> None:
    _backdrop(panel, background, view, alpha=1.0)
    left, top = view.cols[0], view.rows[0]
    frame = Rectangle(
        (left, top), view.cols[-1] - left, view.rows[-1] - top, fill=False, edgecolor="red", linewidth=1.2
    )
    panel.add_patch(frame)
    _mark(panel, view)


def _draw_head(panel: Axes, background: np.ndarray, view: _View, head: int):
    _backdrop(panel, background, view, alpha=0.45)
    weights = view.weights[head]
    mesh = panel.pcolormesh(view.cols, view.rows, weights / weights.max(), cmap="inferno", vmin=0, vmax=1, alpha=0.85)
    _mark(panel, view)
    panel.text(
        0.98, 0.02, f"max {weights.max():.2f}", transform=panel.transAxes, ha="right", va="bottom", fontsize=6,
        color="black", bbox={"facecolor": "white", "alpha": 0.8, "linewidth": 0, "pad": 1},
    )  # fmt: skip
    return mesh


def _backdrop(panel: Axes, background: np.ndarray, view: _View, alpha: float) -> None:
    height, width = view.size
    panel.imshow(background, cmap="gray", alpha=alpha, extent=(-0.5, width - 0.5, height - 0.5, -0.5))
    # The window may reach over the border: show all of it.
    panel.set_xlim(min(-0.5, view.cols[0]) - 0.5, max(width - 0.5, view.cols[-1]) + 0.5)
    panel.set_ylim(max(height - 0.5, view.rows[-1]) + 0.5, min(-0.5, view.rows[0]) - 0.5)
    panel.set_aspect("equal")
    panel.set_xticks([])
    panel.set_yticks([])


def _mark(panel: Axes, view: _View) -> None:
    panel.plot(view.centre[1], view.centre[0], marker="+", color="cyan", markersize=6, markeredgewidth=1.2)


def _label(name: str, layer: RelativeSelfAttention, weights: Tensor) -> str:
    height, width = weights.shape[3:]
    return f"{name}\n{layer.kernel_size[0]}x{layer.kernel_size[1]} on {height}x{width}"


def _as_picture(image: Tensor) -> np.ndarray:
    """(C, H, W) as matplotlib draws it, stretched to 0 to 1; grey if it is neither grey nor RGB."""
    image = image.detach().float().cpu()
    image = (image - image.min()) / (image.max() - image.min()).clamp_min(1e-12)
    return image.permute(1, 2, 0).numpy() if image.shape[0] == 3 else image.mean(0).numpy()
