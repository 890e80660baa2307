"""Attention alone: queries, keys and values are given, so that no projection is timed.

    python -m benchmarks.one attention "notebook forward" sasa      one of its measurements

A 3x3 convolution from half of the channels is the yardstick: what the attention layer replaces.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import sasa

from .attention_peers import Attention, flex, slices, unfolded_sdpa
from .machine import machine
from .measure import Call, call_of, largest_difference, measure
from .problems import ATTENTION, AttentionProblem
from .processes import summarise, take_turns


class Peer(NamedTuple):
    """A way to compute attention.

    Attributes:
        build: from the image's side and the window (and ``compiled``) to a function of queries, keys,
            values and embeddings.
        channels_last: whether it gets views of one channels_last tensor, as the layer has them, or NCHW tensors.
        compiled: whether it runs under torch.compile.
        border: what it does outside the image; its result is compared with sasa's for that border.
    """

    build: Callable[..., Attention]
    channels_last: bool = False
    compiled: bool = False
    border: str = "zero"


def ours(size: int, kernel_size: int, implementation: str | None = None, border: str = "zero") -> Attention:
    """sasa.local_attention."""

    def attention(query: Tensor, key: Tensor, value: Tensor, row: Tensor, col: Tensor) -> Tensor:
        positions = {"row_embedding": row, "col_embedding": col}
        return sasa.local_attention(
            query, key, value, kernel_size, **positions, border=border, implementation=implementation
        )

    return attention


CONVOLUTION = "convolution 3x3"
PEERS = {
    "sasa": Peer(ours, channels_last=True),
    "sasa contiguous": Peer(ours),
    "sasa reference": Peer(functools.partial(ours, implementation="eager"), channels_last=True),
    "FlexAttention compiled": Peer(flex, channels_last=True, compiled=True, border="mask"),
    "slices compiled": Peer(slices, compiled=True),
    "unfold + SDPA": Peer(unfolded_sdpa),
}


class Case(NamedTuple):
    """What is compared: peers on a problem, ``"forward"`` or ``"training"`` (forward and backward)."""

    problem: str
    mode: str
    peers: tuple[str, ...]


# The peers that need k² copies or seconds a call are measured on a quarter of the notebook's batch, and so are we.
CASES = {
    "notebook forward": Case(
        "notebook",
        "forward",
        ("sasa", CONVOLUTION, "sasa contiguous", "sasa reference", "slices compiled", "FlexAttention compiled"),
    ),
    "notebook-batch8 forward": Case("notebook-batch8", "forward", ("sasa", CONVOLUTION, "unfold + SDPA")),
    "notebook training": Case("notebook", "training", ("sasa", CONVOLUTION, "sasa contiguous", "sasa reference")),
    "notebook-batch8 training": Case(
        "notebook-batch8",
        "training",
        ("sasa", CONVOLUTION, "slices compiled", "unfold + SDPA", "FlexAttention compiled"),
    ),
}
QUICK = {
    "small forward": Case(
        "small", "forward", ("sasa", CONVOLUTION, "sasa contiguous", "sasa reference", "unfold + SDPA")
    ),
    "small training": Case("small", "training", ("sasa", CONVOLUTION, "unfold + SDPA")),
}


def inputs(problem: AttentionProblem, channels_last: bool) -> list[Tensor]:
    """Queries, keys, values (B, N, D, H, W), row and column embeddings (N, D, k)."""
    torch.manual_seed(0)
    heads, width = problem.num_heads, problem.head_width
    qkv = torch.randn(problem.batch, 3 * problem.channels, problem.size, problem.size)
    qkv[:, : problem.channels] *= width**-0.5
    row, col = torch.randn(2, heads, width, problem.kernel_size)
    if channels_last:
        qkv = qkv.contiguous(memory_format=torch.channels_last)
        parts = [part.unflatten(1, (heads, width)) for part in qkv.chunk(3, 1)]
    else:
        parts = [part.unflatten(1, (heads, width)).contiguous() for part in qkv.chunk(3, 1)]
    return [*parts, row, col]


def gradient(problem: AttentionProblem, channels_last: bool) -> Tensor:
    """A gradient of the output."""
    torch.manual_seed(1)
    image = torch.randn(problem.batch, problem.channels, problem.size, problem.size)
    if channels_last:
        image = image.contiguous(memory_format=torch.channels_last)
    return image.unflatten(1, (problem.num_heads, problem.head_width))


def call(name: str, problem: AttentionProblem, mode: str, compiled: bool = True) -> Call:
    """The call to measure; without the compiler when ``compiled`` is false."""
    if name == CONVOLUTION:
        return convolution(problem, mode)
    peer = PEERS[name]
    options = {"compiled": compiled} if peer.compiled else {}
    function = peer.build(problem.size, problem.kernel_size, **options)
    tensors = [x.requires_grad_(mode == "training") for x in inputs(problem, peer.channels_last)]
    grad = gradient(problem, peer.channels_last) if mode == "training" else None
    return call_of(lambda: function(*tensors), mode, tensors, grad)


def convolution(problem: AttentionProblem, mode: str) -> Call:
    """A channels_last 3x3 convolution that gives as many channels, from half of them."""
    torch.manual_seed(0)
    layer = nn.Conv2d(problem.channels // 2, problem.channels, 3, padding=1).to(memory_format=torch.channels_last)
    x = torch.randn(problem.batch, problem.channels // 2, problem.size, problem.size)
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_(mode == "training")
    grad = gradient(problem, channels_last=True).flatten(1, 2) if mode == "training" else None
    return call_of(lambda: layer(x), mode, [x, *layer.parameters()], grad)


def check(name: str, problem: AttentionProblem, mode: str, compiled: bool = True) -> float:
    """Largest difference of results and gradients from the reference in float64; raises unless it is rounding."""
    results = call(name, problem, mode, compiled)()
    right = ours(problem.size, problem.kernel_size, "reference", PEERS[name].border)
    tensors = [x.double().requires_grad_(mode == "training") for x in inputs(problem, channels_last=False)]
    grad = gradient(problem, channels_last=False).double()
    expected = call_of(lambda: right(*tensors), mode, tensors, grad)()
    return largest_difference(results, expected, torch.float32)


def measured(case: str, peer: str) -> dict[str, Any]:
    """The figures of one peer, in this process, once its results are checked on a small image."""
    name, mode, _ = (CASES | QUICK)[case]
    problem, result = ATTENTION[name], {}
    if peer == CONVOLUTION:
        call(peer, problem.tiny(), mode)()
        return measure(call(peer, problem, mode))
    try:
        if PEERS[peer].compiled:  # what can't be done says so in clear words without the compiler
            check(peer, problem.tiny(), mode, compiled=False)
        result["largest_difference"] = check(peer, problem.tiny(), mode)
    except NotImplementedError as error:
        return {"cannot": str(error).strip().split("\n")[0]}
    return result | measure(call(peer, problem, mode), PEERS[peer].compiled)


def run(quick: bool, say: Callable[[str], object]) -> dict[str, Any]:
    """All cases, one after the other; the peers of a case take turns."""
    found = []
    for name, case in (QUICK if quick else CASES).items():
        turns = take_turns("attention", [(name, peer) for peer in case.peers], say, quick)
        shape = ATTENTION[case.problem]._asdict()
        peers = {peer: summarise(turns[name, peer], turns[name, "sasa"]) for peer in case.peers}
        found.append({"case": name, "mode": case.mode, **shape, "peers": peers})
    return {"machine": machine(), "cases": found}
