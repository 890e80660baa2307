"""Conversion: every map keeps its size, what can't be converted is left alone and named, errors change nothing."""

import copy
import re

import pytest
import timm
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import Conv2dSame
from torch import nn
from torch.nn.utils import parametrizations

import sasa
from sasa import AttentionStem, RelativeSelfAttention
from sasa.nn.replace import Crop, nearest_heads


def everywhere(name, module):
    return True


def converted(conv, *args, **kwargs):
    return sasa.convert(nn.Sequential(conv), *args, where=everywhere, **kwargs)[0]


def layers_of(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, RelativeSelfAttention)}


def convolutions_of(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Conv2d) and max(m.kernel_size) > 1}


# --- sizes ---


def geometries():
    axis = st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(1, 3), st.integers(0, 4))
    return st.tuples(axis, axis, st.tuples(st.integers(1, 24), st.integers(1, 24)))


@settings(max_examples=300, deadline=None)
@given(geometries(), st.sampled_from(["pool", "strided"]))
def test_sizes_are_the_convolutions_for_every_geometry_and_image(geometry, mode):
    rows, cols, size = geometry
    kernel, stride, dilation, padding = zip(rows, cols, strict=True)
    conv = nn.Conv2d(2, 4, kernel, stride, padding, dilation)
    x = torch.randn(1, 2, *size)
    try:
        expected = conv(x).shape
    except RuntimeError:
        return  # the image is too small for the convolution
    try:
        layer = converted(conv, 3, 2, stride_mode=mode)
    except ValueError as error:
        assert max(kernel) == 1 or "left alone" in str(error)  # noqa: PT017
        return
    assert layer(x).shape == expected


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (7, 7), (8, 5), (16, 9)])
@pytest.mark.parametrize("stride", [1, 2, 3, (2, 1)])
@pytest.mark.parametrize("mode", ["pool", "strided"])
def test_same_padding(size, stride, mode):
    conv = nn.Conv2d(2, 4, 3, stride, padding=1)
    layer = converted(conv, 5, 2, stride_mode=mode)
    assert layer(torch.randn(2, 2, *size)).shape == conv(torch.randn(2, 2, *size)).shape


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("size", [(5, 5), (8, 9)])
@pytest.mark.parametrize("kernel", [2, 4])
def test_padding_by_name_and_even_kernels(size, kernel):
    x = torch.randn(1, 2, *size)
    for padding in ("same", "valid"):
        conv = nn.Conv2d(2, 4, kernel, padding=padding)
        assert converted(conv, 3, 2)(x).shape == conv(x).shape
    same = Conv2dSame(2, 4, kernel, stride=2)
    assert converted(same, 3, 2)(x).shape == same(x).shape


def test_a_patch_convolution_averages_whole_patches_only():
    torch.manual_seed(0)
    layer = converted(nn.Conv2d(2, 4, 2, stride=2), 3, 2)
    x = torch.randn(1, 2, 5, 4)
    assert isinstance(layer[1], nn.AvgPool2d)
    full = layer.attention(x)
    torch.testing.assert_close(layer(x)[0, :, 1, 1], full[0, :, 2:4, 2:4].mean((1, 2)))


def test_what_a_convolution_without_padding_loses_is_cut_off_evenly():
    layer = converted(nn.Conv2d(2, 4, (5, 4), padding=0), 3, 2)
    assert isinstance(layer.crop, Crop)
    x = torch.randn(1, 2, 9, 9)
    # A kernel of 4 begins one pixel before its centre.
    torch.testing.assert_close(layer(x), layer.attention(x)[:, :, 2:-2, 1:-2])
    with pytest.raises(ValueError, match=r"x: expected at least 5 x 4 pixels, got 4 x 9"):
        layer(torch.randn(1, 2, 4, 9))


# --- numbers ---


def test_a_stride_is_attention_of_every_pixel_then_an_average():
    torch.manual_seed(0)
    layer = converted(nn.Conv2d(4, 8, 3, 2, 1), 3, 2)
    assert isinstance(layer, RelativeSelfAttention)
    plain = RelativeSelfAttention(4, 8, 3, 2)
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(2, 4, 5, 6)
    torch.testing.assert_close(layer(x), nn.AvgPool2d(2, ceil_mode=True)(plain(x)))


