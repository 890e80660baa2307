"""Small data sets."""

import pytest
import torch
from image_files import write_idx


@pytest.fixture(params=["", ".gz"], ids=["plain", "gzip"])
def idx_folder(request, tmp_path):
    for part, images in (("train", 12), ("t10k", 6)):
        pixels = torch.randint(0, 256, (images, 28, 28), dtype=torch.uint8)
        write_idx(tmp_path / f"{part}-images-idx3-ubyte{request.param}", pixels)
        write_idx(tmp_path / f"{part}-labels-idx1-ubyte{request.param}", torch.arange(images, dtype=torch.uint8) % 3)
    return tmp_path
