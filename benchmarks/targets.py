"""The library's targets, and how far the results are from them. A benchmark only reports them; it never fails."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from .attention import FLEX
from .cases import CONVOLUTION
from .ceiling import COPY
from .networks import FULL, OURS, RESNET

Found = dict[str, dict[str, Any]]  # results by part
Value = tuple[float, float | None, float | None]  # of the median turn, lowest and highest


class Target(NamedTuple):
    """A target figure: at least or at most ``limit``."""

    name: str
    at_least: bool
    limit: float
    figure: Callable[[Found], Value]

    def reached(self, value: float) -> bool:
        """Whether the median figure is good enough."""
        return value >= self.limit if self.at_least else value <= self.limit


def peers_of(found: Found, part: str, case: str) -> dict[str, Any]:
    """The peers of a case; KeyError where it was not measured."""
    for entry in found[part]["cases"]:
        if entry["case"] == case:
            return entry["peers"]
    raise KeyError(case)


def times_ours(part: str, case: str, peer: str) -> Callable[[Found], Value]:
    """A peer's time divided by ours."""

    def figure(found: Found) -> Value:
        own = peers_of(found, part, case)[peer]
        return own["ratio"], own["ratio_lowest"], own["ratio_highest"]

    return figure


def ours_over(part: str, case: str, peer: str) -> Callable[[Found], Value]:
    """Our time divided by a peer's."""

    def figure(found: Found) -> Value:
        own = peers_of(found, part, case)[peer]
        return 1 / own["ratio"], 1 / own["ratio_highest"], 1 / own["ratio_lowest"]

    return figure


def layer_memory(found: Found) -> Value:
    """Peak memory of the notebook's layer in units of its queries, keys, values and outputs."""
    (case,) = [case for case in found["layer"]["cases"] if case["case"] == "notebook forward"] or [{}]
    four = 4 * 4 * case["batch"] * case["out_channels"] * case["size"] ** 2 / 1e9
    return case["peers"]["sasa"]["peak_gigabytes"] / four, None, None


def slowest_stage(found: Found) -> Value:
    """GFLOP/s of the slowest stage, forward."""
    own = [case["peers"]["sasa"] for case in found["stages"]["cases"] if case["mode"] == "forward"]
    slowest = min(own, key=lambda one: one["gflops"])
    return slowest["gflops"], slowest["gflops_lowest"], slowest["gflops_highest"]


def deviation(series: str) -> Callable[[Found], Value]:
    """Largest deviation of a series from its median."""

    def figure(found: Found) -> Value:
        own = found["scaling"]["deviation"][series]
        return own["value"], own["lowest"], own["highest"]

    return figure


def step_memory(found: Found) -> Value:
    """Peak memory of the network's training step over torchvision's ResNet-50's."""
    own = peers_of(found, "networks", "batch 8 training step")
    return own[OURS]["peak_gigabytes"] / own[RESNET]["peak_gigabytes"], None, None


def full_attention(found: Found) -> Value:
    """Images/s of full attention over torchvision's ResNet-50's, each measured in turns with the network with stem."""
    own = peers_of(found, "networks", "batch 8 forward")
    theirs, ours = own[RESNET], own[FULL]
    lowest, highest = theirs["ratio_lowest"] / ours["ratio_highest"], theirs["ratio_highest"] / ours["ratio_lowest"]
    return theirs["ratio"] / ours["ratio"], lowest, highest


def copy_share(case: str) -> Callable[[Found], Value]:
    """Bytes per second of our attention as a share of a copy's."""

    def figure(found: Found) -> Value:
        own, copy = peers_of(found, "attention", case)["sasa"], peers_of(found, "ceiling", COPY)[COPY]
        name = "gigabytes_per_second"
        low, high = own[f"{name}_lowest"], own[f"{name}_highest"]
        return own[name] / copy[name], low / copy[name], high / copy[name]

    return figure


def over_convolution_stem(case: str) -> Callable[[Found], Value]:
    """Time of the attention stem divided by the convolution stem's."""

    def figure(found: Found) -> Value:
        own = peers_of(found, "stem", case)["sasa"]
        return own["ratio"], own["ratio_lowest"], own["ratio_highest"]

    return figure