def test_strided_attention_samples_the_queries():
    layer = converted(nn.Conv2d(4, 8, 3, 2, 1), 3, 2, stride_mode="strided")
    assert (layer.stride, layer.pool) == ((2, 2), 1)
    x = torch.randn(2, 4, 5, 6)
    layer.stride = (1, 1)
    every = layer(x)
    layer.stride = (2, 2)
    torch.testing.assert_close(layer(x), every[:, :, ::2, ::2])


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_device_dtype_mode_and_memory_format_are_kept(memory_format):
    for bias in (True, False):
        conv = nn.Conv2d(4, 8, 3, padding=1, bias=bias, dtype=torch.float64).eval()
        layer = converted(conv)
        assert layer.qkv.weight.dtype == torch.float64
        assert layer.qkv.bias is not None
        assert not layer.training
        y = layer(torch.randn(2, 4, 6, 6, dtype=torch.float64).to(memory_format=memory_format))
        assert y.is_contiguous(memory_format=memory_format)
    assert converted(nn.Conv2d(4, 8, 3, padding=1, device="meta")).qkv.weight.device.type == "meta"


def test_windows_follow_the_shape_of_the_kernel():
    assert converted(nn.Conv2d(4, 8, (1, 7), padding=(0, 3))).kernel_size == (1, 7)
    assert converted(nn.Conv2d(4, 8, (3, 1), padding=(1, 0)), (5, 9)).kernel_size == (5, 1)
    layer = converted(nn.Conv2d(4, 8, 3, padding=4, dilation=4), 5)
    assert (layer.kernel_size, layer.dilation) == ((5, 5), (4, 4))


HEADS = [(64, 8), (16, 8), (8, 4), (12, 6), (20, 10), (7, 1), (1, 1), (2, 1), (6, 3), (10, 5), (36, 9), (34, 17)]


@pytest.mark.parametrize(("channels", "heads"), [*HEADS, (46, 23), (58, 29), (37, 1), (72, 8), (100, 10)])
def test_the_number_of_heads_is_the_nearest_that_divides_the_channels_into_two_or_more(channels, heads):
    assert nearest_heads(8, channels) == heads
    report = sasa.conversion_report(nn.Sequential(nn.Conv2d(4, channels, 3)), where=everywhere)
    why = (
        f"8 heads don't divide {channels} channels"
        if channels % 8
        else "8 heads of 8 channels would be one channel wide"
    )
    assert report.entries[0].why == ("" if heads == 8 else why)


def test_options_reach_the_layers():
    options = {"position": "none", "border": "mask", "scale": 0.5, "implementation": "reference", "bias": False}
    layer = converted(nn.Conv2d(4, 8, 3, padding=1, bias=True), 5, 4, recompute=True, **options)
    assert {name: getattr(layer, name) for name in options if name != "bias"} == {
        name: value for name, value in options.items() if name != "bias"
    }
    assert layer.recompute
    assert layer.qkv.bias is None


# --- which are converted ---


@pytest.mark.parametrize("make", [timm.create_model, lambda name: getattr(torchvision.models, name)()])
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_resnets_keep_their_stem_by_default(make, name):
    model = sasa.convert(make(name))
    assert list(convolutions_of(model)) == ["conv1"]
    assert len(layers_of(model)) == {"resnet18": 16, "resnet50": 16}[name]


@pytest.mark.parametrize("make", [timm.create_model, lambda name: getattr(torchvision.models, name)()])
@pytest.mark.parametrize("size", [(64, 64), (33, 50)])
def test_the_stem_of_resnets_becomes_the_papers(make, size):
    before = make("resnet18").eval()
    model = sasa.convert(before, stem=True).eval()
    assert convolutions_of(model) == {}
    assert isinstance(model.conv1, AttentionStem)
    seen = {}
    for network in (before, model):
        hook = network.layer1.register_forward_pre_hook(lambda m, x, n=network: seen.update({id(n): x[0].shape}))
        with torch.no_grad():
            assert network(torch.randn(1, 3, *size)).shape == (1, 1000)
        hook.remove()
    assert len(set(seen.values())) == 1


def test_other_stems_are_found_and_converted_as_convolutions_are():
    deep = timm.create_model("resnet18d")
    assert [n for n in convolutions_of(sasa.convert(deep)) if n.startswith("conv1.")] == [
        "conv1.0",
        "conv1.3",
        "conv1.6",
    ]
    assert convolutions_of(sasa.convert(deep, stem=True)) == {}
    repvit = nn.ModuleDict({"stem": nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)), "body": nn.Conv2d(8, 8, 3)})
    assert list(convolutions_of(sasa.convert(repvit))) == ["stem.0", "stem.1"]
    pointwise_first = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3))
    assert convolutions_of(sasa.convert(pointwise_first)) == {}


