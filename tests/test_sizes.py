"""Windows, strides, dilations, pools and blocks of any size: the exact result, or a ValueError that names the size.

Some of the calls have killed their process, so each has one of its own: see ``isolated``.
"""

from __future__ import annotations

import functools
import re
from typing import Any

import isolated
import oracles
import pytest
import torch

import sasa

SIZES = [1, 2, 7, 100, 2**16, 2**31 - 1, 2**31, 2**32, 2**53, 2**60, 2**62, 2**63 - 1, 2**63, 2**64, 10**30]
IMAGE = (2, 3)  # pixels
COVER = 7  # a window of as many taps reaches all of the image from every pixel; as large a stride or dilation leaves it

any_size = pytest.mark.parametrize("size", SIZES)

OPERATOR = """
torch.manual_seed(0)
q, k, v = torch.randn(3, 1, 2, 3, 2, 3).unbind(0)
q, k, v = (t.requires_grad_() for t in (q, k, v))

def numbers(**options):
    y = local_attention(q, k, v, **options)
    vector = torch.linspace(-1, 1, y.numel()).view_as(y)
    return [t.flatten().tolist() for t in (y, *torch.autograd.grad(y, (q, k, v), vector))]
"""


def image() -> list[torch.Tensor]:
    """The tensors of ``OPERATOR``, wider."""
    torch.manual_seed(0)
    return [t.double().requires_grad_() for t in torch.randn(3, 1, 2, 3, *IMAGE).unbind(0)]


