"""The benchmark's peers compute the same, its measurements run, and its summaries say what they should."""

import json
import subprocess
import sys
import warnings

import pytest
import torch

from benchmarks import attention, calls, layer, measure, networks, processes, run, scaling, stages, tables, targets
from benchmarks.machine import machine, sasa_capability
from benchmarks.plots import draw
from benchmarks.problems import ATTENTION, LAYERS, SERIES, AttentionProblem

MODES = ("forward", "training")
WHERE = {"cpu": "a processor", "capability": "AVX512", "threads": 2, "torch": "2.15.0"}


def alone(*measurement):
    command = [sys.executable, "-m", "benchmarks.one", *measurement]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


# Peers agree, and disagreement is noticed.


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("peer", attention.PEERS)
def test_ways_to_compute_attention_agree(peer, mode):
    problem = AttentionProblem(1, 2, 16, 9, 5)
    if attention.PEERS[peer].border == "mask" and mode == "training":
        with pytest.raises(NotImplementedError, match="backward on CPU"):
            attention.check(peer, problem, mode, compiled=False)
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "flex_attention called without torch.compile")
        assert attention.check(peer, problem, mode, compiled=False) < 1e-5


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("peer", [*layer.OURS, "unfold", "sasa bfloat16"])
def test_layers_agree(peer, mode):
    assert layer.check(peer, LAYERS["small"], mode) < (0.1 if "bfloat16" in peer else 1e-5)


@pytest.mark.parametrize("size", [7, 16])
def test_layers_that_compute_something_else_have_the_same_shape(size):
    problem = LAYERS["small"]._replace(size=size, out_channels=64)
    for peer in (layer.HALO, layer.CONVOLUTION, "convolution 3x3 bfloat16"):
        output, *gradients = layer.call(peer, problem, "training")()
        assert output.shape == (1, 64, size, size)
        assert output.dtype == layer.dtype_of(peer)
        assert gradients[0].shape == (1, 32, size, size)


@pytest.mark.parametrize("mode", ["forward", "folded"])
@pytest.mark.parametrize("name", ["sasa_resnet26", "sasa_resnet26_convstem", "sasa_resnet26_conv"])
def test_networks_agree_with_the_reference(name, mode):
    assert networks.check(name, mode) < 1e-4


