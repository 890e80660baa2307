"""Takes the place of ``sasa train`` in the tests of studies: counts steps, saves on SIGTERM, and writes a result.

It notes in the study's folder what was started (``started``) and each step (``steps``), so that a test sees what ran.
FAKE_SECONDS: of each of its four steps. FAKE_HOLDS: after two steps waits for SIGTERM if this is in the run's name.
FAKE_FAILS: ends without a result if this is in the run's name.
"""

import json
import os
import signal
import sys
import time
import zlib
from pathlib import Path

options = dict(zip(sys.argv[1::2], sys.argv[2::2], strict=True))
out, config = Path(options["--out"]), Path(options["--config"]).read_text()
assert options["--resume"] == "auto"
study = out.parent.parent
stopped = []
signal.signal(signal.SIGTERM, lambda number, frame: stopped.append(number))


def note(name, line):
    with (study / name).open("a") as file:
        file.write(f"{line}\n")


place = {name: os.environ.get(name) for name in ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "SLURM_NTASKS")}
note("started", json.dumps({"key": out.name, "process": os.getpid(), **place}))
out.mkdir(exist_ok=True)
if (out / "result.json").exists():
    sys.exit()
saved = out / "step"
for step in range(int(saved.read_text()) if saved.exists() else 0, 4):
    time.sleep(float(os.environ.get("FAKE_SECONDS", 0)))
    note("steps", f"{out.name} {step}")
    saved.write_text(str(step + 1))
    end = time.monotonic() + 250
    while step == 1 and os.environ.get("FAKE_HOLDS", "nothing") in out.name and not stopped:
        time.sleep(0.01)
        assert time.monotonic() < end
    if stopped:
        sys.stdout.write("stopped and saved\n")
        sys.exit(143)
if os.environ.get("FAKE_FAILS", "nothing") in out.name:
    sys.stdout.write("".join(f"line {number}\n" for number in range(30)))
    sys.exit("sasa train: error: the loss is no number")
learning_rate = next(float(line.split()[1]) for line in config.splitlines() if line.startswith("learning_rate:"))
result = {
    "model": "any",
    "top1": 0.8 - abs(learning_rate - 0.01) + zlib.crc32(out.name.encode()) % 100 / 10_000,
    "parameters": 1000,
    "flops": 2_000_000,
    "seconds_per_epoch": 1.5,
    "val_loss": 0.5,
}
(out / "result.json").write_text(json.dumps(result))
