"""The tables of docs/scale.md, of what runs.py computed. A MODEL, NOT A MEASUREMENT."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .model import CONVOLUTION, MACHINES, NODE, SASA

Found = dict[str, Any]

LABELS = {SASA: "full attention", CONVOLUTION: "convolution"}


def rows(header: list[str], lines: list[list[str]]) -> str:
    """As markdown; the first column holds words."""
    rule = "|---" + "|---:" * (len(header) - 1) + "|"
    return "\n".join(["| " + " | ".join(header) + " |", rule, *(f"| {' | '.join(line)} |" for line in lines)])


def percent(share: float) -> str:
    """As a reader likes it."""
    return f"{share:.1%}" if share < 0.0995 else f"{share:.0%}"


def duration(hours: float) -> str:
    """Hours, or minutes where they are few."""
    return f"{hours:.1f} h" if hours >= 1 else f"{60 * hours:.0f} min" if hours >= 1 / 6 else f"{60 * hours:.1f} min"


def runs_table(found: Found) -> str:
    """What a run costs, whatever it runs on."""
    header = ["", "parameters", "GFLOPs an image, forward", "GFLOPs an image, training", "FLOPs a run"]
    header += ["gradient, float32", "gradient, bfloat16"]
    lines = [
        [
            f"{LABELS[own['name']]} (`{own['name']}`)",
            f"{own['parameters']:,}",
            f"{own['flops'] / 1e9:.2f}",
            f"{own['training_flops'] / 1e9:.1f}",
            f"{own['run_flops']:.2e}",
            f"{4 * own['parameters'] / 1e6:.1f} MB",
            f"{2 * own['parameters'] / 1e6:.1f} MB",
        ]
        for own in found["networks"]
    ]
    return rows(header, lines)


def chips_table(found: Found) -> str:
    """Published figures, and what they make of a run."""
    cost = found["networks"][0]["run_flops"]
    chips = found["chips"]
    lines = {
        "dense peak in bfloat16, TFLOP/s": [f"{chip['flops_per_second'] / 1e12:.0f}" for chip in chips],
        "HBM, TB/s": [f"{chip['memory_bytes_per_second'] / 1e12:.2f}" for chip in chips],
        "NVLink of a GPU, one direction, GB/s": [f"{chip['link_bytes_per_second'] / 1e9:.0f}" for chip in chips[:2]],
        "NIC of a GPU, one direction, GB/s": [f"{chip['nic_bytes_per_second'] / 1e9:.0f}" for chip in chips[:2]],
        "CPU cores of a node of eight": [f"{chip['cores']}" for chip in chips[:2]],
        "a run of full attention at the peak, on one": [
            duration(cost / chip["flops_per_second"] / 3600) for chip in chips
        ],
        "ResNet-50 in training, published, images/s": [f"{chip['convolution']:,.0f}" for chip in chips],
        "that is, of the peak": [percent(chip["shares_of_peak"][CONVOLUTION]) for chip in chips],
        "full attention, of the peak, **assumed**": [percent(chip["shares_of_peak"][SASA]) for chip in chips[:2]],
    }
    return rows(
        ["", *(chip["name"] for chip in chips)], [[words, *own, *[""] * (3 - len(own))] for words, own in lines.items()]
    )


def traffic_table(found: Found) -> str:
    """What a step of full attention moves."""
    last = list(found["traffic"][0]["latency_seconds"])[-1]
    lines = {
        "sent by a GPU for the sum of gradients": lambda own: f"{own['sent_bytes'] / 1e6:.0f} MB",
        "the sum, alone, in a node": lambda own: f"{1e3 * own['all_reduce_seconds']['8']:.2f} ms",
        "over 64 GPUs": lambda own: f"{1e3 * own['all_reduce_seconds']['64']:.2f} ms",
        "over 1,024 GPUs": lambda own: f"{1e3 * own['all_reduce_seconds'][last]:.2f} ms",
        "latency alone in a node": lambda own: f"{1e6 * own['latency_seconds']['8']:.0f} µs",
        "latency alone over 1,024 GPUs": lambda own: f"{1e6 * own['latency_seconds'][last]:.0f} µs",
        "sent with FSDP": lambda own: f"{own['fsdp_sent_bytes'] / 1e6:.0f} MB",
        "FSDP's traffic, alone, over 1,024 GPUs": lambda own: f"{1e3 * own['fsdp_seconds'][last]:.2f} ms",
        "the optimiser": lambda own: f"{1e3 * own['optimiser_seconds']:.2f} ms",
        "parameters, gradients, momentum and average": lambda own: f"{own['state_bytes'] / 1e6:.0f} MB",
        "that is, of HBM": lambda own: f"{own['state_share']:.2%}",
    }
    header = ["", *(own["machine"] for own in found["traffic"])]
    return rows(header, [[words, *map(form, found["traffic"])] for words, form in lines.items()])


def strong_table(found: Found) -> str:
    """The paper's batch."""
    header = ["", "GPUs", "images a GPU", "ms a step", "a run takes", "GPU-hours", "efficiency", "norm over all GPUs"]
    header += ["convolution takes", "efficiency"]
    attention = [own for own in found["strong"] if own["network"] == SASA]
    convolution = [own for own in found["strong"] if own["network"] == CONVOLUTION]
    lines = [
        [
            own["machine"],
            f"{own['gpus']:,}",
            f"{own['batch'] // own['gpus']:,}",
            f"{1e3 * own['step_seconds']:.1f}",
            duration(own["hours"]),
            f"{own['gpu_hours']:.0f}",
            percent(own["efficiency"]),
            percent(norms["efficiency"]),
            duration(twin["hours"]),
            percent(twin["efficiency"]),
        ]
        for own, norms, twin in zip(attention, found["synchronised"], convolution, strict=True)
    ]
    return rows(header, lines)


