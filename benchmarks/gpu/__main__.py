"""Time and memory of sasa beside its peers on one GPU: checks results, measures, prints, writes and draws.

    python -m benchmarks.gpu                          everything, within 8 minutes; writes to benchmarks/results/
    python -m benchmarks.gpu --only attention         one part: machine, attention, layer or networks
    python -m benchmarks.gpu --device cpu --quick     a rehearsal in small, on the CPU; writes to runs/gpu/

Each peer takes turns with sasa in one process; numbers are medians of the turns, with the lowest and highest. The most
wanted measurements come first; what the time doesn't reach is written as skipped, what fails with its reason.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from ..processes import ROOT
from ..tables import markdown
from ..targets import evaluate
from .plot import draw
from .results import SKIPPED, Results
from .tables import tables
from .targets import TARGETS
from .worker import DEVICE_LOST, PARTS, Orders

RESULTS, TRIED = ROOT / "benchmarks/results", ROOT / "runs/gpu"
DEADLINE = 460
MOST_SECONDS = 120  # for one measurement, compilation included
MOST_WORKERS = 12
SECONDS_TO_END = 10  # that a worker has behind the deadline
DEVICES = ("cuda", "xpu", "cpu")


def why_not(device: str, quick: bool) -> str | None:
    """Why nothing can be measured on this device; None if it can."""
    if device == "cpu":
        return None if quick else "--device cpu is a rehearsal: add --quick"
    if not getattr(torch, device).is_available():
        return f"no {device} GPU here (--device cpu --quick rehearses without one)"
    return None


def start_workers(orders: Orders, results: Results) -> None:
    """Have everything measured, by a new worker where one dies."""
    with tempfile.TemporaryDirectory() as cache:  # so that compile times are those of a first time
        caches = {"TORCHINDUCTOR_CACHE_DIR": f"{cache}/inductor", "TRITON_CACHE_DIR": f"{cache}/triton"}
        command = [sys.executable, "-m", "benchmarks.gpu.worker", orders.text()]
        for _ in range(MOST_WORKERS):
            left = max(0, orders.deadline - time.time()) + SECONDS_TO_END
            try:
                status = subprocess.run(
                    command, env=os.environ | caches, cwd=ROOT, timeout=left, check=False
                ).returncode
            except subprocess.TimeoutExpired:
                status = -signal.SIGKILL
            results.found = Results(results.path.parent).found
            if status == 0:
                break
            blamed = results.blame(words(status))
            if time.time() > orders.deadline or (not blamed and status != DEVICE_LOST):
                break


def words(status: int) -> str:
    """How a process ended."""
    if status == -signal.SIGALRM:
        return "took too long"
    return f"the process ended by {signal.Signals(-status).name if status < 0 else f'exit status {status}'}"


def finish(orders: Orders, results: Results) -> None:
    """Write why the rest is missing, compare with the targets, print and draw."""
    over = time.time() > orders.deadline - 2
    for step in orders.steps():
        if not results.has(step):
            results.peers(step.case)[step.peer] = {"cannot": SKIPPED if over else "no worker was left to measure it"}
    results.found["targets"] = evaluate(results.found, TARGETS)
    results.save()
    for table in tables(results.found):
        print(f"\n{table.title}\n\n{markdown(table)}")
    try:
        draw(results.found, results.path.with_suffix(".png"))
    except Exception as error:  # the figures are written; matplotlib may be missing
        print(f"no picture: {error}")


def run(device: str, quick: bool, only: list[str], folder: Path, deadline: float = DEADLINE) -> dict[str, Any]:
    """Measure and show; the results."""
    started = time.time()
    parts = [part for part in PARTS if part in (only or PARTS)]
    orders = Orders(str(folder.resolve()), device, quick, parts, started + deadline, MOST_SECONDS)
    results = Results(folder)
    facts = {"rehearsal": device == "cpu" or quick, "device": device, "quick": quick, "deadline_seconds": deadline}
    results.begin(parts, everything=not only, facts=facts)
    start_workers(orders, results)
    results.found["seconds"] = time.time() - started
    finish(orders, results)
    return results.found


def main() -> None:
    """Read the options."""
    parser = argparse.ArgumentParser("benchmarks.gpu", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", choices=["machine", *PARTS], action="append", help="one part; may be repeated")
    parser.add_argument("--out", type=Path, help="folder for the JSON and PNG file")
    parser.add_argument("--device", choices=DEVICES, default="cuda")
    parser.add_argument("--quick", action="store_true", help="small problems, nothing compiled: a rehearsal")
    parser.add_argument("--deadline", type=float, default=DEADLINE, help="seconds after which nothing more is begun")
    options = parser.parse_args()
    problem = why_not(options.device, options.quick)
    if problem:
        sys.exit(f"benchmarks.gpu: {problem}")
    folder = options.out or (TRIED if options.quick else RESULTS)
    run(options.device, options.quick, options.only or [], folder, options.deadline)
    print(f"\nwrote {folder}")


if __name__ == "__main__":
    main()
