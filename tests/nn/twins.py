"""A layer and its twin, which computes the same by hand: ``layer.qkv(x)``, then ``sasa.local_attention``.

Whatever a test does to a layer it does to the twin; both then have to give the same output and the same gradients.
"""

import pytest
import torch
import torch.nn.functional as F

import sasa


class ByHand(sasa.RelativeSelfAttention):
    """The layer step by step, with the options that the tests here use."""

    def forward(self, x):
        query, key, value = self.qkv(x).unflatten(1, (3 * self.num_heads, -1)).chunk(3, dim=1)
        row, col = (half.unflatten(0, (self.num_heads, -1)) for half in (self.row_embedding, self.col_embedding))
        y = sasa.local_attention(
            query,
            key,
            value,
            self.kernel_size,
            row_embedding=F.pad(row, (0, 0, 0, col.shape[1])),
            col_embedding=F.pad(col, (0, 0, row.shape[1], 0)),
        )
        return y.flatten(1, 2)


def twins(num_heads=8, recompute=None, **options):
    """A layer of 4 to 16 channels and its twin."""
    layer, hand = (
        of(4, 16, 3, num_heads, recompute=recompute, **options) for of in (sasa.RelativeSelfAttention, ByHand)
    )
    hand.load_state_dict(layer.state_dict())
    return layer, hand


def image():
    return torch.randn(2, 4, 4, 5, generator=torch.Generator().manual_seed(3))


def results(module, grad=True):
    """The output; with gradients, those of the input and of the trainable parameters too, by name."""
    x = image()
    if not grad:
        with torch.no_grad():
            return {"output": module(x)}
    leaves = {"x": x.requires_grad_()} | {name: p for name, p in module.named_parameters() if p.requires_grad}
    y = module(x)
    vector = torch.linspace(-1, 1, y.numel()).view_as(y)
    grads = torch.autograd.grad(y, list(leaves.values()), vector)
    return {"output": y.detach(), **dict(zip(leaves, grads, strict=True))}


def assert_equal(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def differ(one, other):
    return any(not torch.allclose(one[name], other[name], rtol=1e-2, atol=1e-2) for name in one)


every_way = pytest.mark.parametrize(
    ("num_heads", "recompute", "grad"),
    [
        *((8, None, True), (8, None, False), (8, True, True), (8, True, False), (8, False, True)),
        *((2, None, True), (2, None, False), (2, True, True), (2, False, False)),
    ],
)
