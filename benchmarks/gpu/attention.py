"""Attention alone, queries, keys and values given: sasa's kernels beside other ways to compute it on a GPU.

Counted are the bytes that no way of computing can avoid: queries, keys, values and outputs once, and in training as
many of their gradients; and 4·k²·D FLOPs a query, in training 3.5 times that. FlexAttention can only leave out what is
outside the image, so it takes turns with sasa's border ``"mask"``. NATTEN has no position term and moves the window
at the border: it computes something else.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

import sasa

from ..attention_peers import Attention, flex, slices, unfolded_sdpa
from ..measure import Call, call_of, largest_difference
from ..problems import ATTENTION, STAGES, AttentionProblem
from ..stages import FORWARDS
from .clock import Pace
from .plan import REST, SHAPES, TARGET, Case, RefusedError, Setting
from .precision import PRECISIONS

PACE = Pace(20, 5, 4)
MODES = tuple(FORWARDS)
TENSORS = {"forward": 4, "training": 8}  # of the queries' size, that must be read or written


class Peer(NamedTuple):
    """A way to compute attention.

    Attributes:
        build: from the problem and setting to a function of queries, keys, values and embeddings.
        layout: of these: see ``inputs``.
        border: what it does outside the image.
        compiled: whether it runs under torch.compile.
        position: whether it has the row and column terms; its results are checked only if so.
    """

    build: Callable[[AttentionProblem, Setting], Attention]
    layout: str = "channels_last"
    border: str = "zero"
    compiled: bool = False
    position: bool = True


def ours(problem: AttentionProblem, setting: Setting, border: str = "zero", by: str | None = None) -> Attention:
    """sasa.local_attention by the GPU's kernels, or ``by`` another of its implementations."""

    def attention(query: Tensor, key: Tensor, value: Tensor, row: Tensor, col: Tensor) -> Tensor:
        positions = {"row_embedding": row, "col_embedding": col}
        chosen = by or setting.implementation
        return sasa.local_attention(
            query, key, value, problem.kernel_size, **positions, border=border, implementation=chosen
        )

    return attention


def flex_attention(problem: AttentionProblem, setting: Setting) -> Attention:
    """FlexAttention, compiled unless nothing is."""
    if setting.quick:
        warnings.filterwarnings("ignore", "flex_attention called without torch.compile")
    return flex(problem.size, problem.kernel_size, not setting.quick, setting.device)


def natten(problem: AttentionProblem, setting: Setting) -> Attention:
    """NATTEN's neighbourhood attention, its window moved inside at the border, without positions."""
    from natten import na2d  # type: ignore[import-not-found]

    def attention(query: Tensor, key: Tensor, value: Tensor, row: Tensor, col: Tensor) -> Tensor:
        qkv = (x.permute(0, 3, 4, 1, 2) for x in (query, key, value))
        return na2d(*qkv, kernel_size=(problem.kernel_size,) * 2, scale=1.0).permute(0, 3, 4, 1, 2)

    return attention


VARIANTS = ("halo", "taps")
PEERS = {
    "sasa": Peer(ours),
    **{f"sasa {variant}": Peer(ours) for variant in VARIANTS},
    "sasa contiguous": Peer(ours, layout="contiguous"),
    "sasa mask": Peer(functools.partial(ours, border="mask"), border="mask"),
    "sasa reference": Peer(functools.partial(ours, by="eager")),
    "FlexAttention compiled": Peer(flex_attention, border="mask", compiled=True),
    "slices compiled": Peer(
        lambda problem, setting: slices(problem.size, problem.kernel_size, not setting.quick),
        layout="contiguous",
        compiled=True,
    ),
    "unfold + SDPA": Peer(
        lambda problem, setting: unfolded_sdpa(problem.size, problem.kernel_size), layout="contiguous"
    ),
    "NATTEN, no position": Peer(natten, layout="heads_last", position=False),
}
OURS = ("sasa", "sasa halo", "sasa taps")
FLEX = ("FlexAttention compiled",)
OTHERS = ("unfold + SDPA", "sasa reference", "NATTEN, no position", "slices compiled")


