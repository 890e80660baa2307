"""Time and memory of the layer beside its peers, on the CPU: checks the results, then measures, then writes and draws.

    python -m benchmarks.run                 all cases; writes benchmarks/results/layer-cpu.json and .png
    python -m benchmarks.run --quick         small cases only, for trying it out

Every number comes from a process of its own, so that its peak memory is its own; the processes of a case take turns,
so that a busy moment of the machine hits all of them. Ratios are of medians, with the lowest and highest ratio of
the turns.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import sasa

from .peers import UnfoldSelfAttention
from .problems import PROBLEMS, Problem

RESULTS = Path(__file__).parent / "results"
LAYERS = ("sasa", "unfold", "convolution 3x3")
CASES = [
    ("notebook", "forward"),
    ("notebook-batch8", "forward"),
    ("notebook-batch8", "training"),
    ("stage4", "forward"),
]
QUICK = [("stage4", "forward")]
TURNS = 3


def build(name: str, problem: Problem) -> torch.nn.Module:
    """A layer for the problem; the two attention layers have the same weights."""
    torch.manual_seed(0)
    if name == "convolution 3x3":
        return torch.nn.Conv2d(problem.in_channels, problem.out_channels, 3, padding=1)
    unfold = UnfoldSelfAttention(problem.in_channels, problem.out_channels, problem.kernel_size, problem.num_heads)
    if name == "unfold":
        return unfold
    return sasa.RelativeSelfAttention.from_notebook(unfold.state_dict(), problem.num_heads)


def check(problem: Problem) -> float:
    """Largest difference between the two attention layers on one image; raises unless it is rounding."""
    x = torch.randn(1, problem.in_channels, problem.size, problem.size)
    with torch.no_grad():
        ours, theirs = build("sasa", problem)(x), build("unfold", problem)(x)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    return (ours - theirs).abs().max().item()


def measure(name: str, problem: Problem, mode: str) -> dict[str, float]:
    """Seconds and peak bytes above the input of one call, in this process, after one call to warm up."""
    layer = build(name, problem)
    x = torch.randn(problem.batch, problem.in_channels, problem.size, problem.size)
    if name == "convolution 3x3":
        x, layer = x.contiguous(memory_format=torch.channels_last), layer.to(memory_format=torch.channels_last)

    def call() -> None:
        if mode == "forward":
            with torch.no_grad():
                layer(x)
        else:
            layer(x).sum().backward()

    before = resident_bytes()
    call()
    start = time.perf_counter()
    call()
    return {"seconds": time.perf_counter() - start, "peak_bytes": peak_bytes() - before}


def resident_bytes() -> int:
    """Memory the process holds now (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def peak_bytes() -> int:
    """Most memory the process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def import_seconds(turns: int = 7) -> dict[str, float]:
    """Median seconds that importing sasa takes once torch is imported."""
    code = "import time, torch; s = time.perf_counter(); import sasa; print(time.perf_counter() - s)"
    runs = [
        float(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)
        for _ in range(turns)
    ]
    return {"median": statistics.median(runs), "lowest": min(runs), "highest": max(runs)}


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    return {
        "cpu": model,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "sasa": sasa.__version__,
    }


def run_case(problem: str, mode: str, console: Console) -> dict[str, Any]:
    """All layers of one case, taking turns."""
    difference = check(PROBLEMS[problem])
    turns: dict[str, list[dict[str, float]]] = {name: [] for name in LAYERS}
    for turn in range(TURNS):
        for name in LAYERS:
            with console.status(f"{problem}, {mode}: {name}, turn {turn + 1} of {TURNS}"):
                command = [sys.executable, "-m", "benchmarks.run", "--one", name, problem, mode]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
            turns[name].append(json.loads(done.stdout))
    return {
        "problem": problem,
        **PROBLEMS[problem]._asdict(),
        "mode": mode,
        "largest_difference": difference,
        "layers": {name: summarise(runs, turns["sasa"]) for name, runs in turns.items()},
    }


def summarise(runs: list[dict[str, float]], ours: list[dict[str, float]]) -> dict[str, float]:
    """Medians of a layer's turns, and how many times our time it took, turn by turn."""
    ratios = [run["seconds"] / our["seconds"] for run, our in zip(runs, ours, strict=True)]
    seconds = statistics.median(run["seconds"] for run in runs)
    return {
        "seconds": seconds,
        "peak_gigabytes": statistics.median(run["peak_bytes"] for run in runs) / 1e9,
        "ratio_to_sasa": seconds / statistics.median(our["seconds"] for our in ours),
        "ratio_lowest": min(ratios),
        "ratio_highest": max(ratios),
    }


def table(cases: list[dict[str, Any]]) -> Table:
    """The cases as a table."""
    rows = Table(title="one call of the layer on the CPU, float32")
    for column in ("case", "layer", "seconds", "x sasa (lowest to highest)", "peak GB above the input"):
        rows.add_column(column, justify="left" if column in ("case", "layer") else "right")
    for case in cases:
        for name, layer in case["layers"].items():
            ratio = f"{layer['ratio_to_sasa']:.2f} ({layer['ratio_lowest']:.2f} to {layer['ratio_highest']:.2f})"
            label = f"{case['problem']} {case['mode']}"
            rows.add_row(label, name, f"{layer['seconds']:.3f}", ratio, f"{layer['peak_gigabytes']:.2f}")
        rows.add_section()
    return rows


def draw(cases: list[dict[str, Any]], where: dict[str, Any], path: Path) -> None:
    """Bars of seconds and of memory, a group a case."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    for panel, key, label in zip(
        figure.subplots(1, 2), ("seconds", "peak_gigabytes"), ("seconds a call", "peak GB above the input"), strict=True
    ):
        for index, name in enumerate(LAYERS):
            places = [case + 0.27 * (index - 1) for case in range(len(cases))]
            bars = panel.bar(places, [case["layers"][name][key] for case in cases], 0.25, label=name)
            panel.bar_label(bars, fmt="%.2f", fontsize=6)
        panel.set_xticks(range(len(cases)), [f"{case['problem']}\n{case['mode']}" for case in cases], fontsize=7)
        panel.set(yscale="log", ylabel=label)
        panel.legend(fontsize=7)
    figure.suptitle(f"{where['cpu']}, {where['threads']} threads, torch {where['torch']}, float32", fontsize=9)
    figure.savefig(path, dpi=130)


def main() -> None:
    """Measure, print, write and draw."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small cases only")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for layer-cpu.json and layer-cpu.png")
    parser.add_argument("--one", nargs=3, metavar=("LAYER", "PROBLEM", "MODE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        name, problem, mode = options.one
        print(json.dumps(measure(name, PROBLEMS[problem], mode)))
        return
    console = Console()
    options.out.mkdir(parents=True, exist_ok=True)
    cases = [run_case(problem, mode, console) for problem, mode in (QUICK if options.quick else CASES)]
    result = {"machine": machine(), "import_seconds_after_torch": import_seconds(), "cases": cases}
    (options.out / "layer-cpu.json").write_text(json.dumps(result, indent=2) + "\n")
    draw(cases, result["machine"], options.out / "layer-cpu.png")
    console.print(table(cases))
    console.print(f"importing sasa after torch: {result['import_seconds_after_torch']['median']:.3f} s")
    console.print(f"wrote {options.out / 'layer-cpu.json'} and .png", highlight=False)


if __name__ == "__main__":
    main()
