"""Compiled modules give eager's numbers: by Inductor where images aren't whole windows, and in one graph."""

import shutil

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import sasa
from sasa.nn.in_place_of_convolution import AveragePool

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _nothing_compiled_before():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def results(run, module, x):
    """The output, and gradients of the image and the parameters."""
    x = x.detach().requires_grad_()
    leaves = {"x": x} | dict(module.named_parameters())
    y = run(x)
    vector = torch.linspace(-1, 1, y.numel()).view_as(y)
    return {"output": y.detach()} | dict(
        zip(leaves, torch.autograd.grad(y, list(leaves.values()), vector), strict=True)
    )


def assert_same(run, module, x):
    state = {name: buffer.clone() for name, buffer in module.named_buffers()}
    expected = results(module, module, x)
    for name, buffer in module.named_buffers():
        buffer.copy_(state[name])
    torch.testing.assert_close(results(run, module, x), expected, rtol=1e-4, atol=1e-4)


def converted(*args, **kwargs):
    return sasa.convert(nn.Conv2d(4, 8, *args, **kwargs), 3, 2, where=lambda name, module: True)


POOLED = {
    "layer": lambda: sasa.RelativeSelfAttention(4, 8, 3, 2, pool=2),
    "converted convolution": lambda: converted(4, stride=3, padding=1),
    "stem": lambda: sasa.AttentionStem(4, 8, 2),
}


@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="inductor needs a C++ compiler")
@pytest.mark.parametrize("name", POOLED)
def test_windows_of_a_pool_that_the_border_cuts_by_inductor(name):
    """Inductor's backward of avg_pool2d(ceil_mode=True) is wrong in PyTorch 2.15: see ``ops/pooling.py``."""
    module = POOLED[name]()
    assert name != "converted convolution" or any(isinstance(part, AveragePool) for part in module)
    assert_same(torch.compile(module, backend="inductor", dynamic=False), module, torch.randn(2, 4, 15, 15))


@pytest.mark.parametrize(
    "options",
    [
        {"position_split": "per_head", "recompute": None},
        {"position_split": "per_head", "recompute": True, "border": "mask", "pool": 2},
        {"position_split": "across_heads", "recompute": False, "border": "valid", "stride": 2},
        {"position_split": "last_head", "recompute": True},
        {"position": "absolute", "recompute": None, "bias": False},
        {"position": "none", "recompute": False, "dilation": 2, "scale": 0.5},
    ],
    ids=str,
)
def test_layer_in_one_graph(options):
    """With gradients and without."""
    layer = sasa.RelativeSelfAttention(4, 8, 3, 2, **options)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=False)
    x = torch.randn(2, 4, 7, 6)
    assert_same(compiled, layer, x)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), layer(x))


def test_one_image_without_a_batch():
    layer = sasa.RelativeSelfAttention(4, 8, 3, 2, pool=2)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=False)
    x = torch.randn(4, 7, 6)
    assert_same(compiled, layer, x)
    with torch.no_grad():
        assert compiled(x).shape == (8, 4, 3)
        torch.testing.assert_close(compiled(x), layer(x))


@pytest.mark.sampled(1)
@pytest.mark.parametrize(
    ("training", "memory_format"),
    [(True, torch.contiguous_format), (False, torch.channels_last)],
    ids=["train", "eval"],
)
def test_stem_in_one_graph(training, memory_format):
    """With gradients in both modes, and without."""
    stem = sasa.AttentionStem(3, 8, 2).train(training)
    compiled = torch.compile(stem, backend="aot_eager", fullgraph=True, dynamic=False)
    x = torch.randn(2, 3, 7, 9).to(memory_format=memory_format)
    assert_same(compiled, stem, x)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), stem(x))
        torch.testing.assert_close(compiled(x[0]), stem(x[0]))


@pytest.mark.parametrize("options", [{"recompute": True}, {"border": "mask"}], ids=str)
def test_one_compilation_of_a_pooling_layer_for_all_image_sizes(options):
    layer = sasa.RelativeSelfAttention(4, 8, 3, 2, pool=2, **options)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, backend=counter, fullgraph=True, dynamic=True)
    counts = []
    for batch, height, width in ((2, 8, 7), (3, 15, 15), (4, 9, 16), (2, 6, 6)):
        assert_same(compiled, layer, torch.randn(batch, 4, height, width))
        counts.append(counter.frame_count)
    assert counts[0] > 0
    assert counts == counts[:1] * 4
