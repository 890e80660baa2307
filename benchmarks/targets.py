"""What the library should reach, and how far the results are from it. A benchmark only says so; it never fails."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

Results = dict[str, dict[str, Any]]  # by part: attention, layer, stages, scaling, networks

CONVOLUTION = "convolution 3x3"


class Value(NamedTuple):
    """A figure, with its lowest and highest over the turns where there are any."""

    value: float
    lowest: float | None = None
    highest: float | None = None


class Target(NamedTuple):
    """A figure to reach: at least or at most ``limit``."""

    name: str
    limit: float
    at_least: bool

    def reached(self, value: Value) -> bool:
        """Whether the figure, the median one, is good enough."""
        return value.value >= self.limit if self.at_least else value.value <= self.limit


Targets = list[tuple[Target, Callable[[Results], Value]]]


def peers_of(results: Results, part: str, case: str) -> dict[str, Any]:
    """The peers of a case; KeyError where it was not measured."""
    (found,) = [entry for entry in results[part]["cases"] if entry["case"] == case] or [None]
    if found is None:
        raise KeyError(case)
    return found["peers"]


def times_sasa(results: Results, part: str, case: str, peer: str) -> Value:
    """A peer's time divided by ours."""
    found = peers_of(results, part, case)[peer]
    return Value(found["ratio_to_sasa"], found["ratio_lowest"], found["ratio_highest"])


def sasa_over(results: Results, part: str, case: str, peer: str) -> Value:
    """Our time divided by a peer's."""
    value, lowest, highest = times_sasa(results, part, case, peer)
    return Value(1 / value, 1 / highest, 1 / lowest)


def memory(results: Results) -> Value:
    """Peak memory of the notebook's layer in units of its queries, keys, values and outputs."""
    (case,) = [case for case in results["layer"]["cases"] if case["case"] == "notebook forward"] or [{}]
    return Value(case["peers"]["sasa"]["peak_gigabytes"] / case["qkv_out_gigabytes"])


def lowest_throughput(results: Results) -> Value:
    """GFLOP/s of the slowest stage, forward."""
    slowest = min(
        (stage for stage in results["stages"]["stages"] if stage["mode"] == "forward"), key=lambda s: s["gflops"]
    )
    return Value(slowest["gflops"], slowest["gflops_lowest"], slowest["gflops_highest"])


def linearity(results: Results, series: str) -> Value:
    """Largest deviation of a series from its median."""
    found = results["scaling"]["series"][series]
    return Value(found["deviation"], found["deviation_lowest"], found["deviation_highest"])


def memory_of_a_step(results: Results) -> Value:
    """Peak memory of the network's training step over torchvision's ResNet-50's."""
    peers = peers_of(results, "networks", "batch 8 training step")
    return Value(peers["sasa_resnet50_convstem"]["peak_gigabytes"] / peers["torchvision resnet50"]["peak_gigabytes"])


def images_ratio(case: str, network: str = "sasa_resnet50_convstem") -> Callable[[Results], Value]:
    """Images a second of a network over torchvision's ResNet-50's."""

    def figure(results: Results) -> Value:
        theirs = times_sasa(results, "networks", case, "torchvision resnet50")
        ours = times_sasa(results, "networks", case, network)
        lowest, highest = theirs.lowest or theirs.value, theirs.highest or theirs.value
        if network != "sasa_resnet50_convstem":  # measured against the other network, turn by turn
            lowest, highest = lowest / (ours.highest or ours.value), highest / (ours.lowest or ours.value)
        return Value(theirs.value / ours.value, lowest, highest)

    return figure


TARGETS: Targets = [
    (
        Target("attention forward / convolution", 0.33, at_least=False),
        lambda results: sasa_over(results, "attention", "notebook forward", CONVOLUTION),
    ),
    (
        Target("layer forward / convolution", 0.80, at_least=False),
        lambda results: sasa_over(results, "layer", "notebook forward", CONVOLUTION),
    ),
    (
        Target("layer training / convolution", 1.0, at_least=False),
        lambda results: sasa_over(results, "layer", "notebook training", CONVOLUTION),
    ),
    (
        Target("unfold / layer forward", 150, at_least=True),
        lambda results: times_sasa(results, "layer", "notebook forward", "unfold"),
    ),
    (
        Target("unfold / layer training, batch 8", 100, at_least=True),
        lambda results: times_sasa(results, "layer", "notebook-batch8 training", "unfold"),
    ),
    (
        Target("FlexAttention / attention forward", 100, at_least=True),
        lambda results: times_sasa(results, "attention", "notebook forward", "FlexAttention compiled"),
    ),
    (Target("layer forward: peak memory / (q, k, v, out)", 1.3, at_least=False), memory),
    (Target("slowest stage forward, GFLOP/s", 60, at_least=True), lowest_throughput),
    (
        Target("deviation from linear in pixels", 0.15, at_least=False),
        lambda results: linearity(results, "pixels"),
    ),
    (Target("deviation from linear in taps", 0.15, at_least=False), lambda results: linearity(results, "taps")),
    (
        Target("layer forward, bfloat16 / float32", 0.7, at_least=False),
        lambda results: times_sasa(results, "layer", "notebook forward", "sasa bfloat16"),
    ),
    (
        Target("SASA-ResNet-50, convolution stem / ResNet-50: images/s forward", 1.1, at_least=True),
        images_ratio("batch 8 forward"),
    ),
    (Target("the same, batch norm folded in both", 1.1, at_least=True), images_ratio("batch 8 forward, folded")),
    (Target("the same, batch 1", 1.0, at_least=True), images_ratio("batch 1 forward")),
    (Target("the same, training step", 1.0, at_least=True), images_ratio("batch 8 training step")),
    (Target("the same, peak memory of a training step", 1.1, at_least=False), memory_of_a_step),
    (
        Target("SASA-ResNet-50, full attention / ResNet-50: images/s forward", 1.0, at_least=True),
        images_ratio("batch 8 forward", "sasa_resnet50"),
    ),
]


def evaluate(results: Results, targets: Targets = TARGETS) -> list[dict[str, Any]]:
    """Every target with its figure; ``value`` and ``reached`` are None where it was not measured."""
    rows = []
    for target, figure in targets:
        row: dict[str, Any] = target._asdict()
        try:
            value = figure(results)
        except KeyError:
            row |= {"value": None, "lowest": None, "highest": None, "reached": None}
        else:
            row |= value._asdict() | {"reached": target.reached(value)}
        rows.append(row)
    return rows
