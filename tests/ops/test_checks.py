"""Mistakes of the caller: each error names the argument, what was expected and what came."""

from __future__ import annotations

import re

import pytest
import torch

import sasa

SHAPE = (2, 3, 4, 5, 6)  # 2 images, 3 heads of width 4, 5x6 pixels; the window is 3x2


def call(function=sasa.local_attention, **changes):
    """A call that is right but for the changes; they may be made of the right argument."""
    image = torch.zeros(SHAPE)
    arguments = {
        "query": image,
        "key": image,
        "value": image,
        "kernel_size": (3, 2),
        "row_embedding": torch.zeros(3, 4, 3),
        "col_embedding": torch.zeros(3, 4, 2),
    }
    if function is sasa.local_attention_weights:
        del arguments["value"]
    for name, change in changes.items():
        arguments[name] = change(arguments[name]) if callable(change) else change
    return function(**arguments)


def test_the_call_without_changes_is_right():
    assert call().shape == SHAPE
    assert call(sasa.local_attention_weights).shape == (2, 3, 6, 5, 6)


INTS = "expected an int or a (height, width) pair of ints, each at least 1, got "
FLOATING = "expected a dtype of float16, bfloat16, float32 or float64, got "
RANK = "expected 5 dimensions (batch, heads, head width, height, width), got "

BOTH = [
    # wrong type
    ("query", [1.0], TypeError, "query: expected a Tensor, got list"),
    ("key", None, TypeError, "key: expected a Tensor, got NoneType"),
    ("row_embedding", 3, TypeError, "row_embedding: expected a Tensor, got int"),
    ("col_embedding", "relative", TypeError, "col_embedding: expected a Tensor, got str"),
    # dtypes
    ("query", torch.Tensor.long, ValueError, f"query: {FLOATING}torch.int64"),
    ("key", torch.Tensor.int, ValueError, f"key: {FLOATING}torch.int32"),
    ("key", torch.Tensor.cfloat, ValueError, f"key: {FLOATING}torch.complex64"),
    ("row_embedding", torch.Tensor.bool, ValueError, f"row_embedding: {FLOATING}torch.bool"),
    ("key", torch.Tensor.half, ValueError, "key: expected dtype torch.float32 as query has, got torch.float16"),
    (
        "col_embedding",
        torch.Tensor.double,
        ValueError,
        "col_embedding: expected dtype torch.float32 as query has, got torch.float64",
    ),
    # devices
    ("key", lambda x: x.to("meta"), ValueError, "key: expected device cpu as query is on, got meta"),
    ("query", lambda x: x.to("meta"), ValueError, "key: expected device meta as query is on, got cpu"),
    (
        "row_embedding",
        lambda x: x.to("meta"),
        ValueError,
        "row_embedding: expected device cpu as query is on, got meta",
    ),
    # shapes
    ("query", lambda x: x.flatten(1, 2), ValueError, f"query: {RANK}4: (2, 12, 5, 6)"),
    ("key", lambda x: x[None], ValueError, f"key: {RANK}6: (1, 2, 3, 4, 5, 6)"),
    (
        "key",
        lambda x: x[:, :, :2],
        ValueError,
        "key: expected the shape of query, (2, 3, 4, 5, 6), got (2, 3, 2, 5, 6)",
    ),
    ("key", lambda x: x[:1], ValueError, "key: expected the shape of query, (2, 3, 4, 5, 6), got (1, 3, 4, 5, 6)"),
    *(
        (
            "query",
            lambda x, dim=dim: x.narrow(dim, 0, 0),
            ValueError,
            "query: expected at least one head, channel, row and column (only the batch may be empty), got shape "
            f"{tuple(0 if i == dim else n for i, n in enumerate(SHAPE))}",
        )
        for dim in range(1, 5)
    ),
    (
        "row_embedding",
        lambda x: x[..., :2],
        ValueError,
        "row_embedding: expected shape (heads, head width, kernel height) = (3, 4, 3) to match query and kernel_size, "
        "got (3, 4, 2)",
    ),
    (
        "col_embedding",
        lambda x: x[:2],
        ValueError,
        "col_embedding: expected shape (heads, head width, kernel width) = (3, 4, 2) to match query and kernel_size, "
        "got (2, 4, 2)",
    ),
    (
        "row_embedding",
        lambda x: x[:, :3],
        ValueError,
        "row_embedding: expected shape (heads, head width, kernel height) = (3, 4, 3) to match query and kernel_size, "
        "got (3, 3, 3)",
    ),
    (
        "col_embedding",
        lambda x: x[0],
        ValueError,
        "col_embedding: expected shape (heads, head width, kernel width) = (3, 4, 2) to match query and kernel_size, "
        "got (4, 2)",
    ),
    # sizes
    *((name, 0, ValueError, f"{name}: {INTS}0") for name in ("kernel_size", "stride", "dilation")),
    *((name, (1, -2), ValueError, f"{name}: {INTS}(1, -2)") for name in ("kernel_size", "stride", "dilation")),
    *((name, (3, 2, 1), ValueError, f"{name}: {INTS}(3, 2, 1)") for name in ("kernel_size", "stride", "dilation")),
    *((name, [3], ValueError, f"{name}: {INTS}[3]") for name in ("kernel_size", "stride", "dilation")),
    *((name, 2.0, TypeError, f"{name}: {INTS}2.0") for name in ("kernel_size", "stride", "dilation")),
    *((name, (3, 1.5), TypeError, f"{name}: {INTS}(3, 1.5)") for name in ("kernel_size", "stride", "dilation")),
    *((name, True, TypeError, f"{name}: {INTS}True") for name in ("kernel_size", "stride", "dilation")),
    *((name, "3", TypeError, f"{name}: {INTS}'3'") for name in ("kernel_size", "stride", "dilation")),
    ("kernel_size", None, TypeError, f"kernel_size: {INTS}None"),
    # choices
    ("border", "same", ValueError, "border: expected one of 'zero', 'mask', 'valid', 'shift', got 'same'"),
    ("border", None, ValueError, "border: expected one of 'zero', 'mask', 'valid', 'shift', got None"),
    # scale
    ("scale", float("nan"), ValueError, "scale: expected a finite number, got nan"),
    ("scale", float("inf"), ValueError, "scale: expected a finite number, got inf"),
    ("scale", float("-inf"), ValueError, "scale: expected a finite number, got -inf"),
    ("scale", "1", TypeError, "scale: expected a number, got str"),
    ("scale", True, TypeError, "scale: expected a number, got bool"),
    ("scale", None, TypeError, "scale: expected a number, got NoneType"),
    ("scale", torch.tensor(1.0), TypeError, "scale: expected a number, got Tensor"),
]

