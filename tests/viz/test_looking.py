"""What layers see: queries, keys and positions whose parts add up to the layers' own weights; roll-out; effects."""

import pytest
import torch
from torch import nn

import sasa
from sasa.models import create_model
from sasa.viz import look, roll_out
from sasa.viz.effects import cover, has_position, predict
from sasa.viz.looking import entropy
from sasa.viz.rollout import spread

OPTIONS = [
    {},
    {"position": "none", "bias": False},
    {"position": "absolute"},
    {"position": "only"},
    {"position": "bias", "border": "mask"},
    {"position_split": "across_heads", "border": "mask", "scale": 0.5},
    {"position_split": "last_head", "dilation": 2},
    {"kernel_size": (4, 3), "stride": (2, 1), "border": "valid", "pool": 2},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_parts_add_up_to_the_layers_own_weights(options):
    layer = sasa.RelativeSelfAttention(3, 8, **({"kernel_size": 5, "num_heads": 2} | options))
    (seen,), output = look(nn.Sequential(layer), x := torch.randn(3, 9, 8))
    weights = layer.attention_weights(x[None])[0].detach()
    torch.testing.assert_close(seen.weights(), weights)
    torch.testing.assert_close((seen.content() + seen.position()).softmax(1), weights)
    torch.testing.assert_close(output, layer(x[None]))


@pytest.mark.parametrize("options", [{"padding": 1}, {"padding": 2, "padding_mode": "reflect"}, {"stride": 2}], ids=str)
def test_attention_that_starts_as_a_convolution_is_seen(options):
    conv = nn.Conv2d(3, 4, 3, **options)
    layer = sasa.AttentionConv2d(conv)
    nn.init.normal_(layer.key.weight)
    nn.init.normal_(layer.query.weight)
    (seen,), output = look(layer, x := torch.randn(3, 9, 8))
    weights, padding = seen.weights(), options.get("padding", 0)
    padded = nn.functional.pad(x[None], (padding,) * 4, mode=options.get("padding_mode", "constant"))[0]
    assert seen.offset == ((0, 0) if options == {"padding": 1} else (padding, padding))
    y = torch.zeros_like(output[0])
    for head in range(9):
        for t in range(9):
            stride = options.get("stride", 1)
            rows, cols = (
                slice(i, i + (n - 1) * stride + 1, stride) for i, n in zip(divmod(t, 3), y.shape[1:], strict=True)
            )
            y += torch.einsum("oi,ihw->ohw", layer.weight[head, :, :, 0, 0], padded[:, rows, cols] * weights[head, t])
    torch.testing.assert_close(y + layer.bias[:, None, None], output[0], atol=1e-4, rtol=1e-4)


def test_looking_refuses_what_it_can_not_see():
    with pytest.raises(ValueError, match=r"image: expected shape \(channels, height, width\), got \(1, 3, 8, 8\)"):
        look(nn.Sequential(sasa.RelativeSelfAttention(3, 4, 3, 2)), torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match="network: expected finite queries and keys, got NaN or infinity in layer 0"):
        look(nn.Sequential(sasa.RelativeSelfAttention(3, 4, 3, 2)), torch.full((3, 8, 8), torch.nan))
    with pytest.raises(ValueError, match="network: expected at least one RelativeSelfAttention layer, found none"):
        look(nn.Conv2d(3, 4, 3), torch.zeros(3, 8, 8))


def test_entropy_is_in_bits():
    weights = torch.tensor([[1.0, 0, 0, 0], [0.25, 0.25, 0.25, 0.25]])
    assert entropy(weights, 1).tolist() == [0, 2]


def test_roll_out_of_one_layer_is_half_its_weights_and_half_the_pixel():
    layer = sasa.RelativeSelfAttention(3, 8, 3, 2)
    seen, _ = look(nn.Sequential(layer), torch.randn(3, 6, 7))
    share = roll_out(seen, (3, 4), (6, 7))
    expected = torch.zeros(6, 7)
    expected[2:5, 3:6] = seen[0].weights()[:, :, 3, 4].mean(0).view(3, 3) / 2
    expected[3, 4] += 0.5
    torch.testing.assert_close(share, expected)
    corner = roll_out(seen, (0, 0), (6, 7)).sum()
    inside = seen[0].weights()[:, [4, 5, 7, 8], 0, 0].mean(0).sum() / 2 + 0.5
    torch.testing.assert_close(corner, inside)
    with pytest.raises(ValueError, match=r"query: expected \(row, column\) inside the 6x7 queries, got \(6, 0\)"):
        roll_out(seen, (6, 0), (6, 7))


def test_roll_out_through_a_network_sees_ever_more():
    torch.manual_seed(0)
    seen, _ = look(create_model("sasa_resnet14", in_chans=1), torch.randn(1, 27, 28))
    wide = [
        (roll_out(seen[: n + 1], tuple(n // 2 for n in one.weights().shape[2:]), (27, 28)) > 0).sum()
        for n, one in enumerate(seen)
    ]
    assert wide == sorted(wide) and wide[0] == 9


@pytest.mark.parametrize(("before", "after"), [((7, 7), (28, 27)), ((28, 27), (7, 7)), ((3, 3), (3, 3))])
def test_spreading_keeps_the_sum(before, after):
    share = torch.rand(before)
    assert spread(share, after).shape == after
    torch.testing.assert_close(spread(share, after).sum(), share.sum())


def test_changed_predictions_are_those_of_a_changed_network():
    network, image = create_model("sasa_resnet14", in_chans=1).train(), torch.randn(1, 28, 28)
    plain = predict(network, image)
    assert network.training
    changed = predict(network, image, position=False, temperature=2)
    for layer in network.modules():
        if isinstance(layer, sasa.RelativeSelfAttention):
            layer.scale /= 2
            nn.init.zeros_(layer.row_embedding)
            nn.init.zeros_(layer.col_embedding)
    torch.testing.assert_close(predict(network, image), changed)
    assert not torch.allclose(plain, changed)
    assert predict(nn.Sequential(sasa.RelativeSelfAttention(1, 4, 3, 2)), image) is None
    for temperature in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="temperature: expected a positive number, got"):
            predict(network, image, temperature=temperature)


def test_changed_predictions_change_tables_too():
    layer = sasa.RelativeSelfAttention(1, 4, 3, 2, position="bias")
    network = nn.Sequential(layer, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    image = torch.randn(1, 6, 5)
    assert has_position(network)
    warm, off = predict(network, image, temperature=2), predict(network, image, position=False)
    with torch.no_grad():
        layer.scale /= 2
        layer.position_bias /= 2
        torch.testing.assert_close(predict(network, image), warm)
        layer.scale *= 2
        nn.init.zeros_(layer.position_bias)
    torch.testing.assert_close(predict(network, image), off)


def test_cover_fills_a_rectangle_and_leaves_the_image():
    image = torch.randn(2, 5, 6)
    covered = cover(image, 1, -3, 3, 2)
    torch.testing.assert_close(covered[:, 1:3, :2], image.mean((1, 2))[:, None, None].expand(2, 2, 2))
    covered[:, 1:3, :2] = image[:, 1:3, :2]
    torch.testing.assert_close(covered, image)
