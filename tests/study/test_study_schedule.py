"""Studies from start to end: what runs, what is left out, what goes on, what is told; with trainings that pretend."""

import json
import os
import re
import signal
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from fakes import FAKE
from processes import Running, small_images

from sasa.cli import main
from sasa.study import TrainingsFailed, study, trainings
from sasa.train import OutputError

TUNE = {"fixed": {"model": "resnet14"}, "grid": {"learning_rate": [0.03, 0.01, 0.05]}, "seeds": [100]}


def started(out):
    """What was started, in order."""
    path = out / "started"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def count(out):
    """How often each training was started."""
    return Counter(one["key"] for one in started(out))


def steps(out):
    """What was computed; nothing twice, if it was continued."""
    return (out / "steps").read_text().splitlines() if (out / "steps").exists() else []


def wait_until(condition, running, seconds=200):
    """Wait for what a process is to bring about."""
    end = time.monotonic() + seconds
    while not condition():
        assert running.process.is_alive(), f"exit status {running.process.exitcode}: {running.printed()}"
        assert time.monotonic() < end, running.printed()
        time.sleep(0.01)


def runs(one):
    """Whether a training that was started still does. One whose end nobody has asked for is a zombie."""
    try:
        return Path(f"/proc/{one['process']}/stat").read_text().rpartition(") ")[2][0] not in "ZX"
    except FileNotFoundError:
        return False