@pytest.mark.parametrize("name", [networks.TORCHVISION, "timm resnet50", "sasa_resnet50"])
def test_batch_norms_behind_convolutions_are_folded(name):
    network = networks.build(name)
    for module in network.modules():  # statistics that matter
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    x = networks.images(name, 1, 64)
    (expected,) = networks.forward_call(network.eval(), x)()
    (folded,) = networks.forward_call(networks.folded(network), x)()
    torch.testing.assert_close(folded, expected, rtol=1e-3, atol=1e-3)
    left = [n for n, m in network.named_modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert len(left) == (17 if name == "sasa_resnet50" else 0)


def test_a_training_step_trains():
    network = networks.build("sasa_resnet26_convstem")
    before = network.fc.bias.detach().clone()
    call, optimizer = networks.training_call(network, networks.images("sasa_resnet26_convstem", 2, 64))
    call()
    assert (network.fc.bias != before).any()
    assert len(optimizer.state) == len(list(network.parameters()))


def test_wrong_results_stop_the_benchmark():
    right = [torch.ones(3)]
    assert measure.largest_difference(right, right, torch.float32) == 0
    for wrong in (right[0] + 1e-2, right[0] * float("nan")):
        with pytest.raises(ArithmeticError, match="differ"):
            measure.largest_difference([wrong], right, torch.float32)


def test_every_case_names_what_exists():
    for case in (attention.CASES | attention.QUICK).values():
        assert case.problem in ATTENTION
        assert set(case.peers) <= {*attention.PEERS, attention.CONVOLUTION}
    for case in (layer.CASES | layer.QUICK).values():
        assert case.problem in LAYERS
    for case in (networks.CASES | networks.QUICK).values():
        assert case.peers[0] == networks.OURS
        assert case.mode in ("forward", "folded", "training")
    assert {*scaling.CHOSEN, *scaling.QUICK} == set(SERIES)


# Measurements.


def test_the_notebooks_input_needs_little_more_than_its_output():
    """The notebook's own module takes 10.7 GB; the output is 0.05 GB, queries, keys and values would be 0.15 GB."""
    peak = alone("layer", "notebook forward", "sasa")["peak_bytes"]
    assert 0.05e9 < peak < 0.1e9


def test_a_process_reports_its_figures():
    figures = processes.measured_alone("attention", "small training", "sasa")
    assert figures["seconds"] > 0
    assert 0 < figures["peak_bytes"] < 30e6  # the process's own: this one's memory doesn't count
    assert figures["calls"] >= 3
    assert figures["largest_difference"] < 1e-5


def test_a_failing_process_is_an_error_with_its_words():
    with pytest.raises(RuntimeError, match="KeyError: 'no such case'"):
        processes.measured_alone("layer", "no such case", "sasa")


def test_calls_are_repeated_until_the_median_is_worth_something(monkeypatch):
    assert measure.enough([1.5], 3)
    assert not measure.enough([0.9], 3)
    assert measure.enough([0.9, 0.9, 0.9], 3)
    assert not measure.enough([0.9, 0.9, 0.9], 20)
    assert measure.enough([1e-3] * 30, 3)
    seconds = iter([9.0, 0.5, 0.6, 0.7, 0.8, 0.9])
    monkeypatch.setattr(measure, "seconds_of", lambda call: next(seconds))
    figures = measure.measure(lambda: (), compiled=True)
    assert figures["compile_seconds"] == 9
    assert (figures["seconds"], figures["calls"]) == (0.7, 3)


def test_peak_memory_is_what_the_call_holds_at_most():
    bytes_held = 200_000_000
    torch.ones(bytes_held)  # what was held before doesn't count
    figures = measure.measure(lambda: (torch.ones(bytes_held // 4),))
    assert 0.95 * bytes_held < figures["peak_bytes"] < 1.2 * bytes_held


def test_turns_alternate_and_what_cannot_be_done_is_asked_once(monkeypatch):
    asked = []

    def figures(part, case, peer):
        asked.append(peer)
        return {"cannot": "no backward"} if peer == "b" else {"seconds": 1.0, "peak_bytes": 1e9, "calls": 3}

    monkeypatch.setattr(processes, "measured_alone", figures)
    turns = processes.take_turns("attention", [("case", "a"), ("case", "b")], lambda words: None)
    assert asked == ["a", "b", "a", "a"]
    assert processes.summarise(turns["case", "b"], turns["case", "a"]) == {"cannot": "no backward"}


def test_ratios_are_of_medians_with_the_spread_of_the_turns():
    ours = [{"seconds": s, "peak_bytes": 1e9, "calls": 3} for s in (1.0, 2.0, 4.0)]
    theirs = [{"seconds": s, "peak_bytes": 3e9, "calls": 4, "compile_seconds": 10 * s} for s in (3.0, 8.0, 10.0)]
    summary = processes.summarise(theirs, ours)
    assert summary["ratio_to_sasa"] == 4.0
    assert (summary["ratio_lowest"], summary["ratio_highest"]) == (2.5, 4.0)
    assert (summary["peak_gigabytes"], summary["calls"], summary["compile_seconds"]) == (3.0, 12, 30.0)


def test_throughput_counts_both_products():
    problem = AttentionProblem(1, 8, 8, 56, 7)
    assert problem.flops == 2 * (2 * 49 * 8) * 8 * 56**2
    figures = stages.throughput(12e9, [{"seconds": s} for s in (1.0, 2.0, 3.0)])
    assert (figures["gflops"], figures["gflops_lowest"], figures["gflops_highest"]) == (6, 4, 12)
    assert len(stages.cases()) == 16


def test_linear_time_deviates_by_nothing():
    problems = SERIES["small taps"]
    linear = [scaling.share("taps", problem) * 1e-9 for problem in problems]
    slower = [*linear[:2], 1.5 * linear[2]]
    summary = scaling.summarise("taps", problems, [{"seconds": s} for s in (linear, linear, slower)])
    assert summary["deviation"] == pytest.approx(0)
    assert summary["deviation_highest"] == pytest.approx(0.5)
    assert [point["kernel_size"] for point in summary["points"]] == [3, 5, 7]


def test_small_series_are_measured():
    assert len(scaling.measured("small taps", "sasa")["seconds"]) == len(SERIES["small taps"])


# What is made of the results.


def fake_results():
    """Results in which every peer takes twice as long as the one before, sasa being first."""

    def compared(cases, problems):
        found = []
        for name, case in cases.items():
            peers = {}
            for index, peer in enumerate(case.peers):
                runs = [{"seconds": 0.05 * 2**index * s, "peak_bytes": 2e8, "calls": 3} for s in (0.9, 1, 1.1)]
                peers[peer] = processes.summarise(runs, [{"seconds": 0.05}] * 3)
            if name == "notebook-batch8 training" and "FlexAttention compiled" in peers:
                peers["FlexAttention compiled"] = {"cannot": "no backward"}
            size = problems[case.problem].size
            found.append({"case": name, "mode": case.mode, "batch": 8, "size": size, "peers": peers})
        return {"machine": WHERE, "cases": found}

    whole = compared(layer.CASES, LAYERS)
    whole["cases"][0]["qkv_out_gigabytes"] = 0.1
    whole["import_seconds_after_torch"] = {"median": 0.02}
    speeds = stages.throughput(1e9, [{"seconds": s} for s in (0.01, 0.02, 0.025)])
    entries = [
        {"stage": name.split(", batch")[0], "mode": mode, **problem._asdict(), **speeds}
        for name, (problem, mode) in stages.cases().items()
    ]
    whole_networks = []
    for name, case in networks.CASES.items():
        peers = {}
        for index, peer in enumerate(case.peers):
            run_ = {"seconds": 0.1 * (index + 1), "peak_bytes": 1e8 * (index + 1), "calls": 3}
            peers[peer] = processes.summarise([run_] * 3, [{"seconds": 0.1}] * 3)
            size = 256 if peer == networks.HALONET else 224
            peers[peer] |= {"images_per_second": case.batch / run_["seconds"], "parameters": 2e7, "size": size}
        whole_networks.append({"case": name, "batch": case.batch, "mode": case.mode, "peers": peers})
    series = {}
    for name in scaling.CHOSEN:
        seconds = [1e-9 * scaling.share(name, problem) for problem in SERIES[name]]
        series[name] = scaling.summarise(name, SERIES[name], [{"seconds": seconds}])
    ratios = {"ratio_to_convolution": 2.0, "ratio_lowest": 1.5, "ratio_highest": 2.5}
    one_call = {name: {"microseconds": 20.0, **ratios} for name in calls.layers()}
    return {
        "attention": compared(attention.CASES, ATTENTION),
        "layer": whole,
        "kept": compared(layer.CASES, LAYERS),
        "stages": {"machine": WHERE, "sgemm": speeds, "stages": entries},
        "scaling": {"machine": WHERE, "series": series},
        "networks": {"machine": WHERE, "cases": whole_networks},
        "calls": {"machine": WHERE, "cases": [{"case": mode, "peers": one_call} for mode in calls.MODES]},
    }


@pytest.mark.parametrize("part", run.PARTS)
def test_tables_and_pictures(part, tmp_path):
    result = fake_results()[part]
    rows = tables.ROWS[part](result)
    assert all(len(row) == len(rows.header) for row in rows.rows)
    assert tables.rich(rows).row_count == len(rows.rows)
    assert tables.markdown(rows).count("\n") == len(rows.rows) + 3
    draw(part, result, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_what_a_peer_cannot_do_is_in_the_table():
    rows = tables.compared("attention", fake_results()["attention"]).rows
    assert ["notebook-batch8 training", "FlexAttention compiled", "raises", "", ""] in rows


def test_targets_are_compared_with_the_results():
    results = fake_results()
    rows = {row["name"]: row for row in targets.evaluate(results)}
    assert all(row["value"] is not None for row in rows.values())
    convolution = rows["attention forward / convolution"]  # the one after sasa
    assert convolution["value"] == pytest.approx(1 / 2)
    assert (convolution["lowest"], convolution["highest"]) == pytest.approx((1 / 2.2, 1 / 1.8))
    assert not convolution["reached"]
    assert rows["layer forward / convolution"]["reached"]
    assert not rows["unfold / layer forward"]["reached"]
    memory = rows["layer forward: peak memory / (q, k, v, out)"]
    assert (memory["value"], memory["lowest"], memory["reached"]) == (2.0, None, False)
    assert rows["slowest stage forward, GFLOP/s"]["value"] == 50
    assert rows["deviation from linear in taps"]["value"] == pytest.approx(0)
    forward = rows["SASA-ResNet-50, convolution stem / ResNet-50: images/s forward"]  # the third network of the case
    assert (forward["value"], forward["reached"]) == (pytest.approx(3), True)
    full = rows["SASA-ResNet-50, full attention / ResNet-50: images/s forward"]  # the second
    assert full["value"] == full["lowest"] == pytest.approx(1.5)
    assert rows["the same, peak memory of a training step"]["value"] == pytest.approx(1 / 3)
    table = tables.targets({"machine": WHERE, "targets": list(rows.values())})
    assert ["layer forward: peak memory / (q, k, v, out)", "2.00", "≤ 1.3", "no"] in table.rows


def test_what_was_not_measured_has_no_value():
    rows = targets.evaluate({"layer": {"cases": []}})
    assert all(row["value"] is None and row["reached"] is None for row in rows)
    assert tables.targets({"machine": WHERE, "targets": rows}).rows[0][1:] == ["not measured", "≤ 0.33", ""]


@pytest.mark.parametrize("quick", [True, False])
def test_the_command_measures_writes_and_draws(quick, tmp_path, monkeypatch, capsys):
    """With measurements made up, as every real one takes a process."""

    def figures(part, case, peer):
        seconds = [0.1] * len(scaling.series(case)) if part == "scaling" else 0.1
        return {"seconds": seconds, "peak_bytes": 1e8, "calls": 3}

    monkeypatch.setattr(processes, "measured_alone", figures)
    monkeypatch.setattr(networks, "parameters", lambda name: 10**7)
    monkeypatch.setattr(calls, "TURNS", 2)
    monkeypatch.setattr(calls, "CALLS", 5)
    monkeypatch.setattr(layer, "import_seconds", lambda: {"median": 0.02})
    monkeypatch.setattr(sys, "argv", ["run", "--out", str(tmp_path), *(["--quick"] if quick else [])])
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")
    run.main()
    written = {f"{part}-cpu.{kind}" for part in run.PARTS for kind in ("json", "png")}
    if not quick:
        written.add("targets.json")
        found = json.loads((tmp_path / "targets.json").read_text())["targets"]
        assert all(row["value"] is not None for row in found)
        assert "layer training / convolution" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == written
    assert set(run.read(tmp_path, machine())) == set(run.PARTS)
    assert run.read(tmp_path, machine() | {"threads": 1000}) == {}


def test_the_machine_is_described():
    found = machine()
    assert set(WHERE) <= set(found)
    assert found.get("sasa_capability") == sasa_capability()
