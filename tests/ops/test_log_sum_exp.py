"""The log-sum-exp that ``return_lse=True`` adds to the output, and its derivatives."""

from __future__ import annotations

import pytest
import torch
from oracles import EMBEDDINGS, Case, pair

import sasa
from sasa.ops import equation
from sasa.ops.window import window

CASES = [
    Case(size=(5, 6), kernel_size=(3, 4)),
    Case(size=(6, 5), kernel_size=3, border="mask", stride=2, scale=0.5),
    Case(size=(7, 6), kernel_size=(2, 3), dilation=(2, 1), border="valid"),
    Case(size=(3, 2), kernel_size=7, dilation=3, value_width=2, stride=(2, 1)),
    Case(size=(5, 6), kernel_size=(2, 3), dilation=(2, 1), border="shift", embeddings="all", scale=0.5, stride=(1, 2)),
    *(Case(size=(4, 5), embeddings=name) for name in EMBEDDINGS),
]


def tensors_of(case, dtype, device="cpu"):
    return {name: x.to(device, dtype).detach().requires_grad_() for name, x in case.tensors(torch.float64).items()}


def by_equation(case, query, key, value, row_embedding=None, col_embedding=None, bias=None):
    geometry = window(*case.size, *(pair(x) for x in (case.kernel_size, case.stride, case.dilation)), case.border)
    given = query, key, row_embedding, col_embedding, bias, geometry, case.scale
    return equation.attention(query, key, value, *given[2:]), equation.logits(*given).logsumexp(2)


def gradients(results, tensors, only=(0, 1)):
    torch.manual_seed(1)
    grads = [torch.randn(y.shape, dtype=torch.float64).to(y) for y in results]
    return torch.autograd.grad(
        [results[i] for i in only], list(tensors.values()), [grads[i] for i in only], materialize_grads=True
    )


@pytest.mark.sampled(24)
@pytest.mark.parametrize("only", [(0, 1), (1,), (0,)], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients_are_those_of_the_equation(case, only, implementation):
    dtype = implementation.precise
    right, ours = tensors_of(case, torch.float64), tensors_of(case, dtype, implementation.device)
    expected = by_equation(case, **right)
    got = sasa.local_attention(**ours, **case.options, implementation=implementation.name, return_lse=True)
    close = {"rtol": 1e-10, "atol": 1e-10} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-4}
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a.cpu().double(), b, **close)
    for a, b in zip(gradients(got, ours, only), gradients(expected, right, only), strict=True):
        torch.testing.assert_close(a.cpu().double(), b, **close)


@pytest.mark.parametrize("border", ["zero", "mask"])
def test_derivatives_of_both_orders(border, implementation):
    case = Case(size=(2, 3), kernel_size=2, heads=1, width=2, border=border)
    if implementation.precise != torch.float64:
        pytest.skip("float64 alone")
    ours = tensors_of(case, torch.float64, implementation.device)

    def attend(*given):
        options = case.options | {"implementation": implementation.name}
        return sasa.local_attention(**dict(zip(ours, given, strict=True)), **options, return_lse=True)

    assert torch.autograd.gradcheck(attend, tuple(ours.values()))
    assert torch.autograd.gradgradcheck(attend, tuple(ours.values()))


def test_half_precision_has_a_log_sum_exp_in_float32():
    case = Case(size=(4, 5), width=8)
    given = tensors_of(case, torch.bfloat16)
    output, lse = sasa.local_attention(**given, **case.options, return_lse=True)
    assert (output.dtype, lse.dtype) == (torch.bfloat16, torch.float32)
    rounded = {name: x.detach().double().requires_grad_() for name, x in given.items()}
    expected = by_equation(case, **rounded)
    torch.testing.assert_close(lse.double(), expected[1], rtol=1e-5, atol=1e-5)
    for a, b in zip(gradients((output, lse), given), gradients(expected, rounded), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=0.03, atol=0.03 * b.abs().max().item())


def test_attention_over_several_windows_is_merged():
    """A window of three rows is three windows of a row each."""
    q, k, v = (torch.randn(1, 2, 4, 7, 6, dtype=torch.float64, requires_grad=True) for _ in range(3))
    parts = [
        sasa.local_attention(q, k.roll(-dy, 3), v.roll(-dy, 3), (1, 3), border="mask", return_lse=True)
        for dy in (-1, 0, 1)
    ]
    shares = torch.stack([lse for _, lse in parts]).softmax(0)
    merged = sum(share.unsqueeze(2) * y for share, (y, _) in zip(shares, parts, strict=True))
    whole = sasa.local_attention(q, k, v, 3, border="mask")
    inside = (..., slice(1, -1), slice(None))  # rolled rows come back at the other edge
    torch.testing.assert_close(merged[inside], whole[inside])
    grad = torch.randn_like(whole[inside])
    for a, b in zip(*(torch.autograd.grad(y[inside], (q, k, v), grad) for y in (merged, whole)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@pytest.mark.filterwarnings(
    "ignore:`torch.jit.script` is deprecated:FutureWarning"
)  # PyTorch's own, when it is imported
def test_transforms():
    case = Case(size=(3, 4), kernel_size=2)
    given = tensors_of(case, torch.float64)
    plain = {name: x.detach() for name, x in given.items()}

    def total(tensors):
        output, lse = sasa.local_attention(**tensors, **case.options, return_lse=True)
        return output.sin().sum() + lse.cos().sum()

    expected = dict(zip(given, torch.autograd.grad(total(given), list(given.values())), strict=True))
    torch.testing.assert_close(torch.func.grad(total)(plain), expected)
    many = {name: torch.stack([x, 2 * x]) for name, x in plain.items()}
    torch.testing.assert_close(torch.vmap(total)(many)[0], total(plain))
    tangent = torch.func.jvp(total, (plain,), (plain,))[1]
    torch.testing.assert_close(tangent, sum((expected[name] * plain[name]).sum() for name in plain))


@pytest.mark.slow
def test_compiled():
    case = Case(size=(4, 5), border="mask")
    given = tensors_of(case, torch.float64)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def attend(tensors):
        return sasa.local_attention(**tensors, **case.options, return_lse=True)

    got, expected = attend(given), by_equation(case, **given)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(gradients(got, given), gradients(expected, given))


def test_return_lse_is_a_bool():
    q = torch.zeros(1, 1, 1, 2, 2)
    with pytest.raises((TypeError, ValueError), match="return_lse"):
        sasa.local_attention(q, q, q, 3, return_lse="yes")
