"""Calls of a layout that was seen before: the bits of the whole way, and every way back from them."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import sasa
from sasa.ops import attend, prepared

LAYERS = [
    {"num_heads": 8},
    {"num_heads": 8, "pool": 2, "bias": False},
    {"num_heads": 8, "pool": 3, "stride": 2},
    {"num_heads": 2, "border": "mask", "dilation": 2},
    {"num_heads": 2, "pool": 2, "position": "none"},
    {"num_heads": 2, "recompute": True, "border": "valid"},
    {"num_heads": 8, "recompute": False, "position_split": "across_heads"},
    {"num_heads": 16},  # of width 1: the row half has no channels
]
layers = pytest.mark.parametrize("options", LAYERS, ids=str)


def results(layer, x):
    """Output and gradients, without gradients too."""
    with torch.no_grad():
        alone = layer(x)
    x = x.detach().requires_grad_()
    layer.zero_grad()
    output = layer(x)
    output.tanh().sum().backward()
    return [alone, output.detach(), x.grad, *(p.grad for p in layer.parameters())]


@layers
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "last"])
def test_bits_are_those_of_the_whole_way(options, memory_format, monkeypatch):
    layer = sasa.RelativeSelfAttention(6, 16, 3, **options)
    x = torch.randn(2, 6, 7, 9).to(memory_format=memory_format)
    first, again = results(layer, x), results(layer, x)
    monkeypatch.setattr(attend, "prepared", lambda *_: None)
    whole = results(layer, x)
    for one, two, three in zip(first, again, whole, strict=True):
        assert torch.equal(one, three) and torch.equal(two, three)
        assert one.stride() == three.stride()
    assert not any(grad is None for grad in first)  # distributed training waits for every parameter's


@layers
def test_second_derivatives(options, monkeypatch):
    layer = sasa.RelativeSelfAttention(6, 16, 3, **options).double()
    x = torch.randn(1, 6, 5, 5, dtype=torch.float64, requires_grad=True)

    def second():
        (first,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), [x, layer.qkv.weight])

    ours = second()
    monkeypatch.setattr(attend, "prepared", lambda *_: None)
    torch.testing.assert_close(ours, second())


@pytest.mark.parametrize("heads", [2, 8])
@pytest.mark.parametrize("tracked", [True, False])
@pytest.mark.parametrize("name", ["qkv.bias", "row_embedding", "col_embedding"])
def test_a_parameter_of_another_kind_raises(name, tracked, heads):
    """Kernels are given its address alone and would read garbage; after calls of the right kind too."""
    layer, x = sasa.RelativeSelfAttention(6, 16, 3, heads), torch.randn(2, 6, 7, 9)
    parameter, short = layer.get_parameter(name), name.rpartition(".")[2]
    whole = parameter.data
    with torch.set_grad_enabled(tracked):
        layer(x)
        parameter.data = whole.double()
        with pytest.raises(ValueError, match=f"^{short}: expected dtype torch.float32 as x has, got torch.float64"):
            layer(x)
        setattr(layer.qkv if name == "qkv.bias" else layer, short, torch.nn.Parameter(whole.to("meta")))
        with pytest.raises(ValueError, match=f"^{short}: expected device cpu as x is on, got meta"):
            layer(x)


def test_a_backward_that_is_watched_calls_the_operator():
    layer = sasa.RelativeSelfAttention(6, 16, 3, 8)
    output = layer(torch.randn(2, 6, 7, 9, requires_grad=True))
    with FlopCounterMode(display=False) as counter:
        output.sum().backward()
    assert [str(name) for name in counter.get_flop_counts()["Global"]] == ["sasa.projected_attention_backward"]


def test_the_number_of_threads_is_looked_at_in_every_call():
    layer, x = sasa.RelativeSelfAttention(6, 16, 3, 8, scale=0.123), torch.randn(2, 6, 7, 9)
    threads = torch.get_num_threads()
    before = prepared._prepare.cache_info().misses
    with torch.no_grad():
        try:
            for count in (1, 2):
                torch.set_num_threads(count)
                layer(x)
        finally:
            torch.set_num_threads(threads)
    assert prepared._prepare.cache_info().misses == before + 2


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_projections_elsewhere_keep_the_memory_format(last, biased):
    """On other devices than CPUs, channels_last is projected by a product."""
    x, weight = torch.empty(2, 3, 4, 5, device="meta"), torch.empty(12, 3, 1, 1, device="meta")
    if last:
        x = x.contiguous(memory_format=torch.channels_last)
    y = prepared.project(x, weight, torch.empty(12, device="meta") if biased else None)
    assert y.shape == (2, 12, 4, 5)
    assert y.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


@pytest.mark.parametrize("biased", [False, True])
def test_a_product_projects_as_a_convolution(biased):
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    weight, bias = torch.randn(12, 3, 1, 1, dtype=x.dtype), torch.randn(12, dtype=x.dtype) if biased else None
    leaves = [one.requires_grad_() for one in (x, weight, bias) if one is not None]
    results = []
    for function in (prepared.by_product, torch.nn.functional.conv2d):
        y = function(x, weight, bias)
        results.append([y, *torch.autograd.grad(y.sin().sum(), leaves)])
    torch.testing.assert_close(*results)


def test_gradients_of_projections_have_the_strides_that_were_promised():
    """Whatever dense layout they are in; by the GPU kernels, here in Triton's interpreter."""
    pytest.importorskip("triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = torch.randn(3, 2, 12, 4, device=device).permute(1, 2, 0, 3)  # (B, 3·N·D, H, W)
    options = 2, (3, 3), (1, 1), (1, 1), "zero", 1.0, "triton", 1
    _, lse = torch.ops.sasa.projected_attention(x, None, None, None, None, None, *options)
    grad = torch.randn(2, 4, 3, 4, device=device)
    found = torch.ops.sasa.projected_attention_backward(grad, x, None, None, None, None, None, lse, *options)[0]
    assert found.stride() == torch.empty_like(x).stride()