VALUE = [
    (None, TypeError, "value: expected a Tensor, got NoneType"),
    (torch.Tensor.long, ValueError, f"value: {FLOATING}torch.int64"),
    (torch.Tensor.bfloat16, ValueError, "value: expected dtype torch.float32 as query has, got torch.bfloat16"),
    (lambda x: x.to("meta"), ValueError, "value: expected device cpu as query is on, got meta"),
    (lambda x: x[0], ValueError, f"value: {RANK}4: (3, 4, 5, 6)"),
    *(
        (change, ValueError, f"value: expected shape (2, 3, any, 5, 6) to match query, got {got}")
        for change, got in (
            (lambda x: x[:1], (1, 3, 4, 5, 6)),
            (lambda x: x[:, :2], (2, 2, 4, 5, 6)),
            (lambda x: x[:, :, :0], (2, 3, 0, 5, 6)),
            (lambda x: x[..., :4, :], (2, 3, 4, 4, 6)),
            (lambda x: x[..., :5], (2, 3, 4, 5, 5)),
        )
    ),
]


@pytest.mark.parametrize("function", [sasa.local_attention, sasa.local_attention_weights], ids=lambda f: f.__name__)
@pytest.mark.parametrize(("name", "change", "error", "message"), BOTH, ids=[message for *_, message in BOTH])
def test_message(name, change, error, message, function):
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        call(function, **{name: change})


@pytest.mark.parametrize(("change", "error", "message"), VALUE, ids=[message for *_, message in VALUE])
def test_message_on_the_value(change, error, message):
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        call(value=change)


