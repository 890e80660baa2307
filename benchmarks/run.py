"""Time and memory of sasa compared with its peers: checks results, measures, prints, writes and plots.

    python -m benchmarks.run                           everything on the CPU; writes to benchmarks/results/
    python -m benchmarks.run --device cuda             on a GPU, within 8 minutes; or xpu
    python -m benchmarks.run --only attention          one part; the results of others stay
    python -m benchmarks.run --device cuda --warm      the same; kernels compiled earlier by this user are reused
    python -m benchmarks.run --quick                   small problems, nothing compiled: a rehearsal in runs/bench/

Each peer takes turns with sasa in one process; numbers are medians of the turns, ratios with the lowest and highest of
them. On a GPU the most important measurements come first; those that time doesn't allow are recorded as skipped,
failures with their reason. ``python -m benchmarks.readme`` then fills in the tables of docs/.
"""

from __future__ import annotations

import argparse
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from .machine import ROOT, machine
from .plots import draw
from .registry import PARTS
from .results import RESULTS, SKIPPED, Results
from .tables import markdown, part_table, targets_table
from .worker import Orders

TRIED = ROOT / "runs/bench"
DEADLINE = 460.0  # seconds, on a GPU
MOST_SECONDS = 120  # for one measurement on a GPU, compilation included
SECONDS_TO_END = 10  # that a worker has after the deadline


def start_workers(orders: Orders, results: Results, warm: bool = False) -> None:
    """Measure everything, one worker at a time. Unless ``warm``, compile times are those of a first run."""
    with tempfile.TemporaryDirectory() as cache:
        caches = {"TORCHINDUCTOR_CACHE_DIR": f"{cache}/inductor", "TRITON_CACHE_DIR": f"{cache}/triton"}
        caches = {} if warm else caches
        command = [sys.executable, "-m", "benchmarks.worker", orders.text()]
        missing = sum(not results.has(step) for step in orders.steps())
        while missing:
            left = orders.deadline - time.time()
            limit = None if math.isinf(left) else max(0, left) + SECONDS_TO_END
            try:
                status = subprocess.run(
                    command, env=os.environ | caches, cwd=ROOT, timeout=limit, check=False
                ).returncode
            except subprocess.TimeoutExpired:
                status = -signal.SIGKILL
            results.read()
            results.blame(ending(status))
            before, missing = missing, sum(not results.has(step) for step in orders.steps())
            if missing == before or time.time() > orders.deadline:
                break


def ending(status: int) -> str:
    """How a process ended."""
    if status == -signal.SIGALRM:
        return "took too long"
    return f"the process ended by {signal.Signals(-status).name if status < 0 else f'exit status {status}'}"


def finish(orders: Orders, results: Results) -> None:
    """Write why the rest is missing, complete every part, print and draw."""
    over = time.time() > orders.deadline - 2
    for step in orders.steps():
        if not results.has(step):
            results.ends(step, {"cannot": SKIPPED if over else "no worker was left to measure it"})
    for part in orders.parts:
        PARTS[part].summary(results.found[part])
        results.save(part)
        print(f"\n{part}\n\n{markdown(part_table(part, results.found))}")
        try:
            draw(part, results.found[part], results.path(part, "png"))
        except Exception as error:  # the figures are written; matplotlib may be missing
            print(f"no picture: {error}")
    if not orders.quick:  # small problems are not meaningful for them
        print(f"\ntargets\n\n{markdown(targets_table(results.found, orders.device))}")


def run(
    device: str, quick: bool, only: list[str], folder: Path, seconds: float = math.inf, warm: bool = False
) -> Results:
    """Measure and show; returns the results."""
    given = Orders(str(folder.resolve()), device, quick, [part for part in PARTS if part in (only or PARTS)])
    parts = [part for part in given.parts if PARTS[part].cases(given.where)]
    most_seconds = None if device == "cpu" else MOST_SECONDS
    orders = Orders(given.folder, device, quick, parts, time.time() + seconds, most_seconds)
    results = Results(folder, device)
    results.begin(parts, {"machine": machine(device), "rehearsal": quick, "warm": warm})
    start_workers(orders, results, warm)
    finish(orders, results)
    return results


def main() -> None:
    """Read the options."""
    parser = argparse.ArgumentParser("benchmarks.run", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda", "xpu"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="small problems, nothing compiled: a rehearsal")
    parser.add_argument("--only", choices=PARTS, action="append", help="one part; may be repeated")
    parser.add_argument("--out", type=Path, help="folder for JSON and PNG files")
    parser.add_argument("--deadline", type=float, help="seconds after which nothing more is begun; on a GPU 460")
    parser.add_argument("--warm", action="store_true", help="reuse what was compiled earlier: first calls don't count")
    options = parser.parse_args()
    if options.device != "cpu" and not getattr(torch, options.device).is_available():
        sys.exit(f"benchmarks.run: --device {options.device}: no such GPU here (--quick rehearses on the CPU)")
    folder = options.out or (TRIED if options.quick else RESULTS)
    seconds = math.inf if options.device == "cpu" else DEADLINE
    run(options.device, options.quick, options.only or [], folder, options.deadline or seconds, options.warm)
    print(f"\nwrote {folder}")


if __name__ == "__main__":
    main()
