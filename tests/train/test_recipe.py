"""Recipes: those of the package, their options on the command line, and the errors of wrong ones."""

import dataclasses
import json
import math
from typing import Any

import pytest
import yaml
from image_files import write_images
from processes import small_images
from torch import nn

from sasa.cli import main
from sasa.models import create_model
from sasa.train import OptionError, Recipe, train
from sasa.train.module import Classifier
from sasa.train.recipe import shipped_recipes


@pytest.mark.parametrize("name", shipped_recipes())
def test_shipped_recipes_are_whole(name):
    options = yaml.safe_load(shipped_recipes()[name].read_text())
    assert options.keys() <= {field.name for field in dataclasses.fields(Recipe)}
    Recipe(**options).check()


def test_the_twins_differ_in_the_network_alone():
    attention, convolution = (
        yaml.safe_load(shipped_recipes()[f"imagenet-{name}"].read_text()) for name in ("sasa-resnet50", "resnet50")
    )
    assert (attention.pop("model"), convolution.pop("model")) == ("sasa_resnet50", "sasa_resnet50_conv")
    assert attention == convolution


def test_the_paper_recipe_is_scaled_to_the_batch():
    paper = Recipe(**yaml.safe_load(shipped_recipes()["imagenet-sasa-resnet50"].read_text()))
    whole = dataclasses.replace(paper, batch_size=4096)
    assert whole.scaled_learning_rate == pytest.approx(1.6) and whole.scaled_ema_decay == pytest.approx(0.9999)
    assert paper.batch_size == 1024 and paper.scaled_learning_rate == pytest.approx(0.4)
    assert paper.scaled_ema_decay**4 == pytest.approx(0.9999)  # four steps forget as many images as one of the paper's
    unscaled = dataclasses.replace(paper, base_batch_size=0)
    assert unscaled.scaled_learning_rate == 1.6 and unscaled.scaled_ema_decay == 0.9999


@pytest.mark.parametrize(("epochs", "steps"), [(1, 1), (1, 3), (2, 2), (10, 10), (90, 450)])
@pytest.mark.parametrize("warmup_epochs", [0.0, 2.0])
def test_the_learning_rate_rises_linearly_then_falls_as_a_cosine(epochs, steps, warmup_epochs):
    recipe = Recipe(epochs=epochs, warmup_epochs=warmup_epochs, learning_rate=0.5)
    options: Any = Classifier(nn.Linear(2, 2), 2, recipe, steps).configure_optimizers()
    schedule, group = options["lr_scheduler"]["scheduler"], options["optimizer"].param_groups[0]
    rates = [group["lr"]]
    for step in range(1, steps + 1):
        schedule.step_update(num_updates=step)
        rates.append(group["lr"])
    warmup = round(min(warmup_epochs, epochs / 2) * steps / epochs)
    rise = [0.5 * (step + 1) / (warmup + 1) for step in range(warmup)]
    fall = [0.25 * (1 + math.cos(math.pi * step / (steps - warmup))) for step in range(steps - warmup + 1)]
    assert rates == pytest.approx(rise + fall)


def test_embeddings_have_a_rate_and_a_decay_of_their_own():
    network = create_model("sasa_resnet14", in_chans=1)
    recipe = Recipe(learning_rate=0.5, warmup_epochs=0, embedding_learning_rate=0.25, embedding_weight_decay=0.125)
    options: Any = Classifier(network, 10, recipe, 10).configure_optimizers()
    options["lr_scheduler"]["scheduler"].step_update(num_updates=0)
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    seen = []
    for group in options["optimizer"].param_groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            seen.append(name)
            own = name.endswith(("row_embedding", "col_embedding"))
            assert group["lr"] == pytest.approx(0.125 if own else 0.5), name
            decay = 0.05 if name.endswith("weight") and parameter.dim() > 1 else 0.0
            assert group["weight_decay"] == (0.125 if own else decay), name
    assert sorted(seen) == sorted(names.values())


