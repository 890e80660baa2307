"""Parts of the layer that were replaced, wrapped, pruned or parametrized are what computes."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from twins import assert_equal, differ, every_way, image, results, twins


class LowRank(nn.Module):
    """A low-rank addition to a convolution, as LoRA makes it; it has no weight of its own."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.down = nn.Conv2d(base.in_channels, 2, 1, bias=False)
        self.up = nn.Conv2d(2, base.out_channels, 1, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


class LowRankWithWeight(LowRank):
    """The same with the weight of what it wraps, as PEFT's layers have it."""

    @property
    def weight(self):
        return self.base.weight

    @property
    def bias(self):
        return self.base.bias


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(1.5))

    def forward(self, x):
        return self.factor * x


class Doubled(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


class Tripled(nn.Conv2d):
    """``forward`` is that of nn.Conv2d; what it calls is not."""

    def _conv_forward(self, x, weight, bias):
        return 3 * super()._conv_forward(x, weight, bias)


class Squared(nn.Module):
    """A parametrization."""

    def forward(self, x):
        return x.square()


def replaced(make):
    def change(layer):
        layer.qkv = make(layer.qkv)

    return change


def forward_replaced(layer):
    original = layer.qkv.forward
    layer.qkv.forward = lambda x: 1.5 * original(x)


def conv_forward_replaced(layer):
    original = layer.qkv._conv_forward
    layer.qkv._conv_forward = lambda *args: 1.5 * original(*args)


def old_norm(norm):
    def change(layer):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # deprecated, not gone
            norm(layer.qkv)
        with torch.no_grad():
            next(layer.qkv.parameters()).mul_(1.5)

    return change


def normed(norm):
    def change(layer):
        norm(layer.qkv)
        with torch.no_grad():
            for parameter in layer.qkv.parametrizations.weight.parameters():
                parameter.mul_(1.5)

    return change


def plain_tensor(*path):
    """A parameter becomes a tensor that is none, as hypernetworks and functional code do it."""

    def change(layer):
        module = layer.get_submodule(path[0]) if len(path) > 1 else layer
        tensor = 1.5 * getattr(module, path[-1]).detach()
        delattr(module, path[-1])
        setattr(module, path[-1], tensor)

    return change


CHANGES = {
    "qkv.forward": forward_replaced,
    "qkv._conv_forward": conv_forward_replaced,
    "low rank": replaced(LowRank),
    "low rank with weight": replaced(LowRankWithWeight),
    "low rank on frozen weights": replaced(lambda qkv: LowRank(qkv.requires_grad_(False))),
    "sequential": replaced(lambda qkv: nn.Sequential(qkv, Scale())),
    "subclass with a forward": replaced(lambda qkv: Doubled(4, 48, 1)),
    "subclass with a _conv_forward": replaced(lambda qkv: Tripled(4, 48, 1)),
    "convolution without bias": replaced(lambda qkv: nn.Conv2d(4, 48, 1, bias=False)),
    "3x3 convolution": replaced(lambda qkv: nn.Conv2d(4, 48, 3, padding=1)),
    "grouped convolution": replaced(lambda qkv: nn.Conv2d(4, 48, 1, groups=2)),
    "convolution with a stride": replaced(lambda qkv: nn.Conv2d(4, 48, 1, stride=2)),
    "convolution with padding": replaced(lambda qkv: nn.Conv2d(4, 48, 1, padding=1)),
    "pruned weight": lambda layer: prune.random_unstructured(layer.qkv, "weight", 0.5),
    "pruned channels": lambda layer: prune.ln_structured(layer.qkv, "weight", 0.5, n=2, dim=0),
    "pruned bias": lambda layer: prune.random_unstructured(layer.qkv, "bias", 0.5),
    "pruned row embedding": lambda layer: prune.random_unstructured(layer, "row_embedding", 0.5),
    "weight norm": normed(parametrizations.weight_norm),
    "spectral norm": lambda layer: parametrizations.spectral_norm(layer.qkv),
    "orthogonal": lambda layer: parametrizations.orthogonal(layer.qkv),
    "own parametrization": lambda layer: parametrize.register_parametrization(layer.qkv, "bias", Squared()),
    "parametrized embedding": lambda layer: parametrize.register_parametrization(layer, "col_embedding", Squared()),
    "plain weight": plain_tensor("qkv", "weight"),
    "plain bias": plain_tensor("qkv", "bias"),
    "plain embedding": plain_tensor("row_embedding"),
    "frozen": lambda layer: layer.requires_grad_(False).row_embedding.mul_(2).requires_grad_(),
}
for old in ("weight_norm", "spectral_norm"):
    if hasattr(nn.utils, old):
        CHANGES[f"old {old}"] = old_norm(getattr(nn.utils, old))


@every_way
@pytest.mark.parametrize("name", CHANGES)
def test_parts_that_were_changed_are_used(name, num_heads, recompute, grad):
    modules = twins(num_heads, recompute)
    untouched = results(modules[0], grad)
    for module in modules:
        torch.manual_seed(1)
        CHANGES[name](module)
    for _ in range(2):  # a spectral norm in training moves on with each use of the weight, once a call
        got, expected = (results(module, grad) for module in modules)
        assert_equal(got, expected)
    y, before = got["output"], untouched["output"]
    assert y.shape != before.shape or differ({"output": y}, {"output": before})


@every_way
def test_a_parametrization_is_computed_once_a_call(num_heads, recompute, grad):
    layer, _ = twins(num_heads, recompute)
    counts = []
    counting = Squared()
    counting.register_forward_hook(lambda m, args, y: counts.append(y))
    parametrize.register_parametrization(layer.qkv, "weight", counting)
    counts.clear()
    results(layer, grad)
    assert len(counts) == 1


@every_way
@pytest.mark.parametrize("path", [("qkv", "weight"), ("qkv", "bias"), ("row_embedding",), ("col_embedding",)])
def test_gradients_reach_what_a_plain_tensor_was_computed_from(path, num_heads, recompute, grad):
    """All parameters are frozen and the input wants no gradient: the plain tensor alone does."""
    modules, grads = twins(num_heads, recompute), []
    source = torch.tensor(1.5, requires_grad=True)
    for module in modules:
        module.requires_grad_(False)
        plain_tensor(*path)(module)
        owner = module.get_submodule(path[0]) if len(path) > 1 else module
        setattr(owner, path[-1], source * getattr(owner, path[-1]))
        with torch.set_grad_enabled(grad):
            y = module(image())
        assert y.requires_grad == grad
        grads.append(torch.autograd.grad(y.square().sum(), source)[0] if grad else y)
    assert_equal(*grads)
    assert grads[0].abs().max() > 1e-3
