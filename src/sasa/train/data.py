"""Batches for training: a source's images, resized, augmented and normalised, as a Lightning data module."""

from __future__ import annotations

import lightning
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from .sources import Source


class ImageData(lightning.LightningDataModule):
    """Training and validation batches of (images (B, C, S, S), labels (B,)).

    Args:
        source: the images.
        batch_size: images a batch.
        image_size: S, in pixels.
        augment: shift the training images by up to a fourteenth of S and flip them left to right at random.
        workers: processes that load images; 0 loads in this one.
    """

    def __init__(
        self, source: Source, batch_size: int = 32, image_size: int = 28, augment: bool = True, workers: int = 0
    ) -> None:
        super().__init__()
        self.batch_size, self.workers = batch_size, workers
        fit = v2.Compose([v2.ToImage(), v2.Resize(image_size, antialias=True), v2.CenterCrop(image_size)])
        vary = [v2.RandomCrop(image_size, padding=max(1, image_size // 14)), v2.RandomHorizontalFlip()]
        self.train_set = source.train(fit, v2.Compose([*(vary if augment else []), v2.ToPureTensor()]))
        self.val_set = source.val(fit, v2.ToPureTensor())
        self.normalise = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(source.mean, source.std)])

    def on_after_batch_transfer(self, batch: tuple[Tensor, Tensor], dataloader_idx: int) -> tuple[Tensor, Tensor]:
        """Bytes to normalised floats, for the whole batch at once."""
        images, labels = batch
        return self.normalise(images), labels

    def train_dataloader(self) -> DataLoader:
        """Shuffled batches. A last batch too small to normalise over is left out."""
        return self._loader(self.train_set, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        """Batches in order, every image once."""
        return self._loader(self.val_set, shuffle=False)

    def _loader(self, dataset: Dataset, shuffle: bool) -> DataLoader:
        images = len(dataset)  # type: ignore[arg-type]
        return DataLoader(
            dataset,
            self.batch_size,
            shuffle=shuffle,
            drop_last=shuffle and images > self.batch_size,
            num_workers=self.workers,
            persistent_workers=self.workers > 0,
        )
