"""Attention alone, queries, keys and values given, so that no projection is timed: parts attention, stages, scaling.

Counted are 4·k²·D FLOPs per query, in training 3.5 times that (the backward recomputes the logits and has four products
of the same size), and the bytes that no implementation can avoid: queries, keys, values and outputs once, in training
their gradients as well. On a CPU the baseline is a 3x3 convolution from half of the channels, which is what the
attention layer replaces. FlexAttention can only exclude what is outside the image: it takes turns with sasa's border
"mask". NATTEN has no position term and moves the window at the border: it computes something else, and is not checked.
"""

from __future__ import annotations

import functools
import statistics
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import sasa
from sasa.ops import implementations

from .attention_peers import Attention, flex, natten, slices, unfolded_sdpa
from .cases import CONVOLUTION, MODES, PRECISIONS, REST, SHAPES, Case, Device, Part, RefusedError
from .clock import with_rate
from .problems import ATTENTION, SERIES, STAGES, AttentionProblem
from .verify import Call, call_of, largest_difference

FLOPS = {"forward": 1.0, "training": 3.5}  # in those of a forward
TENSORS = {"forward": 4, "training": 8}  # of the queries' size, that must be read or written
# The plain PyTorch implementation holds k² logits per pixel: tens of gigabytes beyond this many pixels.
MOST_PIXELS_OF_EAGER = 1024**2


class Peer(NamedTuple):
    """A way to compute attention.

    Attributes:
        build: from the problem and device to a function of queries, keys, values and embeddings.
        layout: of these: see ``inputs``.
        border: what it does outside the image.
        compiled: whether it runs under torch.compile.
        position: whether it has the row and column terms; its results are checked only if so.
    """

    build: Callable[[AttentionProblem, Device], Attention]
    layout: str = "channels_last"
    border: str = "zero"
    compiled: bool = False
    position: bool = True


def ours(problem: AttentionProblem, device: Device, border: str = "zero", by: str | None = None) -> Attention:
    """sasa.local_attention by the device's kernels, or ``by`` another of its implementations."""

    def attention(query: Tensor, key: Tensor, value: Tensor, row: Tensor, col: Tensor) -> Tensor:
        options: dict[str, Any] = {"border": border, "implementation": by or device.implementation}
        return sasa.local_attention(
            query, key, value, problem.kernel_size, row_embedding=row, col_embedding=col, **options
        )

    return attention


def flex_attention(problem: AttentionProblem, device: Device) -> Attention:
    """FlexAttention, compiled unless compilation is off."""
    if device.quick:
        warnings.filterwarnings("ignore", "flex_attention called without torch.compile")
    return flex(problem.size, problem.kernel_size, not device.quick, device.name)


VARIANTS = ("halo", "taps")
FLEX = "FlexAttention compiled"
PEERS = {
    "sasa": Peer(ours),
    **{f"sasa {variant}": Peer(ours) for variant in VARIANTS},
    "sasa contiguous": Peer(ours, layout="contiguous"),
    "sasa mask": Peer(functools.partial(ours, border="mask"), border="mask"),
    "sasa reference": Peer(functools.partial(ours, by="eager")),
    FLEX: Peer(flex_attention, border="mask", compiled=True),
    "slices compiled": Peer(
        lambda problem, device: slices(problem.size, problem.kernel_size, not device.quick), "contiguous", compiled=True
    ),
    "unfold + SDPA": Peer(lambda problem, device: unfolded_sdpa(problem.size, problem.kernel_size), "contiguous"),
    "NATTEN, no position": Peer(
        lambda problem, device: natten(problem.kernel_size), layout="heads_last", position=False
    ),
}
OURS = ("sasa", "sasa halo", "sasa taps")
OTHERS = ("sasa contiguous", "sasa mask", "unfold + SDPA", "sasa reference", "NATTEN, no position", "slices compiled")


def each(
    shape: str, problem: AttentionProblem, precision: str, peers: Sequence[str], rank: int, part: str = "attention"
) -> list[Case]:
    """Forward and training."""
    return [Case(part, f"{shape} {precision} {mode}", mode, problem, peers, precision, rank) for mode in MODES]


