"""Weights of the notebook's module give its output, and its cells run."""

import pytest
import torch

from benchmarks.peers import UnfoldSelfAttention
from sasa import RelativeSelfAttention


@pytest.mark.parametrize("last_head_embedding", [True, False], ids=["with the slip", "without the slip"])
@pytest.mark.parametrize(("heads", "stride"), [(8, 1), (4, 2), (1, 1), (2, 3)])
def test_same_output_as_the_unfold_module(heads, stride, last_head_embedding):
    module = UnfoldSelfAttention(16, 32, 5, heads, stride, last_head_embedding)
    layer = RelativeSelfAttention.from_notebook(module.state_dict(), heads, stride, last_head_embedding)
    x = torch.randn(2, 16, 9, 10)
    torch.testing.assert_close(layer(x), module(x), rtol=1e-4, atol=1e-4)


def test_the_slip_matters():
    module = UnfoldSelfAttention(16, 32, 5, 8, last_head_embedding=True)
    layer = RelativeSelfAttention.from_notebook(module.state_dict(), 8)
    x = torch.randn(1, 16, 9, 10)
    assert (layer(x) - module(x)).abs().max() > 0.01


def test_gradients_flow_as_in_the_module():
    module = UnfoldSelfAttention(8, 16, 3, 4, last_head_embedding=True)
    layer = RelativeSelfAttention.from_notebook(module.state_dict(), 4, last_head_embedding=True)
    x = torch.randn(2, 8, 6, 5)
    for each in (module, layer):
        each(x).square().sum().backward()
    torch.testing.assert_close(layer.col_embedding.grad, module.col_embeddings.grad, rtol=1e-3, atol=1e-3)
    assert layer.row_embedding.grad.abs().sum() == module.row_embeddings.grad.abs().sum() == 0
    weights = torch.cat([branch[0].weight.grad for branch in (module.qx, module.kx, module.vx)])
    torch.testing.assert_close(layer.qkv.weight.grad, weights, rtol=1e-3, atol=1e-3)


def test_weights_keep_their_dtype_and_biases_may_be_absent():
    state = {key: value.double() for key, value in UnfoldSelfAttention(4, 8, 3, 2).state_dict().items()}
    assert RelativeSelfAttention.from_notebook(state, 2).qkv.weight.dtype == torch.float64
    without = {key: value for key, value in state.items() if not key.endswith("bias")}
    assert RelativeSelfAttention.from_notebook(without, 2).qkv.bias is None


def test_the_notebooks_cells(capsys):
    inp = torch.randn(2, 64, 56, 56)  # the notebook's batch is 32
    sa = RelativeSelfAttention(64, 128, 7, 8)
    out = sa(inp)
    assert out.shape == torch.Size([2, 128, 56, 56])
    sa.summary(inp)
    assert "25,856" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("kx.0.weight"), r"missing: \['kx.0.weight'\], unknown: none"),
        (lambda s: s.pop("vx.0.bias"), r"missing: \['vx.0.bias'\]"),
        (lambda s: s.update(extra=torch.zeros(1)), r"missing: none, unknown: \['extra'\]"),
        (lambda s: s.update({"kx.0.weight": torch.zeros(8, 5, 1, 1)}), r"kx.0.weight: expected shape \(8, 4, 1, 1\)"),
        (lambda s: s.update({"qx.0.weight": torch.zeros(8, 4)}), r"qx.0.weight: expected shape \(out, in, 1, 1\)"),
        (lambda s: s.update(col_embeddings=torch.zeros(4, 5)), r"col_embeddings: expected shape \(4, 3\)"),
        (
            lambda s: s.update(row_embeddings=torch.zeros(4, 2), col_embeddings=torch.zeros(4, 2)),
            r"expected an even number of channels and an odd window.*a window of 2",
        ),
    ],
)
def test_bad_weights(change, message):
    state = dict(UnfoldSelfAttention(4, 8, 3, 2).state_dict())
    change(state)
    with pytest.raises(ValueError, match=message):
        RelativeSelfAttention.from_notebook(state, 2)


def test_heads_that_do_not_divide_the_channels():
    with pytest.raises(ValueError, match="out_channels: expected a multiple of num_heads = 3, got 8"):
        RelativeSelfAttention.from_notebook(UnfoldSelfAttention(4, 8, 3, 2).state_dict(), 3)
