"""The choice between implementations: the fastest that can, or the one that is named; never a silent substitute."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

import sasa
from sasa.ops import implementations, reference


@pytest.fixture(name="used")
def _used(monkeypatch) -> list[str]:
    """Two more implementations before those there are: one refuses wide heads, one everything. What ran, in order."""
    used = []

    def noting(name: str, function):
        def run(*args):
            used.append(name)
            return function(*args)

        return run

    def narrow_only(query: Tensor, value: Tensor) -> str | None:
        return f"head width {query.shape[2]} is above 4" if query.shape[2] > 4 else None

    of_reference = next(x for x in implementations.IMPLEMENTATIONS if x.name == "reference")
    added = [
        of_reference._replace(
            name=name,
            forward=noting(f"{name} forward", reference.forward),
            backward=noting(f"{name} backward", reference.backward),
            unsupported=unsupported,
        )
        for name, unsupported in (("never", lambda *_: "broken"), ("narrow", narrow_only))
    ]
    monkeypatch.setattr(implementations, "IMPLEMENTATIONS", [*added, *implementations.IMPLEMENTATIONS])
    return used


def run(width: int, name: str | None) -> None:
    query = torch.randn(1, 1, width, 3, 3, requires_grad=True)
    sasa.local_attention(query, query, query, 3, implementation=name).sum().backward()


def test_names(used):
    assert implementations.names()[:2] == ["never", "narrow"]
    assert "reference" in implementations.names()


def test_fastest_that_supports_the_call_is_taken_forward_and_backward(used):
    run(4, None)
    assert used == ["narrow forward", "narrow backward"]


def test_an_implementation_that_does_not_support_the_call_is_passed_over(used):
    run(5, None)
    assert used == []


def test_a_named_implementation_is_taken_at_its_word(used):
    run(4, "reference")
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


def test_when_none_can_all_reasons_are_given(used, monkeypatch):
    monkeypatch.setattr(implementations, "IMPLEMENTATIONS", implementations.IMPLEMENTATIONS[:2])
    message = (
        "implementation: never does not support this call: broken; "
        "narrow does not support this call: head width 5 is above 4"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        run(5, None)


def test_weights_come_from_the_reference_alone(used):
    query = torch.randn(1, 1, 4, 3, 3)
    sasa.local_attention_weights(query, query, 3)
    assert used == []
    with pytest.raises(ValueError, match="implementation: expected one of None, 'reference', got 'narrow'"):
        sasa.local_attention_weights(query, query, 3, implementation="narrow")