def test_the_imagenet_recipe_trains_on_its_layout(tmp_path, capsys):
    for part in ("train", "val"):
        write_images(tmp_path / "images" / part)
    options = ["--epochs=1", "--batch-size=4", "--image-size=32", "--workers=0", "--precision=32-true", "--log-steps=1"]
    where = ["--data", str(tmp_path / "images"), "--out", str(tmp_path / "run")]
    assert main(["train", "--config", "imagenet-sasa-resnet50", *where, *options, "--no-tensorboard"]) == 0
    assert "sasa_resnet50: top-1" in capsys.readouterr().out
    written = json.loads((tmp_path / "run" / "recipe.json").read_text())
    assert written["ema_decay"] == 0.9999 and written["batch_size"] == 4 and not written["tensorboard"]
    assert main(["eval", "--weights", str(tmp_path / "run" / "model.safetensors"), *where[:2]]) == 0


def test_idx_files_train_with_their_recipe(tmp_path, capsys):
    folder = small_images(tmp_path / "data", train=260, size=28)
    options = ["--epochs", "1", "--workers", "0", "--model-options.width", "0.5", "--log-steps=1"]
    assert (
        main(["train", "--config=fashion-mnist", "--data", str(folder), "--out", str(tmp_path / "run"), *options]) == 0
    )
    assert "sasa_resnet14: top-1" in capsys.readouterr().out
    header = (tmp_path / "run" / "metrics.csv").read_text().splitlines()[0]
    for column in ("images_per_second", "data_wait", "memory_gb", "learning_rate", "val_top5"):
        assert column in header
    assert list((tmp_path / "run" / "tensorboard").glob("events.out.tfevents*"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--lerning-rate", "1"], r"lerning_rate: no such option (did you mean learning_rate?); expected one of accel"),
        (["--augment", "shft"], "'none', 'shift', 'imagenet'"),
        (["--epochs", "few"], "epochs"),
        (["--config", "dmo"], "config: expected a YAML file or one of demo, fashion-mnist, imagenet-resnet50"),
        (["--config", "KEY"], "has 'epoch' (did you mean epochs?); expected one of accelerator"),
        (["--config", "VALUE"], "batch_size"),
        (["--config", "LIST"], "LIST: expected keys with values, got a list"),
        (["--config", "BROKEN"], "BROKEN: line"),
        (["--config", "ALIAS"], "expected values written out, got the alias *a"),
        (["--config", "ITSELF"], "expected values written out, got the alias *a"),
        (["--config", "DEEP"], "levels of nesting"),
        (["--config", "LONG"], "expected a number of at most"),
        (["--config", "TWICE"], "epochs: expected each key once, got it twice"),
        (["--config", "OUT"], "has 'out', which only the command line may have"),
        (["--config", "RESUME"], "has 'resume', which only the command line may have"),
        (["--epochs", "1" * 5000], "epochs"),
        (["--epoch", "3"], "epoch: no such option (did you mean epochs?)"),
    ],
    ids=lambda value: None if isinstance(value, str) else "-".join(value)[:24],
)
def test_a_wrong_key_or_value_names_itself_and_what_is_allowed(options, message, tmp_path, capsys):
    files = {"KEY": "epoch: 3\n", "VALUE": "batch_size: [1, 2]\n", "LIST": "- 1\n", "BROKEN": "a: [1\n"}
    files |= {"ALIAS": "model_options: {a: &a [1], b: [*a, *a]}\n", "ITSELF": "model_options: &a {a: *a}\n"}
    files |= {"DEEP": f"model_options: {'[' * 5000}\n", "LONG": f"epochs: {'1' * 5000}\n"}
    files |= {"TWICE": "epochs: 3\nepochs: 4\n", "OUT": "out: x\n", "RESUME": "resume: auto\n"}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    options = [str(tmp_path / word) if word in files else word for word in options]
    with pytest.raises(SystemExit) as stopped:
        main(["train", "--out", str(tmp_path / "run"), *options])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


