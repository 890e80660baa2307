"""What the GPU's kernels should reach."""

from __future__ import annotations

from ..layer import CONVOLUTION
from ..targets import Results, Target, Targets, Value, peers_of, sasa_over, times_sasa
from .networks import RESNET

FLEX = "FlexAttention compiled"


def copy_share(results: Results, case: str) -> Value:
    """Bytes a second of our attention as a share of a copy's."""
    found = peers_of(results, "attention", case)["sasa"]
    return Value(found["copy_share"], found["copy_share_lowest"], found["copy_share_highest"])


TARGETS: Targets = [
    (
        Target("FlexAttention / attention forward, bfloat16", 3, at_least=True),
        lambda results: times_sasa(results, "attention", "notebook bfloat16 forward", FLEX),
    ),
    (
        Target("the same, forward and backward", 4, at_least=True),
        lambda results: times_sasa(results, "attention", "notebook bfloat16 training", FLEX),
    ),
    (
        Target("attention forward, bytes a second / a copy's, bfloat16", 0.6, at_least=True),
        lambda results: copy_share(results, "notebook bfloat16 forward"),
    ),
    (
        Target("the same, float32", 0.6, at_least=True),
        lambda results: copy_share(results, "notebook float32 forward"),
    ),
    (
        Target("layer / 3x3 convolution forward, bfloat16", 1, at_least=False),
        lambda results: sasa_over(results, "layer", "notebook bfloat16 forward", CONVOLUTION),
    ),
    (
        Target("the same, forward and backward", 1, at_least=False),
        lambda results: sasa_over(results, "layer", "notebook bfloat16 training", CONVOLUTION),
    ),
    (
        Target("SASA-ResNet-50, convolution stem / ResNet-50: images/s forward", 1, at_least=True),
        lambda results: times_sasa(results, "networks", "batch 128 forward", RESNET),
    ),
    (
        Target("the same, training step", 1, at_least=True),
        lambda results: times_sasa(results, "networks", "batch 128 training step", RESNET),
    ),
    (
        Target("the same, forward, both compiled", 1, at_least=True),
        lambda results: times_sasa(results, "networks", "batch 128 forward, compiled", RESNET),
    ),
    (
        Target("the same, training step, both compiled", 1, at_least=True),
        lambda results: times_sasa(results, "networks", "batch 128 training step, compiled", RESNET),
    ),
]
