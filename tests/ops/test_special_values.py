"""NaN and infinity go where the equation takes them, and what lies beside a tensor in memory goes nowhere."""

from __future__ import annotations

import pytest
import torch
from oracles import BORDERS, Case, assert_same_sums, centres, moved, offsets
from torch import Tensor

import sasa

CASES = [
    Case(size=(7, 8), border=border, batch=2, embeddings=embeddings, **geometry)
    for border in BORDERS
    for embeddings in ("none", "both")
    for geometry in ({}, {"kernel_size": (2, 3)}, {"stride": 2}, {"dilation": 2, "stride": (1, 2)})
]
cases = pytest.mark.parametrize("case", CASES, ids=str)
PIXELS = pytest.mark.parametrize("pixel", [(0, 0), (3, 4), (6, 7)], ids=str)


def windows_seeing(pixel: tuple[int, int], case: Case, centred: bool = False) -> Tensor:
    """(h, w) booleans: the windows that see the pixel, or only the one centred at it."""
    seeing = []
    for axis in (0, 1):
        size, kernel, stride, dilation = (
            x if isinstance(x, int) else x[axis] for x in (case.size, case.kernel_size, case.stride, case.dilation)
        )
        middles = centres(size, kernel, stride, dilation, case.border)
        reach = [[0] if centred else offsets(kernel, dilation)] * len(middles)
        if case.border == "shift" and not centred:
            reach = [moved(middle, size, kernel, dilation) for middle in middles]
        seeing.append(torch.tensor([pixel[axis] - middle in of for middle, of in zip(middles, reach, strict=True)]))
    return seeing[0][:, None] & seeing[1]


def run(case: Case, implementation, spoil: str | None = None, pixel=(0, 0), by: float = torch.nan) -> Tensor:
    """The output of image 1, head 0, after the pixel of one tensor was spoiled there; the rest must not change."""
    tensors = {name: x.to(implementation.device) for name, x in case.tensors(torch.float32).items()}
    clean = sasa.local_attention(**tensors, **case.options, implementation=implementation.name)
    if spoil is None:
        return clean[1, 0].cpu()
    tensors[spoil][1, 0, 0, *pixel] = by
    output = sasa.local_attention(**tensors, **case.options, implementation=implementation.name)
    assert torch.equal(output[0], clean[0])
    assert torch.equal(output[1, 1], clean[1, 1])
    return output[1, 0].cpu()


@PIXELS
@cases
def test_nan_in_a_value_reaches_the_windows_that_see_it(case, pixel, implementation):
    """And only its own channel."""
    output, clean = run(case, implementation, "value", pixel), run(case, implementation)
    seeing = windows_seeing(pixel, case)
    assert torch.equal(output[0].isnan(), seeing)
    assert torch.equal(output[1:], clean[1:])
    assert torch.equal(output[0, ~seeing], clean[0, ~seeing])


@pytest.mark.sampled(100)
@PIXELS
@cases
def test_nan_in_a_key_reaches_the_windows_that_see_it(case, pixel, implementation):
    output, clean = run(case, implementation, "key", pixel), run(case, implementation)
    seeing = windows_seeing(pixel, case)
    assert torch.equal(output.isnan(), seeing.expand_as(output))
    assert torch.equal(output[:, ~seeing], clean[:, ~seeing])


@pytest.mark.sampled(100)
@PIXELS
@cases
def test_nan_in_a_query_reaches_its_own_window(case, pixel, implementation):
    output, clean = run(case, implementation, "query", pixel), run(case, implementation)
    own = windows_seeing(pixel, case, centred=True)
    assert torch.equal(output.isnan(), own.expand_as(output))
    assert torch.equal(output[:, ~own], clean[:, ~own])


@pytest.mark.parametrize("by", [torch.inf, -torch.inf])
@cases
def test_infinity_in_a_value_comes_out_with_its_sign(case, by, implementation):
    pixel = (3, 4)
    output = run(case, implementation, "value", pixel, by)
    seeing = windows_seeing(pixel, case)
    assert (output[0, seeing] == by).all()
    assert output[0, ~seeing].isfinite().all()


@cases
def test_infinity_in_a_key_decides_or_spoils_the_softmax(case, implementation):
    """A logit of -inf hides the tap, one of inf gives NaN, as softmax does."""
    pixel = (3, 4)
    output = run(case, implementation, "key", pixel, torch.inf)
    query = case.tensors(torch.float32)["query"][1, 0, 0]
    middles = [
        centres(
            size,
            *(x if isinstance(x, int) else x[axis] for x in (case.kernel_size, case.stride, case.dilation)),
            case.border,
        )
        for axis, size in enumerate(case.size)
    ]
    positive = query[middles[0]][:, middles[1]] > 0
    seeing = windows_seeing(pixel, case)
    assert torch.equal(output.isnan(), (seeing & positive).expand_as(output))


@pytest.mark.sampled(100)
@pytest.mark.parametrize("name", ["query", "key", "value"])
@cases
def test_nan_in_the_gradient_of_one_window_reaches_what_it_sees(case, name, implementation):
    """The gradient of a key or value is NaN where that window sees it, that of a query where it is centred."""
    tensors = {n: x.to(implementation.device).requires_grad_() for n, x in case.tensors(torch.float32).items()}
    output = sasa.local_attention(**tensors, **case.options, implementation=implementation.name)
    window = (output.shape[3] // 2, output.shape[4] // 2)
    grad = torch.ones_like(output)
    grad[1, 0, :, *window] = torch.nan
    found = torch.autograd.grad(output, tensors[name], grad)[0]
    expected = torch.zeros(case.size, dtype=torch.bool)
    for y in range(case.size[0]):
        for x in range(case.size[1]):
            expected[y, x] = windows_seeing((y, x), case, centred=name == "query")[window]
    assert expected.any()
    assert torch.equal(found[1, 0].cpu().isnan(), expected.expand_as(found[1, 0]))
    assert not found[0].isnan().any()
    assert not found[1, 1].isnan().any()


@pytest.mark.parametrize("channels_last", [False, True])
@cases
def test_an_image_inside_a_larger_one_sees_nothing_of_it(case, channels_last, implementation):
    """Query, key and value are cut out of an image full of NaN: outputs and gradients are those of copies."""

    def framed(x: Tensor) -> Tensor:
        B, N, D, H, W = x.shape
        canvas = x.new_full((B, N * D, H + 6, W + 6), torch.nan)
        if channels_last:
            canvas = canvas.to(memory_format=torch.channels_last)
        return canvas[:, :, 3:-3, 3:-3].unflatten(1, (N, D)).copy_(x)

    def results(tensors: dict[str, Tensor]) -> list[Tensor]:
        leaves = {name: x.detach().requires_grad_() for name, x in tensors.items()}
        output = sasa.local_attention(**leaves, **case.options, implementation=implementation.name)
        return [output, *torch.autograd.grad(output.square().sum(), list(leaves.values()))]

    copies = {name: x.to(implementation.device) for name, x in case.tensors(torch.float32).items()}
    cut = {name: framed(x) if x.dim() == 5 else x for name, x in copies.items()}
    # On a GPU, other strides are other tiles, whose sums are in another order.
    close = assert_same_sums if implementation.device == "cuda" else torch.testing.assert_close
    close(results(cut), results(copies))
