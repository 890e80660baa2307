"""Accuracy and predictions of a trained network: each image once, on any number of processes, whatever was cut off."""

import csv
import json
import math
import os
import signal
import time

import pytest
import torch
from image_files import write_images
from processes import Running, together
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torchvision.utils import save_image

from sasa.cli import main
from sasa.train import DataError, OptionError, OutputError, checkpoints, load_model
from sasa.train.evaluate import evaluate
from sasa.train.predict import Rows, predict
from sasa.train.predictor import Predictor, RowWriter
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


def test_weights_that_are_not_numbers_have_no_accuracy(run, data, tmp_path):
    with safe_open(run / "model.safetensors", "pt") as file:
        facts, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    tensors["fc.bias"][0] = float("nan")
    save_file(tensors, tmp_path / "nan.safetensors", facts)
    with pytest.raises(DataError, match=r"weights: expected .*finite"):
        evaluate(tmp_path / "nan.safetensors", data, devices=1)


def test_a_file_that_can_not_be_written_is_reported_with_the_figures(run, data, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"out: can't write to .*file: Not a directory"):
        evaluate(run / "model.safetensors", data, tmp_path / "file" / "e.json")

    def read_only(*arguments):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("sasa.train.evaluate.write_whole", read_only)
    arguments = ["eval", "--weights", str(run / "model.safetensors"), "--data", str(data), "--out"]
    assert main([*arguments, str(tmp_path / "e.json")]) == 2
    assert "out: can't write" in (printed := capsys.readouterr().err) and "Read-only" in printed and "top1" in printed


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


DAMAGE = {
    "cut": lambda text: text[: text.rindex(b"\n") - 9],
    "zeros": lambda text: text[:-40] + bytes(40),
    "zeros between": lambda text: text[:9] + bytes(40) + text[49:],
    "junk": lambda text: b'"\xff\n\n[]\n5\n' + b"[" * 100_000 + b"\n" + text,
    "row of another shape": lambda text: b'["a.png", "0", "0.9", ""]\n' + text,
    "no probability": lambda text: b'["0.png", "0", "nan", "1", "0.1", ""]\n' + text,
    "another class": lambda text: b'["0.png", "0", "0.9", "emu", "0.1", ""]\n' + text,
    "row twice": lambda text: text.splitlines(True)[0] + text,
}


@pytest.fixture
def unmerged(run, images, tmp_path, monkeypatch):
    """Predictions of which all rows are made and no table."""
    out = tmp_path / "preds.csv"
    with monkeypatch.context() as patch:
        patch.setattr(Rows, "write", lambda *_: pytest.fail("stopped"))
        with pytest.raises(pytest.fail.Exception):
            predict(images, out, run / "model.safetensors", top_k=2, devices=1)
    return out


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_rows_are_made_again_and_none_is_doubled(run, images, unmerged, damage):
    (part,) = unmerged.with_name("preds.csv.parts").glob("run-*.jsonl")
    part.write_bytes(DAMAGE[damage](part.read_bytes()))
    assert predict(images, unmerged, run / "model.safetensors", top_k=2, devices=1) == 11
    assert [row["path"] for row in rows(unmerged)] == list(walk(images))
    assert all(row["error"] or 0 <= float(row["probability_2"]) <= 1 for row in rows(unmerged))


def a_folder(note):
    note.unlink()
    note.mkdir()


@pytest.mark.parametrize(
    "damage",
    [
        *(lambda note, text=text: note.write_text(text) for text in ("", "5", "[]", "null", "[" * 100_000)),
        *(a_folder, lambda note: note.unlink()),
    ],
)
def test_rows_of_unknown_origin_are_refused(run, images, unmerged, damage):
    damage(unmerged.with_name("preds.csv.parts") / "rows.json")
    with pytest.raises(OutputError, match=r"rows.json can't be read \(.*\); remove \S+preds.csv.parts"):
        predict(images, unmerged, run / "model.safetensors", top_k=2, devices=1)


def test_two_predictions_never_work_on_one_table(run, images, tmp_path, monkeypatch):
    monkeypatch.setattr("sasa.train.predict.PATIENCE", 0.0)
    out, parts = tmp_path / "preds.csv", tmp_path / "preds.csv.parts"
    parts.mkdir()
    holder = Running(tmp_path / "log", hold, parts)
    while not (parts / "held").exists():
        assert holder.process.is_alive()
    with pytest.raises(OutputError, match=r"out: expected no other predict at work on \S+preds.csv, got one"):
        predict(images, out, run / "model.safetensors", devices=1)
    holder.kill()
    holder.end()
    assert predict(images, out, run / "model.safetensors", devices=1) == 11


def hold(parts):
    with checkpoints.alone_in(parts):
        (parts / "held").touch()
        time.sleep(250)


def test_what_is_not_finite_is_no_prediction(run, images, tmp_path, monkeypatch):
    monkeypatch.setattr(Predictor, "predict_step", lambda self, batch, _: torch.full((len(batch.names), 3), math.nan))
    predict(images, tmp_path / "preds.csv", run / "model.safetensors", devices=1)
    assert {row["error"] for row in rows(tmp_path / "preds.csv")} >= {"the network's output is not finite"}
    assert not any(row["class_1"] for row in rows(tmp_path / "preds.csv"))


def test_writing_fails(run, images, tmp_path, monkeypatch):
    out = tmp_path / "preds.csv"
    monkeypatch.setattr(Rows, "files", lambda self: [])
    monkeypatch.setattr("sasa.train.predictor.RUN", "no folder/{}{}")
    with pytest.raises(OutputError, match=r"out: can't write to .+: No such file.*; the same command resumes"):
        predict(images, out, run / "model.safetensors", devices=1)


WRONG_FACTS = {
    "model": ["5", '"resnet1"', "null", "[]"],
    "model_options": ["[]", '"width"', '{"checkpoint_path": "x"}', '{"pretrained": true}', '{"width": NaN}'],
    "classes": ["5", '"abc"', "[]", "[1, 2, 3]", '{"a": 1}', "null"],
    "in_chans": ['"1"', "2", "1.0", "true", "null"],
    "image_size": ['"10"', "0", "-1", "NaN", "1000000000"],
    "crop_pct": ["0", "2", "NaN", '"1"'],
    "mean": ["[]", "[0.5, 0.5]", "0.5", "[NaN]", "[Infinity]", '["0.5"]'],
    "std": ["[0]", "[-1]", "[NaN]", "[1, 1]", "null", "[" * 100_000],
}


@pytest.mark.parametrize(("fact", "value"), [(fact, value) for fact, values in WRONG_FACTS.items() for value in values])
def test_weights_with_wrong_facts_are_refused(run, tmp_path, fact, value):
    with safe_open(run / "model.safetensors", "pt") as file:
        facts = file.metadata()
    path = tmp_path / "model.safetensors"
    save_file(load_file(run / "model.safetensors"), path, facts | {fact: value})
    with pytest.raises(ValueError, match=r"path: \S+ does not hold weights written by sasa train: "):
        load_model(path)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_refused(run, images, tmp_path, value):
    tensors = load_file(run / "model.safetensors")
    tensors["fc.weight"][1, 2] = value
    with safe_open(run / "model.safetensors", "pt") as file:
        save_file(tensors, tmp_path / "model.safetensors", file.metadata())
    for command in (lambda path: predict(images, tmp_path / "preds.csv", path), evaluate):
        with pytest.raises(DataError, match=r"expected finite weights in \S+, got NaN or infinity in fc.weight"):
            command(tmp_path / "model.safetensors")


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
