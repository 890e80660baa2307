"""Subclasses of convolutions: understood if they compute one convolution of the padded image, refused if not."""

import copy

import pytest
import torch
import torch.nn.functional as F
from timm.layers import Conv2dSame, ScaledStdConv2d, ScaledStdConv2dSame, StdConv2d, StdConv2dSame
from torch import nn

import sasa
from sasa.nn.read_convolution import Convolution, read, same_pads

pytestmark = pytest.mark.slow


class OwnConvForward(nn.Conv2d):
    """A kernel of its own, by the method that nn.Conv2d's forward calls."""

    def _conv_forward(self, x, weight, bias):
        return F.conv2d(F.pad(x, (1, 2, 0, 1)), weight.tanh(), bias, self.stride, 0, self.dilation, self.groups)


class OwnCall(nn.Conv2d):
    def __call__(self, x):
        return super().__call__(F.pad(x, (0, 1, 0, 1)))


class StaticSame(nn.Conv2d):
    """Padding for one size of image, as EfficientNets outside timm have it."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.static_padding = nn.ZeroPad2d((0, 1, 0, 1))

    def forward(self, x):
        return F.conv2d(self.static_padding(x), self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class ReflectedByHand(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), self.weight, self.bias, self.stride)


UNDERSTOOD = {
    "std": lambda: StdConv2d(4, 8, 3, 2, 1),
    "std same": lambda: StdConv2dSame(4, 8, 3, 2),
    "scaled std": lambda: ScaledStdConv2d(4, 8, 3, padding=1, groups=2),
    "scaled std same": lambda: ScaledStdConv2dSame(4, 8, 5, 3),
    "same": lambda: Conv2dSame(4, 8, 3, 2),
    "same, even": lambda: Conv2dSame(4, 8, 4, 3, dilation=2),
    "_conv_forward": lambda: OwnConvForward(4, 8, 3, 2),
    "__call__": lambda: OwnCall(4, 8, 3, 2),
    "static same": lambda: StaticSame(4, 8, 3, 2, bias=False),
    "circular": lambda: nn.Conv2d(4, 8, 3, padding=2, padding_mode="circular"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", UNDERSTOOD)
def test_what_is_understood_keeps_sizes_and_function(name, dtype):
    torch.manual_seed(0)
    conv = UNDERSTOOD[name]().to(dtype).eval()
    before = copy.deepcopy(conv.state_dict())
    assert isinstance(read(conv), Convolution)
    assert all(torch.equal(v, before[k]) for k, v in conv.state_dict().items())
    model = nn.Sequential(conv)
    kept = sasa.convert(model, keep_function=True, where=lambda *_: True)
    wide = sasa.convert(model, 5, keep_function=True, margin=30, where=lambda *_: True)
    fresh = None
    if name not in ("circular", "_conv_forward", "__call__"):  # larger than the image, or not zeros
        fresh = sasa.convert(model, 3, 4, grouped=True, where=lambda *_: True)
    for size in ((12, 13), (17, 11), (16, 16)):
        x = torch.randn(2, 4, *size, dtype=dtype)
        expected = model(x)
        tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-10, "atol": 1e-10}
        torch.testing.assert_close(kept(x), expected, **tolerance)
        torch.testing.assert_close(wide(x), expected, **tolerance)
        assert fresh is None or fresh(x).shape == expected.shape


class Twice(nn.Conv2d):
    def forward(self, x):
        return super().forward(super().forward(x))


class Gain(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) * 2


class Fused(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight, bias).relu()


class InputScaled(nn.Conv2d):
    def __call__(self, x):
        return super().__call__(x / x.std())


class Dynamic(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(x, self.weight * x.mean(), self.bias, padding=self.padding)


class Noisy(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(x, self.weight + 0.1 * torch.randn_like(self.weight), self.bias)


class OtherGeometry(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(x, self.weight, self.bias, stride=2)


class TwoInputs(nn.Conv2d):
    def forward(self, x, y):
        return super().forward(x + y)


def replaced():
    conv = nn.Conv2d(4, 4, 3)
    conv.forward = lambda x: x
    return conv


@pytest.mark.parametrize(
    "conv",
    [
        *(c(4, 4, 3) for c in (Twice, Gain, Fused, InputScaled, Dynamic, Noisy, OtherGeometry, TwoInputs)),
        ReflectedByHand(4, 4, 3),
        replaced(),
        StdConv2d(4, 4, 3).to("meta"),
    ],
    ids=lambda conv: type(conv).__name__,
)
@pytest.mark.parametrize("keep_function", [True, False])
def test_what_is_not_understood_is_left_alone(conv, keep_function):
    assert isinstance(read(conv), str)
    model = nn.ModuleList([nn.Conv2d(3, 4, 3), conv, nn.Conv2d(4, 4, 3)])
    network = sasa.convert(model, keep_function=keep_function)
    assert type(network[1]) is type(conv)
    assert type(network[2]) is not nn.Conv2d


@pytest.mark.parametrize(("size", "pads"), [((8, 8), (0, 1, 0, 1)), ((9, 8), (0, 1, 1, 1)), ((1, 2), (0, 1, 1, 1))])
def test_same_pads(size, pads):
    assert same_pads(size, (3, 3), (2, 2), (1, 1)) == pads
