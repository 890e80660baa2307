"""Runs of the model: the paper's batch, a batch that grows, what is advised, what would change, what was published."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

from . import model
from .model import A100, ASSUMED, BATCH, CONVOLUTION, H100, MACHINES, SASA, TPU_V3, Assumptions, Machine

Run = dict[str, Any]

GPUS = (1, 8, 32, 64, 128, 512, 1024)
FSDP = 1.5  # its traffic, in DDP's: parameters gathered twice, gradients scattered, each half of an all-reduce
IMAGES_A_GPU = 128  # where the batch grows with the number of GPUs
# (GPUs, batch, GPUs that share batch norm's statistics): what docs/scale.md advises.
SETUPS = ((1, BATCH, 1), (8, BATCH, 1), (64, BATCH, 1), (1024, BATCH, 8), (1024, model.LARS_LIMIT, 1))
# Images a second of published ResNet-50 runs: where, GPUs, images a GPU. MLPerf's are from its logs, named in
# docs/scale.md: the throughput of late epochs, or what the last four epochs took where the log notes only when work was
# queued. NVIDIA's example states its own, and no images a GPU: 256 is an assumption.
PUBLISHED = (
    ("MLPerf Training 3.0, Dell", A100, 8, 408, 28_620),
    ("MLPerf Training 3.0, Dell", H100, 8, 400, 56_080),
    ("MLPerf Training 2.0, NVIDIA", A100, 1024, 35, 4 * model.IMAGES / 2.153),
    ("MLPerf Training 3.0, NVIDIA", H100, 64, 50, 294_500),
    ("MLPerf Training 3.0, NVIDIA", H100, 512, 40, 4 * model.IMAGES / 2.453),
    ("PyTorch example, NVIDIA", A100, 1, 256, 2_470),
    ("PyTorch example, NVIDIA", A100, 8, 256, 16_621),
)
# What would change the picture: words, GPUs that share batch norm's statistics (0: all), what is assumed instead.
CHANGES: tuple[tuple[str, int, Assumptions], ...] = (
    ("as assumed", 1, ASSUMED),
    ("attention at the convolution's share of the peak", 1, replace(ASSUMED, attention_share=1.0)),
    ("attention at a quarter of it", 1, replace(ASSUMED, attention_share=0.25)),
    ("20 µs a kernel (launched one by one from Python)", 1, replace(ASSUMED, kernel_seconds=20e-6)),
    ("1 µs a kernel (CUDA graphs, fused layers)", 1, replace(ASSUMED, kernel_seconds=1e-6)),
    ("gradients sent in bfloat16", 1, replace(ASSUMED, gradient_bytes=2)),
    ("one bucket: nothing hidden behind the backward", 1, replace(ASSUMED, bucket_bytes=10**9)),
    ("FSDP", 1, replace(ASSUMED, volume=FSDP)),
    ("a tenth of the NIC's bandwidth", 1, replace(ASSUMED, nic_share=ASSUMED.nic_share / 10)),
    ("step times vary by 5%", 1, replace(ASSUMED, variation=0.05)),
    ("batch norm over a node's GPUs", 8, ASSUMED),
    ("batch norm over all GPUs", 0, ASSUMED),
)


def point(
    name: str, machine: Machine, gpus: int, batch: int, norm_group: int = 1, assumed: Assumptions = ASSUMED
) -> Run:
    """A run of all epochs: its step, throughput and length; its efficiency beside one GPU with the paper's batch."""
    own = model.step(name, machine, gpus, batch / gpus, norm_group, assumed)
    alone = model.step(name, machine, 1, BATCH, 1, assumed)
    rate = batch / own.seconds
    hours = model.EPOCHS * model.IMAGES / rate / 3600
    return {
        "network": name,
        "machine": machine.name,
        "gpus": gpus,
        "batch": batch,
        "norm_group": norm_group,
        "step_seconds": own.seconds,
        "shares": {what: seconds / own.seconds for what, seconds in asdict(own).items()},
        "images_per_second": rate,
        "efficiency": rate / gpus / (BATCH / alone.seconds),
        "hours": hours,
        "gpu_hours": hours * gpus,
        "cores_a_gpu": rate / gpus / assumed.decoded,
        "jpeg_bytes_per_second": rate * model.ARCHIVE_BYTES / model.IMAGES,
    }


