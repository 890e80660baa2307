"""First, second and third derivatives by finite differences, and which tensors get one."""

from __future__ import annotations

import itertools

import pytest
import torch
from oracles import EMBEDDINGS, NAMES, Case, pair
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import sasa
from sasa.ops.autograd import _Attention
from sasa.ops.operators import LOCAL


@pytest.fixture(name="attend")
def _attend(implementation):
    """The operation by the implementation, on a dict of float64 tensors."""
    if not implementation.supports(torch.float64):
        pytest.skip(f"{implementation.name} does not support float64 on {implementation.device}")

    def attend(tensors: dict[str, Tensor], case: Case) -> Tensor:
        moved = {name: x.to(implementation.device) for name, x in tensors.items()}
        return sasa.local_attention(**moved, **case.options, implementation=implementation.name)

    return attend


def leaves(case: Case, needed: tuple[str, ...] = NAMES) -> dict[str, Tensor]:
    return {name: x.requires_grad_(name in needed) for name, x in case.tensors().items()}


def function_of(attend, case: Case, names):
    """The operation as a function of tensors in the order of ``names``."""
    return lambda *tensors: attend(dict(zip(names, tensors, strict=True)), case)


SMALL = {"size": (2, 3), "heads": 1, "width": 1}
CASES = [
    *(Case(**SMALL, border=border, kernel_size=k) for border in ("zero", "mask") for k in (3, (1, 4))),
    Case(size=(2, 2), heads=1, width=2, border="mask", kernel_size=2),
    *(Case(**SMALL, border=border, kernel_size=2) for border in ("zero", "mask", "valid")),
    *(Case(**SMALL, border=border, kernel_size=2, stride=2, scale=0.5) for border in ("zero", "mask", "valid")),
    *(Case(**SMALL, border=border, kernel_size=(1, 2), dilation=2) for border in ("zero", "mask", "valid")),
    *(Case(**SMALL, kernel_size=(2, 3), stride=(1, 2), dilation=(2, 1), embeddings=name) for name in EMBEDDINGS),
    Case(size=(3, 4), heads=1, width=1, border="shift", kernel_size=(2, 3), embeddings="all", scale=0.5),
    Case(size=(2, 4), heads=1, width=1, border="shift", kernel_size=2, dilation=(1, 2), stride=(2, 1)),
    Case(**SMALL, border="mask", kernel_size=(2, 3), embeddings="bias"),
    Case(size=(1, 2), heads=2, width=1, batch=2, value_width=2, kernel_size=2),
    Case(size=(1, 2), heads=1, width=2, kernel_size=(3, 5), border="mask"),
]
cases = pytest.mark.parametrize("case", CASES, ids=str)


@pytest.mark.sampled(40)
@cases
def test_first_derivatives(case, attend):
    tensors = leaves(case)
    assert gradcheck(function_of(attend, case, tensors), tuple(tensors.values()))


@pytest.mark.sampled(12)
@pytest.mark.parametrize("case", CASES[::3], ids=str)  # by the equation, whichever the implementation
def test_second_derivatives(case, attend):
    tensors = leaves(case)
    assert gradgradcheck(function_of(attend, case, tensors), tuple(tensors.values()), gen_non_contig_grad_outputs=True)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("border", ["zero", "mask"])
def test_third_derivatives(border, attend):
    """By finite differences of the second derivatives, for every tensor."""
    case = Case(size=(2, 2), heads=1, width=1, kernel_size=2, border=border)
    tensors = leaves(case)

    def second(*given: Tensor) -> tuple[Tensor, ...]:
        output = function_of(attend, case, tensors)(*given)
        first = torch.autograd.grad(output.sin().sum(), given, create_graph=True)
        return torch.autograd.grad(sum(x.square().sum() for x in first), given, create_graph=True)

    assert gradcheck(second, tuple(tensors.values()))


@pytest.mark.parametrize(
    ("names", "border"),
    [("qqq", "zero"), ("qqq", "mask"), ("qqq", "valid"), ("qqv", "zero"), ("qkk", "mask"), ("qkq", "zero")],
)
def test_one_tensor_in_several_places(names, border, attend):
    """As in attention of an image to itself: its gradients add up, also the second ones."""
    case = Case(**SMALL, border=border, kernel_size=2)
    given = leaves(case)
    distinct = sorted(set(names))
    tensors = [given[{"q": "query", "k": "key", "v": "value"}[name]] for name in distinct]
    row = given["row_embedding"]

    def run(row: Tensor, *tensors: Tensor) -> Tensor:
        query, key, value = (tensors[distinct.index(name)] for name in names)
        return attend({"query": query, "key": key, "value": value, "row_embedding": row}, case)

    assert gradcheck(run, (row, *tensors))
    assert gradgradcheck(run, (row, *tensors))