STEM = "SASA-ResNet-50, convolution stem / ResNet-50: images/s"
CPU = (
    Target("attention forward / convolution", False, 0.33, ours_over("attention", "notebook forward", CONVOLUTION)),
    Target("layer forward / convolution", False, 0.8, ours_over("layer", "notebook forward", CONVOLUTION)),
    Target("layer training / convolution", False, 1, ours_over("layer", "notebook training", CONVOLUTION)),
    Target("unfold / layer forward", True, 150, times_ours("layer", "notebook forward", "unfold")),
    Target("unfold / layer training, batch 8", True, 100, times_ours("layer", "notebook-batch8 training", "unfold")),
    Target("FlexAttention / attention forward", True, 100, times_ours("attention", "notebook forward", FLEX)),
    Target("layer forward: peak memory / (q, k, v, out)", False, 1.3, layer_memory),
    Target("slowest stage forward, GFLOP/s", True, 60, slowest_stage),
    Target("deviation from linear in pixels", False, 0.15, deviation("pixels")),
    Target("deviation from linear in taps", False, 0.15, deviation("taps")),
    Target("layer forward, bfloat16 / float32", False, 0.7, times_ours("layer", "notebook forward", "sasa bfloat16")),
    Target(f"{STEM} forward", True, 1.1, times_ours("networks", "batch 8 forward", RESNET)),
    Target("the same, batch norm folded in both", True, 1.1, times_ours("networks", "batch 8 forward, folded", RESNET)),
    Target("the same, batch 1", True, 1, times_ours("networks", "batch 1 forward", RESNET)),
    Target("the same, training step", True, 1, times_ours("networks", "batch 8 training step", RESNET)),
    Target("the same, peak memory of a training step", False, 1.1, step_memory),
    Target("attention stem forward / convolution stem", False, 2, over_convolution_stem("batch 8 forward")),
    Target("the same, forward and backward", False, 2, over_convolution_stem("batch 8 training")),
    Target("SASA-ResNet-50, full attention / ResNet-50: images/s forward", True, 1, full_attention),
)
FLASH = "FlexAttention / attention forward, bfloat16"
BYTES = "attention forward, bytes a second / a copy's, bfloat16"
GPU = (
    Target(FLASH, True, 3, times_ours("attention", "notebook bfloat16 forward", FLEX)),
    Target("the same, forward and backward", True, 4, times_ours("attention", "notebook bfloat16 training", FLEX)),
    Target(BYTES, True, 0.6, copy_share("notebook bfloat16 forward")),
    Target("the same, float32", True, 0.6, copy_share("notebook float32 forward")),
    Target(
        "layer / 3x3 convolution forward, bfloat16",
        False,
        1,
        ours_over("layer", "notebook bfloat16 forward", CONVOLUTION),
    ),
    Target("the same, forward and backward", False, 1, ours_over("layer", "notebook bfloat16 training", CONVOLUTION)),
    Target(f"{STEM} forward", True, 1, times_ours("networks", "batch 128 forward", RESNET)),
    Target("the same, training step", True, 1, times_ours("networks", "batch 128 training step", RESNET)),
    Target("the same, forward, both compiled", True, 1, times_ours("networks", "batch 128 forward, compiled", RESNET)),
    Target(
        "the same, training step, both compiled",
        True,
        1,
        times_ours("networks", "batch 128 training step, compiled", RESNET),
    ),
    Target("attention stem forward / convolution stem", False, 2, over_convolution_stem("batch 128 forward")),
    Target("the same, forward and backward", False, 2, over_convolution_stem("batch 128 training")),
)


def evaluate(found: Found, device: str = "cpu") -> list[tuple[Target, Value | None]]:
    """Every target with its figure; None if it was not measured."""
    rows = []
    for target in CPU if device == "cpu" else GPU:
        try:
            rows.append((target, target.figure(found)))
        except KeyError:
            rows.append((target, None))
    return rows
