"""How attention starts: a tap for each head, the spread of a deep chain, and something to learn for every parameter."""

import pytest
import torch
from torch import nn

import sasa
from sasa import RelativeSelfAttention
from sasa.nn.start import own_taps

SEEDS = [pytest.param(seed, id=f"seed{seed}") for seed in range(3)]


def at_the_start(layer, size=15):
    """Attention of the middle pixel, (heads, kh, kw), where no window is cut off."""
    x = torch.rand(1, layer.in_channels, size, size, dtype=layer.qkv.weight.dtype)
    weights = layer.attention_weights(x)[0]
    return weights[..., weights.shape[-2] // 2, weights.shape[-1] // 2].unflatten(1, layer.kernel_size)


def highest(attention):
    return [tuple(torch.unravel_index(head.argmax(), head.shape)) for head in attention]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("window", "heads", "options"),
    [
        (7, 8, {}),
        (7, 9, {}),
        (3, 16, {}),
        (5, 1, {}),
        (5, 4, {"scale": 0.25}),
        (5, 4, {"scale": -3.0}),
        (5, 4, {"dilation": 2}),
        (5, 4, {"border": "mask"}),
        (5, 4, {"border": "valid"}),
        (5, 4, {"pool": 2}),
        (5, 4, {"position": "only"}),
        (4, 8, {}),
        (2, 4, {}),
        ((1, 7), 4, {}),
        ((7, 1), 4, {}),
        ((5, 3), 8, {}),
        (1, 4, {}),
        (5, 4, {"dtype": torch.float64}),
    ],
)
def test_each_head_starts_at_a_tap_of_its_own(seed, window, heads, options):
    torch.manual_seed(seed)
    layer = RelativeSelfAttention(16, 8 * heads, window, heads, **options)
    taps = own_taps(heads, layer.kernel_size, layer.position_split)
    assert highest(at_the_start(layer)) == taps
    height, width = layer.kernel_size
    assert len(set(taps)) == min(heads, min(height, 3) * min(width, 3))
    centre = torch.tensor(layer.kernel_size).sub(1) // 2
    assert (torch.tensor(taps) - centre).abs().max() <= 1


@pytest.mark.parametrize("strength", [0.0, 0.5, 3.0])
def test_the_strength_is_how_much_less_a_head_looks_at_the_next_tap(strength):
    torch.manual_seed(0)
    layer = RelativeSelfAttention(16, 64, 5, 8, dtype=torch.float64)
    layer.reset_parameters(strength)
    nn.init.zeros_(layer.qkv.weight[: 2 * 64].detach())
    attention = at_the_start(layer).log()
    for head, (row, col) in zip(attention, own_taps(8, (5, 5), "per_head"), strict=True):
        distance = ((torch.arange(5) - row).abs()[:, None] + (torch.arange(5) - col).abs()).double()
        torch.testing.assert_close(head, head[row, col] - strength * distance, rtol=1e-5, atol=1e-5)


def test_a_strength_is_a_finite_number():
    layer = RelativeSelfAttention(4, 8, 3, 2)
    for wrong in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="strength: expected a finite number"):
            layer.reset_parameters(wrong)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("window", [3, 7, 15])
def test_the_share_of_the_own_tap_does_not_depend_on_the_window(seed, window):
    torch.manual_seed(seed)
    layer = RelativeSelfAttention(16, 64, window, 8)
    nn.init.zeros_(layer.qkv.weight[: 2 * 64].detach())
    share = at_the_start(layer, 21).flatten(1).amax(1)
    assert 0.84**2 < share.min() <= share.max() < 0.93**2


@pytest.mark.parametrize("seed", SEEDS)
def test_heads_split_across_rows_and_columns_start_at_a_row_or_a_column(seed):
    torch.manual_seed(seed)
    attention = at_the_start(RelativeSelfAttention(16, 64, 5, 8, position_split="across_heads"))
    taps = own_taps(8, (5, 5), "across_heads")
    assert attention[:4].sum(2).argmax(1).tolist() == [row for row, _ in taps[:4]]
    assert attention[4:].sum(1).argmax(1).tolist() == [col for _, col in taps[4:]]
    assert len(set(taps)) == 8


@pytest.mark.parametrize("seed", SEEDS)
def test_heads_of_one_channel_start_at_a_column(seed):
    torch.manual_seed(seed)
    attention = at_the_start(RelativeSelfAttention(16, 8, 5, 8))
    assert attention.sum(1).argmax(1).tolist() == [col for _, col in own_taps(8, (5, 5), "per_head")]


def he_chain(width):
    layers = []
    for _ in range(16):
        layers += [nn.Conv2d(width, width, 3, padding=1), nn.ReLU()]
        nn.init.kaiming_normal_(layers[-2].weight, nonlinearity="relu")
        nn.init.zeros_(layers[-2].bias)
    return nn.Sequential(*layers)


@pytest.mark.parametrize("seed", SEEDS)
def test_sixteen_layers_keep_the_spread_of_convolutions(seed):
    torch.manual_seed(seed)
    chain = he_chain(32)
    x = torch.randn(2, 32, 32, 32)
    with torch.no_grad():
        ratio = sasa.convert(chain, where=lambda *_: True)(x).std() / chain(x).std()
    assert 1 / 3 < ratio < 3, f"seed {seed}"


@pytest.mark.parametrize("position_split", ["per_head", "across_heads", "last_head"])
@pytest.mark.parametrize("position", ["relative", "absolute", "none", "only"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("channels", "heads", "window", "options"),
    [
        (12, 3, 5, {}),
        (4, 4, 3, {}),
        (8, 2, (1, 5), {}),
        (8, 2, (5, 2), {"stride": 2, "dilation": 2}),
        (8, 2, 3, {"scale": 0.5, "border": "mask", "pool": 2}),
    ],
)
def test_every_parameter_has_a_gradient_at_the_start(position_split, position, bias, channels, heads, window, options):
    torch.manual_seed(0)
    layer = RelativeSelfAttention(
        6, channels, window, heads, position_split=position_split, position=position, bias=bias, **options
    )
    y = layer(torch.randn(2, 6, 9, 9))
    (y * torch.randn_like(y)).sum().backward()
    for name, p in layer.named_parameters():
        if p.numel() == 0 or (position_split == "last_head" and name == "row_embedding"):
            continue  # the last head has no rows, and every head is given its r
        assert p.grad.isfinite().all(), name
        assert p.grad.abs().sum() > 0, name


def test_taps_come_in_pairs_of_opposites():
    for heads in range(1, 10):
        taps = torch.tensor(own_taps(heads, (7, 7), "per_head")).float()
        assert taps.mean(0).tolist() == [3, 3], heads


def test_a_conversion_gives_attention_the_bias_that_says_where_to_start():
    chain = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8))
    assert sasa.convert(chain, where=lambda *_: True)[0].qkv.bias is not None
    assert sasa.convert(chain, where=lambda *_: True, bias=False)[0].qkv.bias is None
