"""The benchmark's measurements run, and the layer's memory stays linear in the pixels."""

import json
import subprocess
import sys

import pytest

from benchmarks.problems import PROBLEMS
from benchmarks.run import LAYERS, check, draw, summarise, table


def measure(*case):
    command = [sys.executable, "-m", "benchmarks.run", "--one", *case]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def test_the_notebooks_input_needs_less_than_a_gigabyte():
    """The notebook's own module takes 10.7 GB; queries, keys, values and output are 0.21 GB of this."""
    peak = measure("sasa", "notebook", "forward")["peak_bytes"]
    assert 0.2e9 < peak < 1e9


@pytest.mark.parametrize("layer", LAYERS)
def test_every_layer_is_measured(layer):
    figures = measure(layer, "stage4", "training")
    assert figures["seconds"] > 0
    assert figures["peak_bytes"] > 0


def test_layers_agree_before_they_are_timed():
    assert check(PROBLEMS["stage4"]._replace(in_channels=32, out_channels=32)) < 1e-4


def test_ratios_are_of_medians_with_the_spread_of_the_turns(tmp_path):
    ours = [{"seconds": s, "peak_bytes": 1e9} for s in (1.0, 2.0, 4.0)]
    theirs = [{"seconds": s, "peak_bytes": 3e9} for s in (3.0, 8.0, 10.0)]
    summary = summarise(theirs, ours)
    assert summary["ratio_to_sasa"] == 4.0
    assert (summary["ratio_lowest"], summary["ratio_highest"]) == (2.5, 4.0)
    assert summary["peak_gigabytes"] == 3.0
    case = {"problem": "stage4", "mode": "forward", "layers": dict.fromkeys(LAYERS, summary)}
    assert table([case]).row_count == 3
    draw([case], {"cpu": "a", "threads": 2, "torch": "b"}, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