def numbers(y: torch.Tensor, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    vector = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    return [t.detach().flatten() for t in (y, *torch.autograd.grad(y, tensors, vector))]


def assert_close(got: list, expected: list[torch.Tensor]) -> None:
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(torch.as_tensor(one).double(), other.double(), rtol=1e-4, atol=1e-5)


def zero_border(kernel: int, tensors: list[torch.Tensor]) -> torch.Tensor:
    """Attention in a window of kernel x kernel taps that covers the image: all taps outside have a logit of 0."""
    masked = oracles.attention(*tensors, COVER, border="mask")
    outside = torch.tensor(float(kernel**2 - IMAGE[0] * IMAGE[1]), dtype=torch.float64).log()
    return masked.output * torch.sigmoid(masked.lse - outside)[:, :, None]


def test_the_formula_for_large_windows_is_the_oracles():
    tensors = image()
    assert_close(numbers(zero_border(COVER, tensors), tensors), numbers(oracles.attention(*tensors, COVER)[0], tensors))


@functools.cache
def expected(name: str, size: int, border: str) -> list[torch.Tensor]:
    tensors = image()
    if name == "kernel_size" and border == "zero" and size > COVER:
        return numbers(zero_border(size, tensors), tensors)
    options = {"kernel_size": 3, "border": border} | {name: min(size, COVER)}
    return numbers(oracles.attention(*tensors, **options).output, tensors)


@functools.cache
def _of_every_size(setup: str, call: str) -> dict[int, dict]:
    return dict(zip(SIZES, isolated.attempts(setup, [call.replace("SIZE", str(size)) for size in SIZES]), strict=True))


def outcome(setup: str, call: str, size: int) -> dict:
    """The value or the error of a call with a size in the place of SIZE. All sizes share a process if they can."""
    return _of_every_size(setup, call)[size]


def value_of(result: dict) -> Any:
    assert "value" in result, result
    return result["value"]


def options_of(**options: object) -> str:
    return ", ".join(f"{name}={option if option == 'SIZE' else repr(option)}" for name, option in options.items())


def assert_refused(result: dict, *names: str) -> None:
    assert result["error"] == "ValueError" and re.search(rf"\b({'|'.join(names)})\b", result["message"]), result


IMPLEMENTATIONS = (None, "reference")


@any_size
@pytest.mark.parametrize("border", ["zero", "mask"])
@pytest.mark.parametrize("name", ["kernel_size", "stride", "dilation"])
def test_of_the_operator(name, border, size):
    for implementation in IMPLEMENTATIONS:
        options = {"kernel_size": 3, "border": border, "implementation": implementation} | {name: "SIZE"}
        result = outcome(OPERATOR, f"numbers({options_of(**options)})", size)
        if (name, border) == ("kernel_size", "zero") and size > 255 and "error" in result:
            assert_refused(result, name)
        else:
            assert_close(value_of(result), expected(name, size, border))


@any_size
@pytest.mark.parametrize("name", ["kernel_size", "stride", "dilation"])
def test_of_the_operator_where_windows_lie_inside(name, size):
    options = {"kernel_size": 2, "border": "valid"}
    for implementation in IMPLEMENTATIONS:
        text = options_of(**options | {name: "SIZE", "implementation": implementation})
        result = outcome(OPERATOR, f"numbers({text})", size)
        if name == "stride" or size <= 2 - (name == "dilation"):
            tensors = image()
            y = oracles.attention(*tensors, **options | {name: min(size, COVER)}).output
            assert_close(value_of(result), numbers(y, tensors))
        else:
            assert_refused(result, name, "query")


@any_size
@pytest.mark.parametrize("border", ["zero", "mask"])
@pytest.mark.parametrize("name", ["stride", "dilation"])
def test_of_the_weights(name, border, size):
    options = {"kernel_size": 3, "border": border}
    weights = oracles.attention(*image(), **options | {name: min(size, COVER)}).weights
    text = options_of(**options | {name: "SIZE"})
    result = outcome(OPERATOR, f"local_attention_weights(q, k, {text}).flatten().tolist()", size)
    assert_close([value_of(result)], [weights.detach().flatten()])


@any_size
@pytest.mark.parametrize("border", ["zero", "mask", "valid"])
def test_of_windows_whose_weights_are_asked_for(border, size):
    """A number for each tap: a window of millions of taps may be too large, but that is no crash."""
    call = f"list(local_attention_weights(q, k, (SIZE, 1), border={border!r}).shape)"
    result = outcome(OPERATOR, call, size)
    if "error" in result:
        assert size > (2 if border == "valid" else 255)
        assert_refused(result, "kernel_size", *(["query"] if border == "valid" else []))
    else:
        assert result["value"] == [1, 2, size, 2 if border != "valid" else 3 - size, 3]


@pytest.mark.parametrize("border", ["zero", "mask"])
@pytest.mark.parametrize("kernel", [(7, 7), (100, 3), (3, 100), (255, 1), (1, 255), (254, 2)], ids=str)
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_of_windows_beyond_the_image_with_embeddings(kernel, border, name):
    tensors, options = image(), {"kernel_size": kernel, "border": border}
    row, col = (torch.randn(2, 3, taps, dtype=torch.float64, requires_grad=True) for taps in kernel)
    leaves = [*tensors, row, col]
    right = numbers(oracles.attention(*tensors, row_embedding=row, col_embedding=col, **options).output, leaves)
    narrow = [t.detach().float().requires_grad_() for t in leaves]
    y = sasa.local_attention(
        *narrow[:3], row_embedding=narrow[3], col_embedding=narrow[4], **options, implementation=name
    )
    assert_close([t.tolist() for t in numbers(y, narrow)], right)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_of_a_window_of_many_thousand_rows_with_embeddings(name):
    """Only the taps that fall on the image count, so only their embeddings do."""
    size, reach = 2**16, IMAGE[0] - 1
    setup = f"torch.manual_seed(1)\nrow, col = torch.randn(2, 3, {size}), torch.randn(2, 3, 3)"
    options = f'({size}, 3), row_embedding=row, col_embedding=col, border="mask", implementation={name!r}'
    (result,) = isolated.attempts(OPERATOR + setup, [f"numbers(kernel_size={options})"])
    torch.manual_seed(1)
    row, col = torch.randn(2, 3, size).double(), torch.randn(2, 3, 3).double()
    centre, tensors = (size - 1) // 2, image()
    row = row[..., centre - reach : centre + reach + 1]
    embeddings = {"row_embedding": row, "col_embedding": col}
    y = oracles.attention(*tensors, (2 * reach + 1, 3), **embeddings, border="mask").output
    assert_close(value_of(result), numbers(y, tensors))


# --- the layer, the stem, converted networks ---

LAYER = """
def layer_numbers(heads, **options):
    torch.manual_seed(0)
    layer = RelativeSelfAttention(4, 8, **({"kernel_size": 3} | options), num_heads=heads)
    x = torch.randn(2, 4, 2, 3, requires_grad=True)
    with torch.no_grad():
        without = layer(x)
    y = layer(x)
    vector = torch.linspace(-1, 1, y.numel()).view_as(y)
    return [t.flatten().tolist() for t in (without, y, *torch.autograd.grad(y, (x, layer.qkv.weight), vector))]
"""


@any_size
@pytest.mark.parametrize("border", ["zero", "mask"])
@pytest.mark.parametrize("name", ["kernel_size", "stride", "dilation", "pool"])
def test_of_the_layer(name, border, size):
    """Without embeddings; with 8 heads and with 2."""
    options = {"border": border, "position": "none"}
    names = {"torch": torch, "RelativeSelfAttention": sasa.RelativeSelfAttention}
    exec(LAYER, names)
    beyond = (name, border) == ("kernel_size", "zero")
    for heads in (8, 2):
        result = outcome(LAYER, f"layer_numbers({heads}, {options_of(**options | {name: 'SIZE'})})", size)
        if beyond and size > 255 and "error" in result:
            assert_refused(result, name)
        elif beyond and size > COVER:
            assert all(torch.tensor(t).isfinite().all() for t in value_of(result))
        else:
            same = names["layer_numbers"](heads, **options | {name: min(size, COVER)})
            assert_close(value_of(result), [torch.tensor(t) for t in same])


@any_size
@pytest.mark.parametrize("border", ["zero", "mask", "valid"])
def test_of_the_window_of_a_layer_with_embeddings(border, size):
    """As many embeddings as taps: those of a window too large for memory can't be made."""
    call = f"list(RelativeSelfAttention(4, 8, SIZE, 2, border={border!r})(torch.randn(1, 4, 2, 3)).shape)"
    result = outcome("", call, size)
    if "error" in result:
        assert size > (2 if border == "valid" else 255)
        assert_refused(result, "kernel_size", *(["x", "query"] if border == "valid" else []))
    else:
        assert result["value"] == [1, 8, *(IMAGE if border != "valid" else (3 - size, 4 - size))]


@any_size
def test_of_the_stems_block(size):
    """A block larger than the image is as large as the image."""
    setup = f"""
def difference(size):
    torch.manual_seed(0)
    stem = AttentionStem(3, 8, 2, block_size=size)
    small = AttentionStem(3, 8, 2, block_size=min(size, {COVER}))
    state = {{k: t[:, :{COVER}] if "row" in k or "col" in k else t for k, t in stem.state_dict().items()}}
    small.load_state_dict(state)
    x = torch.randn(2, 3, 5, 4)
    y, expected = stem(x), small(x)
    y.square().sum().backward()
    trained = (y - expected).abs().max().item()
    with torch.no_grad():
        return max(trained, (stem.eval()(x) - small.eval()(x)).abs().max().item())
"""
    result = outcome(setup, "difference(SIZE)", size)
    if "error" in result:
        assert size > 2**16
        assert_refused(result, "block_size")
    else:
        assert result["value"] < 1e-5


@any_size
@pytest.mark.parametrize(("name", "border"), [("kernel_size", "zero"), ("kernel_size", "mask"), ("num_heads", "zero")])
def test_of_a_conversion(name, border, size):
    setup = """
network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 8, 3, 2))
x = torch.randn(1, 3, 7, 6)

def shape(**options):
    y = convert(network, **options)(x)
    return list(y.shape) if y.isfinite().all() else "not finite"
"""
    options = options_of(**{"border": border, name: "SIZE"})
    report = outcome(setup, f"len(conversion_report(network, {options}).converted)", size)
    for result, right in ((report, 2), (outcome(setup, f"shape({options})", size), [1, 8, 3, 2])):
        if "error" in result:
            assert name == "kernel_size" and size > 255
            assert_refused(result, name)
        else:
            assert result["value"] == right


# --- memory and time follow the image ---

MEGABYTES = 100
SMALL = "x = torch.randn(1, 1, 2, 4, 4, requires_grad=True)\n"


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "code",
    [
        *(
            f"{SMALL}local_attention(x, x, x, {kernel}, {sizes}, border={border!r}, implementation={name!r})"
            f".sum().backward()"
            for name in IMPLEMENTATIONS
            for border in ("zero", "mask")
            for kernel, sizes in ((7, "dilation=2**24"), (7, "dilation=2**13"), (7, "stride=2**24"))
        ),
        *(
            f"{SMALL}local_attention(x, x, x, (2**24, 3), border='mask', implementation={name!r}).sum().backward()"
            for name in IMPLEMENTATIONS
        ),
        f"{SMALL}local_attention_weights(x, x, 7, dilation=2**24).sum().backward()",
        *(
            f"x = torch.randn(1, 4, 4, 4)\nRelativeSelfAttention(4, 8, 7, {heads}, dilation=2**24)(x).sum().backward()"
            for heads in (8, 2)
        ),
        "RelativeSelfAttention(4, 8, 7, 8, pool=2**24)(torch.randn(1, 4, 4, 4)).sum().backward()",
        *(
            f"AttentionStem(3, 8, block_size={size})(torch.randn(2, 3, 5, 5)).sum().backward()"
            for size in (64, 4096, 2**16)
        ),
        "torch.set_grad_enabled(False)\n"
        "AttentionStem(3, 8, block_size=4096).eval()(torch.ones(2, 3, 5, 5)).sum().item()",
    ],
)
def test_of_memory(code):
    result = isolated.run(code)
    assert (result.ended, result.error) == (None, None), result
    assert result.megabytes < MEGABYTES
