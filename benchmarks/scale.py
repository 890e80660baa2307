"""Training on ImageNet on 1 to 1,024 GPUs: A MODEL, NOT A MEASUREMENT.

    python -m benchmarks.scale     writes benchmarks/results/scale.json and scale.png

FLOPs, parameters and layers are counted on this package's networks. Machines are as their vendors publish them. What is
neither counted nor published is an assumption and labelled as such: above all the speed of attention on a GPU, which is
not measured here. docs/scale.md has the equation and the conclusions; ``python -m benchmarks.readme`` fills in its
table.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any

from .plots import CONVOLUTIONS, OURS
from .results import RESULTS
from .tables import Listing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FILE = RESULTS / "scale.json"
SASA, TWIN = "sasa_resnet50", "sasa_resnet50_conv"
NODE = 8
GPUS = (1, 8, 32, 64, 128, 512, 1024)
# The paper's recipe (arXiv 1906.05909) and ImageNet's size (ILSVRC 2012).
EPOCHS, BATCH, IMAGES = 130, 4096, 1_281_167
IMAGES_A_GPU = 128  # if the batch grows with the number of GPUs


@dataclass(frozen=True)
class Counts:
    """What is counted on a network."""

    name: str
    flops: int  # of a forward for one 224x224 image; a multiply-add is 2
    parameters: int
    norms: int
    layers: int  # modules that launch their own kernels

    @property
    def training_flops(self) -> int:
        """For one image: the backward computes two products for the forward's one."""
        return 3 * self.flops


@dataclass(frozen=True)
class Chip:
    """Published figures of a GPU in nodes of eight, each with its own NIC."""

    name: str
    flops_per_second: float  # dense peak in bfloat16
    memory_bytes_per_second: float
    convolution: float  # images a second at which one trains ResNet-50, one among several in a published run
    link_bytes_per_second: float  # of NVLink, one direction, a GPU
    nic_bytes_per_second: float


# Peak and HBM: https://www.nvidia.com/content/dam/en-zz/Solutions/Data-Center/a100/pdf/nvidia-a100-datasheet-us-nvidia-1758950-r4-web.pdf
# NVLink, 600 GB/s both ways: https://www.nvidia.com/en-us/data-center/nvlink/; NIC, 200 Gb/s, DGX A100:
# https://www.nvidia.com/content/dam/en-zz/Solutions/Data-Center/dgx-a100/dgxa100-system-architecture-white-paper.pdf
# ResNet-50, 408 images a GPU: mlcommons/training_results_v3.0, Dell/results/XE9680x8A100-SXM-80GB/resnet/result_0.txt
A100 = Chip("A100 SXM 80 GB", 312e12, 2.039e12, 28_620 / 8, 300e9, 25e9)
# Peak (half of the figure with sparsity) and HBM: https://www.nvidia.com/en-us/data-center/h100/
# NVLink, 900 GB/s both ways: https://www.nvidia.com/en-us/technologies/hopper-architecture/; NIC, 400 Gb/s:
# https://docs.nvidia.com/dgx-basepod/reference-architecture-infrastructure-foundation-enterprise-ai/latest/core-components.html
# ResNet-50, 400 images a GPU: the same repository, Dell/results/XE9680x8H100-SXM-80GB/resnet/result_0.txt
H100 = Chip("H100 SXM 80 GB", 989e12, 3.35e12, 56_080 / 8, 450e9, 50e9)
CHIPS = (A100, H100)

# Published ResNet-50 runs: where, GPUs, images per GPU, images per second. MLPerf's are from its logs (docs/scale.md
# names them): throughput of late epochs, or the time of the last four where the log notes only when work was queued.
# NVIDIA's example states no images a GPU: 256 is an assumption.
PUBLISHED = (
    ("MLPerf Training 3.0, Dell", A100, 8, 408, 28_620),
    ("MLPerf Training 3.0, Dell", H100, 8, 400, 56_080),
    ("MLPerf Training 2.0, NVIDIA", A100, 1024, 35, 4 * IMAGES / 2.153),
    ("MLPerf Training 3.0, NVIDIA", H100, 64, 50, 294_500),
    ("MLPerf Training 3.0, NVIDIA", H100, 512, 40, 4 * IMAGES / 2.453),
    ("PyTorch example, NVIDIA", A100, 1, 256, 2_470),
    ("PyTorch example, NVIDIA", A100, 8, 256, 16_621),
)


