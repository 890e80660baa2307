"""Networks read attributes of their convolutions, and pass single images: attention answers as a convolution does."""

import pytest
import torch
from torch import nn

import sasa

LAYERS = {
    "default": {},
    "5x3": {"kernel_size": (5, 3)},
    "even window": {"kernel_size": (4, 2), "dilation": 2},
    "dilated": {"dilation": (2, 3)},
    "strided": {"stride": (2, 3)},
    "mask": {"border": "mask", "kernel_size": 5},
    "valid": {"border": "valid", "kernel_size": (3, 5), "stride": 2, "dilation": 2},
    "1x1": {"kernel_size": 1},
    "no position, no bias": {"position": "none", "bias": False},
}


def layer_of(**options):
    return sasa.RelativeSelfAttention(4, 8, **({"kernel_size": 3, "num_heads": 2} | options))


def assert_answers_as_a_convolution(module, in_channels, out_channels, bias, weight):
    assert module.weight is weight
    assert isinstance(module.weight, torch.Tensor) and module.weight.requires_grad
    if bias is None:
        assert module.bias is None
    else:
        assert module.bias is bias
    assert (module.in_channels, module.out_channels) == (in_channels, out_channels)
    assert (module.groups, module.transposed, module.padding_mode) == (1, False, "zeros")
    assert module.output_padding == (0, 0)
    for name in ("kernel_size", "stride", "dilation", "padding"):
        numbers = getattr(module, name)
        assert isinstance(numbers, tuple) and len(numbers) == 2 and all(type(n) is int for n in numbers), name


