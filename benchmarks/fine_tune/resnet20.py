"""ResNet-20 for CIFAR-10, with trained weights, and with attention in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

import sasa

STRENGTH = 2.0


class Block(nn.Module):
    """Two convolutions, and a shortcut without parameters: every second pixel, and zeros as the new channels."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.stride, self.more = outputs // inputs, (outputs - inputs) // 2
        self.conv1 = nn.Conv2d(inputs, outputs, 3, self.stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) to (B, outputs, H / stride, W / stride)."""
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.more, self.more)))


class ResNet20(nn.Module):
    """He et al.'s network for CIFAR-10 (arXiv 1512.03385, section 4.2)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(*(Block(16, 16) for _ in range(3)))
        self.layer2 = nn.Sequential(Block(16, 32), Block(32, 32), Block(32, 32))
        self.layer3 = nn.Sequential(Block(32, 64), Block(64, 64), Block(64, 64))
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) to (B, 10)."""
        x = self.layer3(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x))))))
        return self.linear(x.mean((2, 3)))


def trained(path: Path) -> ResNet20:
    """The network with the weights of a file, in evaluation mode."""
    network = ResNet20()
    missing, unexpected = network.load_state_dict(load_file(path), strict=False)
    missing = [name for name in missing if not name.endswith("num_batches_tracked")]  # not every file has them
    if missing or unexpected:
        raise ValueError(f"expected weights of a ResNet-20, got {path} without {missing} and with {unexpected}")
    return network.eval().to(memory_format=torch.channels_last)


def converted(network: nn.Module, first_stage: int = 1, strength: float = STRENGTH) -> nn.Module:
    """With attention instead of convolutions in a stage and those after it."""
    stages = tuple(f"layer{stage}." for stage in range(first_stage, 4))
    # Memory is plentiful here, and saving what the backward needs is faster.
    options: dict[str, Any] = {"keep_function": True, "strength": strength, "recompute": False}
    return sasa.convert(network, where=lambda name, _: name.startswith(stages), **options)