@dataclass(frozen=True)
class Assumptions:
    """The assumptions of the model."""

    # Attention's share of peak relative to the convolution's: not measured. The paper found it slower than its FLOPs.
    attention_share: float = 0.5
    kernels: int = 6  # per layer and step: 2 forward, 3 backward, 1 optimiser
    kernel_seconds: float = 5e-6  # that don't shrink with the batch; a launch takes 4 to 6 µs
    micro_batch: int = 256  # most images a GPU computes at once; more are accumulated
    backward_share: float = 2 / 3  # of a step's products: two for the forward's one
    passes: int = 7  # of the optimiser, in float32: gradient, parameter, momentum, average read; the last three written
    gradient_bytes: int = 4  # float32 parameters under autocast
    bucket_bytes: int = 25 * 2**20  # DistributedDataParallel's default
    volume: float = 1.0  # of the traffic, in that of an all-reduce: DDP; 1.5 for FSDP (arXiv 1910.02054)
    # Shares of the bandwidths that are reached: of Calculon's A100 and H100 (github.com/calculon-ai/calculon);
    # 46 to 48 of 50 GB/s of the NIC are expected (github.com/NVIDIA/nccl-tests/issues/290).
    link_share: float = 0.6
    nic_share: float = 0.9
    # Any collective, a hop in the node, a level of the tree between nodes: NCCL's own model, protocol LL, as quoted in
    # github.com/NVIDIA/nccl/issues/1334.
    call_seconds: float = 6.8e-6
    link_seconds: float = 0.6e-6
    nic_seconds: float = 5e-6
    variation: float = 0.02  # standard deviation of a GPU's step time, in its mean


ASSUMED = Assumptions()


@dataclass(frozen=True)
class StepSeconds:
    """Seconds of a step, by component."""

    compute: float
    kernels: float
    optimiser: float
    stragglers: float
    gradients: float  # the part not hidden by the backward
    norms: float

    @property
    def total(self) -> float:
        """Of the step."""
        return sum(asdict(self).values())


@cache
def counted(name: str) -> Counts:
    """Count a network, on the meta device."""
    import timm
    from torch import nn

    import sasa
    from sasa.models import count_flops

    model = timm.create_model(name, device="meta")
    modules, silent = list(model.modules()), (nn.Identity, nn.Flatten)
    leaves = sum(not [*module.children()] and not isinstance(module, silent) for module in modules)
    attention = sum(isinstance(module, sasa.RelativeSelfAttention | sasa.AttentionStem) for module in modules)
    norms = sum(isinstance(module, nn.BatchNorm2d) for module in modules)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Counts(name, count_flops(model, (1, 3, 224, 224)), parameters, norms, leaves + attention)


def share_of_peak(chip: Chip, name: str, assumed: Assumptions = ASSUMED) -> float:
    """Share of the chip's peak that a network's products reach: published for convolution, assumed for attention."""
    published = chip.convolution * counted(TWIN).training_flops / chip.flops_per_second
    return published * (1.0 if name == TWIN else assumed.attention_share)


