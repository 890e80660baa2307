"""Any shape, window, border, embedding and memory layout that hypothesis thinks of, against the naive float64 loops."""

from __future__ import annotations

import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from oracles import BORDERS, EMBEDDINGS, Case, assert_right, attention, layouts, solve, solve_tensors
from torch import Tensor

import sasa

LAYOUTS = layouts()
MODEST = settings(deadline=None, max_examples=60, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


def pairs(largest: int) -> st.SearchStrategy[tuple[int, int]]:
    return st.tuples(st.integers(1, largest), st.integers(1, largest))


CASES = st.builds(
    Case,
    size=pairs(6),
    kernel_size=pairs(5),
    stride=pairs(3),
    dilation=pairs(3),
    border=st.sampled_from(BORDERS),
    embeddings=st.sampled_from(list(EMBEDDINGS)),
    batch=st.integers(1, 2),
    heads=st.integers(1, 2),
    width=st.integers(1, 5),
    value_width=st.integers(1, 4),
    scale=st.floats(-2, 2, width=16),
).filter(lambda case: case.fits)


def results(implementation, tensors: dict[str, Tensor], grad_output: Tensor, case: Case) -> dict[str, Tensor]:
    leaves = {name: x.to(implementation.device).detach().requires_grad_() for name, x in tensors.items()}
    output = sasa.local_attention(**leaves, **case.options, implementation=implementation.name)
    grads = torch.autograd.grad(output, list(leaves.values()), grad_output.to(implementation.device))
    return {"output": output, **{f"grad {name}": grad for name, grad in zip(leaves, grads, strict=True)}}


@MODEST
@given(case=CASES, moves=st.lists(st.sampled_from(list(LAYOUTS)), min_size=4, max_size=4))
@example(case=Case(size=(1, 1), kernel_size=(5, 4), dilation=3), moves=["strided"] * 4)
def test_equals_the_loops(implementation, case, moves):
    """Output and gradients; query, key, value and the gradient of the output lie in memory as they please."""
    solution = solve(case, implementation.precise)
    names = ("query", "key", "value")
    moved = {name: LAYOUTS[move](solution.tensors[name]) for name, move in zip(names, moves[:3], strict=True)}
    grad_output = LAYOUTS[moves[3]](solution.grad_output)
    for name, got in results(implementation, {**solution.tensors, **moved}, grad_output, case).items():
        assert_right(name, got, solution)


@MODEST
@given(case=CASES, dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]))
def test_weights_equal_the_loops(case, dtype):
    solution = solve(case, dtype)
    tensors = {name: x for name, x in solution.tensors.items() if name != "value"}
    assert_right("weights", sasa.local_attention_weights(**tensors, **case.options), solution)


NUMBERS = st.floats(-100, 100, width=32)


@MODEST
@given(numbers=st.lists(NUMBERS, min_size=24, max_size=24), border=st.sampled_from(BORDERS), scale=st.floats(-3, 3))
def test_any_numbers(implementation, numbers, border, scale):
    """Query, key and value of 2x4 pixels made of numbers that hypothesis chooses: zeros, ties, subnormals, large."""
    tensors = dict(
        zip(
            ("query", "key", "value"),
            torch.tensor(numbers).to(implementation.precise).reshape(3, 1, 1, 1, 2, 4),
            strict=True,
        )
    )
    options = {"kernel_size": (2, 3), "stride": 1, "dilation": 1, "border": border, "scale": scale}
    grad_output = torch.ones_like(attention(**tensors, **options).output)
    solution = solve_tensors(tensors, grad_output, **options)
    leaves = {name: x.to(implementation.device).requires_grad_() for name, x in tensors.items()}
    output = sasa.local_attention(**leaves, **options, implementation=implementation.name)
    assert_right("output", output, solution)
    for name, grad in zip(leaves, torch.autograd.grad(output.sum(), list(leaves.values())), strict=True):
        assert_right(f"grad {name}", grad, solution)
