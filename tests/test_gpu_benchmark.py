"""The GPU's benchmark, rehearsed on the CPU: it measures, survives what fails, and says what the figures say."""

import contextlib
import json
import signal
import subprocess
import sys
import time

import pytest
import torch

import sasa
from benchmarks import readme, tables
from benchmarks.gpu import __main__ as command
from benchmarks.gpu import attention, clock, layer, limits, machine, networks, plan, plot, targets, worker
from benchmarks.gpu import tables as gpu_tables
from benchmarks.gpu.precision import PRECISIONS
from benchmarks.gpu.results import SKIPPED, Results
from benchmarks.problems import AttentionProblem

MACHINE = {
    "gpu": "a GPU",
    "driver": "1.2",
    "torch": "2.15.0",
    "triton": "3.9.0",
    "sasa": "0.1.0",
    "copy_bytes_per_second": {"value": 3e12, "lowest": 3e12, "highest": 3e12},
    "product_flops_per_second": {name: {"value": 8e14} for name in PRECISIONS},
}


def orders(folder, parts=("attention",), deadline=None):
    return worker.Orders(str(folder), "cpu", True, list(parts), time.time() + 600 if deadline is None else deadline)


def ignore(words):
    """Say nothing."""


@pytest.fixture(autouse=True)
def _as_before():
    """Measuring sets what PyTorch may use."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark
    yield
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark = before[1:]


# The rehearsal.


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpu")
    line = [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "--quick", "--out", str(folder)]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads((folder / "gpu.json").read_text()), folder


def test_a_rehearsal_measures_everything_or_says_why_not(rehearsal):
    _, found, folder = rehearsal
    assert found["rehearsal"] is True and found["seconds"] > 0 and "in_progress" not in found
    assert found["machine"]["copy_bytes_per_second"]["value"] > 0
    assert set(found["machine"]["implementation"]) == {"bfloat16", "float32"}
    results = Results(folder)
    for step in orders(folder, worker.PARTS).steps():
        figures = results.peers(step.case)[step.peer]
        if "cannot" in figures:
            assert not (step.peer == "sasa" and not step.case.compiled), figures
            assert figures["cannot"] and figures["cannot"] != SKIPPED
            continue
        assert figures["milliseconds_lowest"] <= figures["milliseconds"] <= figures["milliseconds_highest"]
        assert figures["ratio_lowest"] <= figures["ratio_to_sasa"] <= figures["ratio_highest"]
        assert figures["first_call_seconds"] > 0 and figures["calls"] >= figures["turns"] >= 1
        assert ("copy_share" in figures) == (step.part == "attention")
        assert ("images_per_second" in figures) == (step.part == "networks")
    assert all(row["reached"] is None for row in found["targets"])


def test_a_rehearsal_says_what_failed(rehearsal):
    said, found, _ = rehearsal
    (case,) = [case for case in found["attention"]["cases"] if case["case"] == "small bfloat16 training"]
    assert "does not support backward on CPU" in case["peers"]["FlexAttention compiled"]["cannot"]
    assert case["peers"]["sasa halo"]["cannot"] == "the variants are of the GPU's kernels"
    assert case["peers"]["unfold + SDPA"]["largest_difference"] < 0.1
    (network,) = [case for case in found["networks"]["cases"] if case["case"] == "batch 2 forward"]
    assert network["peers"]["halonet50ts"] == {"cannot": "AssertionError"}  # its blocks don't divide small images
    assert "small bfloat16 training, unfold + SDPA: " in said
    assert "| small bfloat16 forward | sasa |" in said


def test_a_rehearsal_is_drawn_and_never_shown(rehearsal):
    _, found, folder = rehearsal
    assert (folder / "gpu.png").read_bytes().startswith(b"\x89PNG")
    assert gpu_tables.section(found) == gpu_tables.NOTHING


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "no cuda GPU here"),
        (["--device", "xpu"], "no xpu GPU here"),
        (["--device", "cpu"], "add --quick"),
    ],
)
def test_without_a_gpu_the_command_says_so(options, words, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.xpu, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu", *options])
    with pytest.raises(SystemExit, match=words) as error:
        command.main()
    assert "\n" not in str(error.value)


# What fails.


class MadeUp:
    """A part whose peers sleep, or fail."""

    PACE = clock.Pace(1, 2, 1)

    def __init__(self, **calls):
        self.calls = {"sasa": lambda: None} | calls

    def cases(self, quick):
        problem = AttentionProblem(1, 1, 1, 1, 1)
        return [plan.Case("attention", "a case", "forward", "float32", problem, tuple(self.calls))]

    def baseline(self, case, peer):
        return "sasa"

    def compiles(self, case, peer):
        return False

    def build(self, case, peer, setting):
        return self.calls[peer]

    def check(self, case, peer, call, setting):
        return None

    def figures(self, case, peer, found, machine):
        return {"double": 2 * found["milliseconds"]}


def breaks():
    raise torch.OutOfMemoryError("no room\nand a long story")


def worked(folder, monkeypatch, part, **options):
    monkeypatch.setattr(worker, "PARTS", {"attention": part})
    status = worker.work(orders(folder, **options), ignore)
    found = Results(folder).found
    return status, found["attention"]["cases"][0]["peers"] if "attention" in found else {}


def test_a_failing_peer_is_written_down_and_the_next_is_measured(tmp_path, monkeypatch):
    status, peers = worked(tmp_path, monkeypatch, MadeUp(breaks=breaks, fine=lambda: None))
    assert status == 0
    assert peers["breaks"] == {"cannot": "OutOfMemoryError: no room"}
    assert peers["fine"]["ratio_to_sasa"] > 0
    assert peers["fine"]["double"] == 2 * peers["fine"]["milliseconds"]


def test_without_ours_a_peer_has_a_time_and_no_ratio(tmp_path, monkeypatch):
    _, peers = worked(tmp_path, monkeypatch, MadeUp(sasa=breaks, fine=lambda: None))
    assert peers["sasa"]["cannot"] == "OutOfMemoryError: no room"
    assert peers["fine"]["no_ratio"] == "OutOfMemoryError: no room"
    assert peers["fine"]["milliseconds"] > 0 and "ratio_to_sasa" not in peers["fine"]


def test_behind_the_deadline_everything_is_skipped(tmp_path, monkeypatch):
    _, peers = worked(tmp_path, monkeypatch, MadeUp(other=lambda: None), deadline=time.time())
    assert peers == {"sasa": {"cannot": SKIPPED}, "other": {"cannot": SKIPPED}}


def test_what_is_measured_is_not_measured_again(tmp_path, monkeypatch):
    worked(tmp_path, monkeypatch, MadeUp(), deadline=time.time())
    _, peers = worked(tmp_path, monkeypatch, MadeUp(other=lambda: None))
    assert peers["sasa"] == {"cannot": SKIPPED}
    assert peers["other"]["milliseconds"] > 0


def test_a_lost_device_ends_the_process(tmp_path, monkeypatch):
    monkeypatch.setattr(worker, "usable", lambda clock: False)
    status, peers = worked(tmp_path, monkeypatch, MadeUp(breaks=breaks, fine=lambda: None))
    assert status == worker.DEVICE_LOST
    assert set(peers) == {"sasa", "breaks"}


def test_a_new_worker_goes_on_behind_what_killed_the_last(tmp_path, monkeypatch):
    part = MadeUp(hangs=lambda: None, fine=lambda: None)
    monkeypatch.setattr(worker, "PARTS", {"attention": part})
    own, results = orders(tmp_path), Results(tmp_path)
    results.begin(["attention"], everything=True, facts={"rehearsal": True})
    statuses = [-signal.SIGALRM, 0]

    run = subprocess.run

    def process(line, **options):
        if "benchmarks.gpu.worker" not in line:
            return run(line, **options)
        assert options["env"]["TRITON_CACHE_DIR"]
        told = worker.Orders(**json.loads(line[3]))
        status = statuses.pop(0)
        if status:
            here = Results(tmp_path)
            here.begins(told.steps()[1])  # and then the alarm
        else:
            assert worker.work(told, ignore) == 0
        return subprocess.CompletedProcess(line, status)

    monkeypatch.setattr(subprocess, "run", process)
    command.start_workers(own, results)
    peers = results.found["attention"]["cases"][0]["peers"]
    assert peers["hangs"] == {"cannot": "took too long"}
    assert all("milliseconds" in peers[name] for name in ("sasa", "fine"))


def test_a_worker_that_dies_of_nothing_known_is_not_started_again(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(worker, "PARTS", {"attention": MadeUp()})
    monkeypatch.setattr(subprocess, "run", lambda line, **options: subprocess.CompletedProcess(line, 1))
    own, results = orders(tmp_path), Results(tmp_path)
    results.begin(["attention"], everything=True, facts={"rehearsal": True})
    command.start_workers(own, results)
    results.found["machine"] = MACHINE
    command.finish(own, results)
    assert results.peers(own.steps()[0].case)["sasa"] == {"cannot": "no worker was left to measure it"}
    assert (tmp_path / "gpu.png").exists()


def test_other_parts_are_kept_if_they_are_of_the_same_machine(tmp_path):
    results = Results(tmp_path)
    results.found = {"machine": MACHINE, "attention": {"cases": [1]}, "layer": {"cases": [2]}, "targets": []}
    results.save()
    results.begin(["layer"], everything=False, facts={"device": "cuda"})
    assert results.found["attention"] == {"cases": [1]} and "layer" not in results.found
    results.describe(MACHINE, ["layer"])
    assert results.found["attention"] == {"cases": [1]}
    results.describe(MACHINE | {"gpu": "another"}, ["layer"])
    assert "attention" not in results.found
    results.begin(["layer"], everything=True, facts={})
    assert results.found == {"machine": {}}


# Time and memory.


class Device:
    """Stands for torch.cuda: a millisecond between events, and a call that holds 3 bytes of 5."""

    class Event:
        moments = 0.0

        def __init__(self, enable_timing):
            self.moment = 0.0

        def record(self):
            Device.Event.moments += 1
            self.moment = Device.Event.moments

        def elapsed_time(self, end):
            return end.moment - self.moment

    synchronize = reset_peak_memory_stats = staticmethod(lambda: None)
    memory_allocated = staticmethod(lambda: 2)
    max_memory_allocated = staticmethod(lambda: 5)


def test_events_time_calls_on_a_device_whose_cache_is_emptied():
    own = clock.Clock("cpu")
    own.on_cpu, own.module, own.flushed = False, Device, torch.ones(4)
    assert own.milliseconds(lambda: None, 3) == [1, 1, 1]
    assert own.flushed.eq(0).all()
    assert own.peak_bytes(lambda: None) == 3
    medians, calls = clock.alternate(own, [lambda: None] * 2, clock.Pace(7, 5, 60))
    assert medians == [[1] * 5] * 2 and calls == 7 * 5


def test_ratios_are_of_medians_with_the_spread_of_the_turns():
    summary = clock.summarise([3.0, 8.0, 10.0], [1.0, 2.0, 4.0])
    assert summary["ratio_to_sasa"] == 4.0
    assert (summary["ratio_lowest"], summary["ratio_highest"]) == (2.5, 4.0)
    assert (summary["milliseconds_lowest"], summary["milliseconds_highest"]) == (3.0, 10.0)
    assert machine.rate(12, [1.0, 2.0, 3.0]) == {"value": 6000, "lowest": 4000, "highest": 12000}


def test_bytes_and_flops_are_those_that_cannot_be_avoided():
    problem = AttentionProblem(32, 8, 16, 56, 7)
    case = plan.Case("attention", "a", "forward", "bfloat16", problem, ("sasa",))
    found = attention.figures(
        case, "sasa", {"milliseconds": 0.1, "milliseconds_lowest": 0.05, "milliseconds_highest": 0.2}, MACHINE
    )
    moved = 4 * 2 * 32 * 128 * 56**2  # queries, keys, values and outputs of two bytes
    assert found["gigabytes_per_second"] == pytest.approx(moved / 1e-4 / 1e9)
    assert found["copy_share"] == pytest.approx(moved / 1e-4 / 3e12)
    assert (found["copy_share_lowest"], found["copy_share_highest"]) == pytest.approx(
        (found["copy_share"] / 2, found["copy_share"] * 2)
    )
    assert found["product_share"] == pytest.approx(problem.flops / 1e-4 / 8e14)


def test_variants_are_forced_around_the_whole_call(monkeypatch):
    done = []

    class Kernels:
        @staticmethod
        @contextlib.contextmanager
        def using(variant):
            done.append(variant)
            yield
            done.append("end")

    monkeypatch.setattr(sasa.ops, "triton", Kernels, raising=False)
    attention.forced(lambda: done.append("call"), "taps", plan.Setting("cuda", False))()
    assert done == ["taps", "call", "end"]
    with pytest.raises(plan.RefusedError):
        attention.forced(lambda: None, "halo", plan.Setting("cpu", True))


@pytest.mark.parametrize("layout", ["channels_last", "heads_last", "contiguous"])
def test_layouts_hold_the_same_numbers(layout):
    problem = AttentionProblem(2, 2, 4, 5, 3)
    own = attention.inputs(problem, torch.bfloat16, layout, "cpu")
    for one, other in zip(own, attention.inputs(problem, torch.bfloat16, "contiguous", "cpu"), strict=True):
        assert torch.equal(one, other)
    assert own[0].is_contiguous() == (layout == "contiguous")
    assert own[0].permute(0, 3, 4, 1, 2).is_contiguous() == (layout == "heads_last")


# What is planned, and what is made of the results.


def test_the_plan_begins_with_what_the_targets_need():
    steps = plan.plan(worker.PARTS, quick=False)
    assert len({(step.part, step.case.name, step.peer) for step in steps}) == len(steps)
    assert [step.case.rank for step in steps] == sorted(step.case.rank for step in steps)
    assert steps[0][::2] == ("attention", "sasa") and steps[0].case.name == "notebook bfloat16 forward"
    known = {"attention": attention.PEERS, "layer": (layer.OURS, layer.CONVOLUTION, layer.HALO)}
    for step in steps:
        assert step.peer in known.get(step.part, networks.NETWORKS)
        assert step.case.precision in PRECISIONS


def fake_results(monkeypatch, twice=2.0):
    """The full plan: every peer takes ``twice`` as long as ours; one fails, one is skipped."""
    monkeypatch.setattr(networks, "parameters", lambda name: 2 * 10**7)
    found = {"rehearsal": False, "machine": MACHINE}
    results = Results.__new__(Results)
    results.found = found
    for step in plan.plan(worker.PARTS, quick=False):
        ours = [0.15, 0.16, 0.17]
        part = worker.PARTS[step.part]
        own = ours if step.peer.startswith("sasa") else [twice * one for one in ours]
        figures = clock.summarise(own, ours) | {"peak_gigabytes": 0.1, "calls": 3, "first_call_seconds": 1.0}
        figures |= part.figures(step.case, step.peer, figures, MACHINE)
        if step.peer == "NATTEN, no position":
            figures = {"cannot": "ModuleNotFoundError: No module named 'natten'"}
        elif step.peer == "slices compiled":
            figures = {"cannot": SKIPPED}
        results.peers(step.case)[step.peer] = figures
    return found


def test_targets_are_compared_with_the_results(monkeypatch):
    found = fake_results(monkeypatch)
    rows = {row["name"]: row for row in command.evaluate(found, targets.TARGETS)}
    assert all(row["value"] is not None for row in rows.values())
    flex = rows["FlexAttention / attention forward, bfloat16"]
    assert (flex["value"], flex["reached"]) == (pytest.approx(2), False)
    copied = rows["attention forward, bytes a second / a copy's, bfloat16"]
    assert copied["value"] == pytest.approx(4 * 2 * 32 * 128 * 56**2 / 0.16e-3 / 3e12)
    assert copied["lowest"] < copied["value"] < copied["highest"] and not copied["reached"]
    convolution = rows["layer / 3x3 convolution forward, bfloat16"]
    assert (convolution["value"], convolution["reached"]) == (pytest.approx(0.5), True)
    images = rows["SASA-ResNet-50, convolution stem / ResNet-50: images/s forward"]
    assert (images["value"], images["reached"]) == (pytest.approx(2), True)
    rows = {row["name"]: row for row in command.evaluate(fake_results(monkeypatch, 4.5), targets.TARGETS)}
    assert rows["FlexAttention / attention forward, bfloat16"]["reached"]


def test_a_target_of_what_failed_has_no_value(monkeypatch):
    found = fake_results(monkeypatch)
    for case in found["attention"]["cases"]:
        case["peers"]["FlexAttention compiled"] = {"cannot": "it can't"}
    del found["networks"]
    rows = {row["name"]: row for row in command.evaluate(found, targets.TARGETS)}
    assert rows["FlexAttention / attention forward, bfloat16"]["reached"] is None
    assert rows["the same, training step"]["value"] is None
    assert rows["layer / 3x3 convolution forward, bfloat16"]["reached"]


def test_tables_pictures_and_the_readme(monkeypatch, tmp_path):
    found = fake_results(monkeypatch)
    found["targets"] = command.evaluate(found, targets.TARGETS)
    shown = gpu_tables.tables(found)
    assert shown[0].title == "targets" and len(shown) == 6
    for table in shown:
        assert all(len(row) == len(table.header) for row in table.rows)
    by_stage = shown[2].rows
    assert by_stage[0] == ["56x56, D 8", "bfloat16", "0.16", "2.00", "0.16", "2.00"]
    assert len(by_stage) == 8
    text = gpu_tables.section(found)
    assert "a GPU, driver 1.2, PyTorch 2.15.0, Triton 3.9.0; copies 3.00 TB/s" in text
    assert "4 measurements did not fit into the time of the run" in text
    assert "No module named 'natten'" in text and SKIPPED not in text
    assert tables.markdown(shown[0]) in text and gpu_tables.PICTURE in text
    plot.draw(found, tmp_path / "gpu.png")
    assert (tmp_path / "gpu.png").read_bytes().startswith(b"\x89PNG")


def test_the_readme_says_nothing_of_what_was_not_measured(monkeypatch, tmp_path):
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    text = "<!-- gpu table -->\nold\n<!-- end -->"
    assert readme.with_tables(text) == f"<!-- gpu table -->\n{gpu_tables.NOTHING}\n<!-- end -->"
    (tmp_path / "gpu.json").write_text(json.dumps(fake_results(monkeypatch)))
    assert "| notebook bfloat16 forward | sasa | 0.16 |" in readme.with_tables(text)


def test_limits_follow_from_counts():
    """Microseconds of 1e9 pixels: bytes, FLOPs, exponentials and instructions over what the chip does in a second."""
    kernel = {
        "kernel": "forward", "dtype": "bfloat16", "width": 32, "exponentials_per_pixel": 100,
        "warp_instructions_per_pixel": 50,
    }  # fmt: skip
    found = limits.limits(kernel, 10**9)
    assert found["memory"] == pytest.approx(4 * 32 * 2 * 1e9 / 3.35e12 * 1e6)
    assert found["tensor_cores"] == pytest.approx(2 * 2 * 32 * 100 * 1e9 / 989e12 * 1e6)
    assert found["exponentials"] == pytest.approx(100 * 1e9 / (132 * 16 * 1.83e9) * 1e6)
    assert found["issue"] == pytest.approx(50 * 1e9 / (132 * 4 * 1.83e9) * 1e6)
    assert limits.limits(kernel | {"dtype": "float32"}, 10**9)["tensor_cores"] == 0


def test_main_loops_are_the_innermost_of_the_first_that_take_exponentials():
    code = ["MOV"] * 80
    for place in (25, 45, 65):
        code[place] = "MUFU.EX2 R1, R2"
    loops = [(5, 9), (10, 35), (20, 30), (40, 50), (60, 70)]
    assert limits.main_loops(code, loops, 1) == [(20, 30)]
    assert limits.main_loops(code, loops, 2) == [(20, 30), (40, 50)]