def predicted(module, size):
    """The size of the output by the formula of nn.Conv2d's documentation, from the module's attributes."""
    axes = zip(size, module.kernel_size, module.stride, module.dilation, module.padding, strict=True)
    return tuple((n + 2 * padding - dilation * (k - 1) - 1) // s + 1 for n, k, s, dilation, padding in axes)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_layer(name, dtype):
    layer = layer_of(**LAYERS[name], dtype=dtype)
    assert_answers_as_a_convolution(layer, 4, 8, layer.qkv.bias, layer.qkv.weight)
    assert layer.weight.dtype == dtype and layer.weight.device.type == "cpu"
    for size in ((12, 11), (13, 14)):
        y = layer(torch.randn(1, 4, *size, dtype=dtype))
        assert y.shape[2:] == predicted(layer, size)


@pytest.mark.parametrize("border", ["zero", "mask", "valid"])
@pytest.mark.parametrize("kernel", range(1, 8))
@pytest.mark.parametrize("dilation", [1, 2, 3])
def test_padding_keeps_the_size_where_one_number_an_axis_can(kernel, dilation, border):
    layer = layer_of(kernel_size=(kernel, 1), dilation=dilation, border=border)
    lost = 0 if border == "valid" else dilation * (kernel - 1)
    assert abs(2 * layer.padding[0] - lost) == lost % 2
    assert layer.padding[1] == 0


def test_the_weight_follows_the_projection():
    layer = layer_of()
    layer.double()
    assert layer.weight.dtype == torch.float64
    layer.qkv = nn.Conv2d(4, 24, 1, bias=False)
    assert layer.weight is layer.qkv.weight and layer.bias is None
    layer.to("meta")
    assert layer.weight.is_meta
    nn.utils.parametrizations.weight_norm(layer.qkv)
    assert layer.weight.shape == (24, 4, 1, 1)


def test_attributes_that_a_layer_never_had_are_still_missing():
    with pytest.raises(AttributeError, match="colour"):
        _ = layer_of().colour


# What stands in the place of a convolution: the layer alone, or the layer with a crop, a pool or both behind it.
CONVOLUTIONS = {
    "alone": lambda **kw: nn.Conv2d(4, 8, 3, padding=1, **kw),
    "dilated": lambda **kw: nn.Conv2d(4, 8, 3, padding=2, dilation=2, **kw),
    "crop": lambda **kw: nn.Conv2d(4, 8, 3, **kw),
    "crop of a dilated one": lambda **kw: nn.Conv2d(4, 8, (3, 1), dilation=(2, 1), **kw),
    "even kernel": lambda **kw: nn.Conv2d(4, 8, 4, padding=1, **kw),
    "patches": lambda **kw: nn.Conv2d(4, 8, 2, stride=2, **kw),
    "crop and pool": lambda **kw: nn.Conv2d(4, 8, 5, stride=2, **kw),
    "two strides": lambda **kw: nn.Conv2d(4, 8, 3, stride=(2, 1), padding=1, **kw),
    "two strides and a crop": lambda **kw: nn.Conv2d(4, 8, 3, stride=(1, 3), **kw),
}


def converted(conv, **options):
    return sasa.convert(nn.Sequential(conv), 3, 4, where=lambda name, module: True, **options)[0]


def attention_in(module):
    return next(m for m in module.modules() if isinstance(m, sasa.RelativeSelfAttention))


@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_takes_a_convolutions_place(name, bias, dtype):
    conv = CONVOLUTIONS[name](bias=bias, dtype=dtype)
    module = converted(conv)
    qkv = attention_in(module).qkv
    assert_answers_as_a_convolution(module, 4, 8, qkv.bias if bias else None, qkv.weight)
    assert qkv.bias is not None
    assert (module.bias is None) == (conv.bias is None)
    assert (module.weight.dtype, module.weight.device) == (conv.weight.dtype, conv.weight.device)
    assert module.stride == conv.stride
    for size in ((12, 11), (13, 14)):
        y = module(torch.randn(1, 4, *size, dtype=dtype))
        assert y.shape[2:] == predicted(conv, size) == predicted(module, size)


@pytest.mark.parametrize("name", ["alone", "dilated", "crop", "crop of a dilated one", "even kernel", "two strides"])
def test_attention_of_every_other_pixel_in_a_convolutions_place(name):
    conv = CONVOLUTIONS[name]()
    module = converted(conv, stride_mode="strided")
    assert module.stride == conv.stride
    assert module(torch.randn(1, 4, 12, 11)).shape[2:] == predicted(conv, (12, 11)) == predicted(module, (12, 11))


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_the_weight_of_what_was_converted_follows_it(name):
    module = converted(CONVOLUTIONS[name]())
    module.double()
    assert module.weight.dtype == torch.float64
    module.to("meta")
    assert module.weight.is_meta and module.bias.is_meta
    assert module.weight is attention_in(module).weight


class Reader(nn.Module):
    """A network that looks at its convolution before it calls it."""

    def __init__(self, conv):
        super().__init__()
        self.conv = conv
        self.norm = nn.BatchNorm2d(conv.out_channels) if conv.bias is None else nn.Identity()

    def forward(self, x):
        conv = self.conv
        y = conv(x.to(device=conv.weight.device, dtype=conv.weight.dtype))
        assert y.shape == (len(x), conv.out_channels, *predicted(conv, x.shape[2:]))
        if conv.bias is None:
            return self.norm(y)
        return y - conv.bias.mean() * conv.groups


@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize("bias", [True, False])
def test_a_network_that_reads_its_convolution(name, bias):
    model = Reader(CONVOLUTIONS[name](bias=bias))
    network = sasa.convert(model, 3, 4, where=lambda n, m: True)
    x = torch.randn(2, 4, 12, 11, dtype=torch.float64)
    y = network(x)
    assert y.dtype == torch.float32 and y.shape == model(x).shape
    y.square().sum().backward()
    assert all(p.grad is not None for p in network.parameters())


@pytest.mark.parametrize("keep_function", [False, True])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_the_output_is_dense_and_single_images_are_taken(name, keep_function):
    conv = CONVOLUTIONS[name]()
    options = {"keep_function": True} if keep_function else {"kernel_size": 3, "num_heads": 4}
    module = sasa.convert(nn.Sequential(conv), where=lambda n, m: True, **options)[0]
    x = torch.randn(2, 4, 12, 11)
    y = module(x)
    assert y.is_contiguous()
    assert y.view(2, 8, -1).shape == conv(x).flatten(2).shape
    torch.testing.assert_close(module(x[0]), y[0])
    last = module(x.to(memory_format=torch.channels_last))
    assert last.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(last, y)
    names = "in_channels", "out_channels", "stride", "dilation", "groups", "padding_mode"
    assert all(getattr(module, n) == getattr(conv, n) for n in names)
    assert y.shape[2:] == predicted(module, (12, 11))


# --- names ---


LAYER_KEYS = ["row_embedding", "col_embedding", "qkv.weight", "qkv.bias"]


def test_state_dict_keys_of_a_layer():
    assert list(layer_of().state_dict()) == LAYER_KEYS
    assert list(layer_of(bias=False).state_dict()) == LAYER_KEYS[:3]
    assert list(layer_of(position="none").state_dict()) == LAYER_KEYS[2:]


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_state_dict_keys_of_what_takes_a_convolutions_place(name):
    module = converted(CONVOLUTIONS[name]())
    prefix = "" if name in ("alone", "dilated") else "attention."
    assert list(module.state_dict()) == [prefix + key for key in LAYER_KEYS]
    assert [name for name, _ in module.named_parameters()] == list(module.state_dict())
    everything = list(module.named_parameters(remove_duplicate=False))
    assert len(everything) == len({id(p) for _, p in everything}) == 4
    children = {
        "even kernel": ["attention", "crop"],
        "crop": ["attention", "crop"],
        "crop of a dilated one": ["attention", "crop"],
        "patches": ["attention", "pool"],
        "crop and pool": ["attention", "crop", "pool"],
        "two strides": ["attention", "pool"],
        "two strides and a crop": ["attention", "crop", "pool"],
    }
    if prefix:
        assert [child for child, _ in module.named_children()] == children[name]


def test_state_dicts_go_from_one_copy_to_another_and_back():
    model = nn.Sequential(*(make() for make in CONVOLUTIONS.values()))
    one, other = (sasa.convert(model, 3, 4, where=lambda n, m: True) for _ in range(2))
    other.load_state_dict(one.state_dict(), strict=True)
    x = torch.randn(1, 4, 12, 11)
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a(x), b(x))