def cases(quick: bool) -> list[Case]:
    """The notebook's shape and the stages of a ResNet-50 for 64 images, forward and training."""

    def each(shape: str, problem: AttentionProblem, precision: str, peers: tuple[str, ...], rank: int) -> list[Case]:
        return [
            Case("attention", f"{shape} {precision} {mode}", mode, precision, problem, peers, rank) for mode in MODES
        ]

    if quick:
        small = ATTENTION["small"]._replace(size=8, kernel_size=3)
        return each("small", small, "bfloat16", tuple(PEERS), TARGET) + each(
            "small", small, "float32", ("sasa", *FLEX), REST
        )
    notebook = ATTENTION["notebook"]
    stages = {name: problem._replace(batch=64) for name, problem in STAGES.items()}
    found = each("notebook", notebook, "bfloat16", (*OURS, *FLEX), TARGET)
    found += each("notebook", notebook, "float32", OURS, SHAPES)
    found += each("notebook", notebook, "tf32", OURS, SHAPES)
    for precision in ("bfloat16", "float32"):
        for name, problem in stages.items():
            found += each(name, problem, precision, OURS, SHAPES)
    for precision in ("tf32", "float32"):
        found += each("notebook", notebook, precision, FLEX, REST)
    for precision in ("bfloat16", "float32"):
        found += each("notebook", notebook, precision, ("sasa contiguous", "sasa mask", *OTHERS), REST)
    for precision in ("bfloat16", "float32"):
        for name, problem in stages.items():
            found += each(name, problem, precision, ("sasa contiguous", *FLEX, "unfold + SDPA"), REST)
    return found


def baseline(case: Case, peer: str) -> str:
    """Ours with the same border."""
    return "sasa mask" if PEERS[peer].border == "mask" else "sasa"


def compiles(case: Case, peer: str) -> bool:
    """Whether it runs under torch.compile."""
    return PEERS[peer].compiled


def inputs(problem: AttentionProblem, dtype: torch.dtype, layout: str, device: str) -> list[Tensor]:
    """Queries, keys, values (B, N, D, H, W), row and column embeddings (N, D, k); the same numbers in every layout.

    ``"channels_last"``: views of one channels_last tensor, as the layer has them; ``"heads_last"``: channels_last, each
    a tensor of its own; ``"contiguous"``: each contiguous.
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


def build(case: Case, peer: str, setting: Setting) -> Call:
    """Output, and in training all gradients."""
    way, dtype = PEERS[peer], PRECISIONS[case.precision].dtype
    function = way.build(case.problem, setting)
    training = case.mode == "training"
    tensors = [x.requires_grad_(training) for x in inputs(case.problem, dtype, way.layout, setting.device)]
    grad = gradient(case.problem, dtype, way.layout, setting.device) if training else None
    leaves = tensors if way.position else tensors[:3]
    call = call_of(lambda: function(*tensors), case.mode, leaves, grad)
    variant = peer.removeprefix("sasa ")
    return forced(call, variant, setting) if variant in VARIANTS else call


def forced(call: Call, variant: str, setting: Setting) -> Call:
    """The call by one of the variants of the GPU's kernels."""
    if setting.device == "cpu":
        raise RefusedError("the variants are of the GPU's kernels")
    from sasa.ops import triton as kernels

    def by_variant() -> tuple[Tensor, ...]:
        with kernels.using(variant):
            return call()

    return by_variant


def check(case: Case, peer: str, call: Call, setting: Setting) -> float | None:
    """Against plain PyTorch in float64, of the same inputs, with the peer's border."""
    way, precision = PEERS[peer], PRECISIONS[case.precision]
    if not way.position:
        return None
    precise = ours(case.problem, setting, way.border, "eager")
    tensors = [x.double() for x in inputs(case.problem, precision.dtype, "contiguous", setting.device)]
    tensors = [x.requires_grad_(case.mode == "training") for x in tensors]
    grad = gradient(case.problem, precision.dtype, "contiguous", setting.device).double()
    expected = call_of(lambda: precise(*tensors), case.mode, tensors, grad)()
    return largest_difference(call(), expected, precision.dtype, precision.tolerance)


def figures(case: Case, peer: str, found: dict[str, Any], machine: dict[str, Any]) -> dict[str, float]:
    """Bytes and FLOPs a second, and their share of what a copy and a matrix product reach."""
    problem = case.problem
    size = problem.batch * problem.channels * problem.size**2 * PRECISIONS[case.precision].dtype.itemsize
    bytes_a_second = TENSORS[case.mode] * size / found["milliseconds"] * 1e3
    flops = FORWARDS[case.mode] * problem.flops / found["milliseconds"] * 1e3
    result = {"gigabytes_per_second": bytes_a_second / 1e9, "gflops": flops / 1e9}
    if "copy_bytes_per_second" in machine:
        share = bytes_a_second / machine["copy_bytes_per_second"]["value"]
        median = found["milliseconds"]
        result |= {
            "copy_share": share,
            "copy_share_lowest": share * median / found["milliseconds_highest"],
            "copy_share_highest": share * median / found["milliseconds_lowest"],
            "product_share": flops / machine["product_flops_per_second"][case.precision]["value"],
        }
    return result