def pretend(*arguments):
    """A study in another process, which can be killed."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has it ignored in the background
    trainings.COMMAND = FAKE
    study(*arguments)


def test_all_are_trained_once_and_gathered(fake, write_plan, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["study", str(write_plan()), "--out", str(out)]) == 0
    printed = capsys.readouterr()
    assert [one["key"] for one in started(out)][:2] == [
        "model=sasa_resnet14,model_options.width=0.5,seed=0",
        "model=sasa_resnet14,model_options.width=1.0,seed=0",
    ]
    assert set(count(out).values()) == {1} and len(count(out)) == 8
    assert re.search(
        r"grid: 7 of 8, about \d s left: model=resnet14,model_options.width=0.5,seed=1: 79.9% in \d s", printed.err
    )
    assert "(2) | 1,000 | 2.00 | 1.5 |" in printed.out and f"wrote {out / 'plot.png'}" in printed.out
    results = json.loads((out / "results.json").read_text())
    run = out / "runs" / "model=resnet14,model_options.width=1.0,seed=1"
    assert results["cells"][3]["values"]["1"] == json.loads((run / "result.json").read_text())["top1"]
    assert results["cells"][3]["n"] == 2
    [machine] = results["machines"]
    assert machine["torch"] == torch.__version__
    config = yaml.safe_load((run.parent / f"{run.name}.yaml").read_text())
    assert (config["model"], config["model_options"], config["seed"], config["epochs"]) == (
        "resnet14",
        {"width": 1.0},
        1,
        2,
    )

    assert main(["study", str(write_plan()), "--out", str(out)]) == 0
    assert len(started(out)) == 8  # finished is finished
    (run / "result.json").unlink()
    study(write_plan(), out)
    assert [one["key"] for one in started(out)][8:] == [run.name]


def test_without_out_it_is_named_after_the_plan(fake, write_plan, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    study(write_plan("some.yaml", grid={"model": ["resnet14"]}, seeds=[0]))
    assert (tmp_path / "runs" / "some" / "results.json").exists()


def test_more_seeds_and_values_train_only_what_is_new(fake, write_plan, tmp_path):
    out = tmp_path / "out"
    study(write_plan(), out)
    results = study(write_plan(seeds=[0, 1, 2]), out)
    assert [one["key"].rpartition(",")[2] for one in started(out)[8:]] == ["seed=2"] * 4
    assert [cell["n"] for cell in results["cells"]] == [3] * 4
    grid = {"model": ["resnet14", "sasa_resnet14"], "model_options.width": [0.5, 1.0, 2.0]}
    results = study(write_plan(seeds=[0, 1, 2], grid=grid), out)
    assert len(started(out)) == 18 and set(count(out).values()) == {1}
    assert len(results["cells"]) == 6


@pytest.mark.parametrize(
    "change",
    [
        {"options": {"epochs": 3}},
        {"options": {"epochs": 2, "strict": True}},
        {"seeds": [1]},
        {"metric": "val_loss"},
        {"tune": TUNE},
    ],
)
def test_another_study_in_the_folder_is_refused(change, fake, write_plan, tmp_path, capsys):
    out = tmp_path / "out"
    study(write_plan(), out)
    assert main(["study", str(write_plan(**change)), "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert f"{out} holds another study" in error and next(iter(change)) in error.replace("recipe.", "options: ")
    assert len(started(out)) == 8
    assert json.loads((out / "plan.json").read_text())["recipe"]["epochs"] == 2
    assert set(count(out).values()) == {1}


def test_a_folder_of_something_else_is_refused(write_plan, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").touch()
    with pytest.raises(OutputError, match="expected an empty folder or one with a study"):
        study(write_plan(), tmp_path / "out")


def test_options_are_tuned_before_and_kept(fake, write_plan, tmp_path):
    out = tmp_path / "out"
    results = study(write_plan(tune=TUNE), out)
    assert results["tuned"]["options"] == {"learning_rate": 0.01}
    assert [one["key"] for one in started(out)][:3] == [
        f"tune,learning_rate={rate},seed=100" for rate in (0.03, 0.01, 0.05)
    ]
    for config in (out / "runs").glob("model=*.yaml"):
        assert yaml.safe_load(config.read_text())["learning_rate"] == 0.01
    assert len(results["cells"]) == 4 and len(started(out)) == 11
    best = out / "runs" / "tune,learning_rate=0.01,seed=100" / "result.json"
    best.write_text(best.read_text().replace('"top1": 0.8', '"top1": 0.1'))
    results = study(write_plan(tune=TUNE, seeds=[0, 1, 2]), out)
    assert results["tuned"]["options"] == {"learning_rate": 0.01}
    assert len(started(out)) == 15


def test_a_failure_is_told_the_others_go_on_and_it_is_tried_again(fake, write_plan, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    monkeypatch.setenv("FAKE_FAILS", "sasa_resnet14,model_options.width=0.5,seed=0")
    failing = "model=sasa_resnet14,model_options.width=0.5,seed=0"
    assert main(["study", str(write_plan()), "--out", str(out)]) == 1
    told = capsys.readouterr().err
    assert f"{failing} failed: exit status 1; {out}" in told
    assert "line 29" in told and "sasa train: error: the loss is no number" in told and "line 2\n" not in told
    headline = "sasa study: 1 of the trainings failed; the same command tries again, unless tuning is done"
    assert f"{headline}:\n  {failing}: exit status 1; {out / 'runs' / failing}.log ends with\n" in told
    assert "Traceback" not in told
    assert json.loads((out / "results.json").read_text())["cells"][0]["missing_seeds"] == [0]
    monkeypatch.delenv("FAKE_FAILS")
    assert study(write_plan(), out)["cells"][0]["n"] == 2
    assert count(out)[failing] == 2 and len(started(out)) == 9


def test_tuning_goes_on_without_what_failed(fake, write_plan, tmp_path, monkeypatch):
    monkeypatch.setenv("FAKE_FAILS", "learning_rate=0.01")
    with pytest.raises(TrainingsFailed, match=r"1 of the trainings failed.*\n  tune,learning_rate=0.01"):
        study(write_plan(tune=TUNE), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "tuned.json").read_text()) == {"learning_rate": 0.03}
    assert len(started(tmp_path / "out")) == 11
    monkeypatch.setenv("FAKE_FAILS", "tune")
    with pytest.raises(TrainingsFailed, match="3 of the trainings failed"):
        study(write_plan(tune=TUNE), tmp_path / "none")
    assert len(started(tmp_path / "none")) == 3  # without options there is nothing to train


def test_a_result_without_the_metric_is_a_failure(fake, write_plan, tmp_path):
    with pytest.raises(TrainingsFailed, match=r"expected top5 in .*result.json, got None"):
        study(write_plan(metric="top5", seeds=[0], grid={"model": ["resnet14"]}), tmp_path / "out")


@pytest.mark.parametrize("parallel", [1, 2])
def test_killed_it_resumes_and_computes_nothing_twice(parallel, fake, write_plan, tmp_path, capsys):
    out, plan = tmp_path / "out", write_plan()
    holding = {"FAKE_HOLDS": "width=1.0"}  # every second training
    running = Running(tmp_path / "log", pretend, plan, out, parallel, environment=holding)
    wait_until(lambda: len(steps(out)) == 6 * parallel, running)
    running.kill()
    running.end()
    left = [one for one in started(out) if runs(one)]  # they outlive their scheduler
    assert len(left) == parallel
    assert main(["study", str(plan), "--out", str(out)]) == 2
    holders = ", ".join([str(running.process.pid), *(str(one["process"]) for one in left)])
    assert f"expected no other study at work in {out}, got process {holders}; on SIGTERM" in capsys.readouterr().err
    for one in left:
        os.kill(one["process"], signal.SIGTERM)
    while any(map(runs, left)):
        time.sleep(0.01)
    results = study(plan, out, parallel)
    assert [cell["n"] for cell in results["cells"]] == [2] * 4
    assert len(steps(out)) == len(set(steps(out))) == 8 * 4
    assert count(out) == {key: 2 if key in {one["key"] for one in left} else 1 for key in count(out)}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stopped_it_lets_trainings_save(number, fake, write_plan, tmp_path):
    out, plan = tmp_path / "out", write_plan()
    running = Running(tmp_path / "log", pretend, plan, out, 2, environment={"FAKE_HOLDS": "seed=0"})
    wait_until(lambda: len(steps(out)) == 4, running)
    running.kill(number)
    assert running.end() == 128 + number
    printed = (tmp_path / "log").read_text()
    assert f"{number.name}: waiting for trainings to save" in printed
    assert len(started(out)) == 2 and len(steps(out)) == 4
    for one in started(out):
        assert (out / "runs" / f"{one['key']}.log").read_text() == "stopped and saved\n"
    assert (out / "results.json").exists()
    study(plan, out, 2)
    assert len(steps(out)) == len(set(steps(out))) == 8 * 4
    assert len(started(out)) == 10


def test_a_second_signal_ends_trainings_at_once(write_plan, tmp_path):
    out = tmp_path / "out"
    running = Running(tmp_path / "log", pretend, write_plan(), out, 1, environment={"FAKE_SECONDS": "30"})
    wait_until(lambda: len(started(out)) == 1, running)
    running.kill(signal.SIGTERM)
    wait_until(lambda: "again ends them at once" in running.printed(), running)
    running.kill(signal.SIGTERM)
    assert running.end(20) == 143
    assert not runs(started(out)[0])


def test_two_studies_never_work_in_one_folder(fake, write_plan, tmp_path, capsys):
    out, plan = tmp_path / "out", write_plan()
    out.mkdir()
    with trainings.TrainingProcesses(out).alone():
        assert main(["study", str(plan), "--out", str(out)]) == 2
    assert f"expected no other study at work in {out}, got process {os.getpid()};" in capsys.readouterr().err
    assert started(out) == []


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tuned.json", "{", "tuned.json can't be read"),
        ("tuned.json", "5", "expected a dict in .*tuned.json, got a int"),
        ("tuned.json", '{"learning_rate": 7}', "expected options of tune.grid in .*tuned.json, got"),
        ("machines.json", "{}", "expected a list in .*machines.json, got a dict"),
    ],
)
def test_damaged_files_of_the_folder_are_named(name, content, message, fake, write_plan, tmp_path):
    out, plan = tmp_path / "out", write_plan(tune=TUNE, seeds=[0])
    study(plan, out)
    (out / name).write_text(content)
    with pytest.raises(OutputError, match=message):
        study(plan, out)


@pytest.mark.parametrize("content", ["", "5", "[" * 100_000, '{"top1": NaN}', '{"top1": true}', '{"top1": 1e999}'])
def test_a_damaged_result_counts_as_missing(content, fake, write_plan, tmp_path):
    out, plan = tmp_path / "out", write_plan(seeds=[0], grid={"model": ["resnet14"]})
    study(plan, out)
    (out / "runs" / "model=resnet14,seed=0" / "result.json").write_text(content)
    with pytest.raises(TrainingsFailed, match=r"expected top1 in .*result.json, got"):
        study(plan, out)  # the training leaves its result as it is
    results = json.loads((out / "results.json").read_text())
    assert results["cells"][0]["mean"] is None and len(started(out)) == 2


def places(out):
    return [(one["CUDA_VISIBLE_DEVICES"], one["OMP_NUM_THREADS"]) for one in started(out)]


def test_on_a_cpu_slots_share_the_cores(fake, write_plan, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(6)))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("SLURM_NTASKS", "8")
    plan = write_plan(options={"accelerator": "cpu"}, seeds=[0])
    study(plan, tmp_path / "out", 3)
    assert places(tmp_path / "out") == [(None, "2")] * 4
    assert {one["SLURM_NTASKS"] for one in started(tmp_path / "out")} == {None}  # each is a training on its own
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    study(plan, tmp_path / "own", 3)
    assert places(tmp_path / "own") == [(None, "5")] * 4


@pytest.mark.parametrize(("visible", "names"), [(None, ["0", "1"]), ("3,5", ["3", "5"])])
def test_each_training_has_one_of_the_gpus(visible, names, fake, write_plan, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setenv("FAKE_SECONDS", "0.05")
    results = study(write_plan(), tmp_path / "out")
    found = [one["CUDA_VISIBLE_DEVICES"] for one in started(tmp_path / "out")]
    assert sorted(found[:2]) == names and set(found) == set(names)
    assert len(results["machines"][0]["gpus"]) == 2


def test_what_needs_no_signals_runs_in_any_thread(fake, write_plan, tmp_path):
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as pool:
        results = pool.submit(study, write_plan(seeds=[0]), tmp_path / "out").result()
    assert [cell["n"] for cell in results["cells"]] == [1] * 4


def test_real_trainings(write_plan, tmp_path, capsys, monkeypatch):
    """Two of a second, of the package's own command."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    data = small_images(tmp_path / "data")
    small = {"data": str(data), "image_size": 10, "epochs": 1, "batch_size": 8, "tensorboard": False}
    small |= {"model_options.width": 0.5, "accelerator": "cpu"}
    plan = write_plan(options=small, grid={"model": ["sasa_resnet14", "resnet14"]}, seeds=[0])
    assert main(["study", str(plan), "--out", str(tmp_path / "out"), "--parallel", "2"]) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [cell["options"]["model"] for cell in results["cells"]] == ["sasa_resnet14", "resnet14"]
    for cell in results["cells"]:
        assert 0 <= cell["mean"] <= 1 and cell["parameters"] > 1000 and cell["seconds_per_epoch"] > 0
        run = tmp_path / "out" / "runs" / f"model={cell['options']['model']},seed=0"
        recipe = json.loads((run / "recipe.json").read_text())
        assert (recipe["epochs"], recipe["model_options"], recipe["data"]) == (1, {"width": 0.5}, str(data))
        assert (run / "model.safetensors").exists()
    assert np.isfinite(results["differences"][0]["difference"])
