"""Mistakes that could cost a run, rows or an answer: each is told in a line, and nothing is lost."""

import json
import os
import shutil
import sys
import tarfile

import numpy as np
import pytest
import torch
from image_files import write_images
from PIL import Image
from processes import Running, recipe

from sasa.cli import main
from sasa.train import DataError, OptionError, OutputError, checkpoints, train
from sasa.train.data import ImageData
from sasa.train.demo import demo
from sasa.train.predict import predict
from sasa.train.sources import open_source
from sasa.train.transforms import LONGEST, fit_transform


def files(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")}


def test_overwrite_removes_nothing_before_the_new_run_can_begin(data, run, tmp_path):
    out = shutil.copytree(run, tmp_path / "run")
    before = files(out)
    wrong = [{"data": tmp_path / "typo"}, {"model_options": {"widht": 1}}, {"mixup": 1.0, "batch_size": 9}]
    for changes in wrong:
        with pytest.raises((DataError, OptionError)):
            train(recipe(**({"data": data} | changes)), out, overwrite=True)
        assert files(out) == before


def test_a_refused_run_leaves_a_folder_that_the_mended_one_can_have(data, tmp_path):
    with pytest.raises(OptionError, match="batch_size: expected an even share of it with mixup or cutmix, got 7"):
        train(recipe(data, mixup=1.0, batch_size=14, accumulate=2), tmp_path / "out")
    assert not files(tmp_path / "out")


def test_resume_and_overwrite_contradict_each_other(data, tmp_path):
    with pytest.raises(OptionError, match="overwrite: expected it without resume auto"):
        train(recipe(data), tmp_path / "out", resume="auto", overwrite=True)


def test_the_demonstration_takes_no_folder_of_others(run, tmp_path):
    out = shutil.copytree(run, tmp_path / "run")
    before = files(out)
    with pytest.raises(OutputError, match="out: expected an empty folder or an earlier demonstration, got"):
        demo(out)
    with pytest.raises(OptionError, match="epochs: expected at least 1, got 0"):
        demo(tmp_path / "new", epochs=0)
    assert files(out) == before


def test_two_trainings_never_work_in_one_folder(data, tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    holder = Running(tmp_path / "log", hold, out)
    while not (out / "held").exists():
        assert holder.process.is_alive()
    monkeypatch.setattr(checkpoints.alone_in.__wrapped__, "__defaults__", (0.0, "training", False))
    pid = holder.process.pid
    with pytest.raises(OutputError, match=rf"out: expected no other training at work in \S+, got process {pid};"):
        train(recipe(data), out, resume="auto")
    holder.kill()
    holder.end()
    with checkpoints.alone_in(out):
        pass


def hold(out):
    import time

    with checkpoints.alone_in(out):
        (out / "held").touch()
        time.sleep(250)


def test_predictions_go_on_with_rows_of_their_own_alone(run, tmp_path, capsys):
    write_images(tmp_path / "images")
    weights, out = run / "model.safetensors", tmp_path / "p.csv"
    parts = tmp_path / "p.csv.parts"
    parts.mkdir()
    (parts / "rows.json").write_text(json.dumps({"weights": "another", "top_k": 2, "images": "another"}))
    (parts / "run-0000-00000.jsonl").write_text('["cat/0.png", "other", "0.9", "x", "0.1", ""]\n')
    before = files(parts)
    with pytest.raises(OutputError, match=r"parts holds rows made with other weights, top_k, images; remove it"):
        predict(tmp_path / "images", out, weights, top_k=3)
    assert files(parts) == before and not out.exists()
    (tmp_path / "notes").touch()
    with pytest.raises(OutputError, match=r"out: can't write to .*notes/p.csv.parts"):
        predict(tmp_path / "images", tmp_path / "notes" / "p.csv", weights)
    assert main(["eval", "--weights", str(weights), "--out", str(tmp_path)]) == 2
    assert "out: expected a file, got the folder" in capsys.readouterr().err


def test_a_line_of_pixels_does_not_fill_the_memory():
    fit = fit_transform(28)
    assert fit(Image.new("RGB", (6_000_000, 1), "red")).shape == (3, 28, 28)
    assert fit(torch.zeros(1, 1, 6_000_000, dtype=torch.uint8)).shape == (1, 28, 28)
    noise = np.random.default_rng(0).integers(0, 256, (20, 20 * LONGEST, 3), dtype=np.uint8)
    longer = np.pad(noise, ((0, 0), (400, 400), (0, 0)))
    assert torch.equal(fit(Image.fromarray(noise)), fit(Image.fromarray(longer)))


@pytest.mark.skipif(sys.platform != "linux", reason="other systems want names in Unicode")
def test_names_may_be_any_bytes(tmp_path):
    write_images(tmp_path / "images", each=8)
    for path in list((tmp_path / "images").rglob("*.png")):
        path.rename(os.fsdecode(os.fsencode(path).replace(b".png", b"\xe9.png")))
    changes = {"epochs": 1, "image_size": 12, "mixup": 0.2, "model": "resnet14"}
    Running(tmp_path / "log", train, recipe(tmp_path / "images", **changes), tmp_path / "out").succeed()


def test_one_class_is_none(tmp_path):
    write_images(tmp_path / "one", classes=("cat",))
    write_images(tmp_path / "two" / "val")
    with pytest.raises(DataError, match=r"data: expected two classes or more in .*one, found cat alone"):
        open_source(tmp_path / "one")
    with pytest.raises(DataError, match=r"data: expected two classes or more in .*two, found val alone"):
        open_source(tmp_path / "two")


def test_an_archive_beside_unpacked_folders_is_not_shards(tmp_path):
    for part in ("train", "val"):
        write_images(tmp_path / part)
        with tarfile.open(tmp_path / f"{part}.tar", "w") as tar:
            tar.add(tmp_path / part, part)
    assert open_source(tmp_path).classes == ["cat", "dog"]


def test_a_label_that_is_a_key_is_refused(tmp_path):
    for part in ("train", "val"):
        (tmp_path / "0.cls").write_text("20231106123")
        Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
        with tarfile.open(tmp_path / f"{part}.tar", "w") as tar:
            for name in ("0.cls", "0.png"):
                tar.add(tmp_path / name, name)
    with pytest.raises(DataError, match=r"data: expected labels below 100,000 in .*, found 20231106123"):
        open_source(tmp_path)


def test_mixup_of_all_images_in_one_step(data):
    with pytest.raises(OptionError, match="even share"):
        ImageData(open_source(data), recipe(data, mixup=0.5, batch_size=64, accumulate=64))
