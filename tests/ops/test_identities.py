"""What must hold whatever the numbers, and the same results by other routes than the equation."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from oracles import BORDERS, Case, pair
from torch import Tensor

import sasa

CLOSE = {torch.float64: {"rtol": 1e-10, "atol": 1e-11}, torch.float32: {"rtol": 2e-5, "atol": 2e-5}}


@pytest.fixture(name="attend")
def _attend(implementation):
    """``sasa.local_attention`` by the implementation, in its most precise dtype and on its device; float64 back."""

    def attend(query: Tensor, key: Tensor, value: Tensor, kernel_size, **options) -> Tensor:
        given = {name: x for name, x in options.items() if not isinstance(x, Tensor)}
        tensors = {"query": query, "key": key, "value": value} | {n: x for n, x in options.items() if n not in given}
        moved = {name: x.to(implementation.device, implementation.precise) for name, x in tensors.items()}
        output = sasa.local_attention(**moved, kernel_size=kernel_size, **given, implementation=implementation.name)
        return output.to("cpu", torch.float64)

    attend.dtype = implementation.precise
    # On a GPU, a fused multiply-add keeps the rounding of the largest logit when that is subtracted: not quite exp(0).
    # The weighted value rounds by half a step, and Triton's quotient by two.
    attend.steps = 3 if implementation.name == "triton" else 0
    return attend


def close(attend, got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, **CLOSE[attend.dtype])


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def images(count: int = 3, heads: int = 2, width: int = 3, size: tuple[int, int] = (7, 8)) -> tuple[Tensor, ...]:
    """Query, key, value of a batch of two."""
    return normal(count, 2, heads, width, *size).unbind(0)


def embeddings(kernel_size, heads: int = 2, width: int = 3, border: str = "zero") -> dict[str, Tensor]:
    kh, kw = (2 * k - 1 if border == "shift" else k for k in pair(kernel_size))
    return {"row_embedding": normal(heads, width, kh), "col_embedding": normal(heads, width, kw)}


GEOMETRIES = [
    {"kernel_size": 3},
    {"kernel_size": (2, 4)},
    {"kernel_size": 3, "stride": 2, "dilation": (1, 2)},
    {"kernel_size": 5, "stride": (1, 3)},
]
geometries = pytest.mark.parametrize("geometry", GEOMETRIES, ids=lambda g: str(Case(**g)))
borders = pytest.mark.parametrize("border", BORDERS)


@borders
@geometries
def test_weights_are_positive_and_sum_to_one(geometry, border):
    query, key, _ = images()
    weights = sasa.local_attention_weights(
        query, key, border=border, **geometry, **embeddings(geometry["kernel_size"], border=border)
    )
    assert (weights >= 0).all()
    torch.testing.assert_close(weights.sum(2), torch.ones_like(weights[:, :, 0]))


@pytest.mark.parametrize("border", ["mask", "valid"])
@geometries
def test_constant_values_come_back(geometry, border, attend):
    """Any average of a constant is the constant."""
    query, key, value = images()
    constant = normal(2, 2, 3, 1, 1)
    output = attend(query, key, constant.expand_as(value), border=border, **geometry)
    close(attend, output, constant.expand_as(output))


@borders
@pytest.mark.parametrize("stride", [1, 2, (3, 1)])
def test_window_of_one_returns_the_value(stride, border, attend):
    """With a single tap the weight is 1, whatever the logit."""
    query, key, value = images()
    value = value.to(attend.dtype).double()
    output = attend(query, key, value, 1, stride=stride, border=border, **embeddings(1, border=border))
    sh, sw = pair(stride)
    rounding = attend.steps * torch.finfo(attend.dtype).eps
    torch.testing.assert_close(output, value[..., ::sh, ::sw], rtol=rounding, atol=0)


@pytest.mark.parametrize(("border", "count_include_pad"), [("zero", True), ("mask", False)])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("kernel_size", [1, 3, 5, (3, 7)], ids=str)
def test_zero_query_averages_the_window(kernel_size, stride, border, count_include_pad, attend):
    """All logits equal: the output is the average pool, with or without what lies outside."""
    query, key, value = images()
    padding = tuple((k - 1) // 2 for k in pair(kernel_size))
    pooled = F.avg_pool2d(value.flatten(1, 2), pair(kernel_size), stride, padding, count_include_pad=count_include_pad)
    output = attend(torch.zeros_like(query), key, value, kernel_size, stride=stride, border=border)
    close(attend, output.flatten(1, 2), pooled)


@pytest.mark.parametrize("kernel_size", [2, 4, (3, 6)], ids=str)
def test_zero_query_averages_the_window_where_all_windows_lie_inside(kernel_size, attend):
    query, key, value = images()
    output = attend(torch.zeros_like(query), key, value, kernel_size, border="valid", stride=2)
    close(attend, output.flatten(1, 2), F.avg_pool2d(value.flatten(1, 2), pair(kernel_size), 2))


@pytest.mark.parametrize("border", ["zero", "mask"])
@geometries
def test_zero_query_ignores_the_embeddings(geometry, border, attend):
    """The position term is a product with the query."""
    query, key, value = images()
    query = torch.zeros_like(query)
    kernel = embeddings(geometry["kernel_size"])
    close(
        attend,
        attend(query, key, value, border=border, **geometry, **kernel),
        attend(query, key, value, border=border, **geometry),
    )


@pytest.mark.parametrize("border", ["zero", "mask"])
@pytest.mark.parametrize("shift", [(1, 0), (0, 2), (2, 3)])
def test_shifting_the_image_shifts_the_output(shift, border, attend):
    """Where no window crosses the border or the seam."""
    dy, dx = shift
    tensors, kernel = images(size=(10, 11)), embeddings(3)
    output = attend(*tensors, 3, border=border, **kernel)
    shifted = attend(*(x.roll(shift, (3, 4)) for x in tensors), 3, border=border, **kernel)
    close(attend, shifted[..., dy + 1 : -1, dx + 1 : -1], output.roll(shift, (3, 4))[..., dy + 1 : -1, dx + 1 : -1])
    assert not torch.allclose(shifted, output)


@borders
def test_flipping_image_and_embeddings_flips_the_output(border, attend):
    """An odd window is symmetric: mirrored columns, and their embeddings, mirror the output."""
    tensors, kernel = images(), embeddings((3, 5), border=border)
    output = attend(*tensors, (3, 5), border=border, **kernel)
    kernel["col_embedding"] = kernel["col_embedding"].flip(2)
    close(attend, attend(*(x.flip(4) for x in tensors), (3, 5), border=border, **kernel), output.flip(4))


@borders
@geometries
def test_transposing_the_image_swaps_rows_and_columns(geometry, border, attend):
    tensors, kernel = images(), embeddings(geometry["kernel_size"], border=border)
    swapped = {name: pair(x)[::-1] for name, x in geometry.items()}
    transposed = attend(
        *(x.mT for x in tensors),
        border=border,
        row_embedding=kernel["col_embedding"],
        col_embedding=kernel["row_embedding"],
        **swapped,
    )
    close(attend, transposed.mT, attend(*tensors, border=border, **geometry, **kernel))


@borders
def test_heads_and_images_are_independent(border, attend):
    """Permuted heads and images give the permuted output; one alone gives its own part."""
    heads, batch = [2, 0, 1], [1, 0]
    tensors, kernel = images(heads=3), embeddings(3, heads=3, border=border)
    output = attend(*tensors, 3, border=border, **kernel)
    permuted = {name: x[heads] for name, x in kernel.items()}
    close(attend, attend(*(x[batch][:, heads] for x in tensors), 3, border=border, **permuted), output[batch][:, heads])
    alone = {name: x[1:2] for name, x in kernel.items()}
    close(attend, attend(*(x[1:, 1:2] for x in tensors), 3, border=border, **alone), output[1:, 1:2])


@pytest.mark.parametrize("kernel_size", [3, 4, (1, 2)], ids=str)
@pytest.mark.parametrize("dilation", [1, 2])
def test_valid_is_the_interior_and_mask_differs_at_the_border_only(kernel_size, dilation, attend):
    tensors, kernel = images(size=(9, 10)), embeddings(kernel_size)
    options = {"dilation": dilation, **kernel}
    zero, mask, valid = (
        attend(*tensors, kernel_size, border=border, **options) for border in ("zero", "mask", "valid")
    )
    before = [(k - 1) // 2 * dilation for k in pair(kernel_size)]
    inside = torch.zeros(zero.shape[3:], dtype=torch.bool)
    inside[before[0] : before[0] + valid.shape[3], before[1] : before[1] + valid.shape[4]] = True
    close(attend, zero[..., inside], valid.flatten(3))
    close(attend, mask[..., inside], valid.flatten(3))
    differs = (zero - mask).abs().amax((0, 1, 2)) > 1e-4
    assert torch.equal(differs, ~inside)


@borders
@pytest.mark.parametrize("kernel_size", [3, 4, (2, 5)], ids=str)
@pytest.mark.parametrize("stride", [2, 3, (1, 4)], ids=str)
def test_stride_takes_a_subset_of_the_windows(stride, kernel_size, border, attend):
    tensors, kernel = images(size=(8, 9)), embeddings(kernel_size, border=border)
    sh, sw = pair(stride)
    every = attend(*tensors, kernel_size, border=border, **kernel)
    close(attend, attend(*tensors, kernel_size, border=border, stride=stride, **kernel), every[..., ::sh, ::sw])


@pytest.mark.parametrize("border", ["zero", "mask"])
def test_dilation_attends_within_each_residue(border, attend):
    """Dilation 2 is dilation 1 on each of the four images that every second row and column make."""
    tensors, kernel = images(size=(7, 8)), embeddings(3)
    output = attend(*tensors, 3, border=border, dilation=2, **kernel)
    for y, x in ((0, 0), (0, 1), (1, 0), (1, 1)):
        part = attend(*(t[..., y::2, x::2] for t in tensors), 3, border=border, **kernel)
        close(attend, output[..., y::2, x::2], part)


@borders
def test_same_embedding_at_every_tap_changes_nothing(border, attend):
    """It adds the same to all logits of a window, outside taps included."""
    query, key, value = images()
    constant = normal(2, 3, 1).expand(2, 3, 9 if border == "shift" else 5)
    output = attend(query, key, value, 5, border=border)
    close(attend, attend(query, key, value, 5, border=border, row_embedding=constant), output)
    close(attend, attend(query, key, value, 5, border=border, col_embedding=constant), output)


@pytest.mark.parametrize("border", ["mask", "valid"])
def test_same_embedding_at_every_tap_adds_to_the_keys(border):
    """Seen in the log-sum-exp: the row embedding of a window one high is a constant added to all keys."""
    query, key, value = images()
    row = normal(2, 3, 1)
    options = [(1, 3), (1, 1), (1, 1), border, 0.5, None]
    _, embedded = torch.ops.sasa.local_attention(query, key, value, row, None, None, *options)
    _, added = torch.ops.sasa.local_attention(query, key + row[:, :, :, None], value, None, None, None, *options)
    torch.testing.assert_close(embedded, added)


@borders
def test_row_and_column_embeddings_trade_constants(border, attend):
    """A constant added to every row embedding may be taken from every column embedding."""
    tensors, kernel, constant = images(), embeddings((3, 4), border=border), normal(2, 3, 1)
    output = attend(*tensors, (3, 4), border=border, **kernel)
    traded = {"row_embedding": kernel["row_embedding"] + constant, "col_embedding": kernel["col_embedding"] - constant}
    close(attend, attend(*tensors, (3, 4), border=border, **traded), output)


@borders
def test_zero_embeddings_are_no_embeddings(border, attend):
    tensors = images()
    zeros = {name: torch.zeros_like(x) for name, x in embeddings(3, border=border).items()}
    close(attend, attend(*tensors, 3, border=border, **zeros), attend(*tensors, 3, border=border))


@borders
def test_scale_multiplies_the_query(border, attend):
    query, key, value = images()
    kernel = embeddings(3, border=border)
    scaled = attend(query, key, value, 3, border=border, scale=0.3, **kernel)
    close(attend, scaled, attend(0.3 * query, key, value, 3, border=border, **kernel))


@borders
def test_output_is_linear_in_the_values(border, attend):
    query, key, value, other = images(4)
    outputs = [attend(query, key, v, 3, border=border) for v in (value, other, 2 * value - other)]
    close(attend, outputs[2], 2 * outputs[0] - outputs[1])


def position_bias(query: Tensor, row: Tensor, col: Tensor, scale: float) -> Tensor:
    """scale · q·(row + col) between all pairs of pixels of the image: (B, N, H·W, H·W); windows 2H - 1 by 2W - 1."""
    H, W = query.shape[3:]
    dy = torch.arange(H)[None, :] - torch.arange(H)[:, None] + H - 1  # [of the query, of the key]
    dx = torch.arange(W)[None, :] - torch.arange(W)[:, None] + W - 1
    by_row = torch.einsum("bndyx,ndyY->bnyxY", query, row[:, :, dy])
    by_col = torch.einsum("bndyx,ndxX->bnyxX", query, col[:, :, dx])
    return scale * (by_row[..., :, None] + by_col[..., None, :]).flatten(4, 5).flatten(2, 3)


@pytest.mark.parametrize("border", ["mask", "zero"])
@pytest.mark.parametrize("size", [(3, 4), (4, 2)], ids=str)
def test_window_over_the_whole_image_is_global_attention(size, border, attend):
    """PyTorch's own attention over all pixels, with the position term as its bias.

    For ``"zero"`` the pixels outside add keys of zero, without embeddings here: logits of 0 with values of 0.
    """
    H, W = size
    query, key, value = images(size=size)
    kernel_size, scale = (2 * H - 1, 2 * W - 1), 0.7
    kernel = embeddings(kernel_size) if border == "mask" else {}
    output = attend(query, key, value, kernel_size, border=border, scale=scale, **kernel)
    pixels = [x.flatten(3).mT for x in (query, key, value)]
    bias = position_bias(query, *kernel.values(), scale) if kernel else None
    if border == "zero":
        outside = (2 * H - 1) * (2 * W - 1) - H * W
        pixels[1:] = (F.pad(x, (0, 0, 0, outside)) for x in pixels[1:])
    whole = F.scaled_dot_product_attention(*pixels, attn_mask=bias, scale=scale)
    close(attend, output, whole.mT.unflatten(3, size))


@pytest.mark.parametrize("size", [(28, 28), (14, 33)], ids=str)
@pytest.mark.parametrize("dilation", [1, 2])
def test_unfolded_windows(size, dilation, attend):
    """A larger image: windows copied out by unfold, attention by einsum."""
    query, key, value = images(heads=4, width=8, size=size)
    kernel = embeddings(5, heads=4, width=8)
    padding = 2 * dilation
    keys, values = (
        F.unfold(x.flatten(1, 2), 5, dilation, padding).unflatten(2, size).unflatten(1, (4, 8, 5, 5))
        for x in (key, value)
    )
    keys = keys + (kernel["row_embedding"][..., :, None] + kernel["col_embedding"][..., None, :])[..., None, None]
    logits = torch.einsum("bndhw,bndyxhw->bnyxhw", query, keys) * 0.4
    weights = logits.flatten(2, 3).softmax(2).unflatten(2, (5, 5))
    expected = torch.einsum("bnyxhw,bndyxhw->bndhw", weights, values)
    close(attend, attend(query, key, value, 5, dilation=dilation, scale=0.4, **kernel), expected)