def test_where_chooses_by_name_and_module():
    asked = []

    def where(name, module):
        asked.append(name)
        return name.startswith("layer4") and module.stride == (2, 2)

    model = timm.create_model("resnet18")
    assert list(layers_of(sasa.convert(model, where=where))) == ["layer4.0.conv1"]
    assert asked == list(convolutions_of(model))


def test_a_module_in_two_places_stays_one_module():
    conv = nn.Conv2d(4, 4, 3, padding=1)
    model = sasa.convert(nn.ModuleDict({"stem": nn.Conv2d(3, 4, 3), "a": conv, "b": nn.Sequential(conv, nn.ReLU())}))
    assert isinstance(model["a"], RelativeSelfAttention)
    assert model["a"] is model["b"][0]


def test_a_model_that_is_itself_a_convolution():
    conv = nn.Conv2d(4, 8, 3, padding=1)
    assert isinstance(sasa.convert(conv), RelativeSelfAttention)
    with pytest.raises(ValueError, match="inplace: expected False"):
        sasa.convert(conv, inplace=True)


class OwnConvolution(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4, 3, 3))

    def forward(self, x):
        return nn.functional.conv2d(x, self.weight, padding=1)


class Doubled(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


def tied():
    first, second = nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)
    second.weight = first.weight
    return nn.ModuleList([first, second])


def hooked():
    conv = nn.Conv2d(4, 4, 3)
    conv.register_forward_hook(lambda *_: None)
    return conv


@pytest.mark.parametrize(
    ("module", "why"),
    [
        (nn.Conv2d(4, 4, 3, groups=4), "depthwise"),
        (nn.Conv2d(4, 8, 3, groups=2), "in 2 groups"),
        (nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), "padding_mode='reflect'"),
        (nn.Conv2d(4, 4, 3, padding=2), r"padding=\(2, 2\) makes its output larger"),
        (nn.ConvTranspose2d(4, 4, 3), "transposed"),
        (nn.Conv1d(4, 4, 3), "1-dimensional"),
        (nn.Conv3d(4, 4, 3), "3-dimensional"),
        (OwnConvolution(), "holds weights"),
        (Doubled(4, 4, 3), "Doubled computes in a way of its own"),
        (parametrizations.weight_norm(nn.Conv2d(4, 4, 3)), "parametrized"),
        (nn.LazyConv2d(4, 3), "no shape yet"),
        (tied(), "shares its parameters"),
        (hooked(), "hooks"),
    ],
)
def test_what_is_left_alone_is_reported_with_the_reason(module, why):
    model = nn.ModuleDict({"stem": nn.Conv2d(3, 4, 3), "odd": module, "usual": nn.Conv2d(4, 4, 3)})
    report = sasa.conversion_report(model)
    assert [entry.name for entry in report.converted] == ["usual"]
    left = [entry for entry in report.left_alone if entry.name.startswith("odd")]
    assert len(left) == (2 if isinstance(module, nn.ModuleList) else 1)
    assert all(re.search(why, entry.why) for entry in left)
    sasa.convert(model, inplace=True)
    assert model["odd"] is module


def test_groups_are_converted_when_asked():
    layer = converted(nn.Conv2d(8, 8, 3, padding=1, groups=8), grouped=True)
    assert layer.qkv.weight.shape == (24, 8, 1, 1)


# --- copy, report, errors ---


def test_a_copy_is_converted_unless_inplace():
    model = timm.create_model("resnet18")
    before = {name: id(m) for name, m in model.named_modules()}
    copied = sasa.convert(model)
    assert {name: id(m) for name, m in model.named_modules()} == before
    assert copied is not model
    shared = {id(p) for p in model.parameters()} & {id(p) for p in copied.parameters()}
    assert not shared
    assert sasa.convert(model, inplace=True) is model
    assert len(layers_of(model)) == 16


def test_the_report_is_printed_when_asked(capsys):
    model = timm.create_model("resnet18")
    sasa.convert(model)
    assert capsys.readouterr().out == ""
    sasa.convert(model, num_heads=7, verbose=True)
    printed = capsys.readouterr().out
    assert "conv1           Conv2d 7x7, 3 to 64, stride 2     left alone (the stem)" in printed
    assert "attention 7x7, 8 heads, average pool 2x2 (7 heads don't divide 128 channels)" in printed
    assert "16 converted to attention, 1 left alone (1 stem)." in printed
    assert printed == f"{sasa.conversion_report(model, num_heads=7)}\n"


