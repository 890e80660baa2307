"""The modules that Lightning trains: a network, its optimizer and schedule; for a classifier, loss and accuracy."""

from __future__ import annotations

import math
from typing import Any

import lightning
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch import Tensor, nn
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from .batch import IGNORED, Batch
from .order import STEP, seed_everything
from .recipe import Recipe


class Trained(lightning.LightningModule):
    """A network with timm's optimizer and schedule, stepped every batch, and reproducible random draws.

    Args:
        network: the network to train.
        recipe: how to train.
        steps: total number of steps, for the schedule.
    """

    def __init__(self, network: nn.Module, recipe: Recipe, steps: int) -> None:
        super().__init__()
        self.network, self.recipe, self.steps = network, recipe, steps

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Seed random draws from the step, so that a resumed run draws the same numbers."""
        step = self.global_step * self.recipe.accumulate + batch_idx % self.recipe.accumulate
        seed_everything(STEP, self.recipe.seed, step, self.global_rank, gpu=self.device.type != "cpu")

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimizer; biases and norms have no weight decay, embeddings have their own rate and decay."""
        recipe = self.recipe
        matrices = {id(m.weight) for m in self.network.modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
        decayed = [p for p in self.network.parameters() if id(p) in matrices]
        rest = {name: p for name, p in self.network.named_parameters() if id(p) not in matrices}
        groups: Any = [{"params": decayed}]
        # Timm's schedules multiply the learning rate by lr_scale.
        own = {"weight_decay": recipe.embedding_weight_decay, "lr_scale": recipe.embedding_learning_rate}
        if own != {"weight_decay": 0.0, "lr_scale": 1.0}:
            embeddings = [rest.pop(name) for name in list(rest) if name.endswith("_embedding")]
            groups += [{"params": embeddings, **own}] if embeddings else []
        groups += [{"params": list(rest.values()), "weight_decay": 0.0}]
        rate, steps = recipe.scaled_learning_rate, self.steps
        optimizer = create_optimizer_v2(
            groups, recipe.optimizer, lr=rate, weight_decay=recipe.weight_decay, momentum=recipe.momentum
        )
        warmup = round(min(recipe.warmup_epochs, recipe.epochs / 2) * steps / recipe.epochs)
        schedule, _ = create_scheduler_v2(
            optimizer,
            "cosine",
            num_epochs=steps - warmup,  # one epoch of the schedule is one step
            warmup_epochs=warmup,
            warmup_prefix=True,  # the cosine begins after the warm-up, at the highest rate
            warmup_lr=rate / (warmup + 1),
            step_on_epochs=False,
            updates_per_epoch=1,
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}  # type: ignore[typeddict-item]

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        """Timm's schedules are functions of the number of updates."""
        scheduler.step_update(num_updates=self.global_step)


class Classifier(Trained):
    """Cross-entropy with label smoothing.

    Logs ``train_loss``; ``val_loss``, ``val_top1`` and ``val_top5``, the shares of validation images whose class is the
    first guess, or among the first five. They are exact over any number of processes, since padding isn't counted.

    Args:
        network: (B, C, H, W) to (B, num_classes) logits.
        num_classes: classes.
        recipe: how to train.
        steps: total number of steps, for the schedule.
    """

    def __init__(self, network: nn.Module, num_classes: int, recipe: Recipe, steps: int) -> None:
        super().__init__(network, recipe, steps)
        self.loss = nn.CrossEntropyLoss(label_smoothing=recipe.label_smoothing, ignore_index=IGNORED)
        self.soft_loss = SoftTargetCrossEntropy()
        options: dict[str, Any] = {"average": "micro", "ignore_index": IGNORED}
        self.top1 = MulticlassAccuracy(num_classes, **options)
        self.top5 = MulticlassAccuracy(num_classes, top_k=min(5, num_classes), **options)
        # Keeps NaN losses. The strategy "disable", meant for that, ignores the weights (torchmetrics 1.9).
        self.val_loss = MeanMetric(nan_strategy=math.nan)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of the classes."""
        return self.network(images)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The loss of a batch."""
        logits = self(batch.images)
        soft = batch.labels.is_floating_point()
        loss = self.soft_loss(logits, batch.labels) if soft else self.loss(logits, batch.labels)
        options: dict[str, Any] = {"on_step": False, "on_epoch": True, "sync_dist": True}
        self.log("train_loss", loss.detach(), prog_bar=True, batch_size=len(batch.images), **options)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Add a batch to the loss and accuracies."""
        images, labels = batch.images, batch.labels
        logits = self(images).float()
        self.top1.update(logits, labels)
        self.top5.update(logits, labels)
        counted = (labels != IGNORED).sum()
        total = nn.functional.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
        self.val_loss.update(total / counted.clamp(min=1), weight=counted)
        names = {"val_loss": self.val_loss, "val_top1": self.top1, "val_top5": self.top5}
        for name, metric in names.items():
            self.log(name, metric, prog_bar=name == "val_top1", batch_size=len(images))


class Sharded(Trained):
    """Mixin that shards the parameters over the processes block by block (FSDP2)."""

    def configure_model(self) -> None:
        """Shard the network: each block of its stages separately, inner ones first, then the rest."""
        from torch.distributed.fsdp import FSDPModule, fully_shard

        if isinstance(self.network, FSDPModule):
            return
        mesh = self.device_mesh["data_parallel"]  # type: ignore[index]
        options: dict[str, Any] = {"mesh": mesh, "mp_policy": _mixed_precision(self.recipe.precision)}
        options["ignored_params"] = {p for p in self.network.parameters() if not p.numel()}  # can't be sharded
        for block in blocks(self.network):
            fully_shard(block, **options)
        fully_shard(self.network, **options)


class ShardedClassifier(Sharded, Classifier):
    """A classifier whose parameters are sharded."""


def blocks(network: nn.Module) -> list[nn.Module]:
    """The consecutive blocks in the network's stages, inner ones first, without single layers."""
    stages = [module for module in network.modules() if isinstance(module, nn.Sequential)]
    return [block for stage in reversed(stages) for block in stage if any(True for _ in block.children())]


def _mixed_precision(precision: str) -> Any:
    from torch.distributed.fsdp import MixedPrecisionPolicy

    if precision == "bf16-mixed":
        return MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    return MixedPrecisionPolicy()
