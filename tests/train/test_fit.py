"""Training: the files it writes, that it learns, that it repeats, and its errors."""

import csv
import json

import pytest
import torch
from image_files import write_images
from safetensors import safe_open
from safetensors.torch import save_file

from sasa.models import create_model
from sasa.train import DataError, OptionError, OutputError, Recipe, checkpoints, load_model, train
from sasa.train.demo import demo
from sasa.train.fit import count_flops


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Two classes that differ in brightness."""
    folder = tmp_path_factory.mktemp("images")
    generator = torch.Generator().manual_seed(0)
    from torchvision.utils import save_image

    for label, level in (("dark", 0.2), ("light", 0.8)):
        (folder / label).mkdir()
        for index in range(20):
            noise = 0.1 * torch.randn(3, 8, 8, generator=generator)
            save_image((level + noise).clamp(0, 1), folder / label / f"{index:02}.png")
    return folder


def options(images, **more):
    common = {"data": images, "epochs": 3, "batch_size": 8, "image_size": 8, "augment": "none", "tensorboard": False}
    return Recipe(**(common | more))


@pytest.mark.parametrize("model", ["sasa_resnet14", "resnet14"])
def test_training_learns_and_writes_weights_log_and_result(images, tmp_path, model):
    out = tmp_path / "run"
    result = train(options(images, model=model, epochs=6), out)
    assert result.top1 == 1.0
    assert (result.train_images, result.val_images, result.epochs, result.skipped_images) == (32, 8, 6, 0)
    assert json.loads((out / "result.json").read_text())["top1"] == 1.0
    with (out / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    losses = [float(row["train_loss"]) for row in rows if row["train_loss"]]
    assert len(losses) == 6 and losses[-1] < losses[0]
    newest = checkpoints.newest_whole(out)
    assert torch.load(newest, weights_only=True)["global_step"] == checkpoints.step_of(newest) == 23
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_exported_weights_give_the_trained_network(images, tmp_path):
    out = tmp_path / "run"
    train(options(images), out)
    network, facts = load_model(out / "model.safetensors")
    assert facts["classes"] == ["dark", "light"] and facts["image_size"] == 8 and facts["model"] == "sasa_resnet14"
    level = torch.full((1, 3, 8, 8), 0.8)
    normal = (level - torch.tensor(facts["mean"])[:, None, None]) / torch.tensor(facts["std"])[:, None, None]
    assert facts["classes"][network(normal).argmax()] == "light"


def test_equal_seeds_give_equal_weights_and_others_do_not(images, tmp_path):
    def weights(name, seed):
        train(options(images, epochs=1, seed=seed), tmp_path / name)
        with safe_open(tmp_path / name / "model.safetensors", "pt") as file:
            return file.get_tensor("fc.weight")

    first = weights("a", 1)
    assert torch.equal(first, weights("b", 1))
    assert not torch.equal(first, weights("c", 2))


@pytest.mark.parametrize(
    "changes",
    [
        {"precision": "bf16-mixed", "ema_decay": 0.5, "clip_grad_norm": 1.0, "accumulate": 2},
        {"augment": "imagenet", "auto_augment": "rand-m3", "mixup": 0.2, "channels_last": False, "optimizer": "sgd"},
        {"batch_size": 64},  # fewer images than that
    ],
    ids=["bf16", "imagenet", "few"],
)
def test_other_ways_to_train(images, tmp_path, changes):
    result = train(options(images, model="resnet14", epochs=1, **changes), tmp_path / "run")
    assert 0 <= result.top1 <= 1 and result.val_images == 8
    network, _ = load_model(tmp_path / "run" / "model.safetensors")
    assert all(tensor.isfinite().all() for tensor in network.state_dict().values())


def test_validation_after_the_last_epoch_alone_gives_the_same_result(images, tmp_path):
    every, last = (
        train(options(images, model="resnet14", epochs=2, validate=when), tmp_path / when)
        for when in ("every_epoch", "last_epoch")
    )
    assert (every.top1, every.val_loss) == (last.top1, last.val_loss)
    networks = [load_model(tmp_path / when / "model.safetensors")[0] for when in ("every_epoch", "last_epoch")]
    torch.testing.assert_close(*(network.state_dict() for network in networks), rtol=0, atol=0)


def test_flops_are_counted_from_the_equation():
    network = create_model("sasa_resnet14", in_chans=1).eval()
    counted = count_flops(network, (1, 1, 28, 28))

    def attention(channels, outputs, size, taps=25):
        return 2 * 3 * channels * outputs * size**2 + 6 * taps * outputs * size**2

    def block(inputs, width, size, after):
        return 2 * inputs * width * size**2 + attention(width, width, size) + 2 * width * 2 * width * after**2

    stem = attention(1, 16, 28, taps=9) + 2 * 16 * 16 * 28**2
    first = block(16, 32, 14, 14) + 2 * 16 * 64 * 14**2 + block(64, 32, 14, 14)
    second = block(64, 64, 14, 7) + 2 * 64 * 128 * 7**2 + block(128, 64, 7, 7)
    assert counted == stem + first + second + 2 * 128 * 10


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "vgg"}, r"model: expected one of sasa_resnet14, resnet14, sasa_resnet26, .*, got 'vgg'"),
        ({"epochs": 0}, r"epochs: expected at least 1, got 0"),
        ({"batch_size": 1}, r"batch_size: expected at least 2, got 1"),
        ({"image_size": 0}, r"image_size: expected at least 1, got 0"),
        ({"workers": -1}, r"workers: expected at least 0, got -1"),
        ({"learning_rate": 0.0}, r"learning_rate: expected more than 0, got 0.0"),
        ({"label_smoothing": 1.0}, r"label_smoothing: expected at least 0 and below 1, got 1.0"),
    ],
)
def test_bad_options(images, tmp_path, change, message):
    with pytest.raises(OptionError, match=message):
        train(options(images, **change), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_output_folder_that_can_not_be_written(images, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError, match=r"out: can't write to .*file.run: Not a directory"):
        train(options(images), tmp_path / "file" / "run")
    assert (tmp_path / "file").read_text() == "in the way"


def test_an_earlier_run_is_kept_unless_told_otherwise(images, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    (out / "result.json").write_text("an earlier result")
    (out / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"out: .*run is not empty; .* --overwrite"):
        train(options(images), out)
    assert (out / "result.json").read_text() == "an earlier result"
    train(options(images, epochs=1), out, overwrite=True)
    assert json.loads((out / "result.json").read_text())["epochs"] == 1
    assert (out / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("resume", ["never", "auto"])
def test_bad_data_leaves_nothing(tmp_path, resume):
    with pytest.raises(DataError, match="data: expected a folder"):
        train(options(tmp_path / "nowhere"), tmp_path / "deep" / "run", resume=resume)
    assert not (tmp_path / "deep").exists()


def test_skipped_images_are_in_the_result(tmp_path):
    write_images(tmp_path / "images")
    (tmp_path / "images" / "cat" / "2.png").write_bytes(b"broken")
    with pytest.warns(UserWarning, match="skipped an image"):
        result = train(options(tmp_path / "images", model="resnet14", epochs=1), tmp_path / "run")
    assert result.skipped_images == 1 and result.train_images + result.val_images == 9


def test_images_that_turn_out_unreadable_are_told_and_left_out(tmp_path, monkeypatch):
    """In folders too large to be read through beforehand."""
    monkeypatch.setattr("sasa.train.sources.CHECKED_BEFOREHAND", 0)
    write_images(tmp_path / "images")
    (tmp_path / "images" / "cat" / "1.png").write_bytes(b"broken")  # of the validation part
    (tmp_path / "images" / "dog" / "2.png").write_bytes(b"broken")
    with pytest.warns(UserWarning, match=r"skipped an image that can't be read: .*(cat.1|dog.2).png") as caught:
        result = train(options(tmp_path / "images", model="resnet14", epochs=2, batch_size=4), tmp_path / "run")
    assert len(caught) == 2  # each once
    assert (result.train_images, result.val_images, result.skipped_images) == (8, 1, 2)
    with pytest.raises(DataError, match=r"cat.1.png|dog.2.png"):
        train(options(tmp_path / "images", model="resnet14", strict=True), tmp_path / "strict")


@pytest.mark.parametrize(
    ("tensors", "metadata", "message"),
    [
        ({"a": torch.zeros(1)}, None, "does not hold weights written by sasa train: 'model'"),
        (
            {"a": torch.zeros(1)},
            {
                "model": '"resnet14"',
                "classes": '["a"]',
                "in_chans": "1",
                "image_size": "9",
                "mean": "[0]",
                "std": "[1]",
            },
            "(?s)Missing key.*'?fc",
        ),
    ],
)
def test_files_that_hold_no_trained_network(tmp_path, tensors, metadata, message):
    save_file(tensors, tmp_path / "model.safetensors", metadata)
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path / "model.safetensors")


def test_pickles_are_refused(tmp_path):
    torch.save({"a": 1}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="does not hold weights written by sasa train"):
        load_model(tmp_path / "model.safetensors")


def test_the_demonstration(images, tmp_path, capsys):
    results = demo(tmp_path / "demo", data=images, epochs=1)
    assert [r.model for r in results] == ["linear classifier", "resnet14", "sasa_resnet14"]
    written = json.loads((tmp_path / "demo" / "results.json").read_text())
    assert [r["flops"] for r in written] == [r.flops for r in results]
    for name in ("curves.png", "attention.png"):
        assert (tmp_path / "demo" / name).read_bytes().startswith(b"\x89PNG")
    assert "top-1" in capsys.readouterr().out
    demo(tmp_path / "demo", data=images, epochs=1)  # again, in place of the first
