"""The choice between implementations: the fastest that can, or the one that is named; never a silent substitute."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

import sasa
from sasa.ops import eager, implementations


@pytest.fixture(name="used")
def _used(monkeypatch) -> list[str]:
    """Two more implementations before those there are: one refuses wide heads, one everything. What ran, in order."""
    used = []

    def noting(name: str, function):
        def run(*args):
            used.append(name)
            return function(*args)

        return run

    def narrow_only(images: Tensor, widest: int) -> str | None:
        return f"head width {widest} is above 4" if widest > 4 else None

    fallback = next(x for x in implementations.IMPLEMENTATIONS if x.name == "eager")
    added = [
        fallback._replace(
            name=name,
            forward=noting(f"{name} forward", eager.forward),
            backward=noting(f"{name} backward", eager.backward),
            unsupported=unsupported,
        )
        for name, unsupported in (("never", lambda *_: "broken"), ("narrow", narrow_only))
    ]
    use(monkeypatch, *added, *implementations.IMPLEMENTATIONS)
    return used


def use(monkeypatch, *every: implementations.Implementation) -> None:
    monkeypatch.setattr(implementations, "IMPLEMENTATIONS", every)
    monkeypatch.setattr(implementations, "_BY_NAME", {one.name: one for one in every})


def run(width: int, name: str | None) -> None:
    query = torch.randn(1, 1, width, 3, 3, requires_grad=True)
    sasa.local_attention(query, query, query, 3, implementation=name).sum().backward()


def test_names(used):
    assert implementations.names()[:2] == ["never", "narrow"]
    assert implementations.names()[-2:] == ["eager", "reference"]


def test_fastest_that_supports_the_call_is_taken_forward_and_backward(used):
    run(4, None)
    assert used == ["narrow forward", "narrow backward"]


def test_an_implementation_that_does_not_support_the_call_is_passed_over(used):
    run(5, None)
    assert used == []


@pytest.mark.parametrize("width", [(5, 4), (4, 5)], ids=["query", "value"])
def test_the_wider_of_queries_and_values_counts(width, used):
    query, value = (torch.randn(1, 1, channels, 3, 3) for channels in width)
    sasa.local_attention(query, query, value, 3)
    assert used == []


@pytest.mark.parametrize("other", ["eager", "reference"])
def test_a_named_implementation_is_taken(other, used):
    run(4, other)
    assert used == []
    run(4, "narrow")
    assert used == ["narrow forward", "narrow backward"]


@pytest.mark.parametrize(
    ("name", "reason"), [("narrow", "head width 5 is above 4"), ("never", "broken")], ids=["narrow", "never"]
)
def test_a_named_implementation_that_cannot_says_why(name, reason, used):
    message = f"implementation: {name} does not support this call: {reason}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        run(5, name)
    assert used == []


def test_when_none_can_it_says_so(used, monkeypatch):
    use(monkeypatch, *implementations.IMPLEMENTATIONS[:2])
    with pytest.raises(ValueError, match=r"^implementation: none supports this call$"):
        run(5, None)


@pytest.mark.parametrize("operator", ["local_attention", "local_attention_backward"])
def test_the_equation_has_no_operator(operator):
    x, lse = torch.zeros(1, 1, 2, 3, 3), torch.zeros(1, 1, 3, 3)
    tensors = (x, x, x, None, None, None) if operator == "local_attention" else (x, x, x, x, None, None, None, lse)
    with pytest.raises(ValueError, match="implementation: 'reference' is the equation, which has no operator"):
        getattr(torch.ops.sasa, operator)(*tensors, (3, 3), (1, 1), (1, 1), "zero", 1.0, "reference")


def test_weights_come_from_the_reference_alone(used):
    query = torch.randn(1, 1, 4, 3, 3)
    sasa.local_attention_weights(query, query, 3)
    assert used == []
    with pytest.raises(ValueError, match="implementation: expected one of None, 'reference', got 'narrow'"):
        sasa.local_attention_weights(query, query, 3, implementation="narrow")
