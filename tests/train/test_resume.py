"""Runs that are killed, stopped, short of disk or of a sound checkpoint, and resume to the same bits."""

import csv
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from processes import SMALL, Running, assert_equal_bits, recipe

from sasa.train import DataError, OptionError, OutputError, checkpoints
from sasa.train.fit import train
from sasa.train.folder import checkpoint_to_resume, finished_run

OPTIONS = {"ema_decay": 0.9, "workers": 0, "epochs": 4}


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """A run that nothing interrupted, and the seconds that it took."""
    out = tmp_path_factory.mktemp("whole") / "run"
    began = time.perf_counter()
    Running(out.parent / "log", train, recipe(data, **OPTIONS), out).succeed()
    return out, time.perf_counter() - began


def killed_in_checkpoint(step, place):
    """Kill this process while it writes the checkpoint of that step: half of the file, or all but the rename."""
    write = checkpoints.write_whole

    def killed(path, data):
        if path.name == checkpoints.checkpoint_path(Path(), step).name:
            beside = path.with_name(f".{path.name}.part")
            beside.write_bytes(bytes(data)[: len(data) // 2 if place == "half" else None])
            os.kill(os.getpid(), signal.SIGKILL)
        write(path, data)

    checkpoints.write_whole = killed


def train_and_die(step, place, *arguments, **options):
    killed_in_checkpoint(step, place)
    train(*arguments, **options)


@pytest.mark.parametrize("more", [1, pytest.param(8, marks=pytest.mark.nightly)])
def test_killed_at_many_moments_it_ends_with_the_same_bits(data, whole, tmp_path, more):
    reference, seconds = whole
    out, log = tmp_path / "run", tmp_path / "log"
    seed = time.time_ns()
    print(f"{seed=}")  # noqa: T201
    chance = random.Random(seed)
    begin = Running(log, train_and_die, 6, "half", recipe(data, **OPTIONS), out, resume="auto")
    assert begin.end() == -signal.SIGKILL
    again = Running(log, train_and_die, 9, "whole", recipe(data, **OPTIONS), out, resume="auto")
    assert again.end() == -signal.SIGKILL
    for _ in range(more):
        running = Running(log, train, recipe(data, **OPTIONS), out, resume="auto")
        time.sleep(chance.uniform(0, seconds))
        running.kill()
        running.end()
    Running(log, train, recipe(data, **OPTIONS), out, resume="auto").succeed()
    assert_equal_bits(reference, out)


@pytest.mark.parametrize(
    ("number", "changes"),
    [
        (signal.SIGTERM, {"accumulate": 2, "checkpoint_steps": 1}),
        pytest.param(signal.SIGTERM, {"workers": 2, "mixup": 0.2, "cutmix": 1.0}, marks=pytest.mark.nightly),
        (signal.SIGINT, {"workers": 2}),
    ],
)
def test_stopped_by_a_signal_it_ends_with_the_same_bits(data, tmp_path, number, changes):
    options = recipe(data, **changes)
    whole = Running(tmp_path / "whole.log", train, options, tmp_path / "whole")
    cut = Running(tmp_path / "log", stopped_at, 11, options, tmp_path / "run", number=number, resume="auto")
    assert cut.end() == 128 + number
    assert f"stopped by {number.name} after step 11" in cut.log.read_text()
    assert checkpoints.checkpoints(tmp_path / "run")[0].name == "step-000000011.ckpt"
    assert (
        "resuming after step 11" in Running(tmp_path / "log", train, options, tmp_path / "run", resume="auto").succeed()
    )
    whole.succeed()
    assert_equal_bits(tmp_path / "whole", tmp_path / "run")
    assert comparable(tmp_path / "whole") == comparable(tmp_path / "run")


def comparable(out):
    """What doesn't depend on the machine in the log: validation and learning rates by step."""
    with (out / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    return [
        (row["step"], row["val_loss"], row["learning_rate"]) for row in rows if row["val_loss"] or row["learning_rate"]
    ]


def stopped_at(step, *arguments, number=signal.SIGTERM, times=1, **options):
    """Train, and be sent a signal in that step, with all the processes that load images."""
    from sasa.train.callbacks import Stopped, Watch

    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has it ignored in the background
    begin = Watch.on_train_batch_start

    def signalled(self, trainer, *rest):
        begin(self, trainer, *rest)
        if trainer.global_step == step - 1:
            for _ in range(times):
                os.killpg(0, number)

    Watch.on_train_batch_start = signalled
    try:
        train(*arguments, **options)
    except Stopped as stopped:
        sys.stderr.write(f"{stopped}\n")
        sys.stderr.flush()
        raise


def test_a_second_ctrl_c_ends_it_at_once(data, tmp_path):
    """And what the terminal and torchrun send together counts once."""
    out = tmp_path / "run"
    twice = Running(tmp_path / "log", impatiently, 5, recipe(data, workers=2), out)
    assert twice.end() == 1
    assert "Ctrl-C again doesn't wait" in twice.log.read_text()
    assert checkpoints.checkpoints(out)[0] == checkpoints.checkpoint_path(out, 3)
    options = {"number": signal.SIGINT, "times": 2, "resume": "auto"}
    once = Running(tmp_path / "log", stopped_at, 5, recipe(data, workers=2), out, **options)
    assert once.end() == 128 + signal.SIGINT
    assert checkpoints.checkpoints(out)[0] == checkpoints.checkpoint_path(out, 5)


def impatiently(step, *arguments, **options):
    from sasa.train import callbacks

    callbacks.ONE_PRESS = -1.0
    stopped_at(step, *arguments, number=signal.SIGINT, times=2, **options)


def test_of_a_damaged_checkpoint_the_one_before_is_taken(data, whole, tmp_path):
    Running(tmp_path / "log", stopped_at, 20, recipe(data, **OPTIONS), tmp_path / "run").end()
    newest, before, *_ = checkpoints.checkpoints(tmp_path / "run")
    newest.write_bytes(newest.read_bytes()[:-100])
    printed = Running(tmp_path / "log", train, recipe(data, **OPTIONS), tmp_path / "run", resume="auto").succeed()
    assert f"{newest} can't be used (" in printed
    assert f"resuming after step {checkpoints.step_of(before)}, from {before}" in printed
    assert_equal_bits(whole[0], tmp_path / "run")


def test_every_damage_of_a_checkpoint_is_found(whole, tmp_path):
    content = checkpoints.newest_whole(whole[0]).read_bytes()
    path, chance = tmp_path / "step-000000001.ckpt", random.Random(0)
    places = [chance.randrange(len(content)) for _ in range(50)] + [len(content) - 1 - n for n in range(0, 3000, 100)]
    changed = [content[:place] + bytes([content[place] ^ 255]) + content[place + 1 :] for place in places]
    for damaged in (b"", content[: len(content) // 2], content[:-1], *changed):
        path.write_bytes(damaged)
        assert checkpoints.why_broken(path) == "it is cut off or damaged"
    path.write_bytes(content)
    assert checkpoints.why_broken(path) is None


def test_a_full_disk_ends_nothing(data, whole, tmp_path):
    """A real one, where this user may mount one: too small for three checkpoints, then too small for a log."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system")
    try:
        running = Running(tmp_path / "log", train, recipe(data, tensorboard=True, **OPTIONS), disk / "run")
        running.end()
        printed = running.log.read_text()
        assert "no checkpoint written to" in printed and "training continues, the last one is step-" in printed
        kept = checkpoints.checkpoints(disk / "run")
        assert kept and all(checkpoints.why_broken(path) is None for path in kept)
        shutil.copytree(disk / "run", tmp_path / "run")
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)
    Running(
        tmp_path / "log", train, recipe(data, tensorboard=True, **OPTIONS), tmp_path / "run", resume="auto"
    ).succeed()
    assert_equal_bits(whole[0], tmp_path / "run")


def test_a_loss_that_is_no_number_stops_with_the_step_the_images_and_the_checkpoint(data, tmp_path):
    out = tmp_path / "run"
    Running(tmp_path / "log", infinite_at, 10, recipe(data, log_steps=4), out).end()
    printed = (tmp_path / "log").read_text()
    assert "NonFiniteLoss: loss: expected a finite number, got inf at step 10" in printed
    assert f"the last good checkpoint is {checkpoints.checkpoint_path(out, 9)}; the batch (8 images, in" in printed
    assert len((out / "non-finite-step-10.txt").read_text().split()) == 8
    assert checkpoints.checkpoints(out)[0] == checkpoints.checkpoint_path(out, 9)
    Running(tmp_path / "log", train, recipe(data, log_steps=4), out, resume="auto").succeed()


def infinite_at(step, *arguments, **options):
    from sasa.train.module import Classifier

    right = Classifier.training_step

    def wrong(self, *rest):
        return right(self, *rest) * (float("inf") if self.global_step == step - 1 else 1)

    Classifier.training_step = wrong
    train(*arguments, **options)


def test_a_finished_run_is_left_as_it_is_and_another_recipe_refused(data, whole):
    out, _ = whole
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert train(recipe(data, **OPTIONS), out, resume="auto").epochs == 4
    assert before == {path: path.stat().st_mtime_ns for path in out.iterdir()}
    with pytest.raises(OptionError, match=r"resume: expected the options .* started with; batch_size: 8 then, 16 now"):
        train(recipe(data, **(OPTIONS | {"batch_size": 16})), out, resume="auto")


def cut(path):
    path.write_bytes(path.read_bytes()[:-20])


def garble(path):
    content = bytearray(path.read_bytes())
    content[-9:] = b"\xff\0garbled"
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("model.safetensors", Path.unlink),
        ("model.safetensors", cut),
        ("model.safetensors", garble),
        ("model.safetensors.sha256", lambda path: path.write_text("")),
        ("result.json", cut),
        ("result.json", garble),
        ("result.json", lambda path: path.write_text("5")),
        ("result.json", lambda path: path.write_text("[" * 100_000)),
    ],
)
def test_a_run_without_its_weights_or_result_is_not_finished(whole, tmp_path, name, damage):
    out = shutil.copytree(whole[0], tmp_path / "run")
    assert finished_run(out, pytest.fail) is not None
    damage(out / name)
    told = []
    assert finished_run(out, told.append) is None
    assert len(told) <= 1 and all("finished run that can't be used" in line for line in told)


def test_what_is_damaged_in_a_finished_run_is_made_again_to_the_same_bits(data, whole, tmp_path):
    out = shutil.copytree(whole[0], tmp_path / "run")
    garble(out / "model.safetensors")
    with (out / "metrics.csv").open("ab") as log:
        log.write(b"3,30,\xff\xfe\n" + b"9" * 1_000_000 + b"\n3,\0")
    printed = Running(tmp_path / "log", train, recipe(data, **OPTIONS), out, resume="auto").succeed()
    assert "resuming after step 31" in printed
    assert_equal_bits(whole[0], out)
    assert comparable(whole[0]) == comparable(out)


def replaced(name, text):
    return lambda out: (out / name).write_text(text)


def in_the_way(out):
    (out / "recipe.json").unlink()
    (out / "recipe.json").mkdir()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (replaced("recipe.json", "5"), OutputError, r"recipe\.json, what the run was started with, can't be read"),
        (replaced("recipe.json", "{"), OutputError, r"recipe\.json, what the run was started with, can't be read"),
        (lambda out: (out / "recipe.json").unlink(), OutputError, r"recipe\.json, .* --overwrite starts it over"),
        (lambda out: (out / "data.json").unlink(), OutputError, r"data\.json, .* --overwrite starts it over"),
        (in_the_way, OutputError, r"out: expected a file at .*recipe\.json, got a folder"),
        (
            replaced("data.json", '{"classes": ["1", "0", "2"], "channels": 1}'),
            DataError,
            r"data: expected the classes and channels .* started with, .*'1', '0', '2'.* got .*'0', '1', '2'",
        ),
    ],
)
def test_a_run_is_not_resumed_as_another(data, whole, tmp_path, change, error, message):
    out = shutil.copytree(whole[0], tmp_path / "run")
    (out / "result.json").unlink()
    change(out)
    with pytest.raises(error, match=message):
        train(recipe(data, **OPTIONS), out, resume="auto")


def test_a_run_whose_checkpoints_are_gone_begins_anew_and_says_so(data, whole, tmp_path):
    out = shutil.copytree(whole[0], tmp_path / "run")
    (out / "result.json").unlink()
    shutil.rmtree(out / "checkpoints")
    told = []
    described = json.loads((out / "data.json").read_text())
    assert checkpoint_to_resume(out, recipe(data, **OPTIONS), described, told.append) is None
    assert told == [f"no checkpoint that can be used in {out}: the run starts over"]


def test_checkpoints_are_read_as_plain_data_whatever_the_environment_says(data, whole, tmp_path):
    out = shutil.copytree(whole[0], tmp_path / "run")
    (out / "result.json").unlink()
    newest = checkpoints.newest_whole(out)
    checkpoints.save_checkpoint(torch.load(newest, weights_only=True) | {"code": Code(str(tmp_path / "ran"))}, newest)
    environment = {"TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"}
    running = Running(tmp_path / "log", train, recipe(data, **OPTIONS), out, environment=environment, resume="auto")
    assert running.end() != 0 and "weights_only" in running.printed()
    assert not (tmp_path / "ran").exists()


class Code:
    """What makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


def test_torchrun_starts_again_after_a_worker_is_killed(data, tmp_path):
    """Two processes; the second kills itself once, early in the second epoch."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    out = tmp_path / "run"
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "--max-restarts",
        "1",
    ]
    command += [str(program), "train", "--data", str(data), "--out", str(out)]
    for name, value in (SMALL | {"epochs": 2}).items():
        if name not in ("model_options", "tensorboard", "devices"):
            command += [f"--{name}", str(value)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "MARK": str(tmp_path / "mark")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "mark").exists()
    assert "resuming after step 9" in done.stderr and "top-1" in done.stdout
    assert [row[0] for row in comparable(out) if row[1]] == ["7", "15"]


PROGRAM = """
import os, signal, sys
from pathlib import Path
from sasa.cli import main
from sasa.train.callbacks import Watch

begin = Watch.on_train_batch_start

def killed(self, trainer, *rest):
    begin(self, trainer, *rest)
    mark = Path(os.environ["MARK"])
    if trainer.global_step == 10 and trainer.global_rank == 1 and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)

Watch.on_train_batch_start = killed
sys.exit(main())
"""
