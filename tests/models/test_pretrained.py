"""The weights of the package: in timm, by name, without a network; their cards say what they do."""

import json
import socket

import pytest
import timm
import torch

import sasa.models
from sasa.models.pretrained import find_weights, read_facts, shipped_weights
from sasa.train import load_model

NAMES = ("clothing", "fashion_mnist")


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    def refuse(*_):
        raise AssertionError("opened a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def test_the_package_has_them_and_they_are_small():
    assert tuple(shipped_weights()) == NAMES
    assert all(path.stat().st_size <= 3_000_000 for path in shipped_weights().values())
    assert find_weights("other") == find_weights("./other")


@pytest.mark.parametrize("name", NAMES)
def test_timm_builds_the_trained_network(name):
    model = timm.create_model(f"sasa_resnet14.{name}", pretrained=True).eval()
    expected, facts = load_model(name)
    size = facts["image_size"]
    x = torch.randn(2, facts["in_chans"], size, size)
    torch.testing.assert_close(model(x), expected(x), rtol=0, atol=0)
    config = timm.data.resolve_model_data_config(model)
    assert config["input_size"] == (facts["in_chans"], size, size)
    assert (config["mean"], config["std"]) == (tuple(facts["mean"]), tuple(facts["std"]))


def test_timm_takes_the_photographs_network_unless_another_is_named():
    model = timm.create_model("sasa_resnet14", pretrained=True)
    assert model.pretrained_cfg["tag"] == "clothing"
    torch.testing.assert_close(model.state_dict(), load_model("clothing")[0].state_dict(), rtol=0, atol=0)


def test_timm_fits_it_to_other_classes_and_channels():
    model = timm.create_model("sasa_resnet14.fashion_mnist", pretrained=True, num_classes=3, in_chans=3).eval()
    assert model(torch.randn(1, 3, 28, 28)).shape == (1, 3)
    trained = load_model("fashion_mnist")[0].state_dict()
    own = model.state_dict()
    kept = [name for name in own if not name.startswith(("fc.", "stem.spatial."))]
    assert all(torch.equal(own[name], trained[name]) for name in kept)
    model.reset_classifier(5)
    assert model(torch.randn(1, 3, 28, 28)).shape == (1, 5) and model.get_classifier().out_features == 5


def test_without_weights_timm_builds_a_fresh_network():
    model = timm.create_model("sasa_resnet14", width=0.5, num_classes=7)
    assert model(torch.randn(1, 3, 28, 28)).shape == (1, 7)


@pytest.mark.parametrize("name", NAMES)
def test_the_card_has_the_facts(name):
    folder = shipped_weights()[name].parent
    card, figures = (folder / "README.md").read_text(), json.loads((folder / "figures.json").read_text())[name]
    facts, network = read_facts(shipped_weights()[name]), load_model(name)[0]
    assert f"{sum(p.numel() for p in network.parameters()):,} parameters" in card
    assert f"{figures['correct']:,} of {figures['images']:,}" in card
    assert all(word in card for word in (*facts["classes"], f"{facts['image_size']} pixels"))
    assert sasa.models.shipped_weights is shipped_weights
