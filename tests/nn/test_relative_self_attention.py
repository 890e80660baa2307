"""The layer: shapes, parameters, options, formats, its place in PyTorch, and its errors."""

import copy

import pytest
import torch
from torch import nn

import sasa
from sasa import RelativeSelfAttention
from sasa.nn.position import POSITION_SPLITS, POSITIONS, sinusoidal_encoding
from sasa.ops.operators import split_heads


def naive_layer(layer, x):
    """The layer from its equation, with r put together channel by channel as the paper says."""
    channels, heads, (kh, kw) = layer.out_channels, layer.num_heads, layer.kernel_size
    r = torch.zeros(channels, kh, kw, dtype=x.dtype)
    width = channels // heads
    row, col = iter(layer.row_embedding), iter(layer.col_embedding)
    for channel in range(channels):
        per_head = layer.position_split == "per_head"
        is_row = channel % width < width // 2 if per_head else channel < channels // 2
        r[channel] += next(row)[:, None] if is_row else next(col)[None, :]
    if layer.position_split == "last_head":
        r = r[-width:].repeat(heads, 1, 1)
    parts = 2 if layer.position == "only" else 3
    q, *k, v = (
        torch.einsum("oi,bihw->bohw", weight, x) + bias[:, None, None]
        for weight, bias in zip(layer.qkv.weight[..., 0, 0].chunk(parts), layer.qkv.bias.chunk(parts), strict=True)
    )
    k = k[0] if k else torch.zeros_like(q)
    y = torch.zeros_like(q)
    batch, _, height, wide = x.shape
    for b, i, j, n in torch.cartesian_prod(*map(torch.arange, (batch, height, wide, heads))).tolist():
        part = slice(n * width, (n + 1) * width)
        logits, values = [], []
        for dy in range(kh):
            for dx in range(kw):
                a, c = i + dy - (kh - 1) // 2, j + dx - (kw - 1) // 2
                inside = 0 <= a < height and 0 <= c < wide
                key = k[b, part, a, c] if inside else torch.zeros(width, dtype=x.dtype)
                values.append(v[b, part, a, c] if inside else torch.zeros(width, dtype=x.dtype))
                logits.append(q[b, part, i, j] @ (key + r[part, dy, dx]))
        y[b, part, i, j] = torch.stack(logits).softmax(0) @ torch.stack(values)
    return y


@pytest.mark.parametrize("position_split", POSITION_SPLITS)
@pytest.mark.parametrize(("channels", "heads"), [(8, 2), (6, 2), (5, 1), (9, 3)])
def test_layer_is_the_papers_equation(position_split, channels, heads):
    layer = RelativeSelfAttention(4, channels, (3, 2), heads, position_split=position_split).double()
    nn.init.normal_(layer.qkv.bias)
    x = torch.randn(2, 4, 4, 5, dtype=torch.float64)
    torch.testing.assert_close(layer(x), naive_layer(layer, x))


@pytest.mark.parametrize("position_split", POSITION_SPLITS)
@pytest.mark.parametrize("asked", [None, "cpu", "eager", "reference"])
def test_position_only_is_the_equation_without_keys(position_split, asked):
    options = {"position": "only", "position_split": position_split, "implementation": asked}
    layer = RelativeSelfAttention(4, 8, (3, 2), 2, **options).double()
    assert layer.qkv.weight.shape == (16, 4, 1, 1)
    x = torch.randn(2, 4, 4, 5, dtype=torch.float64, requires_grad=True)
    inputs = x, *layer.parameters()
    y, expected = layer(x), naive_layer(layer, x)
    torch.testing.assert_close(y, expected)
    direction = torch.randn_like(y)
    torch.testing.assert_close(
        torch.autograd.grad(y, inputs, direction), torch.autograd.grad(expected, inputs, direction)
    )


def test_parameters_of_the_notebooks_layer():
    layer = RelativeSelfAttention(64, 128, 7, 8)
    assert sum(p.numel() for p in layer.parameters()) == 24_960 + 896 == 25_856
    assert set(layer.state_dict()) == {"qkv.weight", "qkv.bias", "row_embedding", "col_embedding"}


