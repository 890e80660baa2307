"""The package's weights do what their card says, to the last image; and they are what predict takes by itself."""

import csv
import json
import zipfile
from pathlib import Path

import pytest

from sasa.cli import main
from sasa.models import shipped_weights
from sasa.train.evaluate import evaluate

FIGURES = json.loads((shipped_weights()["clothing"].parent / "figures.json").read_text())
WHOLE = Path("/usr/share/datasets/fashion-mnist")  # Debian's dataset-fashion-mnist


@pytest.fixture(scope="module")
def clothing(tmp_path_factory):
    """The test photographs, as both parts of a folder."""
    folder = tmp_path_factory.mktemp("clothing")
    with zipfile.ZipFile(Path(__file__).parent / "clothing-test.zip") as file:
        file.extractall(folder / "val")
    (folder / "train").symlink_to(folder / "val")
    return folder


def correct(figures):
    return round(figures["top1"] * figures["images"]), figures["images"]


def test_photographs_of_clothes(clothing):
    figures = evaluate(Path("clothing"), clothing)
    assert correct(figures) == (FIGURES["clothing"]["correct"], FIGURES["clothing"]["images"])


def test_packaged_images_of_fashion_mnist():
    figures = evaluate(Path("fashion_mnist"))
    own = FIGURES["fashion_mnist"]["packaged"]
    assert correct(figures) == (own["correct"], own["images"])


@pytest.mark.nightly
@pytest.mark.skipif(not WHOLE.is_dir(), reason="needs Debian's dataset-fashion-mnist")
def test_fashion_mnist_whole():
    figures = evaluate(Path("fashion_mnist"), WHOLE)
    assert correct(figures) == (FIGURES["fashion_mnist"]["correct"], FIGURES["fashion_mnist"]["images"])


def test_predict_takes_the_photographs_network_by_itself(clothing, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["predict", str(clothing / "val" / "dress"), "--out", "table.csv"]) == 0
    assert "weights: clothing" in capsys.readouterr().err
    with (tmp_path / "table.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["class_1"] for row in rows} <= set(FIGURES["clothing"]["classes"])
    assert len(rows) == len(list((clothing / "val" / "dress").iterdir())) and not any(row["error"] for row in rows)