def cases(device: Device) -> list[Case]:
    """The notebook's shape. On a CPU, peers that need k² copies or seconds per call get a quarter of its batch."""
    if device.quick:
        every = [peer for peer in PEERS if not (device.on_cpu and peer.startswith("NATTEN"))]
        return each("small", ATTENTION["small"], "bfloat16", every, 0) + each(
            "small", ATTENTION["small"], "float32", ("sasa", CONVOLUTION, FLEX), REST
        )
    if not device.on_cpu:
        notebook, found = ATTENTION["notebook"], []
        found += each("notebook", notebook, "bfloat16", (*OURS, FLEX), 0)
        for precision in ("float32", "tf32"):
            found += each("notebook", notebook, precision, OURS, SHAPES)
            found += each("notebook", notebook, precision, (FLEX,), REST)
        for precision in ("bfloat16", "float32"):
            found += each("notebook", notebook, precision, OTHERS, REST)
        return found
    common = ("sasa", CONVOLUTION)
    whole, quarter = ("sasa contiguous", "sasa reference"), ("slices compiled", "unfold + SDPA", FLEX)
    chosen = {
        ("notebook", "forward"): (*common, *whole, "slices compiled", FLEX),
        ("notebook-batch8", "forward"): (*common, "unfold + SDPA"),
        ("notebook", "training"): (*common, *whole),
        ("notebook-batch8", "training"): (*common, *quarter),
    }
    return [Case("attention", f"{name} {mode}", mode, ATTENTION[name], peers) for (name, mode), peers in chosen.items()]


def stage_cases(device: Device) -> list[Case]:
    """Every stage of a ResNet-50: on a CPU for 8 images and for one, on a GPU for 64, with other implementations."""
    if device.on_cpu:
        return [
            Case("stages", f"{stage}, batch {batch} {mode}", mode, problem._replace(batch=batch), ("sasa",))
            for stage, problem in STAGES.items()
            for batch in ((1,) if device.quick else (8, 1))
            for mode in MODES
        ]
    found = []
    for precision in ("bfloat16", "float32"):
        for stage, problem in STAGES.items():
            batch = problem._replace(batch=1 if device.quick else 64)
            found += each(stage, batch, precision, OURS, SHAPES, "stages")
            if not device.quick:
                found += each(stage, batch, precision, ("sasa contiguous", FLEX, "unfold + SDPA"), REST, "stages")
    return found


def scaling_cases(device: Device) -> list[Case]:
    """One problem after the other of each series that this machine's implementation has the memory for."""
    if not device.on_cpu:
        return []
    kernel = implementations.choose(None, torch.empty(1, 1, 1, 1, 1)).name != "eager"
    return [
        Case("scaling", f"{name}, {p.size}x{p.size}, window {p.kernel_size}", "forward", p, ("sasa",))
        for name, problems in SERIES.items()
        for p in (problems[:2] if device.quick else problems)
        if kernel or p.size**2 <= MOST_PIXELS_OF_EAGER
    ]


def inputs(problem: AttentionProblem, dtype: torch.dtype, layout: str, device: str) -> list[Tensor]:
    """Queries, keys, values (B, N, D, H, W), row and column embeddings (N, D, k); the same numbers in every layout.

    ``"channels_last"``: views of one channels_last tensor, as in the layer; ``"heads_last"``: channels_last, each a
    separate tensor; ``"contiguous"``: each contiguous.
    """
    torch.manual_seed(0)
    heads, width = problem.num_heads, problem.head_width
    qkv = torch.randn(problem.batch, 3 * problem.channels, problem.size, problem.size, device=device)
    qkv[:, : problem.channels] *= width**-0.5
    row, col = torch.randn(2, heads, width, problem.kernel_size, device=device).to(dtype)
    if layout == "channels_last":
        qkv = qkv.contiguous(memory_format=torch.channels_last)
    parts = list(qkv.to(dtype).chunk(3, 1))
    if layout != "channels_last":
        format_ = torch.channels_last if layout == "heads_last" else torch.contiguous_format
        parts = [part.clone(memory_format=format_) for part in parts]
    return [*(part.unflatten(1, (heads, width)) for part in parts), row, col]


def gradient(problem: AttentionProblem, dtype: torch.dtype, layout: str, device: str) -> Tensor:
    """A gradient of the output."""
    torch.manual_seed(1)
    image = torch.randn(problem.batch, problem.channels, problem.size, problem.size, device=device).to(dtype)
    if layout != "contiguous":
        image = image.contiguous(memory_format=torch.channels_last)
    return image.unflatten(1, (problem.num_heads, problem.head_width))


