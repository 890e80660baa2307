"""The options of a training run, in one flat table; recipes are YAML files with these options.

Imports nothing heavy: ``sasa train --help`` is printed from here.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from .._extras import require
from .errors import OptionError

Augmentation = Literal["none", "shift", "imagenet", "flip"]
Resume = Literal["never", "auto"]
Strategy = Literal["auto", "ddp", "fsdp"]
Validate = Literal["every_epoch", "last_epoch"]
Precision = Literal["32-true", "bf16-mixed", "16-mixed", "64-true"]


@dataclass(frozen=True)
class Recipe:
    """A network, its images, and how it is trained.

    Args:
        model: name of a network: sasa_resnet14 (attention), resnet14 (its convolutional twin), the paper's, or the
            detector retinanet.
        model_options: arguments of the network, such as kernel_size or width; for the detector, backbone and heads.
        data: folder of images: IDX files; train and val folders, or one folder, with one folder of images per class; a
            Hugging Face dataset saved to disk; WebDataset shards. Default: 2,000 + 500 Fashion-MNIST images from the
            package. For a detector: a folder in the layout of COCO or Pascal VOC.
        image_size: side in pixels that images are resized to; for a detector, their shorter side.
        train_sizes: for a detector, further shorter sides: every training image is resized to one of them or
            image_size, at random.
        crop_pct: share of an image's shorter side that the central crop for validation keeps.
        augment: none; shift (shifts and flips, for small images); imagenet (random resized crops and flips); flip (for
            a detector, left-right flips of images and boxes).
        auto_augment: with imagenet, a policy of timm, such as rand-m9-mstd0.5.
        mixup: alpha of mixup; 0 for none.
        cutmix: alpha of CutMix; 0 for none.
        workers: worker processes that load images, per training process; 0 loads in the training process.
        strict: reject unreadable images instead of skipping them with a warning.
        epochs: passes over the training images.
        batch_size: images per step, over all processes together.
        accumulate: number of parts that a batch is split into and computed one by one, to save memory.
        optimizer: name in timm; sgd uses Nesterov momentum.
        learning_rate: peak value; it rises linearly over the warm-up, then falls to 0 along a cosine.
        base_batch_size: the batch size that learning_rate and ema_decay are given for; they are scaled to batch_size.
            0 uses them unscaled.
        warmup_epochs: of the learning rate; capped at half of the epochs.
        momentum: of optimizers that have one.
        weight_decay: on the weights of convolutions, projections and the classifier.
        label_smoothing: of the training loss.
        clip_grad_norm: maximum norm of the gradient; 0 for no clipping.
        embedding_learning_rate: factor on the learning rate of the attention's embeddings.
        embedding_weight_decay: on the embeddings.
        ema_decay: of an exponential moving average of the weights, which is validated and saved; 0 for none.
        precision: numeric precision.
        compile: compile the network with torch.compile.
        channels_last: memory format of the images and weights.
        accelerator: as in Lightning: auto, cpu, gpu.
        devices: processes on this machine, as in Lightning; torchrun and SLURM override it.
        num_nodes: machines; likewise.
        strategy: ddp copies the network to every process, fsdp (PyTorch's fully_shard) shards it over them.
        sync_batchnorm: normalise over the whole batch when there are several processes; on GPUs only.
        seed: of the parameters, the order and the augmentation.
        checkpoint_steps: steps between checkpoints; there is always one at the end of every epoch.
        validate: every_epoch, or last_epoch only, to save time.
        log_steps: steps between lines of the log.
        tensorboard: write TensorBoard's event files too.
    """

    model: str = "sasa_resnet14"
    model_options: dict[str, Any] = field(default_factory=dict)

    data: Path | None = None
    image_size: int = 28
    train_sizes: list[int] = field(default_factory=list)
    crop_pct: float = 1.0
    augment: Augmentation = "shift"
    auto_augment: str | None = None
    mixup: float = 0.0
    cutmix: float = 0.0
    workers: int = 0
    strict: bool = False

    epochs: int = 12
    batch_size: int = 32
    accumulate: int = 1
    optimizer: str = "adamw"
    learning_rate: float = 2.5e-3
    base_batch_size: int = 0
    warmup_epochs: float = 2.0
    momentum: float = 0.9
    weight_decay: float = 0.05
    label_smoothing: float = 0.1
    clip_grad_norm: float = 0.0
    embedding_learning_rate: float = 1.0
    embedding_weight_decay: float = 0.0
    ema_decay: float = 0.0

    precision: Precision = "32-true"
    compile: bool = False
    channels_last: bool = True
    accelerator: str = "auto"
    devices: int | str = "auto"
    num_nodes: int = 1
    strategy: Strategy = "auto"
    sync_batchnorm: bool = True

    seed: int = 0
    checkpoint_steps: int = 500
    validate: Validate = "every_epoch"
    log_steps: int = 10
    tensorboard: bool = True

    def check(self) -> None:
        """Validate every value.

        Raises:
            OptionError: one has the wrong type, is not finite, out of range or contradicts another; the message names
                it, what was expected and what was given.
        """
        for name in get_type_hints(Recipe):
            check_option(name, getattr(self, name))
        if not self.learning_rate > 0:
            raise OptionError(f"learning_rate: expected more than 0, got {self.learning_rate}")
        if not 0 < self.crop_pct <= 1 or self.image_size / self.crop_pct > 2 * 16_384:
            raise OptionError(f"crop_pct: expected more than 0 and at most 1, got {self.crop_pct}")
        for name in ("label_smoothing", "momentum", "ema_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise OptionError(f"{name}: expected at least 0 and below 1, got {getattr(self, name)}")
        if self.batch_size % self.accumulate:
            raise OptionError(f"accumulate: expected a divisor of batch_size {self.batch_size}, got {self.accumulate}")
        if self.auto_augment and self.augment != "imagenet":
            raise OptionError(f"auto_augment: expected augment imagenet with it, got augment {self.augment}")
        if self.strategy == "fsdp" and self.ema_decay:
            raise OptionError(
                f"ema_decay: expected 0 with strategy fsdp, which splits the weights; got {self.ema_decay}"
            )
        if self.strategy == "fsdp" and self.compile:
            raise OptionError("compile: expected false with strategy fsdp, got true")
        if self.strategy == "fsdp" and self.precision not in ("32-true", "bf16-mixed"):
            raise OptionError(f"precision: expected 32-true or bf16-mixed with strategy fsdp, got {self.precision}")
        self._check_names()
        if self.model in DETECTORS:
            self._check_detector()
        elif self.train_sizes or self.augment == "flip":
            raise OptionError("train_sizes, augment flip: expected with a detector, got them with a classifier")

    def _check_detector(self) -> None:
        """Reject options that detection doesn't support."""
        if self.augment not in ("none", "flip"):
            raise OptionError(f"augment: expected none or flip for a detector, got {self.augment}")
        for name in ("mixup", "cutmix", "compile"):
            if getattr(self, name):
                raise OptionError(f"{name}: expected {type(getattr(self, name))()} for a detector, got it on")
        if self.strategy == "fsdp":
            raise OptionError("strategy: expected auto or ddp for a detector, got fsdp")
        require("sasa.detection", "detection")

    def _check_names(self) -> None:
        """Validate what only timm knows."""
        from timm.optim import list_optimizers

        from ..models import MODELS

        if self.model not in (*MODELS, *DETECTORS):
            raise OptionError(f"model: expected one of {', '.join((*MODELS, *DETECTORS))}, got {self.model!r}")
        if self.optimizer not in list_optimizers():
            raise OptionError(f"optimizer: expected one of timm's, as sgd or adamw, got {self.optimizer!r}")
        if self.auto_augment:
            _check_policy(self.auto_augment)

    @property
    def scaled_learning_rate(self) -> float:
        """The peak learning rate for this batch size: proportional to it (Goyal et al., 2017, arXiv 1706.02677)."""
        return self.learning_rate * (self.batch_size / self.base_batch_size if self.base_batch_size else 1)

    @property
    def scaled_ema_decay(self) -> float:
        """The decay per step that averages over as many images as ``ema_decay`` at base batch (arXiv 2307.13813)."""
        return self.ema_decay ** (self.batch_size / self.base_batch_size if self.base_batch_size else 1)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as in a YAML file."""
        values = dataclasses.asdict(self)
        return values | {"data": None if self.data is None else str(self.data)}


DETECTORS = ("retinanet",)
"""Networks that predict boxes."""

LARGEST = 2**31 - 1
"""Bound of numbers that have none of their own below."""

PROCESSES = max(64, 8 * (os.cpu_count() or 1))
"""Maximum number of processes of a kind that a run may start on a machine."""

RANGES: dict[str, tuple[float, float]] = {
    "epochs": (1, LARGEST),
    "batch_size": (2, LARGEST),
    "accumulate": (1, LARGEST),
    "image_size": (1, 16_384),
    "train_sizes": (1, 16_384),
    "workers": (0, PROCESSES),
    "base_batch_size": (0, LARGEST),
    "warmup_epochs": (0, LARGEST),
    "weight_decay": (0, LARGEST),
    "embedding_learning_rate": (0, LARGEST),
    "embedding_weight_decay": (0, LARGEST),
    "clip_grad_norm": (0, LARGEST),
    "mixup": (0, LARGEST),
    "cutmix": (0, LARGEST),
    "devices": (1, PROCESSES),
    "num_nodes": (1, LARGEST),
    "seed": (0, 2**63 - 1),
    "checkpoint_steps": (1, LARGEST),
    "log_steps": (1, LARGEST),
}

MOST_OPERATIONS = 16
"""Maximum for a policy on one image. Timm accepts any number, and never finishes with a large one."""

_IN_WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    dict: "options with values",
    list: "a list of whole numbers",
    Path: "a folder",
    type(None): "null",
}

# Options that may differ when a run is resumed: they affect its speed and reports, not what it computes.
FREE_TO_CHANGE = frozenset(
    [
        "data",
        "workers",
        "strict",
        "accelerator",
        "devices",
        "num_nodes",
        "strategy",
        "checkpoint_steps",
        "log_steps",
        "tensorboard",
    ]
)


def shipped_recipes() -> dict[str, Path]:
    """The package's recipes by name."""
    folder = Path(str(resources.files("sasa.train") / "recipes"))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def check_option(name: str, value: Any) -> None:
    """Validate the value of one option on its own.

    Raises:
        OptionError: it has the wrong type, is not finite or out of range.
    """
    _check_type(name, value, get_type_hints(Recipe)[name])
    least, most = RANGES.get(name, (-math.inf, LARGEST))
    for number in _numbers(value):
        if isinstance(number, float) and not math.isfinite(number):
            raise OptionError(f"{name}: expected finite numbers, got {number}")
        if name != "model_options" and number < least:
            raise OptionError(f"{name}: expected at least {least}, got {number if number > -1e20 else 'far less'}")
        if name != "model_options" and number > most:
            raise OptionError(f"{name}: expected at most {most}, got {number if number < 1e20 else 'far more'}")


def _check_type(name: str, value: Any, hint: Any) -> None:
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            raise OptionError(f"{name}: expected one of {', '.join(get_args(hint))}, got {value!r}")
        return
    whole = get_origin(hint) in (dict, list)  # not one of several types
    kinds = (get_origin(hint),) if whole else tuple(get_origin(kind) or kind for kind in get_args(hint) or (hint,))
    right = isinstance(value, kinds) or (float in kinds and isinstance(value, int))
    if hint == list[int] and isinstance(value, list):
        right = all(type(number) is int for number in value)
    if not right or (isinstance(value, bool) and bool not in kinds):
        expected = " or ".join(_IN_WORDS[kind] for kind in kinds)
        raise OptionError(f"{name}: expected {expected}, got {value!r}")


def _numbers(value: Any) -> Iterator[float]:
    """The numbers in a value, and in lists and mappings of them."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        yield value
    elif isinstance(value, (list, tuple, dict)):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _numbers(inner)


def _check_policy(policy: str) -> None:
    for key, number in re.findall(r"-([nwd])(\d[^-]*)", policy):
        if not re.fullmatch("[0-9]{1,4}", number) or int(number) > MOST_OPERATIONS:
            raise OptionError(
                f"auto_augment: expected at most {MOST_OPERATIONS} after {key} in {policy[:80]!r}, got {number[:20]}"
            )
    from timm.data import create_transform

    try:
        create_transform(32, is_training=True, auto_augment=policy)
    except (AssertionError, LookupError, ValueError) as error:
        message = f"auto_augment: expected a policy of timm, as rand-m9-mstd0.5, got {policy[:80]!r}: {error}"
        raise OptionError(message) from error