def weak(machine: Machine, gpus: int) -> Run:
    """A run whose batch grows with the number of GPUs; beside one GPU with as many images."""
    own = point(SASA, machine, gpus, IMAGES_A_GPU * gpus)
    alone = point(SASA, machine, 1, IMAGES_A_GPU)
    batch = own["batch"]
    own["efficiency"] = own["images_per_second"] / gpus / alone["images_per_second"]
    return own | {"learning_rate": model.learning_rate(batch), "recipe": model.recipe(batch)}


def traffic(machine: Machine) -> dict[str, Any]:
    """What a step of the network moves, in bytes and, alone, in seconds."""
    size = model.network(SASA).parameters * ASSUMED.gradient_bytes
    sharded = replace(ASSUMED, volume=FSDP)
    return {
        "machine": machine.name,
        "sent_bytes": model.ring_volume(GPUS[-1]) * size,
        "all_reduce_seconds": {gpus: model.all_reduce(size, machine, gpus) for gpus in GPUS},
        "fsdp_sent_bytes": FSDP * model.ring_volume(GPUS[-1]) * size,
        "fsdp_seconds": {gpus: model.all_reduce(size, machine, gpus, sharded) for gpus in GPUS},
        "latency_seconds": {gpus: model.latency(gpus) for gpus in GPUS},
        "optimiser_seconds": model.step(SASA, machine, 1, BATCH).optimiser,
        "state_bytes": 4 * size,  # parameters, gradients, momentum, and the average that is evaluated
        "state_share": 4 * size / machine.memory_bytes,
    }


def change(words: str, norm_group: int, assumed: Assumptions) -> dict[str, Any]:
    """The paper's batch on H100s with one thing otherwise."""
    few, many = (point(SASA, H100, gpus, BATCH, norm_group or gpus, assumed) for gpus in (8, 1024))
    return {"what": words, "few": few, "many": many, "assumptions": asdict(assumed)}


def check(where: str, machine: Machine, gpus: int, images: int, published: float) -> dict[str, Any]:
    """A published run of the convolution beside the model's, whose GPUs take their images at once as well."""
    assumed = replace(ASSUMED, micro_batch=images)
    own = images * gpus / model.step(CONVOLUTION, machine, gpus, images, assumed=assumed).seconds
    about = {"where": where, "machine": machine.name, "gpus": gpus, "images_a_gpu": images}
    return {**about, "published": published, "model": own, "ratio": own / published}


def significant(found: Any) -> Any:
    """With floats rounded to six digits, so that no machine's last bit shows."""
    if isinstance(found, float):
        return float(f"{found:.6g}")
    if isinstance(found, dict):
        return {str(key): significant(value) for key, value in found.items()}
    return [significant(value) for value in found] if isinstance(found, list | tuple) else found


def run() -> dict[str, Any]:
    """All inputs and outputs."""
    networks = [model.network(name) for name in (SASA, CONVOLUTION)]
    chips = [*MACHINES, TPU_V3]
    found = {
        "what": "a model, not a measurement",
        "networks": [
            asdict(own) | {"training_flops": own.training_flops, "run_flops": own.run_flops} for own in networks
        ],
        "recipe": {"epochs": model.EPOCHS, "batch": BATCH, "images": model.IMAGES, "bytes": model.ARCHIVE_BYTES},
        "chips": [
            asdict(chip) | {"shares_of_peak": {own.name: model.share_of_peak(chip, own.name) for own in networks}}
            for chip in chips
        ],
        "assumptions": asdict(ASSUMED),
        "traffic": [traffic(machine) for machine in MACHINES],
        "strong": [point(own.name, m, gpus, BATCH) for own in networks for m in MACHINES for gpus in GPUS],
        "synchronised": [point(SASA, m, gpus, BATCH, gpus) for m in MACHINES for gpus in GPUS],
        "weak": [weak(machine, gpus) for machine in MACHINES for gpus in GPUS],
        "setups": [point(SASA, machine, *setup) for setup in SETUPS for machine in MACHINES],
        "changes": [change(*one) for one in CHANGES],
        "checks": [check(*one) for one in PUBLISHED],
    }
    return significant(found)
