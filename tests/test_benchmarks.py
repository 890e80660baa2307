"""The benchmark's peers compute the same, its measurements survive what fails, and its tables show the figures."""

import contextlib
import json
import signal
import subprocess
import sys
import time

import pytest
import torch

import sasa
from benchmarks import attention, detection, layer, limits, networks, plots, readme, run, tables, worker
from benchmarks.cases import CONVOLUTION, MODES, PRECISIONS, Case, Device, Pace, Part, RefusedError
from benchmarks.clock import CpuClock, EventClock, alternate, summarise, with_rate
from benchmarks.machine import described, machine
from benchmarks.problems import LAYERS, AttentionProblem
from benchmarks.registry import PARTS, plan
from benchmarks.results import RESULTS, SKIPPED, Results
from benchmarks.targets import CPU, evaluate
from benchmarks.verify import largest_difference

pytestmark = pytest.mark.slow

HERE, GPU = Device("cpu", quick=True), Device("cuda")
WHERE = {"cpu": "a processor", "capability": "AVX512", "threads": 2, "torch": "2.15.0"}
A_GPU = WHERE | {"gpu": "a GPU", "driver": "1.2", "triton": "3.9.0"}
SMALL = AttentionProblem(1, 2, 16, 9, 5)


@pytest.fixture(autouse=True)
def _as_before():
    """Measuring sets what PyTorch may use."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark
    threads = torch.get_num_threads()
    yield
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark = before[1:]
    torch.set_num_threads(threads)


# Peers agree, and disagreement is noticed.


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("peer", [peer for peer in attention.PEERS if "NATTEN" not in peer])
def test_ways_to_compute_attention_agree(peer, precision, mode):
    case = Case("attention", "a case", mode, SMALL, (peer,), precision)
    if peer.removeprefix("sasa ") in attention.VARIANTS:
        with pytest.raises(RefusedError, match="of the GPU's kernels"):
            attention.build(case, peer, HERE)
        return
    call = attention.build(case, peer, HERE)
    if peer == attention.FLEX and mode == "training":
        with pytest.raises(NotImplementedError, match="backward on CPU"):
            call()
        return
    assert attention.check(case, peer, call, HERE) < (1e-5 if precision == "float32" else 0.1)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("peer", ["sasa", "sasa recompute", "unfold", "sasa bfloat16", layer.HALO, CONVOLUTION])
def test_layers_agree_or_have_the_same_shape(peer, mode):
    case = Case("layer", "a case", mode, LAYERS["small"]._replace(out_channels=64), (peer,))
    call = layer.build(case, peer, HERE)
    difference = layer.check(case, peer, call, HERE)
    assert difference is None or difference < (0.1 if "bfloat16" in peer else 1e-5)
    assert (difference is None) == peer.startswith((layer.HALO, CONVOLUTION))
    assert call()[0].shape == (1, 64, 8, 8)


@pytest.mark.parametrize("part", ["kept", "calls"])
def test_small_layers_agree(part):
    for case in PARTS[part].cases(HERE):
        for peer in case.peers:
            difference = layer.check(case, peer, layer.build(case, peer, HERE), HERE)
            assert (difference is None) if peer == CONVOLUTION else difference < 1e-5


@pytest.mark.parametrize("mode", ["forward", "folded"])
@pytest.mark.parametrize("name", ["sasa_resnet26", "sasa_resnet26_convstem", "sasa_resnet26_conv"])
def test_networks_agree_with_the_reference(name, mode):
    case = Case("networks", "a case", mode, networks.NetworkProblem(2, 64), (name,))
    assert networks.check(case, name, lambda: (), HERE) < 1e-4


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_training_step_trains(precision):
    case = Case("networks", "a case", "training", networks.NetworkProblem(2, 64), (), precision)
    step = networks.build(case, "sasa_resnet26_convstem", HERE)
    losses = [step()[0].item() for _ in range(3)]
    assert losses[0] != losses[1] != losses[2]


def test_wrong_results_stop_a_measurement():
    right = [torch.ones(3)]
    assert largest_difference(right, right, 1e-4) == 0
    for wrong in (right[0] + 1e-2, right[0] * float("nan")):
        with pytest.raises(ArithmeticError, match="differ"):
            largest_difference([wrong], right, 1e-4)


@pytest.mark.parametrize("layout", ["channels_last", "heads_last", "contiguous"])
def test_layouts_hold_the_same_numbers(layout):
    problem = AttentionProblem(2, 2, 4, 5, 3)
    own = attention.inputs(problem, torch.bfloat16, layout, "cpu")
    for one, other in zip(own, attention.inputs(problem, torch.bfloat16, "contiguous", "cpu"), strict=True):
        assert torch.equal(one, other)
    assert own[0].is_contiguous() == (layout == "contiguous")
    assert own[0].permute(0, 3, 4, 1, 2).is_contiguous() == (layout == "heads_last")


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
    attention.forced(lambda: done.append("call"), "taps", GPU)()
    assert done == ["taps", "call", "end"]


@pytest.mark.parametrize("device", [Device("cpu"), GPU, HERE], ids=["cpu", "cuda", "quick"])
def test_the_plan_names_what_exists_and_begins_with_what_the_targets_need(device):
    steps = plan(list(PARTS), device)
    assert len({(step.case.part, step.case.name, step.peer) for step in steps}) == len(steps)
    assert [step.case.rank for step in steps] == sorted(step.case.rank for step in steps)
    for step in steps:
        assert step.case.precision in PRECISIONS
        assert step.case.checked(device).problem._fields == step.case.problem._fields
        if step.case.part in ("attention", "stages", "scaling"):
            assert step.peer in (*attention.PEERS, CONVOLUTION)


# Time and memory.


class FakeModule:
    """Stands for torch.cuda: a millisecond between events, and a call that holds 3 bytes of 5."""

    class Event:
        moments = 0.0

        def __init__(self, enable_timing):
            self.moment = 0.0

        def record(self):
            FakeModule.Event.moments += 1
            self.moment = FakeModule.Event.moments

        def elapsed_time(self, end):
            return end.moment - self.moment

    synchronize = reset_peak_memory_stats = empty_cache = staticmethod(lambda: None)
    memory_allocated = staticmethod(lambda: 2)
    max_memory_allocated = staticmethod(lambda: 5)


def test_events_time_calls_on_a_device_whose_cache_is_emptied():
    own = EventClock.__new__(EventClock)
    own.module, own.flushed, own.flush_seconds = FakeModule, torch.ones(4), 60.0
    assert own.seconds(lambda: None, 3) == pytest.approx([1e-3] * 3)
    assert own.flushed.eq(0).all()
    assert own.flushes(lambda: None) == 1
    own.flush_seconds = 1e-3
    assert 10 <= own.flushes(lambda: time.sleep(5e-3)) <= 30  # busy while the host launches, however slow it is
    own.flush_seconds = 60.0
    assert own.peak_bytes(lambda: None) == 3
    medians, counts = alternate(own, [lambda: None] * 2, Pace(0.007, 5, 60))
    assert medians == [pytest.approx([1e-3] * 5)] * 2 and counts == [35, 35]


def test_peak_memory_is_what_the_call_holds_at_most():
    bytes_held = 200_000_000
    torch.ones(bytes_held)  # what was held before doesn't count
    peak = CpuClock().peak_bytes(lambda: torch.ones(bytes_held // 4))
    assert 0.95 * bytes_held < peak < 1.2 * bytes_held


def test_calls_take_turns_until_the_time_is_up():
    order = []
    slow = Pace(1e-9, 3, 0)  # one call a turn, and no time for a second turn
    medians, counts = alternate(CpuClock(), [lambda: order.append("a"), lambda: order.append("b")], slow)
    assert order == ["a", "b", "a", "b"] and counts == [1, 1] and len(medians[0]) == 1


def test_ratios_are_of_medians_with_the_spread_of_the_turns():
    summary = summarise([3.0, 8.0, 10.0], [1.0, 2.0, 4.0])
    assert (summary["ratio"], summary["ratio_lowest"], summary["ratio_highest"]) == (4.0, 2.5, 4.0)
    assert (summary["seconds_lowest"], summary["seconds_highest"]) == (3.0, 10.0)
    assert "ratio" not in summarise([1.0], None)
    rate = with_rate("flops", 12, summarise([1.0, 2.0, 3.0], None))
    assert rate == {"flops": 6, "flops_lowest": 4, "flops_highest": 12}


def test_bytes_and_flops_are_those_that_cannot_be_avoided():
    problem = AttentionProblem(32, 8, 16, 56, 7)
    assert problem.flops == 2 * (2 * 49 * 16) * 32 * 8 * 56**2
    case = Case("attention", "a", "forward", problem, ("sasa",), "bfloat16")
    found = attention.figures(case, "sasa", summarise([1e-4, 5e-5, 2e-4], None))
    moved = 4 * 2 * 32 * 128 * 56**2  # queries, keys, values and outputs of two bytes
    assert found["gigabytes_per_second"] == pytest.approx(moved / 1e-4 / 1e9)
    assert found["gflops_highest"] == pytest.approx(problem.flops / 5e-5 / 1e9)


def test_linear_time_deviates_by_nothing():
    cases, seconds = PARTS["scaling"].cases(Device("cpu")), []
    entries = []
    for case in cases:
        one = 1e-9 * attention.share(case.name.split(",")[0], case.problem)
        slower = 1.5 * one if case.problem.kernel_size == 15 else one
        seconds.append(one)
        entries.append(case.facts() | {"peers": {"sasa": summarise([one, one, slower], None)}})
    result = {"cases": entries}
    attention.with_deviations(result)
    assert result["deviation"]["pixels"] == pytest.approx({"value": 0, "lowest": 0, "highest": 0}, abs=1e-9)
    assert result["deviation"]["taps"]["highest"] == pytest.approx(0.5)
    assert entries[0]["peers"]["sasa"]["relative"] == pytest.approx(1)


# What fails.


def breaks():
    raise torch.OutOfMemoryError("no room\nand a long story")


def made_up(**calls):
    """A part whose peers do nothing, or fail."""
    calls = {"sasa": lambda: None} | calls
    cases = [Case("attention", "a case", "forward", AttentionProblem(1, 1, 1, 1, 1), tuple(calls))]
    figures = {"figures": lambda case, peer, found: {"double": 2 * found["seconds"]}}
    return Part(lambda device: cases, lambda case, peer, device: calls[peer], lambda *_: None, **figures)


def orders(folder, deadline=None):
    return worker.Orders(str(folder), "cpu", True, ["attention"], time.time() + 600 if deadline is None else deadline)


def begun(folder, monkeypatch, part):
    monkeypatch.setitem(PARTS, "attention", part)
    results = Results(folder, "cpu")
    results.begin(["attention"], {"machine": WHERE, "rehearsal": True})
    return results


def worked(folder, monkeypatch, part, **options):
    begun(folder, monkeypatch, part)
    status = worker.work(orders(folder, **options), lambda words: None)
    cases = Results(folder, "cpu").found["attention"]["cases"]
    return status, cases[0]["peers"] if cases else {}


def test_a_failing_peer_is_written_down_and_the_next_is_measured(tmp_path, monkeypatch):
    status, peers = worked(tmp_path, monkeypatch, made_up(breaks=breaks, fine=lambda: None))
    assert status == 0
    assert peers["breaks"] == {"cannot": "OutOfMemoryError: no room"}
    assert peers["fine"]["ratio"] > 0
    assert peers["fine"]["double"] == 2 * peers["fine"]["seconds"]


def test_without_ours_a_peer_has_a_time_and_no_ratio(tmp_path, monkeypatch):
    _, peers = worked(tmp_path, monkeypatch, made_up(sasa=breaks, fine=lambda: None))
    assert peers["fine"]["no_ratio"] == "OutOfMemoryError: no room"
    assert peers["fine"]["seconds"] > 0 and "ratio" not in peers["fine"]


def test_wrong_results_are_not_timed(tmp_path, monkeypatch):
    def wrong(case, peer, call, device):
        raise ArithmeticError("the results differ")

    part = made_up()
    _, peers = worked(tmp_path, monkeypatch, Part(part.cases, part.build, wrong))
    assert peers["sasa"] == {"cannot": "ArithmeticError: the results differ"}


def test_behind_the_deadline_everything_is_skipped_and_stays_so(tmp_path, monkeypatch):
    _, peers = worked(tmp_path, monkeypatch, made_up(other=lambda: None), deadline=time.time())
    assert peers == {"sasa": {"cannot": SKIPPED}, "other": {"cannot": SKIPPED}}
    assert worker.work(orders(tmp_path), lambda words: None) == 0
    assert Results(tmp_path, "cpu").found["attention"]["cases"][0]["peers"] == peers


def test_a_lost_device_ends_the_process(tmp_path, monkeypatch):
    monkeypatch.setattr(worker, "usable", lambda clock: False)
    status, peers = worked(tmp_path, monkeypatch, made_up(breaks=breaks, fine=lambda: None))
    assert status == worker.DEVICE_LOST
    assert set(peers) == {"sasa", "breaks"}


def test_a_new_worker_resumes_behind_what_killed_the_last(tmp_path, monkeypatch):
    results = begun(tmp_path, monkeypatch, made_up(hangs=lambda: None, fine=lambda: None))
    statuses = [-signal.SIGALRM, 0]

    def process(line, **options):
        assert options["env"]["TRITON_CACHE_DIR"]
        given = worker.Orders(**json.loads(line[3]))
        status = statuses.pop(0)
        if status:
            Results(tmp_path, "cpu").begins(given.steps()[1])  # and then the alarm
        else:
            assert worker.work(given, lambda words: None) == 0
        return subprocess.CompletedProcess(line, status)

    monkeypatch.setattr(subprocess, "run", process)
    run.start_workers(orders(tmp_path), results)
    peers = results.found["attention"]["cases"][0]["peers"]
    assert peers["hangs"] == {"cannot": "took too long"}
    assert all("seconds" in peers[name] for name in ("sasa", "fine"))


def test_a_worker_that_dies_of_nothing_known_is_not_started_again(tmp_path, monkeypatch, capsys):
    results = begun(tmp_path, monkeypatch, made_up())
    monkeypatch.setattr(subprocess, "run", lambda line, **options: subprocess.CompletedProcess(line, 1))
    run.start_workers(orders(tmp_path), results)
    run.finish(orders(tmp_path), results)
    peers = Results(tmp_path, "cpu").found["attention"]["cases"][0]["peers"]
    assert peers["sasa"] == {"cannot": "no worker was left to measure it"}
    assert (tmp_path / "attention-cpu.png").exists()


def test_on_a_cpu_every_measurement_has_a_process_of_its_own(tmp_path, monkeypatch):
    begun(tmp_path, monkeypatch, made_up(fine=lambda: None))
    whole = worker.Orders(str(tmp_path), "cpu", False, ["attention"])
    for count in (1, 2):
        assert worker.work(whole, lambda words: None) == 0
        assert len(Results(tmp_path, "cpu").found["attention"]["cases"][0]["peers"]) == count


# The command.


@pytest.mark.nightly
def test_a_rehearsal_measures_one_part_and_leaves_others_as_they_are(tmp_path):
    (tmp_path / "layer-cpu.json").write_text('{"cases": []}')
    (tmp_path / "targets-cpu.json").write_text("[]")
    line = [sys.executable, "-m", "benchmarks.run", "--quick", "--only", "kept", "--only", "calls"]
    done = subprocess.run([*line, "--out", str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {
        *(f"{part}-cpu.{kind}" for part in ("kept", "calls") for kind in ("json", "png")),
        *("layer-cpu.json", "targets-cpu.json"),
    }
    assert (tmp_path / "layer-cpu.json").read_text() == '{"cases": []}'
    assert "| small training | sasa |" in done.stdout
    assert "no picture" not in done.stdout
    for part in ("kept", "calls"):
        found = json.loads((tmp_path / f"{part}-cpu.json").read_text())
        assert found["rehearsal"] and "in_progress" not in found
        for case in found["cases"]:
            for figures in case["peers"].values():
                assert figures["seconds_lowest"] <= figures["seconds"] <= figures["seconds_highest"]
                assert figures["ratio_lowest"] <= figures["ratio"] <= figures["ratio_highest"]
                assert figures["first_call_seconds"] > 0 and figures["peak_gigabytes"] >= 0


@pytest.mark.parametrize("device", ["cuda", "xpu"])
def test_without_a_gpu_the_command_says_so(device, monkeypatch):
    monkeypatch.setattr(getattr(torch, device), "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["run", "--device", device])
    with pytest.raises(SystemExit, match=f"--device {device}: no such GPU here"):
        run.main()


def test_the_machine_is_described():
    found = machine()
    assert set(WHERE) <= set(found)
    assert described(WHERE) == "a processor (AVX512), 2 threads, PyTorch 2.15.0"
    assert described(A_GPU) == "a GPU, driver 1.2, PyTorch 2.15.0, Triton 3.9.0"


# What is made of the results.


def fake_results(device, twice=2.0):
    """The full plan: every peer takes ``twice`` as long as ours; one fails, one is skipped."""
    results = Results.__new__(Results)
    results.found = {part: {"machine": WHERE if device.on_cpu else A_GPU, "cases": []} for part in PARTS}
    for step in plan(list(PARTS), device):
        ours = [1.5e-4, 1.6e-4, 1.7e-4]
        own = ours if step.peer.startswith("sasa") else [twice * one for one in ours]
        figures = summarise(own, ours) | {"peak_gigabytes": 0.1, "calls": 3}
        figures |= PARTS[step.case.part].figures(step.case, step.peer, figures)
        if step.peer == "NATTEN, no position":
            figures = {"cannot": "ModuleNotFoundError: No module named 'natten'"}
        elif step.peer == "slices compiled":
            figures = {"cannot": SKIPPED}
        results.peers(step.case)[step.peer] = figures
    attention.with_deviations(results.found["scaling"])
    return {part: own for part, own in results.found.items() if own["cases"]}


@pytest.mark.parametrize("device", [Device("cpu"), GPU], ids=["cpu", "cuda"])
def test_targets_tables_and_pictures(device, tmp_path, monkeypatch):
    found = fake_results(device)
    rows = {target.name: (target, value) for target, value in evaluate(found, device.name)}
    assert all(value is not None for _, value in rows.values())
    name = "SASA-ResNet-50, convolution stem / ResNet-50: images/s forward"
    assert rows[name][1][0] == pytest.approx(2) and rows[name][0].reached(2)
    assert not rows[name][0].reached(float("nan"))
    table = tables.targets_table(found, device.name)
    assert table.rows[0][3] in ("yes", "no")
    some = {"attention": found["attention"]}
    beside = tables.targets_table(found, device.name, some)
    assert beside.header[4] == found["attention"]["machine"]["capability"]
    assert beside.rows[0] == [*table.rows[0], table.rows[0][2]] and beside.rows[-1][4] == ""
    for part in found:
        table = tables.part_table(part, found)
        assert table.rows and all(len(row) == len(table.header) for row in table.rows)
        assert tables.markdown(table).count("\n") == len(table.rows) + 3
    text = tables.markdown(tables.part_table("attention", found))
    assert " measurements did not fit into the time of the run" in text
    if not device.on_cpu:
        assert "No module named 'natten'" in text and SKIPPED not in text and "share of a copy" in text
    for part in ("attention", "stages", "networks"):
        plots.draw(part, found[part], tmp_path / "plot.png")
        assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_a_target_of_what_failed_has_no_value():
    found = fake_results(GPU)
    for case in found["attention"]["cases"]:
        case["peers"][attention.FLEX] = {"cannot": "it can't"}
    del found["networks"]
    rows = {target.name: value for target, value in evaluate(found, "cuda")}
    assert rows["FlexAttention / attention forward, bfloat16"] is None
    assert rows["the same, forward, both compiled"] is None
    assert rows["layer / 3x3 convolution forward, bfloat16"] is not None
    assert "not measured" in tables.markdown(tables.targets_table(found, "cuda"))


def test_results_of_several_machines_are_told_apart():
    found = Results(RESULTS, "cpu").found
    found["layer"] = found["layer"] | {"machine": WHERE}
    caption = tables.targets_table(found, "cpu").caption
    assert "layer: a processor (AVX512)" in caption and "attention, " in caption
    assert len(evaluate(found)) == len(CPU)


def test_docs_report_that_no_gpu_was_measured(monkeypatch, tmp_path):
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    text = "<!-- gpu table -->\nold\n<!-- end -->"
    assert readme.with_tables(text) == f"<!-- gpu table -->\n{readme.NOTHING}\n<!-- end -->"
    for part, own in fake_results(GPU).items():
        (tmp_path / f"{part}-cuda.json").write_text(json.dumps(own))
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


def test_a_detectors_step_is_measured():
    found = detection.measure({"backbone": "sasa_resnet14", "channels": 32, "num_classes": 2}, "cpu", side=64)
    assert 0 < found["peak_gigabytes"] < 0.5 and found["parameters"] < 1
    peers = {"convolution": found, "attention": found}
    row = detection.listing({"peers": peers, "machine": json.loads(detection.FILE.read_text())["cpu"]["machine"]}).rows[
        1
    ]
    assert row[0] == "attention" and row[-1] == "1.00"