@pytest.mark.parametrize("position_split", POSITION_SPLITS)
@pytest.mark.parametrize(("channels", "heads"), [(8, 2), (6, 2), (14, 7), (5, 1)])
def test_parameter_count_is_the_papers_whatever_the_split(position_split, channels, heads):
    layer = RelativeSelfAttention(3, channels, 5, heads, position_split=position_split, bias=False)
    assert sum(p.numel() for p in layer.parameters()) == 3 * 3 * channels + 5 * channels


def test_parameters_do_not_grow_with_the_window_without_relative_position():
    counts = {
        sum(p.numel() for p in RelativeSelfAttention(8, 8, k, 2, position=position).parameters())
        for k in (1, 7)
        for position in ("absolute", "none")
    }
    assert counts == {3 * 8 * 8 + 3 * 8}


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("border", ["zero", "mask", "valid"])
@pytest.mark.parametrize("stride", [1, 2, (2, 1)])
def test_shapes_and_gradients(position, border, stride):
    layer = RelativeSelfAttention(6, 8, (3, 5), 4, stride, position=position, border=border)
    x = torch.randn(2, 6, 9, 8, requires_grad=True)
    y = layer(x)
    pair = (stride, stride) if isinstance(stride, int) else stride
    full = (7, 4) if border == "valid" else (9, 8)
    assert y.shape == (2, 8, *((n - 1) // s + 1 for n, s in zip(full, pair, strict=True)))
    y.square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    assert x.grad.abs().sum() > 0


def test_relative_position_sees_where_neighbours_are_and_none_does_not():
    x = torch.randn(1, 4, 5, 5)
    flipped = x.flip(3)
    for position, equal in (("none", True), ("relative", False), ("absolute", False)):
        layer = RelativeSelfAttention(4, 8, 3, 2, position=position)
        same = torch.allclose(layer(flipped), layer(x).flip(3), atol=1e-5)
        assert same is equal, position


def test_absolute_position_is_not_shift_equivariant_and_relative_is():
    x = torch.randn(1, 4, 9, 9)
    shifted = x.roll(1, 3)
    for position, equal in (("relative", True), ("absolute", False)):
        layer = RelativeSelfAttention(4, 8, 3, 2, position=position)
        same = torch.allclose(layer(shifted)[..., 2:-2], layer(x).roll(1, 3)[..., 2:-2], atol=1e-5)
        assert same is equal, position


@pytest.mark.parametrize("position", POSITIONS)
def test_attention_weights_are_those_of_the_forward(position):
    layer = RelativeSelfAttention(4, 8, 3, 2, border="mask", position=position).double()
    x = torch.randn(2, 4, 5, 6, dtype=torch.float64)
    weights = layer.attention_weights(x)
    assert weights.shape == (2, 2, 9, 5, 6)
    seen = x + sinusoidal_encoding(x) if position == "absolute" else x
    _, _, value = split_heads(layer.projected(seen), layer.num_heads)
    columns = nn.functional.unfold(value.flatten(1, 2), 3, padding=1).view(2, 2, 4, 9, 5, 6)
    torch.testing.assert_close((weights[:, :, None] * columns).sum(3).flatten(1, 2), layer(x))


@pytest.mark.parametrize("options", [{}, {"pool": 2}, {"recompute": True}, {"position": "absolute"}], ids=str)
def test_an_image_without_a_batch(options):
    layer = RelativeSelfAttention(4, 8, 3, 2, **options)
    x = torch.randn(1, 4, 5, 6)
    assert torch.equal(layer(x[0]), layer(x)[0])
    assert torch.equal(layer.attention_weights(x[0]), layer.attention_weights(x)[0])


def test_channels_last_in_channels_last_out():
    layer = RelativeSelfAttention(4, 8, 3, 2)
    x = torch.randn(2, 4, 6, 5)
    y = layer(x.contiguous(memory_format=torch.channels_last))
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, layer(x))


def test_projections_are_views_of_one_product():
    layer = RelativeSelfAttention(4, 8, 3, 2)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        qkv = layer.qkv(torch.randn(2, 4, 6, 5).contiguous(memory_format=memory_format))
        q, k, v = split_heads(qkv, layer.num_heads)
        assert (
            qkv.untyped_storage().data_ptr()
            == q.untyped_storage().data_ptr()
            == k.untyped_storage().data_ptr()
            == v.untyped_storage().data_ptr()
        )


def test_without_a_bias_both_terms_of_the_logits_start_with_variance_one_and_the_values_with_two():
    x = torch.randn(4, 64, 16, 16)
    for scale in (1.0, 0.25):
        layer = RelativeSelfAttention(64, 1024, 3, 64, scale=scale, bias=False)
        q, k, v = split_heads(layer.qkv(x), layer.num_heads)
        r = torch.cat([half.unflatten(0, (layer.num_heads, -1))[..., 0] for half in layer._embeddings()], 1)
        for product in ((scale * q * k).sum(2), (scale * q * r[..., None, None]).sum(2), v / 2**0.5):
            assert 0.75 < product.square().mean().item() < 1.25


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(dtype):
    layer = RelativeSelfAttention(4, 8, 3, 2, dtype=dtype)
    x = torch.randn(1, 4, 5, 5, dtype=dtype)
    assert layer(x).dtype == dtype
    exact = copy.deepcopy(layer).double()(x.double())
    torch.testing.assert_close(layer(x).double(), exact, rtol=0, atol=16 * torch.finfo(dtype).eps)


def test_autocast_computes_in_its_dtype_and_keeps_float32_gradients():
    layer = RelativeSelfAttention(4, 8, 3, 2)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(torch.randn(1, 4, 5, 5))
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in layer.parameters())


