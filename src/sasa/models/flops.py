"""The cost of a network."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn


def count_flops(network: nn.Module, shape: Sequence[int]) -> int:
    """FLOPs of one forward for an input of ``shape``; a multiply-add is 2. Softmax, norms and pools are not counted.

    Nothing is computed if the network's parameters are on the ``"meta"`` device.
    """
    from torch.utils.flop_counter import FlopCounterMode  # imports Triton, which takes a while

    parameter = next(network.parameters())
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.zeros(tuple(shape), device=parameter.device, dtype=parameter.dtype))
    return counter.get_total_flops()