def shares_table(found: Found) -> str:
    """Where a step of the paper's batch goes."""
    header = [
        "",
        "GPUs",
        "products",
        "kernels' fixed cost",
        "optimiser",
        "waiting for the slowest",
        "gradients, not hidden",
    ]
    kinds = ("compute", "kernels", "optimiser", "stragglers", "gradients")
    attention = [own for own in found["strong"] if own["network"] == SASA]
    lines = [
        [own["machine"], f"{own['gpus']:,}", *(percent(own["shares"][kind]) for kind in kinds)] for own in attention
    ]
    return rows(header, lines)


def weak_table(found: Found) -> str:
    """A batch that grows."""
    header = [
        "",
        "GPUs",
        "batch",
        "learning rate by the rule",
        "shown to train with",
        "images/s",
        "a run takes",
        "efficiency",
    ]
    lines = [
        [
            own["machine"],
            f"{own['gpus']:,}",
            f"{own['batch']:,}",
            f"{own['learning_rate']:g}",
            own["recipe"],
            f"{own['images_per_second']:,.0f}",
            duration(own["hours"]),
            percent(own["efficiency"]),
        ]
        for own in found["weak"]
    ]
    return rows(header, lines)


def data_table(found: Found) -> str:
    """What the network asks of storage and CPUs, a node full of GPUs."""
    header = ["", "", "images/s a node", "JPEG, GB/s a node", "cores a GPU it takes", "cores a GPU there are"]
    cores = {chip["name"]: chip["cores"] / NODE for chip in found["chips"] if "cores" in chip}
    lines = [
        [
            own["machine"],
            LABELS[own["network"]],
            f"{own['images_per_second']:,.0f}",
            f"{own['jpeg_bytes_per_second'] / 1e9:.2f}",
            f"{own['cores_a_gpu']:.1f}",
            f"{cores[own['machine']]:.0f}",
        ]
        for own in found["strong"]
        if own["gpus"] == NODE
    ]
    return rows(header, lines)


def setups_table(found: Found) -> str:
    """What is advised."""
    header = ["GPUs", "batch", "images a GPU", "batch norm over"]
    header += [f"{machine.name.split()[0]}: {what}" for machine in MACHINES for what in ("a run takes", "efficiency")]
    lines = []
    for first, second in zip(found["setups"][::2], found["setups"][1::2], strict=True):
        about = [f"{first['gpus']:,}", f"{first['batch']:,}", f"{first['batch'] // first['gpus']:,}"]
        group = "a GPU" if first["norm_group"] == 1 else f"{first['norm_group']} GPUs"
        figures = [form for own in (first, second) for form in (duration(own["hours"]), percent(own["efficiency"]))]
        lines.append([*about, group, *figures])
    return rows(header, lines)


