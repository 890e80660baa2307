"""What is right, worked out the slow way, and how far from it a result may be.

:func:`attention` loops over batch, head, window and tap, from the equation alone:

    logit_t = scale · q[p]·( k[p + t] + row[dy] + col[dx] ) + bias[dy, dx]
    y[p] = sum over t of  softmax_t(logit) · v[p + t]

Its gradients come from autograd through these loops. :class:`Case` names a problem, :func:`solve` solves it in float64,
and :func:`assert_right` allows an error derived from that solution.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

BORDERS = ("zero", "mask", "valid", "shift")
NAMES = ("query", "key", "value", "row_embedding", "col_embedding", "bias")
EMBEDDINGS = {
    "none": (),
    "row": ("row_embedding",),
    "col": ("col_embedding",),
    "both": ("row_embedding", "col_embedding"),
    "bias": ("bias",),
    "all": ("row_embedding", "col_embedding", "bias"),
}

Pair = int | tuple[int, int]


def pair(x: Pair) -> tuple[int, int]:
    return (x, x) if isinstance(x, int) else x


def offsets(kernel: int, dilation: int) -> list[int]:
    """Pixels from the centre to each tap; an even window reaches one tap further after the centre than before."""
    before = (kernel - 1) // 2
    return [(tap - before) * dilation for tap in range(kernel)]


def centres(size: int, kernel: int, stride: int, dilation: int, border: str) -> list[int]:
    """Pixels at which windows are centred: every ``stride``-th of those allowed, from the first."""
    taps = offsets(kernel, dilation)
    if border == "shift" and size < kernel * dilation:
        return []
    allowed = [p for p in range(size) if border != "valid" or (p + taps[0] >= 0 and p + taps[-1] < size)]
    return allowed[::stride]


def moved(pixel: int, size: int, kernel: int, dilation: int) -> list[int]:
    """Pixels from a query to each tap of its window, moved by as few steps of the dilation as bring it inside."""
    for steps in sorted(range(-kernel, kernel + 1), key=abs):
        taps = [offset + steps * dilation for offset in offsets(kernel, dilation)]
        if all(0 <= pixel + offset < size for offset in taps):
            return taps
    raise ValueError(f"no window of {kernel} taps holds pixel {pixel} of {size}")


class Attention(NamedTuple):
    """Output (B, N, Dv, h, w), weights (B, N, kh·kw, h, w) and log-sum-exp of the logits (B, N, h, w)."""

    output: Tensor
    weights: Tensor
    lse: Tensor


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: Pair,
    *,
    row_embedding: Tensor | None = None,
    col_embedding: Tensor | None = None,
    bias: Tensor | None = None,
    stride: Pair = 1,
    dilation: Pair = 1,
    border: str = "zero",
    scale: float = 1.0,
) -> Attention:
    """Local attention of (B, N, D, H, W), (B, N, D, H, W) and (B, N, Dv, H, W), in the dtype given; B at least 1."""
    B, N, D, H, W = query.shape
    (kh, kw), (sh, sw), (dh, dw) = pair(kernel_size), pair(stride), pair(dilation)
    rows, cols = centres(H, kh, sh, dh, border), centres(W, kw, sw, dw, border)
    taps = [(dy, dx, oy, ox) for dy, oy in enumerate(offsets(kh, dh)) for dx, ox in enumerate(offsets(kw, dw))]
    # One vector of channels a pixel: pixels[((b·N + n)·H + y)·W + x].
    queries, keys, values = (x.permute(0, 1, 3, 4, 2).flatten(0, 3).unbind(0) for x in (query, key, value))
    no_key, no_value = key.new_zeros(D), value.new_zeros(value.shape[2])

    outputs, weights, lses = [], [], []
    for plane in range(B * N):
        n = plane % N
        for y in rows:
            for x in cols:
                if border == "shift":  # positions are numbered by offset, the smallest first
                    across = [(ox // dw + kw - 1, ox) for ox in moved(x, W, kw, dw)]
                    down = [(oy // dh + kh - 1, oy) for oy in moved(y, H, kh, dh)]
                    taps = [(dy, dx, oy, ox) for dy, oy in down for dx, ox in across]
                position = [torch.zeros_like(no_key) for _ in taps]
                extra = [query.new_zeros(()) for _ in taps]
                for t, (dy, dx, _, _) in enumerate(taps):
                    if row_embedding is not None:
                        position[t] = position[t] + row_embedding[n, :, dy]
                    if col_embedding is not None:
                        position[t] = position[t] + col_embedding[n, :, dx]
                    if bias is not None:
                        extra[t] = bias[n, dy, dx]
                seen, seen_keys, seen_values = [], [], []
                for t, (_, _, oy, ox) in enumerate(taps):
                    inside = 0 <= y + oy < H and 0 <= x + ox < W
                    if border == "mask" and not inside:
                        continue
                    pixel = (plane * H + y + oy) * W + x + ox
                    seen.append(t)
                    seen_keys.append((keys[pixel] if inside else no_key) + position[t])
                    seen_values.append(values[pixel] if inside else no_value)
                logits = scale * (torch.stack(seen_keys) @ queries[(plane * H + y) * W + x])
                logits = logits + torch.stack([extra[t] for t in seen])
                largest = logits.detach().max()
                exponentials = (logits - largest).exp()
                softmax = exponentials / exponentials.sum()
                outputs.append(softmax @ torch.stack(seen_values))
                weights.append(softmax.new_zeros(len(taps)).index_copy(0, torch.tensor(seen), softmax))
                lses.append(largest + exponentials.sum().log())

    def image(vectors: list[Tensor]) -> Tensor:
        return torch.stack(vectors).unflatten(0, (B, N, len(rows), len(cols))).movedim(4, 2)

    return Attention(image(outputs), image(weights), torch.stack(lses).reshape(B, N, len(rows), len(cols)))


@dataclass(frozen=True)
class Case:
    """A problem: shapes and options of one call. ``str`` gives its test id, the defaults left out."""

    size: tuple[int, int] = (5, 4)
    kernel_size: Pair = 3
    stride: Pair = 1
    dilation: Pair = 1
    border: str = "zero"
    embeddings: str = "both"
    batch: int = 1
    heads: int = 2
    width: int = 3
    value_width: int | None = None
    scale: float = 1.0
    spread: float = 1.0

    def __str__(self) -> str:
        def text(x: object) -> str:
            return "x".join(map(str, x)) if isinstance(x, tuple) else str(x)

        changed = [name for name in self.__dataclass_fields__ if getattr(self, name) != getattr(Case, name)]
        return "-".join(f"{name}={text(getattr(self, name))}" for name in changed) or "default"

    @property
    def fits(self) -> bool:
        """Whether there is at least one window."""
        axes = zip(self.size, pair(self.kernel_size), pair(self.stride), pair(self.dilation), strict=True)
        return all(centres(*axis, self.border) for axis in axes)

    @property
    def options(self) -> dict:
        """Arguments of the call that are no tensors."""
        names = ("kernel_size", "stride", "dilation", "border", "scale")
        return {name: getattr(self, name) for name in names}

    def tensors(self, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
        """Query, key, value and the embeddings, standard normal times ``spread``, rounded to ``dtype``."""
        generator = torch.Generator().manual_seed(0)
        image, (kh, kw) = (self.batch, self.heads, self.width, *self.size), pair(self.kernel_size)
        if self.border == "shift":
            kh, kw = 2 * kh - 1, 2 * kw - 1
        shapes = {
            "query": image,
            "key": image,
            "value": (self.batch, self.heads, self.value_width or self.width, *self.size),
            "row_embedding": (self.heads, self.width, kh),
            "col_embedding": (self.heads, self.width, kw),
            "bias": (self.heads, kh, kw),
        }
        kept = {"query", "key", "value", *EMBEDDINGS[self.embeddings]}
        normal = {name: torch.randn(s, generator=generator, dtype=torch.float64) for name, s in shapes.items()}
        return {name: (x * self.spread).to(dtype) for name, x in normal.items() if name in kept}


class Solution(NamedTuple):
    """A case solved: the tensors given to the loops, and the results in float64 by name ("output", "grad query", ...).

    ``unit`` bounds the terms that each result sums. Rounding errors are relative to these, not to the sum, in which
    they may cancel.
    """

    tensors: dict[str, Tensor]
    grad_output: Tensor
    right: dict[str, Tensor]
    unit: dict[str, float]


def units(tensors: dict[str, Tensor], grad_output: Tensor, lse: Tensor, scale: float) -> dict[str, float]:
    """Bounds on the terms of each result, by the Cauchy-Schwarz inequality; see the equation and its gradients.

    An absolute error in a logit is a relative error in its weight: hence the factor 1 + (largest logit), which is about
    the log-sum-exp for the weights that matter.
    """
    largest = {name: x.abs().max().item() for name, x in {**tensors, "grad_output": grad_output}.items()}
    norm = {"grad_output": grad_output.norm(dim=2).max().item()}
    norm |= {name: x.norm(dim=2 if x.dim() == 5 else 1).max().item() for name, x in tensors.items() if name != "bias"}
    keys = ("key", "row_embedding", "col_embedding")
    logit = abs(scale) * norm["query"] * sum(norm.get(name, 0.0) for name in keys) + largest.get("bias", 0.0)
    grad_weight = norm["grad_output"] * norm["value"]
    grad_logit = abs(scale) * grad_weight
    weighted = {
        "output": largest["value"],
        "weights": 1.0,
        "grad query": grad_logit * sum(largest.get(name, 0.0) for name in keys),
        **{f"grad {name}": grad_logit * largest["query"] for name in keys},
        "grad value": largest["grad_output"],
        "grad bias": grad_weight,
    }
    amplified = 1 + lse.abs().max().item()
    return {"lse": max(logit, amplified), **{name: amplified * unit for name, unit in weighted.items()}}


def solve_tensors(tensors: dict[str, Tensor], grad_output: Tensor, **options) -> Solution:
    """The solution for these tensors, of any dtype and memory format."""
    leaves = {name: x.double().clone().requires_grad_() for name, x in tensors.items()}
    results = attention(**leaves, **options)
    grads = torch.autograd.grad(results.output, list(leaves.values()), grad_output.double())
    right = {name: x.detach() for name, x in results._asdict().items()}
    right |= {f"grad {name}": grad for name, grad in zip(leaves, grads, strict=True)}
    wide = {name: x.detach() for name, x in leaves.items()}
    return Solution(tensors, grad_output, right, units(wide, grad_output.double(), right["lse"], options["scale"]))


@functools.lru_cache(maxsize=4096)
def solve(case: Case, dtype: torch.dtype = torch.float64) -> Solution:
    """The solution of a case whose tensors were rounded to ``dtype``; kept, as each implementation asks for it."""
    tensors = case.tensors(dtype)
    axes = zip(case.size, pair(case.kernel_size), pair(case.stride), pair(case.dilation), strict=True)
    shape = *tensors["value"].shape[:3], *(len(centres(*axis, case.border)) for axis in axes)
    grad_output = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    return solve_tensors(tensors, grad_output, **case.options)


def assert_right(name: str, got: Tensor, solution: Solution, rounded: bool = False) -> None:
    """Compare with the solution in float64: an error of max(2, sqrt(D / 2)) epsilons of the largest terms is allowed,
    and of as many steps of the subnormals.

    A logit sums D terms and rounds each time, by at most u = eps / 2 of a running sum of about its size. Independent
    roundings add up to λ·sqrt(D)·u (Higham and Mary, "A New Approach to Probabilistic Rounding Error Analysis", 2019),
    here with λ = sqrt(2); this error of a logit is in every weight (see :func:`units`). Below D = 8 the two epsilons
    are for the roundings whatever D: exponential, division, sums over taps. The unit of "lse" itself grows with D.

    Half precision is summed in float32, and rounding the result may add twice the error of rounding once: one epsilon
    of each element, or one step of the subnormals. Where terms are ``rounded`` to half precision before they are
    summed, as for tensor cores, an epsilon of the largest is allowed as well.
    """
    right = solution.right[name]
    assert got.shape == right.shape, f"{name}: {tuple(got.shape)} instead of {tuple(right.shape)}"
    info, half = torch.finfo(got.dtype), got.dtype in (torch.float16, torch.bfloat16)
    sums = torch.finfo(torch.float32) if half else info
    epsilons = 2 if name == "lse" else max(2, math.sqrt(solution.tensors["query"].shape[2] / 2))
    allowed = torch.full_like(right, epsilons * sums.eps * (solution.unit[name] + sums.smallest_normal))
    if half:
        allowed += info.eps * right.abs().clamp(min=info.smallest_normal)
    if half and rounded and name != "lse":
        allowed += info.eps * solution.unit[name]
    error = (got.detach().cpu().double() - right).abs()
    excess = torch.where(error <= allowed, 0.0, (error / allowed).nan_to_num(nan=torch.inf))  # NaN is the worst
    worst = tuple(int(i) for i in torch.unravel_index(excess.argmax(), right.shape))
    assert not excess.any(), (
        f"{name}: at {worst} of {tuple(right.shape)} got {got[worst].item():.9g} instead of "
        f"{right[worst].item():.9g}, {excess[worst].item():.2g} times the allowed {allowed[worst].item():.2g}"
    )


def assert_same_sums(got: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """Equal but for rounding, where both sum in their own order: in float32, 3e-5 of a tensor's largest number is
    allowed, and 3e-6 of the largest of all, as gradients that should be 0 are sums of the same terms as others.
    """
    assert all(x.isfinite().all() for x in expected)
    largest = [x.detach().abs().max().item() if x.numel() else 0.0 for x in expected]
    for one, right, most in zip(got, expected, largest, strict=True):
        allowed = {"rtol": 1e-4, "atol": 3e-5 * most + 3e-6 * max(largest)}
        torch.testing.assert_close(one, right, **({} if one.dtype == torch.float64 else allowed))


def layouts() -> dict[str, object]:
    """Functions giving the same values of a (B, N, D, H, W) tensor in other places of memory, by name."""

    def flat(x: Tensor) -> Tensor:
        return x.flatten(1, 2).contiguous()

    def channels_last(x: Tensor) -> Tensor:
        return flat(x).to(memory_format=torch.channels_last).unflatten(1, x.shape[1:3])

    def slice_of(format_: torch.memory_format):
        def middle_third(x: Tensor) -> Tensor:
            wide = torch.cat([torch.full_like(flat(x), torch.nan), flat(x), torch.full_like(flat(x), torch.nan)], 1)
            channels = x.shape[1] * x.shape[2]
            return wide.to(memory_format=format_)[:, channels : 2 * channels].unflatten(1, x.shape[1:3])

        return middle_third

    def permuted(x: Tensor) -> Tensor:
        return x.permute(4, 1, 3, 0, 2).contiguous().permute(3, 1, 4, 2, 0)

    def strided(x: Tensor) -> Tensor:
        canvas = x.new_full((*x.shape[:2], 2 * x.shape[2], x.shape[3] + 2, 3 * x.shape[4]), torch.nan)
        view = canvas[:, :, 1::2, 1:-1, 2::3]
        return view.copy_(x)

    return {
        "contiguous": Tensor.contiguous,
        "channels_last": channels_last,
        "slice": slice_of(torch.contiguous_format),
        "slice_channels_last": slice_of(torch.channels_last),
        "permuted": permuted,
        "strided": strided,
    }
