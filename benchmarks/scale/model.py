"""The time of a step of data-parallel training on ImageNet, on 1 to 1,024 GPUs: A MODEL, NOT A MEASUREMENT.

FLOPs, parameters and layers are counted on this package's networks. Machines are as their vendors publish them. What
is neither counted nor published is an assumption, and is called so: foremost the speed of attention on a GPU, which is
not measured here. runs.py makes runs of steps; docs/scale.md has the equations, the sources and what follows.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from functools import cache

from ..processes import ROOT

FILE = ROOT / "benchmarks/results/scale.json"
SASA, CONVOLUTION = "sasa_resnet50", "sasa_resnet50_conv"
NODE = 8
# The paper's recipe (arXiv 1906.05909), ImageNet's size (ILSVRC 2012) and the bytes of its archive of training images.
EPOCHS, BATCH, LEARNING_RATE = 130, 4096, 1.6
IMAGES, ARCHIVE_BYTES = 1_281_167, 147_897_477_120
# Largest batches shown to train a ResNet-50 as well as small ones: by the linear rule (arXiv 1706.02677), with LARS
# (arXiv 1708.03888).
LINEAR_LIMIT, LARS_LIMIT = 8192, 32768


@dataclass(frozen=True)
class Network:
    """What is counted on a network.

    Attributes:
        name: timm's.
        flops: of a forward for one 224x224 image; a multiply-add is 2.
        parameters: trained numbers.
        norms: batch norms.
        layers: modules that launch kernels of their own.
    """

    name: str
    flops: int
    parameters: int
    norms: int
    layers: int

    @property
    def training_flops(self) -> int:
        """Of forward and backward for one image: the backward computes two products for the forward's one."""
        return 3 * self.flops

    @property
    def run_flops(self) -> int:
        """Of the whole run."""
        return self.training_flops * IMAGES * EPOCHS


@dataclass(frozen=True)
class Chip:
    """Published figures of an accelerator.

    Attributes:
        name: the vendor's.
        flops_per_second: dense peak in bfloat16.
        memory_bytes_per_second: of its HBM.
        convolution: images a second at which one trains ResNet-50, one among several in a published run.
    """

    name: str
    flops_per_second: float
    memory_bytes_per_second: float
    convolution: float


@dataclass(frozen=True)
class Machine(Chip):
    """A chip in nodes of eight, each with a NIC of its own.

    Attributes:
        link_bytes_per_second: of NVLink, one direction, a GPU.
        nic_bytes_per_second: one direction, a GPU.
        memory_bytes: of HBM, a GPU.
        cores: of the node's CPUs.
    """

    link_bytes_per_second: float
    nic_bytes_per_second: float
    memory_bytes: float
    cores: int


# Peak and HBM: https://www.nvidia.com/content/dam/en-zz/Solutions/Data-Center/a100/pdf/nvidia-a100-datasheet-us-nvidia-1758950-r4-web.pdf
# NVLink, 600 GB/s both ways: https://www.nvidia.com/en-us/data-center/nvlink/; NIC, 200 Gb/s, and cores, DGX A100:
# https://www.nvidia.com/content/dam/en-zz/Solutions/Data-Center/dgx-a100/dgxa100-system-architecture-white-paper.pdf
# ResNet-50, 408 images a GPU: mlcommons/training_results_v3.0, Dell/results/XE9680x8A100-SXM-80GB/resnet/result_0.txt
A100 = Machine("A100 SXM 80 GB", 312e12, 2.039e12, 28_620 / 8, 300e9, 25e9, 80e9, 128)
# Peak (half of the figure with sparsity) and HBM: https://www.nvidia.com/en-us/data-center/h100/
# NVLink, 900 GB/s both ways: https://www.nvidia.com/en-us/technologies/hopper-architecture/; NIC, 400 Gb/s, and cores:
# https://docs.nvidia.com/dgx-basepod/reference-architecture-infrastructure-foundation-enterprise-ai/latest/core-components.html
# ResNet-50, 400 images a GPU: the same repository, Dell/results/XE9680x8H100-SXM-80GB/resnet/result_0.txt
H100 = Machine("H100 SXM 80 GB", 989e12, 3.35e12, 56_080 / 8, 450e9, 50e9, 80e9, 112)
# https://cloud.google.com/tpu/docs/v3; ResNet-50 on 1,024 chips: arXiv 1811.06992
TPU_V3 = Chip("TPU v3", 123e12, 900e9, 1.05e6 / 1024)
MACHINES = (A100, H100)


@dataclass(frozen=True)
class Assumptions:
    """What the model takes for granted; docs/scale.md has the sources.

    Attributes:
        attention_share: attention's share of the peak, of that of the convolution.
        kernels: launched a layer in a step: forward, backward, optimiser.
        kernel_seconds: of a kernel that don't shrink with the batch.
        micro_batch: most images a GPU computes at once; more are accumulated.
        backward_share: of a step's compute.
        passes: of the optimiser over the parameters, in float32.
        gradient_bytes: of one number.
        bucket_bytes: of DistributedDataParallel.
        volume: of the traffic, in that of an all-reduce.
        link_share: of NVLink's bandwidth that an all-reduce reaches.
        nic_share: of the NIC's.
        call_seconds: of any collective.
        link_seconds: latency of a step of the ring inside a node.
        nic_seconds: latency of a level of the tree between nodes.
        variation: standard deviation of a GPU's step time, in its mean.
        decoded: images a second that a CPU core decodes and crops.
    """

    attention_share: float = 0.5
    kernels: int = 6
    kernel_seconds: float = 5e-6
    micro_batch: int = 256
    backward_share: float = 2 / 3
    passes: int = 7
    gradient_bytes: int = 4
    bucket_bytes: int = 25 * 2**20
    volume: float = 1.0
    link_share: float = 0.6
    nic_share: float = 0.9
    call_seconds: float = 6.8e-6
    link_seconds: float = 0.6e-6
    nic_seconds: float = 5e-6
    variation: float = 0.02
    decoded: float = 300.0