def unchanged(model, call, error, match):
    before = copy.deepcopy(model.state_dict())
    modules = dict(model.named_modules())
    with pytest.raises(error, match=match):
        call(model)
    assert dict(model.named_modules()) == modules
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"kernel_size": 0}, ValueError, "kernel_size: expected an int or a"),
        ({"kernel_size": "7"}, TypeError, "kernel_size"),
        ({"num_heads": 0}, ValueError, "num_heads: expected at least 1, got 0"),
        ({"stride_mode": "max"}, ValueError, "stride_mode: expected one of 'pool', 'strided', got 'max'"),
        ({"where": "layer1"}, TypeError, "where: expected a function"),
        ({"border": "wrap"}, ValueError, "border: expected one of"),
        ({"heads": 8}, TypeError, "heads: not an argument of convert; layer options are position,"),
        ({"where": lambda name, module: False}, ValueError, "model: expected a convolution larger than 1x1"),
    ],
)
@pytest.mark.parametrize("inplace", [True, False])
def test_errors_leave_the_model_unchanged(arguments, error, message, inplace):
    model = timm.create_model("resnet18")
    unchanged(model, lambda m: sasa.convert(m, inplace=inplace, **arguments), error, message)


def test_a_class_that_cannot_be_rebuilt_is_an_error_when_asked_for():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), Doubled(4, 4, 3))
    call = lambda m: sasa.convert(m, where=everywhere, inplace=True)  # noqa: E731
    unchanged(model, call, TypeError, "got 1: Doubled computes in a way of its own")


@pytest.mark.parametrize(
    "model", [nn.Linear(3, 3), nn.Sequential(nn.Conv2d(3, 3, 1)), nn.Sequential(nn.Conv2d(3, 3, 3))]
)
def test_nothing_to_convert(model):
    with pytest.raises(ValueError, match="model: expected a convolution larger than 1x1 that can be converted"):
        sasa.convert(model)


@pytest.mark.parametrize("model", [None, torch.zeros(1), "resnet50"])
def test_no_model(model):
    with pytest.raises(TypeError, match=r"model: expected an nn\.Module"):
        sasa.convert(model)


# --- whole networks ---


@pytest.mark.sampled(4)
@pytest.mark.parametrize(
    ("make", "arguments"),
    [
        (lambda: timm.create_model("resnet26d"), {}),
        (lambda: timm.create_model("regnetx_002"), {"grouped": True}),
        (lambda: timm.create_model("tf_efficientnet_lite0"), {"grouped": True}),
        (lambda: timm.create_model("convnext_atto"), {"grouped": True}),
        (lambda: timm.create_model("densenet121"), {}),
        (lambda: timm.create_model("vgg11"), {}),
        (lambda: torchvision.models.inception_v3(init_weights=False), {}),
        (lambda: torchvision.models.squeezenet1_1(), {}),
    ],
)
def test_networks_run_and_keep_every_feature_map(make, arguments):
    model = make().eval()
    network = sasa.convert(model, 3, **arguments).eval()
    shapes = []
    names = {n for n, m in model.named_modules() if n and "." not in n}
    for m in (model, network):
        seen = []
        hooks = [
            child.register_forward_hook(lambda m, i, y, n=n, seen=seen: seen.append((n, getattr(y, "shape", None))))
            for n, child in m.named_children()
            if n in names
        ]
        with torch.no_grad():
            m(torch.randn(1, 3, 107, 90))
        for hook in hooks:
            hook.remove()
        shapes.append(seen)
    assert shapes[0] == shapes[1]


def test_every_parameter_of_a_converted_network_gets_a_gradient():
    model = sasa.convert(timm.create_model("resnet18", zero_init_last=False), 3, stem=True)
    model(torch.randn(2, 3, 64, 64)).square().sum().backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert without == []


def test_compiled_in_one_graph_with_channels_last():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, 2, 1), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 16, 2, 2)
    )
    model = sasa.convert(net, 3, 4, where=everywhere)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for size in ((12, 12), (13, 10)):
        x = torch.randn(2, 3, *size).to(memory_format=torch.channels_last)
        assert compiled(x).shape == net(x).shape
        torch.testing.assert_close(compiled(x), model(x))
