"""Attention inside blocks as one operator: the kernels for CPUs and GPUs against the equation in float64."""

from typing import NamedTuple

import pytest
import torch
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from sasa.ops import block_attention as module
from sasa.ops import cpu, cpu_blocks, cpu_library
from sasa.ops.block_attention import Extremes, block_attention, equation
from sasa.ops.triton import blocks as triton_blocks

FORWARD = torch.ops.sasa.block_attention.default
NAMES = ("extreme", "mean", "variance", "grad x", "grad form", "grad values")

# Size of the image, channels, outputs, heads, block.
CASES = [
    ((8, 8), 3, 16, 2, 4),
    ((23, 37), 3, 12, 2, 4),  # all four kinds of blocks, more of each than lanes; heads of 6 channels
    ((3, 2), 1, 3, 3, 4),  # one block, cut on both sides
    ((5, 9), 4, 10, 2, 3),
    ((6, 4), 2, 8, 1, 1),
    ((9, 17), 3, 4, 1, 8),
]
SMALL = ((7, 10), 3, 2, 2, 4)
cases = pytest.mark.parametrize("case", CASES, ids=str)


class Kernels(NamedTuple):
    """Kernels under test. Attributes: name; device; case: one with all four kinds of blocks."""

    name: str
    device: str = "cpu"
    case: tuple = CASES[1]


def triton(monkeypatch) -> Kernels:
    """Triton's kernels, in the interpreter, which is slow, with all of a small image's blocks in one program."""
    monkeypatch.setattr(module, "_kernels", lambda x, rest, block_size: triton_blocks)
    if torch.cuda.is_available():
        return Kernels("triton", "cuda")
    monkeypatch.setattr(triton_blocks, "THREADS", 2048)
    return Kernels("triton", "cpu", SMALL)


@pytest.fixture(params=[*cpu.capabilities(), "triton"])
def tested(request, monkeypatch) -> Kernels:
    """Each instruction set's kernels, and Triton's, interpreted where there is no GPU."""
    if request.param == "triton":
        return triton(monkeypatch)
    monkeypatch.setattr(cpu_library, "_chosen", cpu.capabilities().index(request.param))
    return Kernels(request.param)


def problem(case, dtype=torch.float32, batch=3, device="cpu"):
    """Tensors whose logits are of order 1; signs of each kind."""
    (height, width), channels, outputs, heads, block = case
    torch.manual_seed(0)
    x = torch.randn(batch, channels, height, width, dtype=torch.float64) + 0.5
    form = torch.randn(heads, channels, channels, dtype=torch.float64)
    values = torch.randn(block**2, outputs, channels, dtype=torch.float64)
    sign = torch.tensor([1.0, -1.0, 0.0], dtype=torch.float64).repeat(outputs)[:outputs]
    return [t.float().to(device, dtype) for t in (x, form, values, sign)]


def solve(function, tensors, block):
    """Results, and gradients of a weighted sum of all of them."""
    leaves = [x.detach().requires_grad_() for x in tensors[:3]]
    results = function(*leaves, tensors[3], block)
    torch.manual_seed(1)
    grads = [torch.randn(y.shape, dtype=torch.float64).bfloat16().to(y) for y in results]
    grads[1:] = [grad * results[0][:, 0].numel() for grad in grads[1:]]  # as much as the extremes'
    return dict(zip(NAMES, (*results, *torch.autograd.grad(results, leaves, grads)), strict=True))


def assert_right(got, tensors, block):
    """Errors at most twice those of the equation in float32, and a few units in the last place of the largest."""
    right = solve(equation, [x.double() for x in tensors], block)
    reference = solve(equation, tensors, block)
    for name in NAMES:
        unit = right[name].abs().max() * torch.finfo(torch.float32).eps
        error, allowed = ((y[name].double() - right[name]).abs().max() for y in (got, reference))
        assert error <= 2 * allowed + 8 * unit, f"{name}: {error} for {allowed}"


LAYOUTS = {
    "contiguous": torch.Tensor.contiguous,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.mT.contiguous().mT,
    "sliced": lambda x: torch.stack((x, x), -1)[..., 0],
}


@cases
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_results_and_gradients(case, layout, tested):
    if tested.name == "triton" and case[4] > triton_blocks.LARGEST_BLOCK:
        pytest.skip("Triton's kernels hold a block in registers")
    if tested.case == SMALL and layout == "channels_last":
        pytest.skip("strides are tested with the small image, as the interpreter is slow")
    tensors = problem(case, device=tested.device)
    tensors[0] = LAYOUTS[layout](tensors[0])
    got = solve(block_attention, tensors, case[4])
    assert got["extreme"].is_contiguous(memory_format=torch.channels_last)
    assert_right(got, tensors, case[4])