IMAGENET = {"augment": "imagenet"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer": "sdg"}, "optimizer: expected one of timm's, as sgd or adamw, got 'sdg'"),
        ({"crop_pct": 0.0}, "crop_pct: expected more than 0 and at most 1, got 0.0"),
        ({"ema_decay": 1.0}, "ema_decay: expected at least 0 and below 1, got 1.0"),
        ({"accumulate": 3}, "accumulate: expected a divisor of batch_size 32, got 3"),
        ({"auto_augment": "rand-m9"}, "auto_augment: expected augment imagenet with it, got augment shift"),
        ({"strategy": "fsdp", "ema_decay": 0.9}, "ema_decay: expected 0 with strategy fsdp"),
        ({"strategy": "fsdp", "compile": True}, "compile: expected false with strategy fsdp"),
        ({"strategy": "fsdp", "precision": "64-true"}, "precision: expected 32-true or bf16-mixed with strategy fsdp"),
        ({"checkpoint_steps": 0}, "checkpoint_steps: expected at least 1, got 0"),
        ({"workers": 1_000_000}, r"workers: expected at most \d+, got 1000000"),
        ({"devices": 1_000_000}, r"devices: expected at most \d+, got 1000000"),
        ({"epochs": 10**5000}, "epochs: expected at most 2147483647, got far more"),
        ({"seed": -(10**5000)}, "seed: expected at least 0, got far less"),
        ({"crop_pct": 1e-300}, "crop_pct: expected more than 0 and at most 1, got 1e-300"),
        ({"strict": 1}, "strict: expected true or false, got 1"),
        ({"epochs": True}, "epochs: expected a whole number, got True"),
        ({"augment": "shft"}, "augment: expected one of none, shift, imagenet, flip, got 'shft'"),
        ({"model_options": {"layers": [1, {"a": math.inf}]}}, "model_options: expected finite numbers, got inf"),
        (
            IMAGENET | {"auto_augment": "rand-n99999999"},
            "auto_augment: expected at most 16 after n in .*, got 99999999",
        ),
        (IMAGENET | {"auto_augment": "rand-n9_9999999"}, "auto_augment: expected at most 16 after n"),
        (IMAGENET | {"auto_augment": "augmix-w1000"}, "auto_augment: expected at most 16 after w"),
        (IMAGENET | {"auto_augment": "rand-x9"}, "auto_augment: expected a policy of timm, .* got 'rand-x9'"),
        (IMAGENET | {"auto_augment": "random"}, "auto_augment: expected a policy of timm, .* got 'random'"),
    ],
)
def test_what_can_not_be_meant(changes, message):
    with pytest.raises(OptionError, match=message):
        Recipe(**changes).check()


NUMBERS = [field.name for field in dataclasses.fields(Recipe) if field.type in ("int", "float", "int | str")]


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", NUMBERS)
def test_every_number_is_finite(name, number):
    with pytest.raises(OptionError, match=f"{name}: expected (finite numbers|a whole number.*), got {number}"):
        Recipe(**{name: number}).check()


@pytest.mark.parametrize("option", [["--data", "null"], ["--data=null"], ["--config", "QUOTED"]])
def test_a_folder_may_be_called_null(option, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "QUOTED").write_text("data: 'null'\n")
    assert main(["train", *option]) == 2
    assert "data: expected a folder, got null" in capsys.readouterr().err
    assert main(["train", *option, "--print-config"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["data"] == "null"


def test_a_printed_recipe_is_one_to_start_from(tmp_path, capsys):
    assert main(["train", "--config", "demo", "--strict", "--no-tensorboard", "--epochs=3", "--print-config"]) == 0
    printed = capsys.readouterr().out
    (tmp_path / "mine.yaml").write_text(printed)
    assert main(["train", "--config", str(tmp_path / "mine.yaml"), "--print-config"]) == 0
    assert capsys.readouterr().out == printed
    expected = Recipe(augment="none", strict=True, tensorboard=False, epochs=3).as_dict()
    assert yaml.safe_load(printed) == expected


@pytest.mark.parametrize("options", [{"pretrained": True}, {"checkpoint_path": "x.pth"}, {"widht": 1}, {"width": "a"}])
def test_model_options_are_a_networks_own(options, tmp_path):
    for model in ("sasa_resnet14", "sasa_resnet26"):
        with pytest.raises(OptionError, match="model_options: "):
            train(Recipe(model=model, model_options=options), tmp_path / "run")
    assert not (tmp_path / "run").exists()
