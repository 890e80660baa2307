"""What a study's runs come to: means, deviations and differences against NumPy; the table and the plot."""

import json

import numpy as np
import pytest

from sasa.study import StudyError, gather
from sasa.study.gather import choose
from sasa.study.plot import plot
from sasa.study.read import read_plan

VALUES = {  # by model and width: of each seed
    ("sasa_resnet14", 0.5): [0.80, 0.82, 0.81],
    ("sasa_resnet14", 1.0): [0.84, 0.86, 0.91],
    ("resnet14", 0.5): [0.83, 0.83, 0.86],
    ("resnet14", 1.0): [0.70, 0.75, 0.71],
}


def place(out, plan):
    """A study's folder without runs."""
    out.mkdir()
    (out / "plan.json").write_text(json.dumps(plan.as_dict()))
    return out


def finish(out, key, **numbers):
    run = out / "runs" / key
    run.mkdir(parents=True)
    result = {"model": "any", "parameters": 1234, "flops": 5_000_000, "seconds_per_epoch": 2.0} | numbers
    (run / "result.json").write_text(json.dumps(result))


@pytest.fixture
def plan(write_plan):
    return read_plan(write_plan(seeds=[0, 1, 2], plot={"x": "model_options.width"}))


@pytest.fixture
def out(plan, tmp_path):
    out = place(tmp_path / "out", plan)
    for cell in plan.trainings({}):
        values = VALUES[cell.options["model"], cell.options["model_options.width"]]
        finish(out, cell.key, top1=values[cell.seed], seconds_per_epoch=float(cell.seed))
    return out


def test_means_deviations_and_differences_are_numpys(out):
    results = gather(out)
    assert results == json.loads((out / "results.json").read_text())
    assert len(results["cells"]) == len(VALUES)
    for cell in results["cells"]:
        values = VALUES[cell["options"]["model"], cell["options"]["model_options.width"]]
        assert cell["n"] == 3 and list(cell["values"]) == ["0", "1", "2"] and cell["missing_seeds"] == []
        np.testing.assert_allclose(cell["mean"], np.mean(values), rtol=1e-12)
        np.testing.assert_allclose(cell["standard_deviation"], np.std(values, ddof=1), rtol=1e-12)
        assert (cell["parameters"], cell["flops"], cell["seconds_per_epoch"]) == (1234, 5_000_000, 1.0)
    assert [found["options"]["model_options.width"] for found in results["differences"]] == [0.5, 1.0]
    for found in results["differences"]:
        width = found["options"]["model_options.width"]
        first, second = VALUES[found["first"], width], VALUES[found["second"], width]
        variances = np.array([np.var(first, ddof=1), np.var(second, ddof=1)]) / 3
        np.testing.assert_allclose(found["difference"], np.mean(first) - np.mean(second), rtol=1e-9)
        np.testing.assert_allclose(found["standard_error"], np.sqrt(variances.sum()), rtol=1e-9)
        freedom = variances.sum() ** 2 / (variances**2 / 2).sum()
        np.testing.assert_allclose(found["degrees_of_freedom"], freedom, rtol=1e-9)
        quantiles = {2: 4.303, 3: 3.182, 4: 2.776}  # Student's, of 0.975
        ratio = found["chance"] / found["standard_error"]
        assert quantiles[int(freedom) + 1] < ratio < quantiles[int(freedom)]


def test_the_table_has_a_row_a_cell_and_a_row_a_difference(out):
    gather(out)
    lines = (out / "table.md").read_text().splitlines()
    assert lines[0] == "# a study"
    assert "| sasa_resnet14 | 0.5 | 81.0% ± 1.0% (3) | 1,234 | 5.00 | 1.0 |" in lines
    assert "| 0.5 | sasa_resnet14 | resnet14 | -3.0 ± 1.2 points | 3.5 points |" in lines
    assert sum(line.startswith("| ") for line in lines) == 2 + len(VALUES) + 2 + 2