ASSUMED = Assumptions()


@dataclass(frozen=True)
class Step:
    """Seconds of a step, by what they go to; ``gradients`` is what the backward doesn't hide."""

    compute: float
    kernels: float
    optimiser: float
    stragglers: float
    gradients: float
    norms: float

    @property
    def seconds(self) -> float:
        """Of the step."""
        return sum(asdict(self).values())


@cache
def network(name: str) -> Network:
    """Count a network, on the meta device."""
    import timm
    from torch import nn

    import sasa
    from sasa.models import count_flops

    model = timm.create_model(name, device="meta")
    modules = list(model.modules())
    silent = (nn.Identity, nn.Flatten)
    leaves = [module for module in modules if not list(module.children()) and not isinstance(module, silent)]
    attention = [module for module in modules if isinstance(module, sasa.RelativeSelfAttention | sasa.AttentionStem)]
    return Network(
        name,
        count_flops(model, (1, 3, 224, 224)),
        sum(parameter.numel() for parameter in model.parameters()),
        sum(isinstance(module, nn.BatchNorm2d) for module in modules),
        len(leaves) + len(attention),
    )


def share_of_peak(chip: Chip, name: str, assumed: Assumptions = ASSUMED) -> float:
    """What of the chip's peak a network's products reach: published for the convolution, assumed for attention."""
    published = chip.convolution * network(CONVOLUTION).training_flops / chip.flops_per_second
    return published * (1.0 if name == CONVOLUTION else assumed.attention_share)


def nodes(gpus: int) -> tuple[int, int]:
    """GPUs of a node that take part, and nodes."""
    if gpus < 1 or (gpus > NODE and gpus % NODE):
        raise ValueError(f"gpus: 1 to {NODE} or a multiple of {NODE} expected, got {gpus}")
    return min(gpus, NODE), max(1, gpus // NODE)


def ring_volume(members: int) -> float:
    """Bytes that each member of an all-reduce sends, for each byte that is reduced."""
    return 2 * (members - 1) / members


def latency(gpus: int, assumed: Assumptions = ASSUMED) -> float:
    """Seconds of an all-reduce of nothing: a ring in the node, a tree between nodes."""
    inside, outside = nodes(gpus)
    if gpus == 1:
        return 0.0
    steps, levels = 2 * (inside - 1), 2 * math.ceil(math.log2(outside))
    return assumed.call_seconds + steps * assumed.link_seconds + levels * assumed.nic_seconds


def all_reduce(size: float, machine: Machine, gpus: int, assumed: Assumptions = ASSUMED) -> float:
    """Seconds to sum ``size`` bytes: scattered over a node's GPUs, summed between nodes by each NIC, gathered."""
    inside, outside = nodes(gpus)
    link = ring_volume(inside) * size / (assumed.link_share * machine.link_bytes_per_second)
    nic = ring_volume(outside) * size / inside / (assumed.nic_share * machine.nic_bytes_per_second)
    return assumed.volume * (link + nic) + latency(gpus, assumed)


def step(
    name: str, machine: Machine, gpus: int, images: float, norm_group: int = 1, assumed: Assumptions = ASSUMED
) -> Step:
    """One step of data-parallel training.

    Args:
        name: of the network.
        machine: what it runs on.
        gpus: how many.
        images: a GPU.
        norm_group: GPUs whose batch norms share their statistics.
        assumed: what the model takes for granted.

    Returns:
        Seconds.
    """
    own = network(name)
    micro_batches = math.ceil(images / assumed.micro_batch)
    peak = machine.flops_per_second * share_of_peak(machine, name, assumed)
    compute = images * own.training_flops / peak
    kernels = micro_batches * own.layers * assumed.kernels * assumed.kernel_seconds
    work = compute + kernels
    size = own.parameters * assumed.gradient_bytes
    buckets = math.ceil(size / assumed.bucket_bytes)
    bucket = all_reduce(size / buckets, machine, gpus, assumed)
    backward = assumed.backward_share * work / micro_batches  # of the last micro-batch: only that one sends
    return Step(
        compute=compute,
        kernels=kernels,
        optimiser=assumed.passes * 4 * own.parameters / machine.memory_bytes_per_second,
        stragglers=assumed.variation * math.sqrt(2 * math.log(gpus)) * work,  # bounds a normal variable's maximum
        gradients=bucket + max(0.0, (buckets - 1) * bucket - backward) if gpus > 1 else 0.0,
        norms=2 * micro_batches * own.norms * latency(norm_group, assumed),
    )


def learning_rate(batch: int) -> float:
    """The paper's, by the linear rule."""
    return LEARNING_RATE * batch / BATCH


def recipe(batch: int) -> str:
    """How a batch of this size has been shown to train a ResNet-50."""
    limits = {LINEAR_LIMIT: "linear rule", LARS_LIMIT: "LARS or LAMB"}
    return next((words for limit, words in limits.items() if batch <= limit), "not by these papers")
