"""Figures of what a network's attention layers have learned: positions, distances, entropy, receptive field."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from ..nn import RelativeSelfAttention
from .attention_maps import chosen
from .looking import cell, entropy
from .payload import as_bytes


def plot_embeddings(layer: RelativeSelfAttention) -> Figure:
    """Draw the learned row and column embeddings of a layer: channels across, taps of the window down.

    Raises:
        ValueError: the layer has none.
    """
    row, col = layer.row_embedding, layer.col_embedding
    if row is None or col is None:
        raise ValueError(f"layer: expected position='relative', got {layer.position!r}")
    most = max(half.detach().abs().max().item() if half.numel() else 0.0 for half in (row, col)) or 1.0
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    panels = figure.subplots(2, 1)
    drawn = []
    for panel, half, name in zip(panels, (row, col), ("row", "column"), strict=True):
        taps = half.shape[1]
        panel.set(ylabel=f"{name} of the window", xlabel=f"channel of the {name} half", title=f"{name} embedding")
        first = -((taps - 1) // 2) - 0.5
        extent = (-0.5, half.shape[0] - 0.5, first + taps, first)
        values = half.detach().float().cpu().T.numpy()
        drawn.append(panel.imshow(values, cmap="PuOr", vmin=-most, vmax=most, aspect="auto", extent=extent))
    figure.colorbar(drawn[0], ax=panels, label="embedding")
    return figure


def plot_position(network: nn.Module, image: Tensor, *, layers: Sequence[str] | None = None) -> Figure:
    """Draw where each head looks by position alone: softmax of q·r as a kh x kw map, mean over the image's queries.

    Args:
        network: with attention layers.
        image: (C, H, W) as the network expects it; r is multiplied by its queries.
        layers: names as returned by :func:`look`; all of them by default.

    Raises:
        ValueError: as :func:`plot_attention`.
    """
    seen, _ = chosen(network, image, layers)
    columns = max(len(one.query) for one in seen)
    figure = Figure(figsize=(1.1 * columns + 1.6, 1.2 * len(seen) + 0.5), layout="constrained")
    rows = figure.subfigures(len(seen), 1, squeeze=False)[:, 0]
    for part, one in zip(rows, seen, strict=True):
        kernel = one.window.rows.kernel, one.window.cols.kernel
        maps = one.position().softmax(1).mean((2, 3)).unflatten(1, kernel).numpy()
        part.suptitle(f"{one.name}: {kernel[0]}x{kernel[1]}", fontsize=8)
        panels = part.subplots(1, columns, squeeze=False)[0]
        for panel in panels[len(maps) :]:
            panel.remove()
        for panel, found in zip(panels, maps, strict=False):
            panel.imshow(found, cmap="viridis", vmin=0)
            panel.set_xticks([])
            panel.set_yticks([])
            panel.set_xlabel(f"max {found.max():.2f}", fontsize=6, labelpad=2)
    return figure


def plot_distances(network: nn.Module, image: Tensor, *, layers: Sequence[str] | None = None) -> Figure:
    """Draw how far each head looks, in pixels of the image, and how evenly, by layer: a dot per head, a mean line.

    Args:
        network: with attention layers.
        image: (C, H, W) as the network expects it.
        layers: names as returned by :func:`look`; all of them by default.

    Raises:
        ValueError: as :func:`plot_attention`.
    """
    seen, size = chosen(network, image, layers)
    figure = Figure(figsize=(8, 2.2 + 0.28 * len(seen)), layout="constrained")
    far, even = figure.subplots(1, 2, sharey=True)
    for place, one in enumerate(seen):
        weights = one.weights()
        pixels = np.sqrt(cell(size[0], one.size[0]) * cell(size[1], one.size[1]))
        distance = torch.einsum("nkhw,k->nhw", weights, one.distances()).mean((1, 2)).numpy() * pixels
        bits = entropy(weights, 1).mean((1, 2)).numpy()
        for panel, values in ((far, distance), (even, bits)):
            panel.plot(values, [place] * len(values), "o", color="C0", alpha=0.5, markersize=5, markeredgewidth=0)
            panel.plot(values.mean(), place, "|", color="black", markersize=14, markeredgewidth=2)
        even.plot(np.log2(weights.shape[1]), place, "x", color="0.5")
    far.set(xlabel="mean distance, pixels of the image", xlim=(0, None), yticks=range(len(seen)))
    far.set_yticklabels([one.name for one in seen], fontsize=7)
    far.invert_yaxis()
    even.set(xlabel="entropy, bits (×: all taps evenly)", xlim=(0, None))
    for panel in (far, even):
        panel.grid(alpha=0.3)
    return figure


def receptive_field(network: nn.Module, images: Tensor, layer: str, pixel: tuple[int, int] | None = None) -> Tensor:
    """How much each pixel of the image matters to one pixel of a layer's output.

    The absolute gradient of the sum of the output's channels, summed over the image's channels, averaged over the
    images, and divided by its maximum. Source: Luo et al. 2016 (arXiv 1701.04128), section 3.

    Args:
        network: run in evaluation mode; no gradients are stored in it.
        images: (B, C, H, W) as the network expects them.
        layer: name of any module whose output is a map, (B, C, h, w).
        pixel: (row, column) of that map; the centre by default.

    Returns:
        (H, W) from 0 to 1.

    Raises:
        ValueError: the layer is unknown, or the pixel lies outside its map.
    """
    modules = dict(network.named_modules())
    if layer not in modules:
        raise ValueError(f"layer: expected the name of a module, got {layer!r}")
    outputs: list[Tensor] = []

    def keep(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        outputs.append(output)

    handle = modules[layer].register_forward_hook(keep)
    modes = [(module, module.training) for module in network.modules()]
    images = images.detach().clone().requires_grad_()
    try:
        with torch.enable_grad():
            network.eval()(images)
            height, width = outputs[0].shape[2:]
            row, col = (height // 2, width // 2) if pixel is None else pixel
            if not (0 <= row < height and 0 <= col < width):
                raise ValueError(f"pixel: expected (row, column) inside the {height}x{width} map, got {pixel}")
            (found,) = torch.autograd.grad(outputs[0][:, :, row, col].sum(), images)
    finally:
        handle.remove()
        for module, training in modes:
            module.training = training
    found = found.abs().sum(1).mean(0).cpu()
    return found / found.max().clamp_min(torch.finfo(found.dtype).tiny)


def plot_receptive_field(
    network: nn.Module, images: Tensor, layers: Sequence[str], pixel: tuple[int, int] | None = None
) -> Figure:
    """Draw :func:`receptive_field` of several layers, as its square root for visibility, next to the first image.

    Raises:
        ValueError: as :func:`receptive_field`; or there is no layer.
    """
    if not layers:
        raise ValueError("layers: expected at least one name, got none")
    figure = Figure(figsize=(2.2 * (len(layers) + 1), 2.5), layout="constrained")
    first, *panels = figure.subplots(1, len(layers) + 1)
    first.imshow(as_bytes(images[0]).permute(1, 2, 0).numpy(), cmap="gray")
    first.set_title("first image", fontsize=8)
    for panel, layer in zip(panels, layers, strict=True):
        found = receptive_field(network, images, layer, pixel)
        panel.imshow(found.sqrt().numpy(), cmap="viridis", vmin=0, vmax=1)
        panel.set_title(f"{layer}\n{(found > 0).float().mean():.0%} of the image", fontsize=7)
    for panel in (first, *panels):
        panel.set_xticks([])
        panel.set_yticks([])
    return figure