def test_meta_device_needs_no_memory():
    layer = RelativeSelfAttention(64, 128, 7, 8, device="meta")
    assert layer(torch.empty(1000, 64, 1000, 1000, device="meta")).shape == (1000, 128, 1000, 1000)


def test_empty_batch():
    layer = RelativeSelfAttention(4, 8, 3, 2)
    y = layer(torch.randn(0, 4, 5, 5))
    assert y.shape == (0, 8, 5, 5)
    y.sum().backward()
    assert layer.row_embedding.grad.abs().sum() == 0


def test_copies_and_state_dict_round_trip():
    layer = RelativeSelfAttention(4, 8, 3, 2)
    x = torch.randn(1, 4, 5, 5)
    other = RelativeSelfAttention(4, 8, 3, 2)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(layer(x), other(x))
    assert torch.equal(layer(x), copy.deepcopy(layer)(x))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, "RelativeSelfAttention(64, 128, kernel_size=(7, 7), num_heads=8, stride=(1, 1))"),
        (
            {"stride": 2, "dilation": (1, 2), "border": "mask", "bias": False, "scale": 0.5},
            "RelativeSelfAttention(64, 128, kernel_size=(7, 7), num_heads=8, stride=(2, 2), dilation=(1, 2), "
            "border='mask', scale=0.5, bias=False)",
        ),
        (
            {"position": "none", "position_split": "across_heads", "implementation": "reference"},
            "RelativeSelfAttention(64, 128, kernel_size=(7, 7), num_heads=8, stride=(1, 1), position='none', "
            "position_split='across_heads', implementation='reference')",
        ),
    ],
)
def test_repr_reads_like_a_convolutions(options, expected):
    layer = RelativeSelfAttention(64, 128, 7, 8, **options)
    assert repr(layer) == expected
    assert repr(eval(repr(layer), {"RelativeSelfAttention": RelativeSelfAttention})) == expected


def test_summary_prints_a_table_and_counts_the_embeddings(capsys):
    statistics = RelativeSelfAttention(64, 128, 7, 8).summary(torch.randn(2, 64, 8, 8))
    printed = capsys.readouterr().out
    assert "25,856" in printed and "[2, 128, 8, 8]" in printed
    assert statistics.total_params == 25_856


