"""A layer that keeps only its input gives the numbers of one that keeps queries, keys and values."""

import pytest
import torch

import sasa
from sasa.ops import cpu


def layers(**options):
    """The same layer that keeps everything, that keeps its input, and that does what is faster."""
    made = [sasa.RelativeSelfAttention(12, 32, 5, 8, recompute=r, **options) for r in (False, True, None)]
    for layer in made[1:]:
        layer.load_state_dict(made[0].state_dict())
    return made


@pytest.mark.parametrize(
    "options",
    [{}, {"stride": 2}, {"border": "valid"}, {"position": "absolute"}, {"position": "none", "bias": False}],
    ids=str,
)
def test_same_numbers(options):
    x = torch.randn(2, 12, 9, 10, dtype=torch.float64, requires_grad=True)
    results = []
    for layer in layers(dtype=torch.float64, **options):
        y = layer(x)
        vector = torch.ones_like(y).cumsum(-1)
        with torch.no_grad():
            torch.testing.assert_close(layer(x), y)
        results.append([y, *torch.autograd.grad(y, [x, *layer.parameters()], vector)])
    for other in results[1:]:
        torch.testing.assert_close(other, results[0])


def saved_elements(layer, x):
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(x)
    memory = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() // t.element_size() for t in saved}
    return sum(memory.values())


def test_only_the_input_is_kept():
    keeps, recomputes, _ = layers()
    x = torch.randn(2, 12, 40, 40, requires_grad=True)
    parameters, lse = sum(p.numel() for p in keeps.parameters()), 2 * 8 * 40 * 40
    embeddings = 2 * 8 * 4 * 5  # as every head sees them
    assert saved_elements(recomputes, x) <= x.numel() + lse + parameters + embeddings
    qkv = 3 * 2 * 32 * 40 * 40  # but not the output, which may be changed in place
    assert 0 <= saved_elements(keeps, x) - (x.numel() + qkv + lse) <= parameters + embeddings


def test_without_a_choice_the_faster_is_taken():
    keeps, _, either = layers()
    x = torch.randn(2, 12, 20, 20, requires_grad=True)
    if cpu.why_missing() is None:
        assert saved_elements(either, x) < saved_elements(keeps, x) / 3
    either.implementation = "eager"
    assert saved_elements(either, x) == saved_elements(keeps, x)


@pytest.mark.parametrize("recompute", [None, True])
def test_hooks_and_replacements_of_the_projection_are_honoured(recompute):
    layer = sasa.RelativeSelfAttention(6, 16, 3, 8, recompute=recompute)
    x = torch.randn(1, 6, 5, 5)
    seen = []
    handle = layer.qkv.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    plain = layer(x)
    handle.remove()
    assert seen == [(1, 48, 5, 5)]
    torch.nn.utils.parametrizations.weight_norm(layer.qkv)
    torch.testing.assert_close(layer(x), plain)
    torch.testing.assert_close(layer(x.requires_grad_()), plain)


def test_autocast_casts_as_the_projection_would():
    _, recomputes, _ = layers()
    x = torch.randn(2, 12, 9, 10)
    with torch.autocast("cpu", torch.bfloat16):
        y = recomputes(x)
        assert y.dtype == torch.bfloat16
        y.float().sum().backward()
    torch.testing.assert_close(y.float(), recomputes(x), rtol=0.1, atol=0.1)
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in recomputes.parameters())


def test_the_choice_shows_and_an_unsupported_image_is_an_error():
    layer = sasa.RelativeSelfAttention(6, 16, 3, 8, border="valid", recompute=True)
    assert "recompute=True" in repr(layer)
    with pytest.raises(ValueError, match=r"query: expected an image of at least 3x3 pixels"):
        layer(torch.randn(1, 6, 2, 5))
    with pytest.raises(ValueError, match="x: expected shape"):
        layer(torch.randn(1, 5, 7, 7))
