"""The layer in a network of one's own, trained for a few steps."""

import torch
import torch.nn.functional as F
from torch import nn

import sasa

torch.manual_seed(0)
network = nn.Sequential(
    nn.Conv2d(3, 32, 3, stride=2, padding=1),
    nn.ReLU(),
    sasa.RelativeSelfAttention(32, 64, kernel_size=7, num_heads=8),  # for nn.Conv2d(32, 64, 7, padding=3)
    nn.BatchNorm2d(64),
    nn.ReLU(),
    nn.AdaptiveAvgPool2d(1),
    nn.Flatten(),
    nn.Linear(64, 2),
)

# is the left half of the image brighter than the right?
images = torch.randn(64, 3, 32, 32)
labels = (images[..., :16].mean((1, 2, 3)) > images[..., 16:].mean((1, 2, 3))).long()

optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
for step in range(30):
    loss = F.cross_entropy(network(images), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 10 == 9:
        print(f"step {step + 1}: loss {loss.item():.3f}")