def test_the_plot_has_a_line_a_network_and_every_seed(out):
    results = gather(out)
    assert (out / "plot.png").read_bytes().startswith(b"\x89PNG")
    axes = plot(results).axes[0]
    assert axes.get_xlabel() == "model_options.width"
    assert axes.get_ylabel() == "validation top-1 accuracy"
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["sasa_resnet14", "resnet14"]
    drawn = list(axes.containers[0].lines[0].get_ydata())
    np.testing.assert_allclose(drawn, [np.mean(VALUES["sasa_resnet14", width]) for width in (0.5, 1.0)])
    dots = [value for line in axes.lines if line.get_marker() == "." for value in line.get_ydata()]
    assert sorted(dots) == sorted(value for values in VALUES.values() for value in values)


@pytest.mark.parametrize("x", ["flops", "parameters", "seconds_per_epoch", "optimizer", "model_options.width"])
def test_three_keys_and_words_along_the_plot(x, write_plan, tmp_path):
    grid = {"model": ["sasa_resnet14", "resnet14"], "model_options.width": [0.5, 1.0], "optimizer": ["sgd", "adamw"]}
    plan = read_plan(write_plan(grid=grid, plot={"x": x}, seeds=[0]))
    out = place(tmp_path / "out", plan)
    for cell in plan.trainings({}):
        finish(out, cell.key, top1=0.5)
    results = gather(out)
    assert all(cell["standard_deviation"] is None for cell in results["cells"])
    assert all(found["difference"] == 0 and found["standard_error"] is None for found in results["differences"])
    assert len(results["differences"]) == 4
    assert len(plot(results).axes[0].containers) == (4 if x in grid else 2)


def test_a_study_that_has_just_begun_and_one_half_done_can_be_gathered(plan, tmp_path):
    out = place(tmp_path / "out", plan)
    assert [cell["n"] for cell in gather(out)["cells"]] == [0, 0, 0, 0]
    assert (out / "plot.png").exists()
    assert "| resnet14 | 1.0 | (0 of 3) |" in (out / "table.md").read_text()
    for cell in plan.trainings({})[:5]:
        finish(out, cell.key, top1=float("nan") if cell.seed else 0.5)
    results = gather(out)
    assert [cell["n"] for cell in results["cells"]] == [1, 1, 1, 1]  # what is no number doesn't count
    assert results["cells"][0]["missing_seeds"] == [1, 2]
    assert "NaN" not in (out / "results.json").read_text()
    assert "50.0% (1 of 3)" in (out / "table.md").read_text()


def test_losses_are_no_percentages_and_lower_is_better(write_plan, tmp_path):
    tune = {"grid": {"learning_rate": [0.1, 0.2, 0.3]}, "seeds": [0, 1]}
    losses = {0.1: (0.5, 0.6), 0.2: (0.4, 0.5), 0.3: (0.1,)}  # the last has failed once
    for metric, best in (("val_loss", 0.2), ("top1", 0.1)):
        plan = read_plan(write_plan(tune=tune, metric=metric))
        out = place(tmp_path / metric, plan)
        for cell in plan.searched():
            values = losses[cell.options["learning_rate"]]
            if cell.seed < len(values):
                finish(out, cell.key, **{metric: values[cell.seed]})
        assert choose(plan, out) == {"learning_rate": best}
    (out.parent / "val_loss" / "tuned.json").write_text('{"learning_rate": 0.2}')
    results = gather(out.parent / "val_loss")
    assert results["tuned"]["options"] == {"learning_rate": 0.2}
    assert [cell["n"] for cell in results["tuned"]["cells"]] == [2, 2, 1]
    table = (out.parent / "val_loss" / "table.md").read_text()
    assert "| 0.2 | 0.45 ± 0.07071 (2) |" in table
    assert "| 0.3 | 0.1 (1 of 2) |" in table


def test_no_study_to_gather(tmp_path):
    with pytest.raises(StudyError, match="out: expected the folder of a study"):
        gather(tmp_path)
