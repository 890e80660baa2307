"""Weights of other code, against it where it installs and else against loops written from its definition."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from timm.layers.bottleneck_attn import BottleneckAttn
from timm.layers.halo_attn import HaloAttn
from torch import Tensor, nn

import sasa


def neighbours(pixel: int, size: int, kernel: int, dilation: int) -> list[int]:
    """Neighborhood attention's definition for odd windows: the nearest pixels among those the dilation steps on."""
    phase = range(pixel % dilation, size, dilation)
    return sorted(sorted(phase, key=lambda other: abs(other - pixel))[:kernel])


def neighborhood_attention(x: Tensor, state: dict[str, Tensor], heads: int, kernel: int, dilation: int) -> Tensor:
    """NATTEN's module up to its last projection: (H, W, C) to (H, W, C)."""
    height, width, channels = x.shape
    query, key, value = F.linear(x, state["qkv.weight"], state["qkv.bias"]).view(height, width, 3, heads, -1).unbind(2)
    rpb = state.get("rpb", x.new_zeros(heads, 2 * kernel - 1, 2 * kernel - 1))
    rows = torch.zeros(height, width, heads, channels // heads, dtype=x.dtype)
    for i in range(height):
        for j in range(width):
            for n in range(heads):
                pixels = [
                    (y, x)
                    for y in neighbours(i, height, kernel, dilation)
                    for x in neighbours(j, width, kernel, dilation)
                ]
                bias = [rpb[n, (y - i) // dilation + kernel - 1, (x - j) // dilation + kernel - 1] for y, x in pixels]
                seen = torch.stack([key[y, x, n] for y, x in pixels])
                logits = seen @ (query[i, j, n] * (channels // heads) ** -0.5) + torch.stack(bias)
                rows[i, j, n] = logits.softmax(0) @ torch.stack([value[y, x, n] for y, x in pixels])
    return rows.flatten(2)


@pytest.mark.parametrize(("size", "dilation"), [((5, 7), 1), ((7, 8), 2), ((9, 9), 3)], ids=str)
@pytest.mark.parametrize("biased", [True, False], ids=["rpb", "no rpb"])
def test_natten(size, dilation, biased):
    heads, channels, kernel = 2, 6, 3
    state = {"qkv.weight": torch.randn(3 * channels, channels), "qkv.bias": torch.randn(3 * channels)}
    if biased:
        state["rpb"] = torch.randn(heads, 2 * kernel - 1, 2 * kernel - 1)
    state = {name: x.double() for name, x in state.items()}
    layer = sasa.RelativeSelfAttention(
        channels,
        channels,
        kernel,
        heads,
        dilation=dilation,
        border="shift",
        position="bias" if biased else "none",
        scale=(channels // heads) ** -0.5,
        dtype=torch.float64,
    )
    weights = {"qkv.weight": state["qkv.weight"][..., None, None], "qkv.bias": state["qkv.bias"]}
    layer.load_state_dict(weights | ({"position_bias": state["rpb"]} if biased else {}))
    x = torch.randn(*size, channels, dtype=torch.float64)
    expected = neighborhood_attention(x, state, heads, kernel, dilation).permute(2, 0, 1)
    torch.testing.assert_close(layer(x.permute(2, 0, 1)), expected)


def test_a_table_trains_and_starts_at_a_tap_of_each_head():
    """Also with its gradient, of the CPU kernels, which the equation has too."""
    layer = sasa.RelativeSelfAttention(8, 16, 3, 4, border="shift", position="bias")
    assert layer.position_bias is not None
    assert layer.position_bias.shape == (4, 5, 5)
    most = layer.attention_weights(torch.zeros(1, 8, 9, 9))[0, :, :, 4, 4].argmax(1)
    assert most.tolist() == [3, 5, 1, 7]  # left, right, above, below
    x = torch.randn(2, 8, 6, 7)
    layer(x).square().sum().backward()
    got = layer.position_bias.grad
    assert got is not None
    layer.position_bias.grad = None
    layer.implementation = "reference"
    layer(x).square().sum().backward()
    assert layer.position_bias.grad is not None
    torch.testing.assert_close(got, layer.position_bias.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"scale_pos_embed": True}, {"stride": 2, "dim_head": 5, "qkv_bias": True}])
def test_timm_bottleneck(options):
    module = BottleneckAttn(6, 8, feat_size=(4, 6), num_heads=2, **options).double()
    x = torch.randn(2, 6, 4, 6, dtype=torch.float64)
    query, key, value = (
        part.unflatten(1, (2, -1)) for part in module.qkv(x).split([module.dim_out_qk] * 2 + [module.dim_out_v], 1)
    )
    factor = 1 if module.scale_pos_embed else module.scale
    rows, cols = (
        (rel.mT / factor).expand(2, -1, -1) for rel in (module.pos_embed.height_rel, module.pos_embed.width_rel)
    )
    y = sasa.local_attention(
        query, key, value, (4, 6), row_embedding=rows, col_embedding=cols, border="shift", scale=module.scale
    )
    torch.testing.assert_close(module.pool(y.flatten(1, 2)), module(x))


def test_timm_halo():
    """Exact for the places of a block one by one; a window around each query is another function."""
    module = HaloAttn(6, 8, num_heads=2, block_size=2, halo_size=1).double()
    x = torch.randn(2, 6, 4, 6, dtype=torch.float64)
    query = module.q(x).unflatten(1, (2, -1))
    images = F.pad(module.kv(x), [1] * 4).unflatten(1, (2, -1))
    key, value = images.split((module.dim_head_qk, module.dim_head_v), 2)
    rows, cols = ((rel / module.scale).mT for rel in (module.pos_embed.height_rel, module.pos_embed.width_rel))
    y = torch.empty_like(value[..., 1:-1, 1:-1])
    for i in range(2):
        for j in range(2):
            place = F.pad(query, (1 - j, 1 + j, 1 - i, 1 + i))
            embeddings = (rel[:, 3 - at : 7 - at].expand(2, -1, -1) for rel, at in ((rows, i), (cols, j)))
            options = dict(zip(("row_embedding", "col_embedding"), embeddings, strict=True))
            options |= {"border": "valid", "stride": 2, "scale": module.scale}
            y[..., i::2, j::2] = sasa.local_attention(place, key, value, 4, **options)
    torch.testing.assert_close(y.flatten(1, 2), module(x))


class AttentionConv(nn.Module):
    """leaderj1001's function, from its definition: a softmax by channel, and the embeddings on the values."""

    def __init__(self, inputs: int, channels: int, kernel: int) -> None:
        super().__init__()
        self.kernel = kernel
        self.query_conv, self.key_conv, self.value_conv = (nn.Conv2d(inputs, channels, 1, bias=False) for _ in range(3))
        self.rel_h = nn.Parameter(torch.randn(channels // 2, 1, 1, kernel, 1))
        self.rel_w = nn.Parameter(torch.randn(channels // 2, 1, 1, 1, kernel))

    def forward(self, x: Tensor) -> Tensor:
        batch, _, height, width = x.shape
        unfold = nn.Unfold(self.kernel, padding=self.kernel // 2)
        keys, values = (
            unfold(conv(x)).view(batch, -1, self.kernel**2, height, width) for conv in (self.key_conv, self.value_conv)
        )
        rows = self.rel_h.view(-1, self.kernel, 1).expand(-1, -1, self.kernel)
        cols = self.rel_w.view(-1, 1, self.kernel).expand(-1, self.kernel, -1)
        values = values + torch.cat((rows, cols)).flatten(1)[:, :, None, None]
        return ((self.query_conv(x)[:, :, None] * keys).softmax(2) * values).sum(2)


def load_attention_conv(module: AttentionConv, layer: sasa.RelativeSelfAttention) -> None:
    convs = module.query_conv, module.key_conv, module.value_conv
    weights = {"qkv.weight": torch.cat([conv.weight for conv in convs])}
    if layer.position == "relative":
        weights |= {"row_embedding": module.rel_h.flatten(1), "col_embedding": module.rel_w.flatten(1)}
    layer.load_state_dict(weights)


def test_leaderj1001s_softmax_is_that_of_heads_of_one_channel():
    module = AttentionConv(5, 8, 3)
    nn.init.zeros_(module.rel_h)
    nn.init.zeros_(module.rel_w)
    layer = sasa.RelativeSelfAttention(5, 8, 3, num_heads=8, bias=False, position="none")
    load_attention_conv(module, layer)
    x = torch.randn(2, 5, 6, 7)
    torch.testing.assert_close(layer(x), module(x), rtol=1e-4, atol=1e-5)


def test_leaderj1001s_weights_give_the_papers_equation():
    """The embeddings on the keys, the first half of the heads by row and the second by column."""
    module = AttentionConv(5, 8, 3)
    layer = sasa.RelativeSelfAttention(5, 8, 3, num_heads=2, bias=False, position_split="across_heads")
    load_attention_conv(module, layer)
    x = torch.randn(2, 5, 6, 7)
    images = [conv(x).unflatten(1, (2, 4)) for conv in (module.query_conv, module.key_conv, module.value_conv)]
    rows, cols = module.rel_h.flatten(1), module.rel_w.flatten(1)
    none = torch.zeros_like(rows)
    embeddings = {"row_embedding": torch.stack((rows, none)), "col_embedding": torch.stack((none, cols))}
    expected = sasa.local_attention(*images, 3, **embeddings, implementation="reference").flatten(1, 2)
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)
    assert (layer(x) - module(x)).abs().max() > 0.01
