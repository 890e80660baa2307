"""What Lightning trains: a network, its loss, its accuracy, its optimizer."""

from __future__ import annotations

import lightning
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy


class Classifier(lightning.LightningModule):
    """Cross-entropy with label smoothing; AdamW with a learning rate that rises, then falls as a cosine.

    Logs ``train_loss``, ``val_loss`` and ``val_top1`` (the share of validation images whose first guess is right).

    Args:
        network: (B, C, H, W) to (B, num_classes) logits.
        num_classes: classes.
        learning_rate: the highest, reached after a fifth of the steps.
        weight_decay: of AdamW, on matrices alone: biases, norms and embeddings have none.
        label_smoothing: of the training loss.
    """

    def __init__(
        self,
        network: nn.Module,
        num_classes: int,
        learning_rate: float = 5e-3,
        weight_decay: float = 0.05,
        label_smoothing: float = 0.1,
    ) -> None:
        super().__init__()
        self.network = network
        self.learning_rate, self.weight_decay = learning_rate, weight_decay
        self.loss = nn.CrossEntropyLoss(label_smoothing=label_smoothing)
        self.top1 = MulticlassAccuracy(num_classes, average="micro")

    def forward(self, images: Tensor) -> Tensor:
        """Logits of the classes."""
        return self.network(images)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> Tensor:
        """The loss of a batch."""
        images, labels = batch
        loss = self.loss(self(images), labels)
        self.log("train_loss", loss, on_step=False, on_epoch=True, prog_bar=True, batch_size=len(images))
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> None:
        """Add a batch to the accuracy."""
        images, labels = batch
        logits = self(images)
        self.top1(logits, labels)
        self.log("val_loss", nn.functional.cross_entropy(logits, labels), batch_size=len(images))
        self.log("val_top1", self.top1, prog_bar=True)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW and its schedule, stepped every batch."""
        matrices = {id(m.weight) for m in self.network.modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
        decayed = [p for p in self.network.parameters() if id(p) in matrices]
        rest = [p for p in self.network.parameters() if id(p) not in matrices]
        groups = [{"params": decayed}, {"params": rest, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=self.learning_rate, weight_decay=self.weight_decay)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, self.learning_rate, total_steps=int(self.trainer.estimated_stepping_batches), pct_start=0.2
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
