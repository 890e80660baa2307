"""Converts every network of the zoo and writes docs/zoo.md: ``make zoo``.

    python -m tests.zoo                    all networks
    python -m tests.zoo --resume           those that an interrupted run has not come to
    python -m tests.zoo timm/resnet18      some; prints what came of them and writes nothing

Each network has a process of its own: one that ends it, or never ends, is a fault like any other. A fault of the
network as it was is not one of the conversion. Fails if a network has a fault that docs/zoo.json does not have.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rich.console import Console
from rich.progress import track

from . import check, networks
from .processes import alone
from .table import FILE, PAGE, page

TRIED = Path("runs/zoo.json")


def main() -> int:
    """Check, print faults, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("names", nargs="*", help="networks, as library/name; all if there is none")
    parser.add_argument("--resume", action="store_true", help=f"keep what {TRIED} has")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="how many at a time")
    options = parser.parse_args()
    console = Console()
    names = options.names or list(networks.networks())
    results = json.loads(TRIED.read_text()) if options.resume and TRIED.exists() else {}
    missing = [name for name in names if name not in results]
    TRIED.parent.mkdir(exist_ok=True)
    with ThreadPoolExecutor(options.processes) as threads:
        found = zip(missing, threads.map(checked, missing), strict=True)
        for name, result in track(found, total=len(missing), console=console):
            results[name] = result
            if fault := result.get("fault") or result.get("kept_fault"):
                console.print(f"{name}: {fault}", highlight=False)
            if not options.names:
                TRIED.write_text(json.dumps(results, indent=1) + "\n")
    if options.names:
        console.print_json(data=results)
        return 0
    before = json.loads(FILE.read_text()) if FILE.exists() else {}
    new = [name for name in names if faults(results[name]) - faults(before.get(name, {}))]
    FILE.write_text(json.dumps({name: results[name] for name in names}, indent=1) + "\n")
    PAGE.write_text(page(json.loads(FILE.read_text())))
    console.print(f"wrote {FILE} and {PAGE}; new faults: {', '.join(new) or 'none'}", highlight=False)
    return bool(new)


def faults(result: check.Result) -> set[str]:
    """Which checks failed, or could not be made."""
    return {"fault", "kept_fault", "refused", "kept_refused"} & set(result)


def checked(name: str) -> check.Result:
    """All that there is to say of a network."""
    start = time.monotonic()
    network = networks.networks()[name]
    result = {"library": network.library, "family": network.family, "network": network.name}
    every = alone(name, check.converted, check.kept)
    for found, fault in zip(every, ("fault", "kept_fault"), strict=True):
        if "refused" in found:
            result[fault.replace("fault", "refused")] = found["refused"]
        elif "error" in found and "error" in alone(name, check.runs)[0]:
            result["original_fails"] = found["error"]
        elif "error" in found:
            result[fault] = found["error"]
        else:
            result |= found
    return result | {"seconds": round(time.monotonic() - start, 1)}


if __name__ == "__main__":
    raise SystemExit(main())