@pytest.mark.parametrize("layout", ["transposed", "sliced"])
def test_any_strides_give_equal_bits(layout, tested):
    tensors = problem(tested.case, device=tested.device)
    expected = solve(block_attention, tensors, 4)
    tensors[0] = LAYOUTS[layout](tensors[0])
    for name, got in solve(block_attention, tensors, 4).items():
        assert torch.equal(got, expected[name]), name


def test_logits_that_differ_by_thousands(tested):
    tensors = problem(tested.case, device=tested.device)
    tensors[1] *= 1000
    assert_right(solve(block_attention, tensors, 4), tensors, 4)


def test_a_mean_far_from_zero_costs_the_variance_nothing(tested):
    tensors = problem(tested.case, device=tested.device)
    tensors[0] += 1000
    tensors[1] *= 1e-6
    got, right = block_attention(*tensors, 4), equation(*(x.double() for x in tensors), 4)
    torch.testing.assert_close(got.mean.double(), right[1], rtol=1e-6, atol=0)
    torch.testing.assert_close(got.variance.double(), right[2], rtol=1e-6, atol=1e-6)


def test_any_number_of_threads_gives_equal_bits():
    tensors, before, results = problem(((61, 83), 3, 16, 2, 4)), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(solve(block_attention, tensors, 4))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        for name, got in result.items():
            assert torch.equal(got, results[0][name]), name


