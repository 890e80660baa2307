"""Writes small data sets in the real formats."""

import gzip
import struct

import torch
from torchvision.utils import save_image


def write_idx(path, tensor):
    """A byte tensor in the IDX format, compressed if the name says so."""
    header = struct.pack(f">BBBB{tensor.dim()}i", 0, 0, 8, tensor.dim(), *tensor.shape)
    data = header + tensor.numpy().tobytes()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


def write_images(folder, classes=("cat", "dog"), each=5):
    """A folder of images, one folder a class."""
    for name in classes:
        (folder / name).mkdir(parents=True)
        for index in range(each):
            save_image(torch.rand(3, 12, 10 + index), folder / name / f"{index}.png")
    return folder
