"""Whatever is passed: a finite result of the right shape, or an error that names one of the arguments."""

from __future__ import annotations

import math
import re

import isolated
from calls import (
    ARRAYS,
    CHOICES,
    ENTRIES,
    HUGE,
    INTS,
    NO_CHOICE,
    NO_NUMBER,
    NO_RECOMPUTE,
    NO_SCALE,
    PAIRS,
    PAIRS_OF_OTHERS,
    SETUP,
    TENSORS,
    call_of,
    evaluate,
)  # fmt: skip
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

SIZES = [
    *map(str, HUGE),
    *(f"({size}, 1)" for size in HUGE),
    "0",
    "-1",
    "-(2**63)",
    "1",
    "2",
    "5",
    "100",
    "(2, 5)",
    "np.int64(2)",
]
CHOSEN = ["None", "'mask'", "'valid'", "'none'", "'absolute'", "'across_heads'", "'strided'", "'reference'", "'cpu'"]
SCALES = [
    "-1",
    "0",
    "10**400",
    "float('nan')",
    "float('inf')",
    "1e308",
    "1e39",
    "1e30",
    "5e-324",
    "np.float32(2)",
    "np.float64(2)",
]
TENSORS_OF_OTHERS = "None; 'q'; []; q.numpy(); q.long(); q[:, :, :, :0]; q[0]; q.double(); q.to('meta'); q[..., :1]"
ODD = {
    **{name: [*NO_NUMBER, *ARRAYS, *TENSORS, *PAIRS_OF_OTHERS, *SIZES] for name in INTS | PAIRS},
    **dict.fromkeys(CHOICES, NO_CHOICE + CHOSEN),
    "recompute": ["True", "False", *NO_RECOMPUTE],
    "scale": SCALES + NO_SCALE,
    "model": ["None", "'resnet50'", "nn.Linear(2, 2)", "nn.Sequential()", "torch.zeros(2)"],
    **{name: TENSORS_OF_OTHERS.split("; ") for name in ("query", "key", "value")},
}


def calls() -> st.SearchStrategy[tuple[str, dict[str, str]]]:
    def changes(entry: str):
        of = {name: st.sampled_from(ODD[name]) for name in ENTRIES[entry] if name in ODD}
        some = st.lists(st.sampled_from(sorted(of)), min_size=1, max_size=3, unique=True)
        return some.flatmap(lambda names: st.fixed_dictionaries({name: of[name] for name in names}))

    return st.sampled_from(list(ENTRIES)).flatmap(lambda entry: st.tuples(st.just(entry), changes(entry)))


def ceil_div(pixels: int, by: int) -> int:
    return -(-pixels // by)


def shape_of(entry: str, changes: dict[str, str]) -> list[int]:
    """Of the result of a call whose arguments turned out to be right."""
    of = {name: evaluate(text) for name, text in (ENTRIES[entry] | changes).items()}
    if entry == "AttentionStem":
        return [2, int(of["out_channels"]), *(ceil_div(n, int(of["block_size"])) for n in (2, 3))]
    kernel, stride, dilation = (
        tuple(int(n) for n in (x if isinstance(x, (tuple, list)) else (x, x)))
        for x in (of["kernel_size"], of.get("stride", 1), of.get("dilation", 1))
    )
    lost = [(k - 1) * d if of["border"] == "valid" else 0 for k, d in zip(kernel, dilation, strict=True)]
    size = [ceil_div(n - over, s) for n, over, s in zip((2, 3), lost, stride, strict=True)]
    size = [ceil_div(n, int(of.get("pool", 1))) for n in size]
    if entry == "local_attention":
        return [1, 2, 3, *size]
    if entry == "local_attention_weights":
        return [1, 2, math.prod(kernel), *size]
    return [2, int(of.get("out_channels", 8)), *size]


@settings(deadline=None, max_examples=40, derandomize=True, suppress_health_check=list(HealthCheck))
@given(drawn=st.lists(calls(), min_size=1, max_size=6))
def test_any_arguments(drawn):
    """A finite result of the right shape, or an error that names one of the arguments that were changed."""
    texts = []
    for entry, changes in drawn:
        call = call_of(entry, **changes)
        texts.append(f"len({call})" if entry == "conversion_report" else f"looked_at({call})")
    setup = f"{SETUP}\ndef looked_at(y):\n    return [list(y.shape), bool(y.isfinite().all())]\n"
    for (entry, changes), text, result in zip(drawn, texts, isolated.attempts(setup, texts), strict=True):
        if "error" in result:
            names = [*changes, *(["query", "x"] if "'valid'" in changes.values() else [])]
            assert result["error"] in ("ValueError", "TypeError"), (text, result)
            assert re.search(rf"\b({'|'.join(names)})\b", result["message"]), (text, result)
        elif entry != "conversion_report":
            assert result["value"] == [shape_of(entry, changes), True], text
