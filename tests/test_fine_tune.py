"""The study of fine-tuning runs on a handful of random images, repeats nothing, and refuses what it can't use."""

import json
import sys

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import sasa
from benchmarks.fine_tune import __main__ as command
from benchmarks.fine_tune import pruning, report, training
from benchmarks.fine_tune.resnet20 import ResNet20, converted, trained
from benchmarks.fine_tune.training import FineTuning

pytestmark = pytest.mark.slow

RECIPE = FineTuning(train_images=4, held_out=4, epochs=1, batch=2, rates=(1e-2,), seeds=(0, 1))


@pytest.fixture(autouse=True)
def _one_thread():
    """So little work is slower on two."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def given(tmp_path):
    """Weights and images as the command takes them."""
    save_file(
        {k: v for k, v in ResNet20().state_dict().items() if "tracked" not in k}, tmp_path / "weights.safetensors"
    )
    for index in range(12):
        path = tmp_path / f"images/{'val' if index % 3 else 'train'}/{'cat' if index % 2 else 'dog'}/{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(torch.randint(256, (8, 8, 3), dtype=torch.uint8).numpy()).save(path)
    return tmp_path


def run(monkeypatch, folder, *more):
    arguments = ["--weights", folder / "weights.safetensors", "--images", folder / "images", "--out", folder / "out"]
    monkeypatch.setattr(sys, "argv", ["fine_tune", *map(str, (*arguments, *more))])
    command.main()


def test_a_study_runs_once_and_is_drawn(given, monkeypatch):
    images = torch.randint(256, (8, 3, 8, 8), dtype=torch.uint8), torch.arange(8) % 2
    study = command.FineTuningRuns(trained(given / "weights.safetensors"), images, images, RECIPE, given)
    found = study.results()
    assert [(run["network"], run["strength"], run["seed"]) for run in found["runs"]] == [
        *(("convolution", None, 0), ("attention", 2, 0), ("convolution", None, 1), ("attention", 2, 1)),
        *(("attention", 1, 0), ("attention", 3, 0)),
    ]
    assert all(len(run["epochs"]) == 1 for run in found["runs"] + found["tuning"])
    assert all(one["correct_before"] == one["correct_after"] for one in found["conversion"])
    assert [one["strength"] for one in found["strengths"]] == [None, 1, 2, 3, 8]
    report.draw(found, given / "curve.png")
    with Image.open(given / "curve.png") as picture:
        assert picture.width > 1000
    for name, rows in report.TABLES.items():
        table = rows(found)
        assert table.rows, name
        assert {len(row) for row in table.rows} == {len(table.header)}, name

    monkeypatch.setattr(command, "fine_tune", None)  # nothing is trained again
    assert study.results() == found


def test_the_order_of_images_is_the_seeds_alone(given):
    images = torch.randint(256, (6, 3, 8, 8), dtype=torch.uint8), torch.arange(6)
    network = trained(given / "weights.safetensors")
    losses = []
    for own, seed in ((network, 0), (converted(network, 3), 0), (network, 1)):
        (first,) = training.fine_tune(own, images, images, RECIPE, 0.0, seed, lambda text: None)
        losses.append(first["train_loss"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert losses[2] != pytest.approx(losses[0], rel=1e-4)


@pytest.mark.parametrize("shift", [0, 3])
def test_an_image_is_moved_and_mirrored(shift):
    image = torch.zeros(200, 3, 9, 9, dtype=torch.uint8)
    image[:, :, 4, 3] = 1
    found = training.augmented(image, shift, torch.Generator().manual_seed(0))
    assert found.shape == image.shape
    assert (found.sum((2, 3)) == 1).all()
    rows, cols = found[:, 0].nonzero()[:, 1:].T
    assert (rows.min(), rows.max()) == (4 - shift, 4 + shift)
    assert (cols.min(), cols.max()) == (3 - shift, 5 + shift)


def test_stages_attend_from_the_first_asked_for():
    for stage, count in ((1, 18), (2, 12), (3, 6)):
        network = converted(ResNet20(), stage)
        assert sum(isinstance(module, sasa.AttentionConv2d) for module in network.modules()) == count


def test_what_cannot_be_used_is_refused_by_its_argument(given, monkeypatch, capsys):
    cases = {"--train-images": ("--train-images", "9", "--held-out", "1"), "--images": ("--images", str(given / "no"))}
    cases["--weights"] = ("--weights", str(given / "no"))
    for argument, options in cases.items():
        with pytest.raises(SystemExit):
            run(monkeypatch, given, *options)
        assert f"error: {argument}" in capsys.readouterr().err

    (given / "out").mkdir(exist_ok=True)
    (given / "out/settings.json").write_text(json.dumps({"recipe": "another"}))
    with pytest.raises(SystemExit):
        run(monkeypatch, given, "--train-images", "2", "--held-out", "2")
    assert "error: --out: " in capsys.readouterr().err

    save_file({"conv1.weight": torch.zeros(16, 3, 3, 3)}, given / "weights.safetensors")
    with pytest.raises(SystemExit):
        run(monkeypatch, given, "--train-images", "2", "--held-out", "2")
    assert "error: --weights: expected weights of a ResNet-20, got" in capsys.readouterr().err


@pytest.mark.parametrize("strength", [None, 2.0])
def test_pruned_heads_are_the_least_and_stay_zero(strength):
    network = ResNet20() if strength is None else converted(ResNet20(), 3, strength)
    first = pruning.layers(network)[0]
    norms = pruning.by_head(first.weight.detach()).norm(dim=1)
    own = pruning.pruned(network, 4).train()
    images, labels = torch.randint(256, (4, 3, 8, 8), dtype=torch.uint8), torch.arange(4) % 2
    training.fine_tune(own, (images, labels), (images, labels), RECIPE, 0.1, 0, lambda _: None)
    kept = pruning.by_head(pruning.layers(own)[0].weight.detach()).norm(dim=1) > 0
    assert kept.sum() == pruning.HEADS - 4 and norms[kept].min() >= norms[~kept].max()
    assert (pruning.by_head(first.weight.detach()).norm(dim=1) > 0).all()  # the network itself is whole


def test_pruning_is_measured_once_and_listed(given, monkeypatch):
    monkeypatch.setattr(pruning, "PRUNED", (0, 5))
    monkeypatch.setattr(pruning, "SCRATCH_EPOCHS", 1)
    images = torch.randint(256, (8, 3, 8, 8), dtype=torch.uint8), torch.arange(8) % 2
    study = pruning.PruningRuns(trained(given / "weights.safetensors"), images, images, RECIPE, given)
    found = study.results()
    assert [(run["network"], run["seed"]) for run in found["pruned"]] == [
        (name, seed) for seed in RECIPE.seeds for name in ("convolution", "attention")
    ]
    assert [row[0] for row in report.pruning(found).rows] == ["0", "5"]
    assert [row[0] for row in report.scratch(found).rows] == ["convolution", "attention"]
    monkeypatch.setattr(pruning, "fine_tune", None)  # nothing is trained again
    assert study.results() == found
