"""Accuracy and predictions of a trained network: each image once, on any number of processes, whatever was cut off."""

import csv
import json
import os
import signal

import pytest
import torch
from image_files import write_images
from processes import Running, together
from torchvision.utils import save_image

from sasa.cli import main
from sasa.train import DataError, OptionError, OutputError, load_model
from sasa.train.evaluate import evaluate
from sasa.train.predict import RowWriter, predict
from sasa.train.walk import walk


@pytest.fixture
def images(tmp_path):
    """Eleven images in folders, one broken, names that need care."""
    folder = tmp_path / "images"
    generator = torch.Generator().manual_seed(0)
    for name in ("a.png", "a/1.png", "a/2.jpg", "a/deep/er/3.png", "b, c.png", 'quo"te.png', "é.png", "z/9.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        save_image(torch.rand(3, 12, 15, generator=generator), folder / name)
    (folder / "broken.png").write_bytes(b"no image")
    (folder / "notes.txt").write_text("no image either")
    for name in ("y1.png", "y2.png"):
        save_image(torch.rand(3, 40, 15, generator=generator), folder / name)
    return folder


def rows(out):
    with out.open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_accuracy_is_that_of_the_run_for_any_batch_and_processes(data, run, tmp_path):
    result = json.loads((run / "result.json").read_text())
    for batch_size in (4, 256):
        figures = evaluate(run / "model.safetensors", data, tmp_path / "eval.json", batch_size=batch_size, devices=1)
        assert figures == json.loads((tmp_path / "eval.json").read_text())
        assert (figures["top1"], figures["top5"]) == pytest.approx((result["top1"], result["top5"]))
        assert figures["val_loss"] == pytest.approx(result["val_loss"], rel=1e-5)
        assert (figures["images"], figures["skipped"]) == (19, 0)
    options = {"batch_size": 8, "out": tmp_path / "two.json"}
    for running in together(tmp_path / "log", 2, evaluate, run / "model.safetensors", data, **options):
        running.succeed()
    two = json.loads((tmp_path / "two.json").read_text())
    assert two == pytest.approx(figures, rel=1e-5)


def test_other_classes_are_refused(run, tmp_path):
    write_images(tmp_path / "images")
    with pytest.raises(DataError, match=r"data: expected the 3 classes .*\(0, 1, 2; 1 channels\), got 2 \(cat, dog; 3"):
        evaluate(run / "model.safetensors", tmp_path / "images")
    with pytest.raises(DataError, match=r"weights: expected model.safetensors of a run .*nowhere"):
        evaluate(tmp_path / "nowhere")


def test_every_image_has_a_row_in_order(run, images, tmp_path):
    out = tmp_path / "preds.csv"
    assert predict(images, out, run / "model.safetensors", top_k=2, batch_size=3, devices=1) == 11
    found = rows(out)
    assert [row["path"] for row in found] == sorted(row["path"] for row in found) == list(walk(images))
    assert set(found[0]) == {"path", "class_1", "probability_1", "class_2", "probability_2", "error"}
    _, facts = load_model(run / "model.safetensors")
    for row in found:
        if row["path"] == "broken.png":
            assert row["class_1"] == "" and "not an image" in row["error"]
            continue
        assert float(row["probability_1"]) >= float(row["probability_2"]) and row["error"] == ""
        assert row["class_1"] in facts["classes"]
    assert not list(tmp_path.glob("*.parts"))
    with pytest.raises(OutputError, match=r"preds\.csv exists already"):
        predict(images, out, run / "model.safetensors")


def dying(after, *arguments, **options):
    """Predict, and be killed after so many batches, with half a row written."""
    write = RowWriter.write_on_batch_end

    def killed(self, trainer, module, prediction, indices, batch, batch_idx, *rest):
        if batch_idx == after:
            with self.file.open("a") as file:
                file.write('["a/1.p')
            os.kill(os.getpid(), signal.SIGKILL)
        write(self, trainer, module, prediction, indices, batch, batch_idx, *rest)

    RowWriter.write_on_batch_end = killed
    predict(*arguments, **options)


def test_killed_it_goes_on_where_it_stopped_on_another_number_of_processes(run, images, tmp_path):
    weights, options = run / "model.safetensors", {"top_k": 2, "batch_size": 2}
    predict(images, tmp_path / "whole.csv", weights, devices=1, **options)
    out = tmp_path / "preds.csv"
    first = Running(tmp_path / "log", dying, 2, images, out, weights, devices=1, **options)
    assert first.end() == -signal.SIGKILL and not out.exists()
    pair = together(tmp_path / "two", 2, predict, images, out, weights, workers=2, **options)
    assert "resuming: 4 images are done already" in "".join(running.succeed() for running in pair)
    for found, expected in zip(rows(out), rows(tmp_path / "whole.csv"), strict=True):
        for name in ("probability_1", "probability_2"):  # other batches round otherwise
            assert float(found.pop(name) or 0) == pytest.approx(float(expected.pop(name) or 0), abs=1e-5)
        assert found == expected


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"top_k": 0}, OptionError, "top_k: expected at least 1, got 0"),
        ({"images": "nowhere"}, DataError, "images: expected a folder, got nowhere"),
        ({"images": "."}, DataError, r"images: expected images \(\.jpg.* below \., found none"),
    ],
)
def test_what_can_not_be_predicted(run, tmp_path, monkeypatch, arguments, error, message):
    from pathlib import Path

    monkeypatch.chdir(tmp_path)
    options = {"images": ".", "out": "preds.csv", "weights": run / "model.safetensors"} | arguments
    with pytest.raises(error, match=message):
        predict(**options | {"images": Path(options["images"]), "out": Path(options["out"])})


def test_from_the_command_line(run, data, images, tmp_path, capsys):
    weights = str(run / "model.safetensors")
    assert main(["predict", str(images), "--out", str(tmp_path / "p.csv"), "--weights", weights, "--top-k", "1"]) == 0
    assert "11 images classified into" in capsys.readouterr().out
    assert main(["eval", "--weights", weights, "--data", str(data)]) == 0
    assert "on 19 images" in capsys.readouterr().out
    assert main(["eval", "--weights", weights]) == 2
    assert "sasa eval: error: data: expected the 3 classes" in capsys.readouterr().err
