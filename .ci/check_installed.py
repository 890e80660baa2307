"""Checks that an installed sasa has its compiled kernels, and that they match the equation."""

import torch

import sasa

layer = sasa.RelativeSelfAttention(16, 32, kernel_size=7, num_heads=8, implementation="cpu")
reference = sasa.RelativeSelfAttention(16, 32, kernel_size=7, num_heads=8, implementation="reference")
reference.load_state_dict(layer.state_dict())
x = torch.randn(2, 16, 11, 13)
torch.testing.assert_close(layer(x), reference(x))
print(f"sasa {sasa.__version__}: compiled kernels compute the layer")
