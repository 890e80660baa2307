"""A study's trainings replaced by ones that take no time, and plans of them."""

import sys
from pathlib import Path

import pytest
import yaml

sys.path.append(str(Path(__file__).parent.parent / "train"))  # processes.py: killable processes, small images

from fakes import FAKE

from sasa.study import trainings

PLAN = {
    "title": "a study",
    "options": {"epochs": 2},
    "grid": {"model": ["sasa_resnet14", "resnet14"], "model_options.width": [0.5, 1.0]},
    "seeds": [0, 1],
}


@pytest.fixture
def fake(monkeypatch):
    """Trainings that only pretend; see fake_training.py."""
    monkeypatch.setattr(trainings, "COMMAND", FAKE)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)


@pytest.fixture
def write_plan(tmp_path):
    """Writes a study's file: the plan above with changes; None takes a key out."""

    def write(name="study.yaml", **changes):
        path = tmp_path / name
        plan = {key: value for key, value in (PLAN | changes).items() if value is not None}
        path.write_text(yaml.safe_dump(plan, sort_keys=False))
        return path

    return write