def nodes(gpus: int) -> tuple[int, int]:
    """GPUs used per node, and nodes."""
    if gpus < 1 or (gpus > NODE and gpus % NODE):
        raise ValueError(f"gpus: expected 1 to {NODE} or a multiple of {NODE}, got {gpus}")
    return min(gpus, NODE), max(1, gpus // NODE)


def ring_volume(members: int) -> float:
    """Bytes that each member of an all-reduce sends per byte reduced."""
    return 2 * (members - 1) / members


def latency(gpus: int, assumed: Assumptions = ASSUMED) -> float:
    """Seconds of an all-reduce of nothing: a ring in the node, a tree between nodes."""
    inside, outside = nodes(gpus)
    if gpus == 1:
        return 0.0
    steps, levels = 2 * (inside - 1), 2 * math.ceil(math.log2(outside))
    return assumed.call_seconds + steps * assumed.link_seconds + levels * assumed.nic_seconds


def all_reduce(size: float, chip: Chip, gpus: int, assumed: Assumptions = ASSUMED) -> float:
    """Seconds to sum ``size`` bytes: scattered over a node's GPUs, summed between nodes by each NIC, gathered."""
    inside, outside = nodes(gpus)
    link = ring_volume(inside) * size / (assumed.link_share * chip.link_bytes_per_second)
    nic = ring_volume(outside) * size / inside / (assumed.nic_share * chip.nic_bytes_per_second)
    return assumed.volume * (link + nic) + latency(gpus, assumed)


def step(
    name: str, chip: Chip, gpus: int, images: float, norm_group: int = 1, assumed: Assumptions = ASSUMED
) -> StepSeconds:
    """One step with that many images per GPU; ``norm_group`` GPUs share batch norm's statistics."""
    own = counted(name)
    micro_batches = math.ceil(images / assumed.micro_batch)
    compute = images * own.training_flops / (chip.flops_per_second * share_of_peak(chip, name, assumed))
    kernels = micro_batches * own.layers * assumed.kernels * assumed.kernel_seconds
    work = compute + kernels
    size = own.parameters * assumed.gradient_bytes
    buckets = math.ceil(size / assumed.bucket_bytes)
    bucket = all_reduce(size / buckets, chip, gpus, assumed)
    backward = assumed.backward_share * work / micro_batches  # of the last micro-batch: only that one sends
    return StepSeconds(
        compute=compute,
        kernels=kernels,
        optimiser=assumed.passes * 4 * own.parameters / chip.memory_bytes_per_second,
        stragglers=assumed.variation * math.sqrt(2 * math.log(gpus)) * work,  # bounds a normal variable's maximum
        gradients=bucket + max(0.0, (buckets - 1) * bucket - backward) if gpus > 1 else 0.0,
        norms=2 * micro_batches * own.norms * latency(norm_group, assumed),
    )


def point(
    name: str, chip: Chip, gpus: int, norm_group: int = 1, assumed: Assumptions = ASSUMED, images: int | None = None
) -> dict[str, Any]:
    """A run of all epochs with the paper's batch, or a number of images per GPU; its efficiency relative to one GPU."""
    batch, alone_with = (BATCH, BATCH) if images is None else (images * gpus, images)
    own = step(name, chip, gpus, batch / gpus, norm_group, assumed)
    rate, alone = batch / own.total, step(name, chip, 1, alone_with, 1, assumed)
    return {
        "step_seconds": own.total,
        "shares": {what: seconds / own.total for what, seconds in asdict(own).items()},
        "images_per_second": rate,
        "efficiency": rate / gpus / (alone_with / alone.total),
        "hours": EPOCHS * IMAGES / rate / 3600,
    }


def published_ratio(chip: Chip, gpus: int, images: int, published: float) -> float:
    """The model's images a second of the convolution in a published run's, whose GPUs take their images at once too."""
    own = step(TWIN, chip, gpus, images, assumed=replace(ASSUMED, micro_batch=images))
    return images * gpus / own.total / published


def compute() -> dict[str, Any]:
    """All inputs and outputs."""
    found = {
        "what": "a model, not a measurement",
        "networks": [asdict(counted(name)) for name in (SASA, TWIN)],
        "chips": [asdict(chip) | {"share_of_peak": share_of_peak(chip, TWIN)} for chip in CHIPS],
        "assumptions": asdict(ASSUMED),
        "runs": [
            {
                "chip": chip.name,
                "gpus": gpus,
                "attention": point(SASA, chip, gpus),
                "norm_over_all": point(SASA, chip, gpus, norm_group=gpus),
                "convolution": point(TWIN, chip, gpus),
                "weak": point(SASA, chip, gpus, images=IMAGES_A_GPU),
            }
            for chip in CHIPS
            for gpus in GPUS
        ],
        "published": [
            {"where": where, "chip": chip.name, "gpus": gpus, "ratio": published_ratio(chip, gpus, *rest)}
            for where, chip, gpus, *rest in PUBLISHED
        ],
    }
    # Six digits, so that the last bit doesn't depend on the machine.
    return json.loads(json.dumps(found), parse_float=lambda text: float(f"{float(text):.6g}"))


def listing(found: dict[str, Any]) -> Listing:
    """The table of docs/scale.md."""
    rows = [
        [
            run["chip"].split()[0],
            f"{run['gpus']:,}",
            f"{BATCH // run['gpus']:,}",
            f"{1e3 * run['attention']['step_seconds']:.1f}",
            *(write(run[kind]) for kind in ("attention", "convolution", "weak") for write in (takes, efficiency)),
            efficiency(run["norm_over_all"]),
        ]
        for run in found["runs"]
    ]
    header = ["", "GPUs", "images a GPU", "ms a step", "a run takes", "efficiency", "convolution takes", "efficiency"]
    header += [f"{IMAGES_A_GPU} images a GPU: a run takes", "efficiency", "norm over all GPUs: efficiency"]
    return Listing(header, rows, words=1)


def takes(run: dict[str, Any]) -> str:
    """Hours, or minutes where they are few."""
    hours = run["hours"]
    return f"{hours:.1f} h" if hours >= 1 else f"{60 * hours:.{0 if hours >= 1 / 6 else 1}f} min"


def efficiency(run: dict[str, Any]) -> str:
    """As a share of one GPU's."""
    return f"{run['efficiency']:.{1 if run['efficiency'] < 0.0995 else 0}%}"


def figure(found: dict[str, Any]) -> Figure:
    """Efficiency, and hours of a run, against GPUs."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(10, 4.6), layout="constrained")
    drawn.suptitle("A MODEL, NOT A MEASUREMENT: sasa_resnet50 on ImageNet, 130 epochs", fontsize=10)
    kinds = {
        "attention": ("-", "batch 4,096"),
        "norm_over_all": (":", "batch 4,096, batch norm over all GPUs"),
        "weak": ("--", f"{IMAGES_A_GPU} images a GPU"),
        "convolution": ("-.", "batch 4,096, convolution"),
    }
    titles = {"efficiency": "images a second and GPU, in those of one GPU", "hours": "hours of a run"}
    for panel, (key, title) in zip(drawn.subplots(1, 2), titles.items(), strict=True):
        for chip, shade, mark in zip(CHIPS, (OURS, "tab:purple"), "os", strict=True):
            own = [run for run in found["runs"] if run["chip"] == chip.name]
            for kind, (line, words) in kinds.items():
                tint = CONVOLUTIONS if kind == "convolution" else shade
                values = [run[kind][key] for run in own]
                panel.plot(GPUS, values, mark + line, color=tint, ms=4, label=f"{chip.name.split()[0]}, {words}")
        panel.set_xscale("log", base=2)
        panel.set_xticks(GPUS, [f"{gpus:,}" for gpus in GPUS])
        panel.set(xlabel="GPUs", title=title)
        panel.grid(alpha=0.25)
    panel.set_yscale("log")
    drawn.axes[0].legend(fontsize=7, loc="lower left")
    return drawn


if __name__ == "__main__":
    result = compute()
    FILE.write_text(json.dumps(result, indent=1) + "\n")
    figure(result).savefig(FILE.with_suffix(".png"), dpi=130)
    print(f"wrote {FILE} and its picture")