def changes_table(found: Found) -> str:
    """One assumption otherwise."""
    header = ["H100, the paper's batch", "8 GPUs", "efficiency", "1,024 GPUs", "efficiency"]
    lines = [
        [
            one["what"],
            *(
                form
                for own in (one["few"], one["many"])
                for form in (duration(own["hours"]), percent(own["efficiency"]))
            ),
        ]
        for one in found["changes"]
    ]
    return rows(header, lines)


def checks_table(found: Found) -> str:
    """Published runs beside the model."""
    header = [
        "ResNet-50 of convolutions",
        "",
        "GPUs",
        "images a GPU",
        "images/s, published",
        "images/s, model",
        "ratio",
    ]
    lines = [
        [
            one["where"],
            one["machine"],
            f"{one['gpus']:,}",
            f"{one['images_a_gpu']}",
            f"{one['published']:,.0f}",
            f"{one['model']:,.0f}",
            f"{one['ratio']:.2f}",
        ]
        for one in found["checks"]
    ]
    return rows(header, lines)


NCCL = "NCCL's own model, protocol LL, as [quoted](https://github.com/NVIDIA/nccl/issues/1334)"
CALCULON = "[Calculon](https://github.com/calculon-ai/calculon)'s A100 and H100"
# Words, value as words, source.
ASSUMPTIONS: dict[str, tuple[str, Callable[[float], str], str]] = {
    "attention_share": (
        "share of the peak that full attention reaches, of the convolution's published share",
        lambda value: f"{value:g}",
        "**assumption**: not measured. The paper found attention slower than its FLOPs say",
    ),
    "kernels": ("kernels a layer and step", lambda value: f"{value}", "assumption: 2 forward, 3 backward, 1 optimiser"),
    "kernel_seconds": (
        "time of a kernel that does not shrink with the batch",
        lambda value: f"{1e6 * value:g} µs",
        "assumption; a launch takes [4 to 6 µs](https://susun-blog.com/blog/pegainfer-3-cuda-graph)",
    ),
    "micro_batch": ("images computed at once; more are accumulated", lambda value: f"{value}", "assumption"),
    "backward_share": ("backward's share of the products", percent, "counted: two products for the forward's one"),
    "passes": (
        "passes of the optimiser over float32 parameters",
        lambda value: f"{value}",
        "counted: gradient, parameter, momentum and average read, the last three written",
    ),
    "gradient_bytes": ("bytes of a gradient", lambda value: f"{value}", "float32 parameters under autocast"),
    "bucket_bytes": (
        "bucket of gradients",
        lambda value: f"{value / 2**20:g} MiB",
        "[PyTorch's default](https://pytorch.org/docs/1.7.0/generated/torch.nn.parallel.DistributedDataParallel.html)",
    ),
    "volume": ("traffic, in that of an all-reduce", lambda value: f"{value:g}", "DDP; 1.5 for FSDP (below)"),
    "link_share": ("share of NVLink's bandwidth that is reached", lambda value: f"{value:g}", CALCULON),
    "nic_share": (
        "share of the NIC's bandwidth",
        lambda value: f"{value:g}",
        f"{CALCULON}; 46 to 48 of 50 GB/s [expected](https://github.com/NVIDIA/nccl-tests/issues/290)",
    ),
    "call_seconds": ("time of any collective", lambda value: f"{1e6 * value:g} µs", NCCL),
    "link_seconds": ("a hop inside a node", lambda value: f"{1e6 * value:g} µs", NCCL),
    "nic_seconds": ("a level of the tree between nodes", lambda value: f"{1e6 * value:g} µs", NCCL),
    "variation": ("standard deviation of a GPU's step time", percent, "assumption"),
    "decoded": (
        "images a second a core decodes, crops and flips",
        lambda value: f"{value:g}",
        "assumption: half of the 620 to 860 that torchvision decodes on [x86 cores]"
        "(https://github.com/ternaus/imread_benchmark)",
    ),
}


def assumed_table(found: Found) -> str:
    """What is neither counted nor published."""
    lines = [[words, form(found["assumptions"][key]), source] for key, (words, form, source) in ASSUMPTIONS.items()]
    return rows(["what", "value", "from"], lines).replace("|---|---:|---:|", "|---|---:|---|")


TABLES: dict[str, Callable[[Found], str]] = {
    "runs": runs_table,
    "chips": chips_table,
    "traffic": traffic_table,
    "strong": strong_table,
    "shares": shares_table,
    "weak": weak_table,
    "data": data_table,
    "setups": setups_table,
    "changes": changes_table,
    "checks": checks_table,
    "assumed": assumed_table,
}
