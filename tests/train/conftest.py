"""Small data sets, and a finished run."""

import pytest
import torch
from image_files import write_idx
from processes import Running, recipe, small_images

from sasa.train import train


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A folder of IDX files."""
    return small_images(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def run(data, tmp_path_factory):
    """A finished run; to be read only."""
    out = tmp_path_factory.mktemp("run") / "run"
    Running(out.parent / "log", train, recipe(data, model="resnet14", epochs=2), out).succeed()
    return out


@pytest.fixture(params=["", ".gz"], ids=["plain", "gzip"])
def idx_folder(request, tmp_path):
    for part, images in (("train", 12), ("t10k", 6)):
        pixels = torch.randint(0, 256, (images, 28, 28), dtype=torch.uint8)
        write_idx(tmp_path / f"{part}-images-idx3-ubyte{request.param}", pixels)
        write_idx(tmp_path / f"{part}-labels-idx1-ubyte{request.param}", torch.arange(images, dtype=torch.uint8) % 3)
    return tmp_path
