r"""Train what the evidence page needs, most valuable first; it can be stopped and restarted at any time.

    python -m benchmarks.evidence --work runs/evidence \
        --fashion-mnist /usr/share/datasets/fashion-mnist --cifar10 cifar10

The folders are made once, below ``--work``; results are gathered after each plan, and by ``--gather`` at any time.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

from . import data

HERE = Path(__file__).parent
ORDER = (
    "tune-fashion",
    "weights-fashion",
    "weights-clothing",
    "fashion",
    "cifar",
    "ablations-fashion",
    "widths-fashion",
    "data-2000",
    "data-10000",
    "data-20000",
    "weights-fashion-long",
    "weights-clothing-long",
    "ablations-cifar",
    "rate-fashion",
    "embeddings-fashion",
    "smoothing-fashion",
    "length-fashion",
    "widths-cifar",
    "whole-fashion",
)
"""The plans, most informative first."""


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.evidence", description="Train what the page of evidence needs, in order of worth."
    )
    parser.add_argument("--work", type=Path, required=True, help="folder for images and runs")
    parser.add_argument("--fashion-mnist", type=Path, help="folder of the four IDX files, .gz")
    parser.add_argument("--cifar10", type=Path, help="folder with train and val, each one folder of images a class")
    parser.add_argument("--clothing", type=Path, help="folder with train, val and test, likewise")
    parser.add_argument("--gather", action="store_true", help="only gather what is there")
    parser.add_argument("plans", nargs="*", metavar="PLAN", help=f"default: {' '.join(ORDER)}")
    options = parser.parse_args()
    if unknown := sorted(set(options.plans) - set(ORDER)):
        parser.error(f"PLAN: expected some of {', '.join(ORDER)}, got {', '.join(unknown)}")
    folder = options.work / "data"
    for name in ("fashion_mnist", "cifar10", "clothing"):
        source = getattr(options, name)
        if source is not None and not (folder / f".{name}").exists():
            getattr(data, name)(source, folder)
            (folder / f".{name}").touch()
    os.chdir(options.work)  # the plans' folders of images are below it
    from sasa.study.gather import gather
    from sasa.study.run import study

    for name in options.plans or ORDER:
        plan, out = HERE / "plans" / f"{name}.yaml", Path("studies") / name
        if not options.gather:
            study(plan, out, parallel=len(os.sched_getaffinity(0)))  # one thread each
        elif (out / "plan.json").is_file():
            gather(out)
        if (out / "results.json").is_file():
            (HERE / "results").mkdir(exist_ok=True)
            text = (out / "results.json").read_text(encoding="utf-8")
            here = json.dumps(f"{Path.cwd()}{os.sep}")[1:-1]  # the images' location is not part of the result
            (HERE / "results" / f"{name}.json").write_text(text.replace(here, ""), encoding="utf-8")


if __name__ == "__main__":
    main()
