"""Initialisation of attention: every head looks softly at one neighbour of the pixel, like a convolution's tap."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

STRENGTH = 2.5
CONTENT = 0.1
_NOISE = 0.25
_EDGES = ((0, -1), (0, 1), (-1, 0), (1, 0))
_CORNERS = ((-1, -1), (1, 1), (-1, 1), (1, -1))
_CENTRE = (0, 0)


def own_taps(num_heads: int, kernel_size: tuple[int, int], position_split: str) -> list[tuple[int, int]]:
    """Row and column of the window that each head starts at.

    They lie in the central 3x3 and come in opposite pairs, so that the heads' mean has no preferred direction; an odd
    number of heads has one at the centre. From the tenth head on they repeat.
    """
    # Heads that see only rows or only columns can distinguish corners, but not all edges.
    order = _CORNERS + _EDGES if position_split == "across_heads" else _EDGES + _CORNERS
    order = (_CENTRE, *order) if num_heads % 2 else (*order, _CENTRE)
    centre = [(size - 1) // 2 for size in kernel_size]
    taps = [(centre[0] + dy, centre[1] + dx) for dy, dx in order]
    taps = [(y, x) for y, x in taps if 0 <= y < kernel_size[0] and 0 <= x < kernel_size[1]]
    return [taps[head % len(taps)] for head in range(num_heads)]


def soft_table(num_heads: int, kernel_size: tuple[int, int], strength: float = STRENGTH) -> Tensor:
    """(N, kh, kw): -strength · distance of each tap from the head's own."""
    own = torch.tensor(own_taps(num_heads, kernel_size, "per_head"))
    rows, cols = ((torch.arange(size) - own[:, axis, None]).abs() for axis, size in enumerate(kernel_size))
    return -strength * (rows[:, :, None] + cols[:, None, :])


def soft_taps(
    channels: int,
    num_heads: int,
    kernel_size: tuple[int, int],
    position_split: str,
    device: torch.device,
    strength: float = STRENGTH,
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries' biases b, (channels), and the row and column halves of r with ``b·r_t = -strength · distance``.

    The distance is that of tap t from the head's own, along rows for the row half and along columns for the other.
    The rest of r is small noise orthogonal to b. b has length 1 in each half of a head, a random direction.
    """
    width = channels // num_heads
    own = own_taps(num_heads, kernel_size, position_split)
    is_row = [c % width < width // 2 if position_split == "per_head" else c < channels // 2 for c in range(channels)]
    options = {"device": device, "dtype": torch.float32}
    direction = torch.randn(num_heads, width, **options)
    biases, halves = torch.zeros(channels, **options), []
    for axis, size in enumerate(kernel_size):
        mine = [c for c in range(channels) if is_row[c] == (axis == 0)]
        mask = torch.zeros(channels, **options)
        index = torch.tensor(mine, dtype=torch.long, device=device)
        mask[index] = 1
        b = F.normalize(direction * mask.view(num_heads, width), dim=1)
        taps = torch.tensor([tap[axis] for tap in own], **options)
        distance = (torch.arange(size, **options) - taps[:, None]).abs()
        noise = _NOISE * torch.randn(num_heads, width, size, **options)
        along = (b[..., None] * noise).sum(1) + strength * distance
        biases += b.flatten()
        halves.append((noise - b[..., None] * along[:, None]).flatten(0, 1)[index])
    return biases, halves[0], halves[1]