@pytest.mark.parametrize("function", [sasa.local_attention, sasa.local_attention_weights], ids=lambda f: f.__name__)
@pytest.mark.parametrize(
    ("dilation", "window", "fits"), [(1, "3x2", True), (2, "5x3", True), ((3, 1), "7x2", False), ((1, 6), "3x7", False)]
)
def test_valid_needs_an_image_as_large_as_the_window(dilation, window, fits, function):
    """The window with its dilation, 3x2 taps on 5x6 pixels."""
    if fits:
        assert call(function, border="valid", dilation=dilation).numel() > 0
        return
    message = (
        f"query: expected an image of at least {window} pixels, the window with its dilation, "
        "for border='valid', got 5x6"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        call(function, border="valid", dilation=dilation)
    assert call(function, border="zero", dilation=dilation).numel() > 0


def test_unknown_implementation():
    known = ", ".join(map(repr, sasa.ops.implementations.names()))
    message = f"implementation: expected None or one of {known}, got 'tritton'"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        call(implementation="tritton")
    message = "implementation: expected one of None, 'reference', got 'tritton'"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        call(sasa.local_attention_weights, implementation="tritton")


@pytest.mark.parametrize("size", [3, (3, 3), [3, 3], torch.Size([3, 3])], ids=repr)
def test_sizes_may_be_an_int_or_any_pair(size):
    query = torch.randn(1, 1, 2, 7, 7)
    expected = sasa.local_attention(query, query, query, (3, 3), stride=(3, 3), dilation=(3, 3))
    assert torch.equal(sasa.local_attention(query, query, query, size, stride=size, dilation=size), expected)


def test_scale_may_be_an_int():
    query = torch.randn(1, 1, 2, 4, 4)
    expected = sasa.local_attention(query, query, query, 3, scale=2.0)
    assert torch.equal(sasa.local_attention(query, query, query, 3, scale=2), expected)


MOVED = [
    ({"dilation": 2}, "query: expected an image of at least 6x6 pixels, kernel_size times dilation, for "
     "border='shift', got 5x6"),
    ({"kernel_size": 6}, "query: expected an image of at least 6x6 pixels"),
    ({"row_embedding": torch.zeros(2, 3, 3)}, "row_embedding: expected shape (heads, head width, 2 * kernel height - "
     "1) = (2, 3, 5) to match query, kernel_size and border='shift', got (2, 3, 3)"),
    ({"bias": torch.zeros(2, 3, 3)}, "bias: expected shape (heads, 2 * kernel height - 1, 2 * kernel width - 1) = "
     "(2, 5, 5) to match query, kernel_size and border='shift', got (2, 3, 3)"),
    ({"bias": torch.zeros(2, 5, 5), "border": "mask"}, "bias: expected shape (heads, kernel height, kernel width) = "
     "(2, 3, 3) to match query and kernel_size, got (2, 5, 5)"),
    ({"bias": torch.zeros(2, 5, 5, dtype=torch.float64)}, "bias: expected dtype torch.float32"),
]  # fmt: skip


@pytest.mark.parametrize("name", [None, "reference"])
@pytest.mark.parametrize(("changed", "message"), MOVED, ids=[str(i) for i in range(len(MOVED))])
def test_windows_that_are_moved_and_tables(changed, message, name):
    query = torch.zeros(1, 2, 3, 5, 6)
    options = {"kernel_size": 3, "border": "shift", "implementation": name} | changed
    with pytest.raises(ValueError, match=re.escape(message)):
        sasa.local_attention(query, query, query, **options)


def test_a_layer_names_an_image_that_is_smaller_than_its_window():
    layer = sasa.RelativeSelfAttention(2, 4, 3, 2, border="shift", dilation=(1, 2))
    assert layer(torch.zeros(1, 2, 3, 6)).shape == (1, 4, 3, 6)
    for size in ((2, 6), (3, 5)):
        with pytest.raises(ValueError, match=f"at least 3x6 pixels.*got {size[0]}x{size[1]}"):
            layer(torch.zeros(1, 2, *size))