def test_one_embedding_for_rows_and_columns(attend):
    """And the same for every head, by expand."""
    case = Case(**SMALL, kernel_size=3)
    given = leaves(case)
    shared = given["row_embedding"]

    def run(query: Tensor, shared: Tensor) -> Tensor:
        two = {name: x.expand(-1, 2, -1, -1, -1) for name, x in (("query", query), ("key", given["key"]))}
        rows = shared.expand(2, -1, -1)
        return attend({**two, "value": two["key"], "row_embedding": rows, "col_embedding": rows}, case)

    assert gradcheck(run, (given["query"], shared))
    assert gradgradcheck(run, (given["query"], shared))


def test_jacobian_by_batched_gradients(attend):
    """As ``torch.autograd.functional.jacobian(vectorize=True)`` takes them, one call of the backward for many."""
    case = Case(**SMALL, border="mask", kernel_size=(2, 3))
    given = case.tensors()
    function, tensors = function_of(attend, case, given), tuple(given.values())
    one_by_one = torch.autograd.functional.jacobian(function, tensors)
    torch.testing.assert_close(torch.autograd.functional.jacobian(function, tensors, vectorize=True), one_by_one)


def test_derivatives_of_the_weights():
    case = Case(**SMALL, border="mask", kernel_size=(2, 3))
    tensors = {name: x for name, x in leaves(case).items() if name != "value"}

    def weights(*given: Tensor) -> Tensor:
        return sasa.local_attention_weights(**dict(zip(tensors, given, strict=True)), **case.options)

    assert gradcheck(weights, tuple(tensors.values()))
    assert gradgradcheck(weights, tuple(tensors.values()))


SUBSETS = [subset for count in range(1, 5) for subset in itertools.combinations(NAMES, count)]


@pytest.mark.sampled(60)
@pytest.mark.parametrize("needed", SUBSETS, ids="-".join)
def test_only_what_requires_a_gradient_gets_one(needed, attend):
    """First and second derivatives are those found when all tensors require them."""
    case = Case(size=(3, 4), kernel_size=(2, 3), embeddings="all")

    def first_and_second(tensors: dict[str, Tensor]) -> None:
        wanted = {name: x for name, x in tensors.items() if x.requires_grad}
        grads = torch.autograd.grad(attend(tensors, case).sin().sum(), list(wanted.values()), create_graph=True)
        first = dict(zip(wanted, grads, strict=True))
        sum(first[name].square().sum() for name in needed).backward()

    every, some = leaves(case), leaves(case, needed)
    first_and_second(every)
    first_and_second(some)
    for name, x in some.items():
        assert x.requires_grad == (name in needed)
        if name in needed:
            torch.testing.assert_close(x.grad, every[name].grad)
        else:
            assert x.grad is None


def test_no_gradient_wanted_none_kept(attend):
    case = Case()
    tensors = leaves(case)
    assert not attend(case.tensors(), case).requires_grad
    with torch.no_grad():
        assert not attend(tensors, case).requires_grad
    with torch.inference_mode():
        assert attend(tensors, case).is_inference()


def test_backward_twice_accumulates(attend):
    case = Case(border="mask")
    tensors = leaves(case)
    output = attend(tensors, case)
    output.sum().backward(retain_graph=True)
    once = {name: x.grad.clone() for name, x in tensors.items()}
    output.sum().backward()
    for name, x in tensors.items():
        torch.testing.assert_close(x.grad, 2 * once[name])


@pytest.mark.parametrize("border", ["zero", "mask", "valid"])
def test_pixels_no_window_uses_get_a_gradient_of_zero(border, attend):
    """With windows of one and stride 3, all but every third pixel."""
    case = Case(size=(7, 8), kernel_size=1, stride=3, border=border)
    tensors = leaves(case)
    attend(tensors, case).square().sum().backward()
    used = torch.zeros(case.size, dtype=torch.bool)
    used[::3, ::3] = True
    assert torch.equal((tensors["value"].grad != 0).all(2), used.expand(1, 2, 7, 8))
    for name in ("query", "key", "row_embedding", "col_embedding"):
        assert torch.equal(tensors[name].grad, torch.zeros_like(tensors[name])), (
            f"{name}: one tap, so a constant weight"
        )


def test_log_sum_exp_carries_no_gradient(implementation):
    if not implementation.has_operator:
        pytest.skip("the equation returns none")
    tensors = leaves(Case(embeddings="all"))
    given = [tensors[name].to(implementation.device, implementation.precise) for name in NAMES]
    options = (*(pair(x) for x in (3, 1, 1)), "zero", 1.0, implementation.name)
    output, lse = _Attention.apply(LOCAL, options, *given)
    assert output.requires_grad
    assert not lse.requires_grad