def test_equal_numbers_have_the_first_pixel_as_their_extreme(tested):
    """As a max pool has it: blocks of one colour are common in images."""
    x, form, values, sign = problem(tested.case, device=tested.device)
    x = torch.ones_like(x).requires_grad_()
    results = block_attention(x, form, values[:1].expand_as(values), sign, 4)
    grad = torch.autograd.grad(results.extreme.sum(), x)[0]
    expected = torch.autograd.grad(equation(x, form, values[:1].expand_as(values), 0 * sign, 4)[0].sum(), x)[0]
    torch.testing.assert_close(grad, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # by the interpreter
@pytest.mark.parametrize("by", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_in_its_block(by, tested):
    x, form, values, sign = problem(tested.case, device=tested.device)
    x[1, 1, 6, 9] = by
    extreme, mean, variance = block_attention(x, form, values, sign, 4)
    assert mean.isnan().all() and variance.isnan().all()
    found = extreme.isnan().all(1)
    assert found[1, 1, 2]
    assert found.sum() == extreme.isnan().any(1).sum() == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_images_in_half_precision(dtype, monkeypatch):
    """On a GPU, as under autocast: the results are those of the same numbers in float32, rounded."""
    tested = triton(monkeypatch)
    tensors = problem(tested.case, device=tested.device)
    tensors[0] = tensors[0].to(dtype)
    got, wide = solve(block_attention, tensors, 4), solve(block_attention, [tensors[0].float(), *tensors[1:]], 4)
    assert {name: y.dtype for name, y in got.items()} == {
        name: dtype if name in ("extreme", "grad x") else torch.float32 for name in NAMES
    }
    for name, expected in wide.items():
        torch.testing.assert_close(got[name], expected.to(got[name].dtype), msg=name)


def test_an_image_that_needs_no_gradient_changes_no_other(tested):
    x, *rest, sign = problem(tested.case, device=tested.device)
    rest = [y.requires_grad_() for y in rest]
    found = []
    for needs_input in (True, False):
        results = block_attention(x.detach().requires_grad_(needs_input), *rest, sign, 4)
        found.append(torch.autograd.grad(sum(y.square().sum() for y in results), rest))
    for got, expected in zip(*found, strict=True):
        assert torch.equal(got, expected)


# opcheck itself looks at .grad of tensors that are no leaves.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@cases
def test_opcheck(case):
    opcheck(FORWARD, (*[x.requires_grad_(i < 3) for i, x in enumerate(problem(case))], case[4]))
    x, form, values, sign = problem(case)
    extreme, mean, variance = FORWARD(x, form, values, sign, case[4])
    for needs_input in (True, False):
        given = extreme, variance, mean, x, form, values, sign, mean, case[4], needs_input
        opcheck(torch.ops.sasa.block_attention_backward.default, given)


@pytest.mark.parametrize("layout", ["channels_last", "sliced"])
def test_triton_keeps_the_promises_of_the_operator(layout, monkeypatch):
    """Shapes, dtypes and strides, of images in half precision."""
    tested = triton(monkeypatch)
    x, *rest = problem(tested.case, device=tested.device)
    given = LAYOUTS[layout](x.bfloat16()), *rest
    extreme, mean, variance = FORWARD(*given, 4)
    backward = extreme, variance, mean, *given, mean, 4
    checks = {"test_utils": ("test_schema", "test_faketensor")}
    opcheck(FORWARD, (*given, 4), **checks)
    for needs_input in (True, False):
        opcheck(torch.ops.sasa.block_attention_backward.default, (*backward, needs_input), **checks)


def test_gradients_of_images_are_added_up_a_few_images_at_a_time(monkeypatch):
    tested = triton(monkeypatch)
    tensors = problem(tested.case, batch=3, device=tested.device)
    expected = solve(block_attention, tensors, 4)
    monkeypatch.setattr(triton_blocks, "SHARE_BYTES", 4 * 2 * 2 * tensors[0][0].numel())  # two images, two slices
    for name, got in solve(block_attention, tensors, 4).items():
        torch.testing.assert_close(got, expected[name], rtol=1e-5, atol=1e-5 * expected[name].abs().max().item())


def test_what_triton_supports():
    image = torch.empty(2, 3, 8, 8, device="meta")

    class OnGpu(torch.Tensor):
        device = torch.device("cuda")

    def supports(x: torch.Tensor, block: int = 4) -> bool:
        return triton_blocks.supports(x.as_subclass(OnGpu), block)

    assert supports(image)
    assert supports(image.bfloat16())
    assert not supports(image.double())
    assert not supports(image, 5)
    assert not supports(torch.empty(2, 5, 8, 8, device="meta"))
    assert not triton_blocks.supports(image, 4)


def test_triton_is_available_for_an_empty_batch():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    assert triton_blocks.is_available(torch.empty(0, 3, 8, 8, device=device))


@pytest.mark.parametrize("which", [1, 2, 3])
def test_weights_in_half_precision_are_left_to_the_equation(which):
    tensors = problem(CASES[0])
    tensors[which] = tensors[which].bfloat16()
    for got, right in zip(block_attention(*tensors, 4), equation(*tensors, 4), strict=True):
        torch.testing.assert_close(got, right)


@pytest.mark.parametrize("function", [block_attention, FORWARD], ids=["function", "operator"])
def test_second_derivatives_under_autocast_are_not_rounded(function):
    leaves = [x.requires_grad_() for x in problem(CASES[2])[:3]]
    sign, found = problem(CASES[2])[3], []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            results = function(*leaves, sign, 4)
            first = torch.autograd.grad(sum(y.square().sum() for y in results), leaves, create_graph=True)
        found.append(torch.autograd.grad(sum(y.square().sum() for y in first), leaves))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("function", [block_attention, FORWARD], ids=["function", "operator"])
def test_second_derivatives(function):
    results = []
    for run in (function, equation):
        leaves = [x.requires_grad_() for x in problem(CASES[2])[:3]]
        first = torch.autograd.grad(
            sum(y.square().sum() for y in run(*leaves, problem(CASES[2])[3], 4)), leaves, create_graph=True
        )
        results.append(torch.autograd.grad(sum(y.square().sum() for y in first), leaves))
    torch.testing.assert_close(*results, atol=1e-3, rtol=1e-3)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")  # PyTorch's own rules for jvp
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_transforms_of_the_operator():
    x, *rest = problem(CASES[2], torch.float64)
    for transform in (torch.func.jacrev, torch.func.jacfwd):
        got, want = (transform(lambda x, f=f: f(x, *rest, 4)[0])(x) for f in (FORWARD, equation))
        torch.testing.assert_close(got, want)
    got, want = (torch.func.vmap(lambda x, f=f: f(x, *rest, 4)[0])(torch.stack((x, -x))) for f in (FORWARD, equation))
    torch.testing.assert_close(got, want)


def test_without_a_library_the_operator_computes_the_equation(monkeypatch):
    tensors = problem(CASES[1])
    expected = solve(equation, tensors, 4)
    monkeypatch.setattr(cpu_blocks, "is_available", lambda x: False)
    for name, got in solve(block_attention, tensors, 4).items():
        torch.testing.assert_close(got, expected[name], msg=name)


def test_names_of_results():
    assert isinstance(block_attention(*problem(CASES[0]), 4), Extremes)


def test_flops():
    x, form, values, sign = problem(CASES[0])
    parameters = [form.requires_grad_(), values.requires_grad_()]
    pixels, pairs = 3 * 8 * 8, 3 * 4 * 16 * 16
    weighted = 2 * pairs * 16
    forward = 2 * pixels * (form.numel() + values[0].numel()) + 2 * pairs * 2 * 3 + weighted
    for image, backward in ((x, 2 * forward + weighted), (x.clone().requires_grad_(), 3 * forward)):
        with FlopCounterMode(display=False) as counter:
            results = block_attention(image, *parameters, sign, 4)
            assert counter.get_total_flops() == forward
            torch.autograd.grad(results.extreme.sum(), parameters)
        assert counter.get_total_flops() == forward + backward
