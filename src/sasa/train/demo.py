"""The demonstration: attention, its convolutional twin and a linear classifier on the same images, with figures.

Imports Lightning, timm and Matplotlib only when it is called.
"""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import OutputError
from .folder import Result, prepare_folder
from .recipe import Recipe

if TYPE_CHECKING:
    from torch import Tensor

ATTENTION, CONVOLUTION, LINEAR = "sasa_resnet14", "resnet14", "linear classifier"


def demo(out: Path = Path("runs/demo"), data: Path | None = None, epochs: int = 12, seed: int = 0) -> list[Result]:
    """Train a network of attention, its convolutional twin and a linear classifier, and draw what attention sees.

    Writes each run to its own folder in out, and ``results.json``, ``curves.png`` and ``attention.png``.
    An earlier demonstration in out is replaced.

    Args:
        out: folder to write to.
        data: as for sasa train; by default the packaged images.
        epochs: passes over the training images.
        seed: of the parameters and the order of the images.

    Raises:
        DataError: data can't be trained on.
        OptionError: epochs or seed is out of range.
        OutputError: out can't be written, or contains something other than a demonstration.
    """
    import torch
    from rich.console import Console

    from ..viz import plot_attention, plot_curves
    from .data import ImageData
    from .fit import train
    from .sources import open_source
    from .weights import load_model

    # Without augmentation, which pays off only with more epochs than a demonstration has.
    recipe = Recipe(data=data, epochs=epochs, seed=seed, augment="none", devices=1)
    recipe.check()
    if out.is_dir() and not (out / "linear").is_dir() and any(out.iterdir()):
        raise OutputError(f"out: expected an empty folder or an earlier demonstration, got {out}")
    console = Console()
    source = open_source(data)
    prepare_folder(out, overwrite=True)
    console.print("[bold]1/3[/] a linear classifier, for comparison")
    results = [_linear(source, out / "linear", recipe)]
    for step, (model, what) in enumerate(((CONVOLUTION, "3x3 convolution"), (ATTENTION, "local self-attention")), 2):
        console.print(f"[bold]{step}/3[/] {model}: a residual network of {what}")
        results.append(train(replace(recipe, model=model), out / model, overwrite=True))

    (out / "results.json").write_text(json.dumps([asdict(result) for result in results], indent=2) + "\n")
    logs = {result.model: out / result.model / "metrics.csv" for result in results[1:]}
    title = f"{results[0].train_images:,} training and {results[0].val_images:,} validation images"
    plot_curves(logs, title).savefig(out / "curves.png", dpi=130)

    network, facts = load_model(out / ATTENTION / "model.safetensors")
    batches = ImageData(source, recipe)
    batch = next(iter(batches.val_dataloader()))
    image, label = batches.normalise(batch.images)[0], int(batch.labels[0])
    with torch.no_grad():
        guess = facts["classes"][int(network(image[None]).argmax())]
    pixel = _edge_pixel(image)
    caption = (
        f"{facts['classes'][label]}, classified as {guess}: what the pixel at row {pixel[0]}, column {pixel[1]} sees"
    )
    plot_attention(network, image, pixel, title=caption).savefig(out / "attention.png", dpi=130)

    console.print(table(results))
    for name in ("results.json", "curves.png", "attention.png"):
        console.print(f"wrote {out / name}", highlight=False, soft_wrap=True)
    return results


def table(results: list[Result]) -> Any:
    """Accuracy and cost of the runs, side by side."""
    from rich.table import Table

    rows = Table(title="validation accuracy after the last epoch")
    rows.add_column("network")
    for column in ("top-1", "parameters", "MFLOPs per image", "seconds per epoch"):
        rows.add_column(column, justify="right")
    for result in results:
        figures = f"{result.top1:.1%}", f"{result.parameters:,}", f"{result.flops / 1e6:.2f}"
        rows.add_row(result.model, *figures, f"{result.seconds_per_epoch:.1f}")
    return rows


def _linear(source: Any, out: Path, recipe: Recipe) -> Result:
    """A linear classifier on the pixels."""
    from torch import nn

    from .fit import fit
    from .order import seed_everything

    prepare_folder(out, overwrite=True)
    seed_everything(recipe.seed)
    pixels = source.channels * recipe.image_size**2
    network = nn.Sequential(nn.Flatten(), nn.Linear(pixels, len(source.classes)))
    return fit(replace(recipe, learning_rate=1e-3, model=LINEAR), network, source, out, overwrite=True)


def _edge_pixel(image: Tensor) -> tuple[int, int]:
    """The pixel of the steepest edge away from the border, where there is something to attend to."""
    import torch

    grey = image.mean(0)
    down, across = torch.gradient(grey)
    steepness = down**2 + across**2
    margin = min(grey.shape) // 5
    inner = steepness[margin : grey.shape[0] - margin, margin : grey.shape[1] - margin]
    row, column = divmod(int(inner.argmax()), inner.shape[1])
    return row + margin, column + margin