def test_full_graph_compile():
    layer = RelativeSelfAttention(4, 8, 3, 2)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 4, 5, 6)
    torch.testing.assert_close(compiled(x), layer(x))


def test_export_runs_for_other_sizes():
    layer = RelativeSelfAttention(4, 8, 3, 2).eval()
    size = {2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO}
    program = torch.export.export(layer, (torch.randn(2, 4, 8, 9),), dynamic_shapes=(size,))
    x = torch.randn(2, 4, 13, 7)
    torch.testing.assert_close(program.module()(x), layer(x))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"out_channels": 9}, ValueError, r"out_channels: expected a multiple of num_heads = 2, got 9"),
        ({"in_channels": 0}, ValueError, r"in_channels: expected at least 1, got 0"),
        ({"num_heads": 0}, ValueError, r"num_heads: expected at least 1, got 0"),
        ({"num_heads": 2.0}, TypeError, r"num_heads: expected an int of at least 1, got 2.0"),
        ({"kernel_size": 0}, ValueError, r"kernel_size: expected .* at least 1, got 0"),
        ({"kernel_size": (3, 3, 3)}, ValueError, r"kernel_size: expected .* pair .*, got \(3, 3, 3\)"),
        ({"kernel_size": "3"}, TypeError, r"kernel_size: expected an int or .*, got '3'"),
        ({"stride": 0}, ValueError, r"stride: expected .* at least 1, got 0"),
        ({"dilation": (1, -1)}, ValueError, r"dilation: expected .* at least 1, got \(1, -1\)"),
        ({"border": "same"}, ValueError, r"border: expected one of 'zero', 'mask', 'valid', 'shift', got 'same'"),
        ({"position": "learned"}, ValueError, r"position: expected one of 'relative', .*, got 'learned'"),
        ({"position_split": "half"}, ValueError, r"position_split: expected one of 'per_head', .*, got 'half'"),
        ({"implementation": "cudnn"}, ValueError, r"implementation: expected None or one of .*, got 'cudnn'"),
        ({"scale": float("nan")}, ValueError, r"scale: expected a finite number, got nan"),
        ({"scale": "1"}, TypeError, r"scale: expected a number, got str"),
    ],
)
def test_bad_arguments(arguments, error, message):
    good = {"in_channels": 4, "out_channels": 8, "kernel_size": 3, "num_heads": 2}
    with pytest.raises(error, match=message):
        RelativeSelfAttention(**(good | arguments))


@pytest.mark.parametrize("shape", [(5, 5), (3, 5, 5), (1, 3, 5, 5), (1, 4, 5, 5, 5)])
def test_bad_input_shape(shape):
    layer = RelativeSelfAttention(4, 8, 3, 2)
    with pytest.raises(ValueError, match=r"x: expected shape \(batch, in_channels=4, height, width\), got \("):
        layer(torch.randn(shape))


@pytest.mark.parametrize("dtype", [torch.int64, torch.float64, torch.bool])
def test_bad_input_dtype(dtype):
    layer = RelativeSelfAttention(4, 8, 3, 2)
    with pytest.raises(ValueError, match=rf"x: expected dtype torch.float32 as the parameters have, got {dtype}"):
        layer(torch.ones(1, 4, 5, 5, dtype=dtype))


def test_bad_input_device():
    layer = RelativeSelfAttention(4, 8, 3, 2, device="meta")
    with pytest.raises(ValueError, match=r"x: expected device meta as the parameters are on, got cpu"):
        layer(torch.ones(1, 4, 5, 5))


def test_valid_border_with_an_image_smaller_than_the_window():
    layer = RelativeSelfAttention(4, 8, 7, 2, border="valid")
    with pytest.raises(ValueError, match=r"at least 7x7 pixels.*got 5x6"):
        layer(torch.randn(1, 4, 5, 6))


def test_top_level_names():
    layers = {"RelativeSelfAttention", "AttentionConv2d", "AttentionStem"}
    conversion = {"convert", "conversion_report", "ConversionReport", "save_converted", "load_converted"}
    assert set(sasa.__all__) == layers | conversion | {"local_attention", "local_attention_weights"}
