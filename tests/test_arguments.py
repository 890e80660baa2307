"""Arguments of any kind to every function and module: a result, or an error that names the argument.

Sizes are in ``test_sizes``, mixtures of all in ``test_any_arguments``, full messages in ``ops/test_checks.py``.
"""

from __future__ import annotations

import functools
import math
import re

import isolated
import numpy as np
import pytest
import torch
from calls import (
    ARRAYS,
    CHOICES,
    ENTRIES,
    EVERY,
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
from torch import nn

import sasa


def of_kind(*kinds: set[str]) -> pytest.MarkDecorator:
    chosen = [pair for pair in EVERY if any(pair[1] in kind for kind in kinds)]
    return pytest.mark.parametrize(("entry", "name"), chosen)


def naming(error: type[Exception] | tuple[type[Exception], ...], *names: str):
    return pytest.raises(error, match=rf"\b({'|'.join(names)})\b")


def value_unless_refused(text: str, name: str) -> object:
    """None where a TypeError names the argument."""
    try:
        return evaluate(text)
    except TypeError as error:
        if not re.search(rf"\b{name}\b", str(error)):
            raise
        return None


@pytest.mark.parametrize("entry", ENTRIES)
def test_the_calls_without_changes_are_right(entry):
    result = evaluate(call_of(entry))
    assert len(result) == 1 if entry == "conversion_report" else result.isfinite().all()


# --- kinds ---


@of_kind(INTS, PAIRS)
@pytest.mark.parametrize("text", [*NO_NUMBER, *ARRAYS, *TENSORS, *PAIRS_OF_OTHERS])
def test_what_is_no_int(entry, name, text):
    if text == "None" and name == "kernel_size" and entry.startswith("conver"):
        return  # the convolution's, or 7
    error = TypeError if text in (*NO_NUMBER, *ARRAYS) and text != "[]" else (TypeError, ValueError)
    with naming(error, name):
        evaluate(call_of(entry, **{name: text}))


@of_kind(INTS)
def test_a_pair_where_one_number_is_wanted(entry, name):
    with naming(TypeError, name):
        evaluate(call_of(entry, **{name: "(2, 2)"}))


@of_kind(INTS, PAIRS)
@pytest.mark.parametrize("text", ["0", "-1", "-(2**31)", "-(2**63)", "-(2**64)", "-(10**30)"])
def test_ints_below_one(entry, name, text):
    with naming(ValueError, name):
        evaluate(call_of(entry, **{name: text}))


@of_kind(PAIRS)
@pytest.mark.parametrize("text", ["(3, 0)", "(-1, 3)", "[3, -(10**30)]", "torch.Size([0, 3])"])
def test_pairs_below_one(entry, name, text):
    with naming(ValueError, name):
        evaluate(call_of(entry, **{name: text}))


@of_kind(INTS, PAIRS)
def test_ints_of_numpy_are_ints_or_refused(entry, name):
    result = value_unless_refused(call_of(entry, **{name: f"np.int64({ENTRIES[entry][name]})"}), name)
    if result is not None and entry != "conversion_report":
        assert result.shape == evaluate(call_of(entry)).shape


@of_kind(CHOICES)
@pytest.mark.parametrize("text", NO_CHOICE)
def test_what_is_no_choice(entry, name, text):
    with naming((ValueError, TypeError), name):
        evaluate(call_of(entry, **{name: text}))


@of_kind(CHOICES - {"implementation"})
def test_none_is_no_choice(entry, name):
    with naming((ValueError, TypeError), name):
        evaluate(call_of(entry, **{name: "None"}))


@of_kind({"recompute"})
@pytest.mark.parametrize("text", NO_RECOMPUTE)
def test_recompute_is_true_false_or_none(entry, name, text):
    with naming((ValueError, TypeError), name):
        evaluate(call_of(entry, **{name: text}))


# --- the scale ---


@of_kind({"scale"})
@pytest.mark.parametrize("text", NO_SCALE)
def test_what_is_no_number(entry, name, text):
    with naming(TypeError, name):
        evaluate(call_of(entry, **{name: text}))


@of_kind({"scale"})
@pytest.mark.parametrize("text", ["float('nan')", "float('inf')", "-float('inf')", "10**400", "-(10**400)", "2**1024"])
def test_scales_that_are_not_finite(entry, name, text):
    with naming(ValueError, name):
        evaluate(call_of(entry, **{name: text}))


@pytest.mark.parametrize("entry", ["local_attention", "local_attention_weights", "RelativeSelfAttention", "convert"])
@pytest.mark.parametrize("text", ["1e308", "-1e308", "1e39", "10**39", "3.5e38", "10**308"])
@pytest.mark.parametrize("cast", ["", ".half()", ".bfloat16()"])
def test_scales_that_are_infinite_in_the_dtype_of_the_sums(cast, text, entry):
    """Those are float32 for half precision."""
    call = call_of(entry, scale=text)
    if cast:
        call = re.sub(r"\bq\b", f"q{cast}", call)
        call = call.replace("(x)", f"{cast}(x{cast})")
    with naming(ValueError, "scale"):
        evaluate(call)


@pytest.mark.parametrize("computed_by", [None, "reference"])
@pytest.mark.parametrize("scale", [1e308, -1e308, 10**308, 1e39, 1e-300])
def test_a_large_scale_in_float64(scale, computed_by):
    """Of queries and keys so small, or so large, that the logits are ordinary numbers."""
    query, key, value = torch.randn(3, 1, 2, 3, 2, 3, dtype=torch.float64).unbind(0)
    options = {"kernel_size": 3, "implementation": computed_by}
    factor = math.sqrt(abs(1 / scale))
    small = query * factor, key * factor, value
    expected = sasa.local_attention(math.copysign(1, scale) * query, key, value, **options)
    torch.testing.assert_close(sasa.local_attention(*small, scale=scale, **options), expected)
    weights = sasa.local_attention_weights(*small[:2], 3, scale=scale)
    expected = sasa.local_attention_weights(math.copysign(1, scale) * query, key, 3)
    torch.testing.assert_close(weights, expected)


@pytest.mark.parametrize("scale", [1e39, 1e308])
@pytest.mark.parametrize("num_heads", [8, 2])
def test_a_layer_with_a_large_scale_in_float64(scale, num_heads):
    options = {"position": "none", "bias": False, "dtype": torch.float64}
    layer = sasa.RelativeSelfAttention(4, 8, 3, num_heads, scale=scale, **options)
    plain = sasa.RelativeSelfAttention(4, 8, 3, num_heads, **options)
    with torch.no_grad():
        plain.qkv.weight.normal_()
        layer.qkv.weight.copy_(plain.qkv.weight)
        layer.qkv.weight[:16] *= math.sqrt(1 / scale)
    x = torch.randn(1, 4, 5, 4, dtype=torch.float64)
    torch.testing.assert_close(layer(x), plain(x))


@pytest.mark.parametrize("entry", ["local_attention", "local_attention_weights", "RelativeSelfAttention", "convert"])
@pytest.mark.parametrize(
    "text", ["-1", "0", "-0.0", "1", "1e30", "-1e30", "1e-30", "1e-50", "5e-324", "np.float64(0.5)"]
)
def test_scales_that_are_finite(text, entry):
    assert evaluate(call_of(entry, scale=text)).isfinite().all()


@of_kind({"scale"})
def test_floats_of_numpy_are_numbers_or_refused(entry, name):
    result = value_unless_refused(call_of(entry, scale="np.float32(0.5)"), "scale")
    if result is not None and entry.startswith("local"):
        torch.testing.assert_close(result, evaluate(call_of(entry, scale="0.5")))


# --- inputs ---

MODULES = {
    "layer": lambda: sasa.RelativeSelfAttention(4, 8, 3, 2),
    "layer of eight heads": lambda: sasa.RelativeSelfAttention(4, 16, 3, 8),
    "layer that pools": lambda: sasa.RelativeSelfAttention(4, 8, 3, 2, pool=2),
    "absolute": lambda: sasa.RelativeSelfAttention(4, 8, 3, 2, position="absolute"),
    "weights": lambda: sasa.RelativeSelfAttention(4, 8, 3, 2).attention_weights,
    "stem": lambda: sasa.AttentionStem(4, 8, 2),
    "crop": lambda: sasa.convert(nn.Sequential(nn.Conv2d(4, 8, 3, 2)), 3, 2, where=lambda n, m: True)[0],
}


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize(
    "x", [None, "x", 3, [1.0], [torch.zeros(1, 4, 5, 5)], np.zeros((1, 4, 5, 5))], ids=lambda x: type(x).__name__
)
def test_inputs_that_are_no_tensors(x, module, grad):
    with torch.set_grad_enabled(grad), naming(TypeError, "x"):
        MODULES[module]()(x)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize(
    "shape", [(1, 4, 0, 5), (2, 4, 5, 0), (1, 4, 0, 0), (0, 4, 0, 5), (4, 0, 5), (4, 5, 0)], ids=str
)
def test_images_of_no_pixels(shape, module, grad):
    with torch.set_grad_enabled(grad), naming(ValueError, "x"):
        MODULES[module]()(torch.zeros(shape))


# --- channels ---


@functools.cache
def channels(entry: str, name: str) -> dict[int, dict]:
    sizes = [size - size % 2 for size in HUGE]
    calls = [f"list({call_of(entry, **{name: str(size)})}.shape)" for size in sizes]
    return dict(zip(HUGE, isolated.attempts(SETUP, calls), strict=True))


@of_kind(INTS - {"block_size", "pool", "num_heads"})
@pytest.mark.parametrize("size", HUGE)
def test_channels_without_bounds(entry, name, size):
    """More than memory holds, or an input of another number."""
    result = channels(entry, name)[size]
    if "error" in result:
        assert result["error"] == "ValueError" and re.search(rf"\b{name}\b", result["message"]), result
    else:
        assert size == 2**16
        pixels = [1, 2] if entry == "AttentionStem" else [2, 3]
        assert result["value"] == [2, size if name == "out_channels" else 8, *pixels]