def build(case: Case, peer: str, device: Device) -> Call:
    """Output, and in training all gradients."""
    dtype, training = PRECISIONS[case.precision].dtype, case.mode == "training"
    way = PEERS.get(peer, Peer(ours))
    grad = gradient(case.problem, dtype, way.layout, device.name) if training else None
    if peer == CONVOLUTION:  # gives as many channels, from half of them
        problem = case.problem
        torch.manual_seed(0)
        layer = nn.Conv2d(problem.channels // 2, problem.channels, 3, padding=1, device=device.name, dtype=dtype)
        layer = layer.to(memory_format=torch.channels_last)
        x = torch.randn(problem.batch, problem.channels // 2, problem.size, problem.size, device=device.name).to(dtype)
        x = x.contiguous(memory_format=torch.channels_last).requires_grad_(training)
        grad = grad if grad is None else grad.flatten(1, 2)
        return call_of(lambda: layer(x), case.mode, [x, *layer.parameters()], grad)
    function = way.build(case.problem, device)
    tensors = [x.requires_grad_(training) for x in inputs(case.problem, dtype, way.layout, device.name)]
    call = call_of(lambda: function(*tensors), case.mode, tensors if way.position else tensors[:3], grad)
    variant = peer.removeprefix("sasa ")
    return forced(call, variant, device) if variant in VARIANTS else call


def forced(call: Call, variant: str, device: Device) -> Call:
    """The call by one of the variants of the GPU's kernels."""
    if device.on_cpu:
        raise RefusedError("the variants are of the GPU's kernels")
    from sasa.ops import triton as kernels

    def by_variant() -> tuple[Tensor, ...]:
        with kernels.using(variant):
            return call()

    return by_variant


def check(case: Case, peer: str, call: Call, device: Device) -> float | None:
    """Against plain PyTorch in float64, of the same inputs, with the peer's border."""
    if peer == CONVOLUTION or not PEERS[peer].position:
        return None
    precision = PRECISIONS[case.precision]
    # The equation itself; chunk by chunk where the whole problem is checked.
    precise = ours(case.problem, device, PEERS[peer].border, "reference" if device.on_cpu else "eager")
    tensors = [x.double() for x in inputs(case.problem, precision.dtype, "contiguous", device.name)]
    tensors = [x.requires_grad_(case.mode == "training") for x in tensors]
    grad = gradient(case.problem, precision.dtype, "contiguous", device.name).double()
    expected = call_of(lambda: precise(*tensors), case.mode, tensors, grad)()
    return largest_difference(call(), expected, precision.tolerance)


def figures(case: Case, peer: str, found: dict[str, Any]) -> dict[str, float]:
    """Bytes and FLOPs a second."""
    if peer == CONVOLUTION:
        return {}
    problem = case.problem
    size = problem.batch * problem.channels * problem.size**2 * PRECISIONS[case.precision].dtype.itemsize
    bandwidth = with_rate("gigabytes_per_second", TENSORS[case.mode] * size / 1e9, found)
    return bandwidth | with_rate("gflops", FLOPS[case.mode] * problem.flops / 1e9, found)


def share(series: str, problem: AttentionProblem) -> int:
    """Pixels of the problem, or pixels times taps: what its time should be proportional to."""
    return problem.batch * problem.size**2 * (1 if series == "pixels" else problem.kernel_size**2)


def with_deviations(result: dict[str, Any]) -> None:
    """Add to every problem of the series its time per share relative to their median, and to the results the largest
    deviation of that from 1, with its lowest and highest over the turns.
    """
    result["deviation"] = {}
    for series in SERIES:
        points = [case for case in result["cases"] if case["case"].startswith(f"{series},")]
        points = [case for case in points if "seconds" in case["peers"].get("sasa", {})]
        if not points:
            continue
        own = [case["peers"]["sasa"] for case in points]
        shares = [share(series, AttentionProblem(*(case[key] for key in AttentionProblem._fields))) for case in points]

        def relative(seconds: Sequence[float], shares: Sequence[int] = shares) -> list[float]:
            each = [second / share for second, share in zip(seconds, shares, strict=True)]
            return [one / statistics.median(each) for one in each]

        values = relative([figures["seconds"] for figures in own])
        for figures, value, part in zip(own, values, shares, strict=True):
            figures |= {"seconds_per_share": figures["seconds"] / part, "relative": value}
        turns = [relative(turn) for turn in zip(*(figures["turn_seconds"] for figures in own), strict=False)]
        ends = [max(abs(value - 1) for value in turn) for turn in turns]
        value = max(abs(value - 1) for value in values)
        result["deviation"][series] = {"value": value, "lowest": min(ends), "highest": max(ends)}


def baseline(peer: str) -> str:
    """Ours with the same border."""
    return "sasa mask" if peer in PEERS and PEERS[peer].border == "mask" else "sasa"


def compiles(case: Case, peer: str) -> bool:
    """Whether it runs under torch.compile."""
    return peer in PEERS and PEERS[peer].compiled


PART = Part(cases, build, check, figures, baseline, compiles)
STAGE_PART = Part(stage_cases, build, check, figures, baseline, compiles)
SCALING_PART = Part(scaling_cases, build, check, summary=with_deviations)
