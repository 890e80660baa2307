"""The networks: twins but for the spatial layer, any image size, every parameter trained."""

import math

import pytest
import timm
import torch
from torch import nn

from sasa import RelativeSelfAttention
from sasa.models import create_model
from sasa.models.presets import RESNET14, SMALL_MODELS

TWINS = ("sasa_resnet14", "resnet14")


def spatial_convolutions(network):
    return [m for m in network.modules() if isinstance(m, nn.Conv2d) and m.kernel_size != (1, 1)]


def test_the_attention_network_has_no_spatial_convolution_and_the_twin_no_attention():
    attention, convolution = (create_model(name) for name in TWINS)
    layers = [m for m in attention.modules() if isinstance(m, RelativeSelfAttention)]
    assert spatial_convolutions(attention) == []
    assert len(layers) == len(spatial_convolutions(convolution)) == 1 + sum(RESNET14.blocks)
    assert not any(isinstance(m, RelativeSelfAttention) for m in convolution.modules())


def test_twins_are_equal_but_for_the_spatial_layers():
    def rest(network):
        return {k: v.shape for k, v in network.state_dict().items() if "spatial" not in k}

    assert rest(create_model(TWINS[0])) == rest(create_model(TWINS[1]))


@pytest.mark.parametrize("name", SMALL_MODELS)
@pytest.mark.parametrize("size", [(28, 28), (1, 1), (7, 30), (5, 2)])
def test_any_image_size(name, size):
    network = create_model(name, num_classes=3, in_chans=2).eval()
    assert network(torch.randn(2, 2, *size)).shape == (2, 3)


@pytest.mark.parametrize("size", [(28, 28), (9, 14)])
def test_twins_have_maps_of_equal_size(size):
    maps = []
    for name in TWINS:
        network = create_model(name, in_chans=1).eval()
        x, shapes = network.stem(torch.randn(1, 1, *size)), []
        for stage in network.stages:
            x = stage(x)
            shapes.append(x.shape)
        maps.append(shapes)
    assert maps[0] == maps[1]


@pytest.mark.parametrize("name", SMALL_MODELS)
def test_every_parameter_gets_a_gradient(name):
    network = create_model(name, in_chans=1)
    network(torch.randn(4, 1, 12, 12)).square().sum().backward()
    without = [n for n, p in network.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert without == []


@pytest.mark.parametrize("name", SMALL_MODELS)
def test_a_channels_last_batch_gives_the_same(name):
    network = create_model(name, in_chans=3).eval()
    x = torch.randn(2, 3, 10, 10)
    torch.testing.assert_close(network(x.contiguous(memory_format=torch.channels_last)), network(x))


def test_depth_counts_layers_as_a_resnets_are_counted():
    network = create_model("resnet14")
    layers = [n for n, m in network.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert RESNET14.depth == 14 == len([n for n in layers if "downsample" not in n and n != "stem.mix"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("resnet1",), r"name: expected one of 'sasa_resnet14', 'resnet14', 'sasa_resnet26', .*, got 'resnet1'"),
        (("resnet14", 0), r"num_classes: expected at least 1, got 0"),
        (("resnet14", 10, 0), r"in_chans: expected at least 1, got 0"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        create_model(*arguments)


@pytest.mark.parametrize(
    ("options", "attending"),
    [
        ({}, "stem stage1 stage2"),
        ({"attention_stem": False}, "stage1 stage2"),
        ({"attention_stem": False, "attention_stages": [2]}, "stage2"),
        ({"attention_stages": [1]}, "stem stage1"),
        ({"attention_stem": False, "attention_stages": []}, ""),
    ],
)
def test_the_parts_that_attend_are_chosen_and_the_others_convolve(options, attending):
    network = create_model("sasa_resnet14", **options)
    parts = {"stem": network.stem, **dict(network.stages.named_children())}
    with_attention = [
        name for name, part in parts.items() if any(isinstance(m, RelativeSelfAttention) for m in part.modules())
    ]
    assert with_attention == attending.split()
    assert not any(
        isinstance(m, RelativeSelfAttention) for m in create_model("resnet14", position="none", kernel_size=7).modules()
    )


def test_the_options_of_the_attention_reach_every_layer():
    options = {"kernel_size": 3, "position": "only", "position_split": "across_heads", "border": "mask"}
    network = create_model("sasa_resnet14", **options)
    layers = [m for m in network.modules() if isinstance(m, RelativeSelfAttention)]
    for layer in layers:
        assert (layer.position, layer.position_split, layer.border) == ("only", "across_heads", "mask")
        assert layer.kernel_size == (3, 3)


@pytest.mark.parametrize(("start", "bias"), [(2.5, True), (0.5, True), (None, False)])
def test_heads_start_with_the_given_strength(start, bias):
    torch.manual_seed(0)
    layer = create_model("sasa_resnet14", start=start).stages[0][0].spatial
    queries = layer.qkv.bias[: layer.out_channels].unflatten(0, (layer.num_heads, -1))
    pulls = torch.einsum("nd,ndk->nk", queries[:, :4], layer.row_embedding.unflatten(0, (layer.num_heads, -1)))
    steps = pulls.diff(dim=1).abs()
    assert torch.allclose(steps, torch.full_like(steps, start if bias else 0), atol=1e-5) is bias


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention_stages": [0]}, r"attention_stages: expected numbers from 1 to 2, got \[0\]"),
        ({"border": "valid"}, "border: expected"),
        ({"position": "some"}, "position: expected"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        create_model("sasa_resnet14", **options)


@pytest.mark.parametrize("name", ["resnet14", "sasa_resnet26"])
@pytest.mark.parametrize(
    "option",
    [
        *("checkpoint_path", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "pretrained_filter_fn"),
        *("cache_dir", "scriptable", "exportable", "no_jit", "features_only", "block", "device", "widht"),
    ],
)
def test_options_are_the_networks_own(name, option, monkeypatch):
    """What reads files or the network in timm's factory never gets there."""
    monkeypatch.setattr(timm, "create_model", lambda *_, **__: pytest.fail("reached timm"))
    with pytest.raises(TypeError, match=rf"expected arguments of {name} \(.*width.*\), got {option}"):
        create_model(name, **{option: "x"})


@pytest.mark.parametrize(("name", "option"), [("resnet14", "width"), ("sasa_resnet26", "drop_rate")])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_options_are_finite(name, option, value):
    with pytest.raises(ValueError, match=f"{option}: expected a finite number, got {value}"):
        create_model(name, **{option: value})
