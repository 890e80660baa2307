"""Runs beside and after each other: equal bits, whatever the threads."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from oracles import BORDERS, Case
from torch import Tensor

import sasa

CASES = [Case(size=(14, 17), batch=3, heads=4, width=8, kernel_size=5, border=border) for border in BORDERS]
cases = pytest.mark.parametrize("case", CASES, ids=str)


def run(tensors: dict[str, Tensor], case: Case, implementation) -> list[Tensor]:
    """Output and all gradients."""
    leaves = {name: x.to(implementation.device).detach().requires_grad_() for name, x in tensors.items()}
    output = sasa.local_attention(**leaves, **case.options, implementation=implementation.name)
    return [output.detach(), *torch.autograd.grad(output.sin().sum(), list(leaves.values()))]


def same_bits(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


@cases
def test_second_run_gives_equal_bits(case, implementation):
    tensors = case.tensors(torch.float32)
    first = run(tensors, case, implementation)
    assert same_bits(run({name: x.clone() for name, x in tensors.items()}, case, implementation), first)


@cases
def test_inputs_stay_as_they_were(case, implementation):
    tensors = case.tensors(torch.float32)
    run(tensors, case, implementation)
    assert all(torch.equal(x, case.tensors(torch.float32)[name]) for name, x in tensors.items())


@cases
def test_number_of_threads_does_not_matter(case, implementation):
    """One thread or two: equal bits."""
    tensors, before = case.tensors(torch.float32), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = run(tensors, case, implementation)
        torch.set_num_threads(2)
        assert same_bits(run(tensors, case, implementation), one)
    finally:
        torch.set_num_threads(before)


def test_two_python_threads_at_once(implementation):
    """Each gets what it gets alone, forward and backward, many times over."""
    problems = [(case.tensors(torch.float32), case) for case in CASES[:2]]
    alone = [run(*problem, implementation) for problem in problems]
    start = threading.Barrier(2)

    def worker(index: int) -> list[bool]:
        start.wait(timeout=60)
        return [same_bits(run(*problems[index], implementation), alone[index]) for _ in range(10)]

    with ThreadPoolExecutor(2) as pool:
        assert all(all(same) for same in pool.map(worker, range(2)))
