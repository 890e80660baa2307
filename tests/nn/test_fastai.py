"""What fastai asks of modules, which is not installed here: its functions of the same names stand for it."""

import subprocess
import sys

import pytest

LAYERS = '''
"""As fastai's module of this name takes networks apart."""


def has_children(m):
    return any(True for _ in m.children())


def flatten_model(m):
    return sum(map(flatten_model, m.children()), []) if has_children(m) else [m]
'''
SUMMARY = """
import sasa, torch
from fastai.layers import flatten_model

stem, layer = sasa.AttentionStem(3, 8, 2), sasa.RelativeSelfAttention(8, 16, 3, 2)
network = torch.nn.Sequential(stem, torch.nn.Sequential(layer, torch.nn.ReLU()), sasa.convert(torch.nn.Sequential(
    torch.nn.Conv2d(16, 8, 3, padding=1), torch.nn.Conv2d(8, 8, 3)), 3, keep_function=True, where=lambda *_: True))
listed = flatten_model(network)
print([type(m).__name__ for m in listed])
assert sum(p.numel() for m in listed for p in m.parameters()) == sum(p.numel() for p in network.parameters())
assert all(isinstance(m.weight, torch.Tensor) for m in listed if list(m.parameters()))  # else not counted
"""


@pytest.mark.slow
def test_summaries_have_a_row_for_each_layer(tmp_path):
    """With all its parameters. In a process of its own: the module is looked for once."""
    (tmp_path / "fastai").mkdir()
    (tmp_path / "fastai" / "__init__.py").touch()
    (tmp_path / "fastai" / "layers.py").write_text(LAYERS)
    line = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{SUMMARY}"]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    names = ["AttentionStem", "RelativeSelfAttention", "ReLU", "AttentionConv2d", "AttentionConv2d"]
    assert done.stdout.strip() == str(names)
