"""Converted networks saved and loaded: the same outputs, whatever the conversion; other networks are named."""

import copy
import json
import warnings

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
import torchvision
from torch import nn

import sasa

pytestmark = pytest.mark.slow


def build(seed=0):
    torch.manual_seed(seed)
    return timm.create_model("resnet18", num_classes=10)


CONVERSIONS = {
    "defaults": {},
    "stem": {"stem": True, "kernel_size": 3, "num_heads": 4},
    "options": {"kernel_size": (3, 5), "stride_mode": "strided", "border": "mask", "position": "none"},
    "where": {"where": lambda name, module: name.startswith("layer3")},
    "function": {"keep_function": True},
    "function, larger window": {"keep_function": True, "kernel_size": 5, "margin": 12, "stem": True},
    "numbers of NumPy": {"kernel_size": np.int64(3), "scale": np.float32(0.5)},
}


@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", CONVERSIONS)
def test_there_and_back(name, tmp_path):
    network = sasa.convert(build(), **CONVERSIONS[name])
    network(torch.randn(2, 3, 64, 64))  # statistics of the batch norms
    sasa.save_converted(network, tmp_path / "deep" / "folder")
    assert sorted(p.name for p in (tmp_path / "deep" / "folder").iterdir()) == ["conversion.json", "model.safetensors"]
    model = build(1).eval()
    before = copy.deepcopy(model.state_dict())
    loaded = sasa.load_converted(model, tmp_path / "deep" / "folder")
    assert not loaded.training
    assert [type(m) for m in model.modules() if "sasa" in type(m).__module__] == []
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert str(loaded) == str(network)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(loaded(x), network.eval()(x))
    sasa.save_converted(loaded, tmp_path)  # once more, from what was loaded
    with torch.no_grad():
        assert torch.equal(sasa.load_converted(build(2).eval(), str(tmp_path))(x), network(x))


def test_parts_converted_in_turn_tied_weights_and_other_dtypes(tmp_path):
    def parts():
        net = nn.ModuleDict(
            {"a": nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)), "b": nn.Conv2d(8, 8, 3, padding=1)}
        )
        net["c"], net["d"] = nn.Linear(8, 8), nn.Linear(8, 8)
        net["d"].weight = net["c"].weight
        return net

    network = parts()
    network["a"] = sasa.convert(network["a"], 3)
    network["b"] = sasa.convert(network["b"], 5, keep_function=True)
    network = sasa.convert(network, 3, where=lambda name, module: name == "a.0")
    network.bfloat16()
    sasa.save_converted(network, tmp_path)
    loaded = sasa.load_converted(parts().bfloat16(), tmp_path)
    assert str(loaded) == str(network)
    assert all(torch.equal(v, network.state_dict()[k]) for k, v in loaded.state_dict().items())
    assert loaded["c"].weight is loaded["d"].weight
    wide = sasa.load_converted(parts().double(), tmp_path)
    assert all(v.dtype == torch.float64 for v in wide.state_dict().values())


def test_compiled_and_data_parallel_networks_are_saved_as_themselves(tmp_path):
    network = sasa.convert(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)), 3)
    for wrapped in (torch.compile(network), nn.DataParallel(network)):
        sasa.save_converted(wrapped, tmp_path)
        loaded = sasa.load_converted(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)), tmp_path).state_dict()
        assert loaded.keys() == network.state_dict().keys()
        assert all(torch.equal(value, loaded[name]) for name, value in network.state_dict().items())


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("other", "match"),
    [
        (lambda: timm.create_model("resnet18", num_classes=7), r"fc\.weight of \(7, 512\), the file has \(10, 512\)"),
        (
            lambda: timm.create_model("resnet34", num_classes=10),
            r"got one with layer1\.2\.conv1\.weight of .* the file has none",
        ),
        (lambda: timm.create_model("resnet50", num_classes=10), r"got one with .*layer1\.0\.conv1"),
        (lambda: torchvision.models.vgg11(), r"a convolution 'layer1\.0\.conv1', got no module of that name"),
        (lambda: sasa.convert(build()), r"before its conversion.* got RelativeSelfAttention there"),
        (lambda: nn.Sequential(build()), r"a convolution 'layer1\.0\.conv1', got no module"),
    ],
)
def test_another_network_is_named(other, match, tmp_path):
    sasa.save_converted(sasa.convert(build()), tmp_path)
    with pytest.raises(ValueError, match=r"model: expected the network .*" + match):
        sasa.load_converted(other(), tmp_path)


def test_wrong_arguments(tmp_path):
    with pytest.raises(TypeError, match=r"model: expected an nn\.Module, got str"):
        sasa.save_converted("resnet18", tmp_path)
    with pytest.raises(TypeError, match=r"model: expected an nn\.Module, got dict"):
        sasa.load_converted({}, tmp_path)
    with pytest.raises(ValueError, match=r"model: expected a network that sasa\.convert gave, got ResNet"):
        sasa.save_converted(build(), tmp_path)
    with pytest.raises(FileNotFoundError):
        sasa.load_converted(build(), tmp_path / "nowhere")


@pytest.mark.parametrize(
    "change",
    [
        lambda p: (p / "conversion.json").write_text("{"),
        lambda p: (p / "conversion.json").write_text("[]"),
        lambda p: (p / "conversion.json").write_text(
            json.dumps({"conversions": [{"module": 1, "arguments": {}, "names": []}]})
        ),
        lambda p: (p / "conversion.json").write_text(json.dumps({"conversions": [{"module": "a", "arguments": {}}]})),
        lambda p: edit(p, lambda c: c["arguments"].update(border="wrap")),
        lambda p: edit(p, lambda c: c["arguments"].update(where="x")),
        lambda p: edit(p, lambda c: c.update(module="layer9")),
        lambda p: (p / "model.safetensors").write_bytes(b"12345678" * 9),
        lambda p: (p / "model.safetensors").write_bytes((p / "model.safetensors").read_bytes()[:-100]),
    ],
)
def test_damaged_files(change, tmp_path):
    sasa.save_converted(sasa.convert(build()), tmp_path)
    change(tmp_path)
    with pytest.raises(ValueError, match=r"folder: |model: "):
        sasa.load_converted(build(), tmp_path)


def edit(folder, change):
    path = folder / "conversion.json"
    text = json.loads(path.read_text())
    change(text["conversions"][0])
    path.write_text(json.dumps(text))


def test_a_failed_save_leaves_the_earlier_files(tmp_path, monkeypatch):
    network = sasa.convert(build())
    sasa.save_converted(network, tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_model", full)
    with pytest.raises(OSError, match="No space"):
        sasa.save_converted(sasa.convert(build(3), 3), tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_loading_warns_of_nothing(tmp_path):
    with pytest.warns(UserWarning, match="left alone"):
        network = sasa.convert(timm.create_model("mobilenetv2_035"), where=None, grouped=False, stem=True)
    sasa.save_converted(network, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sasa.load_converted(timm.create_model("mobilenetv2_035"), tmp_path)
