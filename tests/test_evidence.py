"""The plans of the evidence: readable, all of them in the order, and no two networks of one name."""

import sys

import pytest

from benchmarks.evidence.__main__ import HERE, ORDER, main
from benchmarks.evidence.networks import name_of
from sasa.models import create_model
from sasa.study.read import read_plan

PLANS = sorted((HERE / "plans").glob("*.yaml"))


def test_every_plan_has_its_turn():
    assert sorted(ORDER) == sorted(path.stem for path in PLANS)


def test_an_unknown_plan_is_refused_before_anything_is_trained(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sys, "argv", ["evidence", "--work", str(tmp_path), "fashion", "smoothing"])
    with pytest.raises(SystemExit):
        main()
    assert "smoothing-fashion" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("path", PLANS, ids=lambda path: path.stem)
def test_networks_can_be_built_and_have_names_of_their_own(path):
    options = read_plan(path).grid.get("model_options", [])
    for each in options:
        create_model("sasa_resnet14", **each)
    names = [name_of(each) for each in options]
    assert all(names) and len(set(names)) == len(names)