# --- single images ---


def formats(x):
    """A single image, in rows and in pixels."""
    return {"contiguous": x, "channels_last": x.permute(1, 2, 0).contiguous().permute(2, 0, 1)}


pytestmark = pytest.mark.filterwarnings("ignore:num_heads. 8 heads of 8 channels:UserWarning")

SINGLE = {
    **{f"{border} {position}": {"border": border, "position": position} for border in ("zero", "mask", "valid")
       for position in ("relative", "absolute", "none")},
    "pool": {"pool": 2},
    "pool of windows inside": {"pool": 3, "border": "valid"},
    "stride": {"stride": (2, 1), "bias": False},
    "eight heads": {"num_heads": 8},
    "eight heads, pool": {"num_heads": 8, "pool": 2},
}  # fmt: skip


@pytest.mark.parametrize("memory_format", ["contiguous", "channels_last"])
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("name", SINGLE)
def test_a_single_image_through_the_layer(name, grad, memory_format):
    layer = layer_of(**SINGLE[name])
    x = formats(torch.randn(4, 7, 6))[memory_format].requires_grad_(grad)
    with torch.set_grad_enabled(grad):
        y, expected = layer(x), layer(x[None])
    assert y.shape == expected.shape[1:]
    torch.testing.assert_close(y, expected[0])
    if memory_format == "channels_last":
        assert y[None].is_contiguous(memory_format=torch.channels_last)
    if grad:
        leaves = [x, *layer.parameters()]
        vector = torch.randn_like(y)
        grads = torch.autograd.grad(y, leaves, vector)
        torch.testing.assert_close(grads, torch.autograd.grad(expected, leaves, vector[None]))


@pytest.mark.parametrize("memory_format", ["contiguous", "channels_last"])
@pytest.mark.parametrize("name", SINGLE)
def test_attention_weights_of_a_single_image(name, memory_format):
    layer = layer_of(**SINGLE[name])
    x = formats(torch.randn(4, 7, 6))[memory_format]
    weights = layer.attention_weights(x)
    assert weights.dim() == 4
    torch.testing.assert_close(weights, layer.attention_weights(x[None])[0])


@pytest.mark.parametrize("recompute", [True, False])
def test_a_single_image_recomputed_or_not(recompute):
    layer = layer_of(recompute=recompute, num_heads=8)
    x = torch.randn(4, 7, 6, requires_grad=True)
    one, many = (torch.autograd.grad(layer(image).square().sum(), x)[0] for image in (x, x[None]))
    torch.testing.assert_close(one, many)


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_single_image_through_what_takes_a_convolutions_place(name):
    conv = CONVOLUTIONS[name]()
    module = converted(conv)
    x = torch.randn(4, 12, 11)
    assert module(x).shape == conv(x).shape
    torch.testing.assert_close(module(x), module(x[None])[0])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("size", [(8, 8), (7, 9), (3, 2)])
@pytest.mark.parametrize("memory_format", ["contiguous", "channels_last"])
def test_a_single_image_through_the_stem(memory_format, size, grad, training):
    stem = sasa.AttentionStem(3, 16, 8, dtype=torch.float64).train(training)
    x = formats(torch.randn(3, *size, dtype=torch.float64))[memory_format].requires_grad_(grad)
    with torch.set_grad_enabled(grad):
        y, expected = stem(x), stem(x[None])
    assert y.shape == (16, -(-size[0] // 4), -(-size[1] // 4))
    torch.testing.assert_close(y, expected[0])
    if grad:
        vector = torch.randn_like(y)
        one = torch.autograd.grad(y, [x, *stem.parameters()], vector)
        torch.testing.assert_close(one, torch.autograd.grad(expected, [x, *stem.parameters()], vector[None]))


@pytest.mark.parametrize("shape", [(3, 7, 6), (1, 1, 4, 7, 6), (7, 6), (4,), ()])
def test_no_image(shape):
    layer, x = layer_of(), torch.zeros(shape)
    for function in (layer, layer.attention_weights):
        with pytest.raises(ValueError, match=r"x: expected .*in_channels=4.*got"):
            function(x)
    if shape != (3, 7, 6):
        with pytest.raises(ValueError, match=r"x: expected .*in_channels=3.*got"):
            sasa.AttentionStem(3, 16)(x)
