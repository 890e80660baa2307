"""Training: from a network and its data to a checkpoint, a log and a result."""

from __future__ import annotations

import contextlib
import json
import logging
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import lightning
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar, Timer
from lightning.pytorch.loggers import CSVLogger

from ..models import MODELS, count_flops, create_model
from .data import ImageData
from .errors import OptionError, OutputError
from .export import save_weights
from .module import Classifier
from .sources import Source, open_source


@dataclass(frozen=True)
class Result:
    """What a training run came to.

    Attributes:
        model: name of the network.
        top1: share of validation images classified rightly after the last epoch, from 0 to 1.
        parameters: of the network.
        flops: of one image's forward; a multiply-add is 2.
        seconds_per_epoch: of training, validation not included.
        epochs: passes over the training images.
        train_images: images trained on.
        val_images: images validated on.
        skipped_images: unreadable images left out.
    """

    model: str
    top1: float
    parameters: int
    flops: int
    seconds_per_epoch: float
    epochs: int
    train_images: int
    val_images: int
    skipped_images: int


def train(
    model: str = "sasa_resnet14",
    data: Path | None = None,
    out: Path = Path("runs/train"),
    epochs: int = 12,
    batch_size: int = 32,
    learning_rate: float = 5e-3,
    weight_decay: float = 0.05,
    label_smoothing: float = 0.1,
    image_size: int = 28,
    augment: bool = True,
    workers: int = 0,
    seed: int = 0,
    strict: bool = False,
    overwrite: bool = False,
) -> Result:
    """Train a network on images and write its weights, log and result.

    Writes ``model.safetensors`` (weights, with what is needed to use them), ``last.ckpt`` (the Lightning checkpoint),
    ``metrics.csv`` and ``result.json``.

    Args:
        model: name of a network: sasa_resnet14 (attention) or resnet14 (its convolutional twin).
        data: folder of IDX files, of train and val folders with one folder of images a class, or of one folder of
            images a class. Left out: 2,000 + 500 Fashion-MNIST images from the package.
        out: folder to write to.
        epochs: passes over the training images.
        batch_size: images a step.
        learning_rate: the highest; it rises for a fifth of the steps, then falls as a cosine.
        weight_decay: of AdamW, on the weights of convolutions, projections and the classifier.
        label_smoothing: of the training loss.
        image_size: side in pixels that images are resized to.
        augment: shift and flip the training images at random.
        workers: processes that load images; 0 loads in the main one.
        seed: of the parameters, the order and the augmentation.
        strict: refuse unreadable images instead of skipping them with a warning.
        overwrite: replace an earlier run in out.

    Raises:
        DataError: data can't be trained on.
        OutputError: out can't be written, or holds a run and overwrite is off.
        OptionError: an option out of range.
    """
    if model not in MODELS:
        raise OptionError(f"model: expected one of {', '.join(MODELS)}, got {model!r}")
    least = {
        "epochs": (epochs, 1),
        "batch_size": (batch_size, 2),
        "image_size": (image_size, 1),
        "workers": (workers, 0),
    }
    for name, (number, minimum) in least.items():
        if number < minimum:
            raise OptionError(f"{name}: expected at least {minimum}, got {number}")
    if not learning_rate > 0:
        raise OptionError(f"learning_rate: expected more than 0, got {learning_rate}")
    if not 0 <= label_smoothing < 1:
        raise OptionError(f"label_smoothing: expected at least 0 and below 1, got {label_smoothing}")
    prepare_folder(out, overwrite)
    lightning.seed_everything(seed, workers=True, verbose=False)
    source = open_source(data, strict)
    network = create_model(model, len(source.classes), source.channels)
    batches = ImageData(source, batch_size, image_size, augment, workers)
    classifier = Classifier(network, len(source.classes), learning_rate, weight_decay, label_smoothing)
    return fit(model, classifier, batches, source, out, epochs, image_size)


def fit(
    name: str, classifier: Classifier, batches: ImageData, source: Source, out: Path, epochs: int, image_size: int
) -> Result:
    """Train ``classifier`` on ``batches`` and write the files of :func:`train` to ``out``."""
    timer = Timer()
    checkpoint = ModelCheckpoint(dirpath=out, filename="last", enable_version_counter=False)
    with _quiet():
        trainer = lightning.Trainer(
            max_epochs=epochs,
            accelerator="auto",
            devices=1,
            logger=CSVLogger(out, name="", version=""),
            callbacks=[RichProgressBar(), checkpoint, timer],
            enable_model_summary=False,
            log_every_n_steps=1,
        )
        trainer.fit(classifier, batches)
    network = classifier.network.eval()
    seconds = timer.time_elapsed("train") - timer.time_elapsed("validate")
    shape = (1, source.channels, image_size, image_size)
    result = Result(
        model=name,
        top1=trainer.callback_metrics["val_top1"].item(),
        parameters=sum(parameter.numel() for parameter in network.parameters()),
        flops=count_flops(network, shape),
        seconds_per_epoch=seconds / epochs,
        epochs=epochs,
        train_images=len(batches.train_set),  # type: ignore[arg-type]
        val_images=len(batches.val_set),  # type: ignore[arg-type]
        skipped_images=source.skipped,
    )
    facts = {"model": name, "classes": source.classes, "in_chans": source.channels, "image_size": image_size}
    facts |= {"mean": source.mean, "std": source.std}
    save_weights(network, out / "model.safetensors", facts)
    (out / "result.json").write_text(json.dumps(asdict(result), indent=2) + "\n")
    return result


def prepare_folder(out: Path, overwrite: bool) -> None:
    """Make the output folder, and make sure now that it can be written.

    Raises:
        OutputError: it can't, or it holds an earlier run and ``overwrite`` is off.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise OutputError(f"out: can't write to {out}: {error.strerror}") from error
    if any(out.iterdir()):
        if not overwrite:
            raise OutputError(f"out: {out} is not empty; choose another folder, or pass --overwrite to replace it")
        for name in ("metrics.csv", "result.json", "model.safetensors", "last.ckpt"):
            (out / name).unlink(missing_ok=True)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without Lightning's notes on accelerators and worker counts; its progress bar and real warnings stay."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*does not have many workers.*")
            warnings.filterwarnings("ignore", ".*Experiment logs directory .* exists and is not empty.*")
            # Lightning 2.6 with PyTorch 2.15, about the two of them alone.
            warnings.filterwarnings("ignore", ".*isinstance.treespec, LeafSpec.*", FutureWarning)
            warnings.filterwarnings("ignore", ".*Checkpoint directory .* exists and is not empty.*")
            yield
    finally:
        logger.setLevel(level)
