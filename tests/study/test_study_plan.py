"""Studies' files: what is refused, and how; what trainings they come to; which studies are the same."""

import json

import pytest

from sasa.cli import main
from sasa.study import StudyError
from sasa.study.plan import changes, labels, merged, run_key
from sasa.study.read import check_trainings, find_plan, read_plan, shipped_plans

TUNE = {"fixed": {"model": "resnet14"}, "grid": {"learning_rate": [0.005, 0.01]}, "seeds": [100]}


def keys(plan, tuned=None):
    return [cell.key for cell in plan.trainings(tuned or {})]


def test_a_grid_becomes_trainings_named_by_what_distinguishes_them(write_plan):
    plan = read_plan(write_plan(recipe="demo"))
    assert keys(plan)[:2] == [
        "model=sasa_resnet14,model_options.width=0.5,seed=0",
        "model=sasa_resnet14,model_options.width=1.0,seed=0",
    ]
    assert len(keys(plan)) == 8
    first, last = plan.trainings({"learning_rate": 0.5})[0].recipe, plan.trainings({})[-1].recipe
    assert (first["model"], first["model_options"], first["seed"]) == ("sasa_resnet14", {"width": 0.5}, 0)
    assert (last["model"], last["model_options"], last["seed"]) == ("resnet14", {"width": 1.0}, 1)
    assert first["learning_rate"] == 0.5
    assert first["epochs"] == 2  # options are over the recipe
    assert first["augment"] == "none"  # of the recipe


def test_tuning_has_options_of_its_own(write_plan):
    plan = read_plan(write_plan(tune=TUNE))
    assert [one.key for one in plan.searched()] == [f"tune,learning_rate={rate},seed=100" for rate in (0.005, 0.01)]
    assert {one.recipe["model"] for one in plan.searched()} == {"resnet14"}
    assert [one.recipe["learning_rate"] for one in plan.searched()] == [0.005, 0.01]


def test_a_recipe_may_be_a_file_or_written_out(write_plan, tmp_path):
    (tmp_path / "own.yaml").write_text("batch_size: 16\nseed: 7\nmodel_options: {width: 2.0}\n")
    for recipe in ("own.yaml", {"batch_size": 16, "model_options.width": 2.0}):
        plan = read_plan(write_plan(recipe=recipe, grid={"weight_decay": [0, 1e-4]}))
        found = plan.trainings({})[1].recipe
        assert (found["batch_size"], found["model_options"], found["weight_decay"]) == (16, {"width": 2.0}, 1e-4)
        assert plan.plot == {"x": "flops", "line": "weight_decay"}


def test_dotted_keys_go_into_mappings():
    before = {"model_options": {"width": 1}, "epochs": 2}
    after = merged(before, {"model_options.width": 3, "model_options.kernel_size": 5, "epochs": 4})
    assert after == {"model_options": {"width": 3, "kernel_size": 5}, "epochs": 4}
    assert before == {"model_options": {"width": 1}, "epochs": 2}


def test_names_of_runs_are_safe_and_differ():
    assert run_key({"model": "a", "epochs": 1}, 3) == "epochs=1,model=a,seed=3"
    awkward = ["../etc", "..-etc", "a b", "a/b", "a,seed=0", "a,seed=1", "é", "x" * 300, "x" * 301]
    names = [run_key({"data": value}, seed) for value in awkward for seed in (0, 1)]
    assert len(set(names)) == len(names)
    for name in names:
        assert set(name) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._=,-")
        assert len(name) <= 160
    assert run_key({"data": "..-etc"}, 0) == "data=..-etc,seed=0"  # a hash only where one is needed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sedes": [1]}, "sedes: no such key (did you mean seeds?); expected one of title, recipe,"),
        ({"grid": None}, "grid: expected, but missing"),
        ({"grid": {}}, "grid: expected options with lists of values, got none"),
        ({"grid": ["model"]}, "grid: expected keys with values, got ['model']"),
        ({"grid": {"model": []}}, "grid.model: expected a list of values, got []"),
        ({"grid": {"model": "resnet14"}}, "grid.model: expected a list of values, got 'resnet14'"),
        (
            {"grid": {"modle": ["a"]}},
            "grid.modle: no such option (did you mean model?); expected one of model, model_op",
        ),
        ({"grid": {"model": ["resnet14", "resnet14"]}}, "grid.model: expected different values, got 'resnet14' twice"),
        ({"grid": {"weight_decay": [0, 0.0]}}, "grid.weight_decay: expected different values, got 0.0 twice"),
        ({"grid": {"model_options.a": [1, "1"]}}, "grid.model_options.a: expected different values, got '1' twice"),
        ({"grid": {"model": ["resnet14", "vgg"]}}, "with model vgg: model: expected one of sasa_resnet14"),
        ({"grid": {"model_options.widht": [1]}}, "with model_options.widht 1: model_options: "),
        ({"grid": {"model_options.width": [1, -1]}}, "width: expected a positive factor, got -1"),
        ({"grid": {"epochs.x": [1]}}, "grid.epochs.x: expected a whole number, got {'x': 1}"),
        ({"options": None, "grid": {"epochs": [1, "two"]}}, "grid.epochs: expected a whole number, got 'two'"),
        ({"options": None, "grid": {"epochs": [1, 0]}}, "grid.epochs: expected at least 1, got 0"),
        (
            {"grid": {"augment": ["none", "nun"]}},
            "grid.augment: expected one of none, shift, imagenet, flip, got 'nun'",
        ),
        ({"grid": {"seed": [1]}}, "grid.seed: expected under seeds"),
        ({"seeds": None}, "seeds: expected, but missing"),
        ({"seeds": []}, "seeds: expected a list of whole numbers from 0 to 2^32 - 1, got []"),
        ({"seeds": 3}, "seeds: expected a list of whole numbers from 0 to 2^32 - 1, got 3"),
        ({"seeds": [0, True]}, "seeds: expected a list of whole numbers from 0 to 2^32 - 1, got [0, True]"),
        ({"seeds": [0, -1]}, "seeds: expected a list of whole numbers from 0 to 2^32 - 1, got [0, -1]"),
        ({"seeds": [2**32]}, "seeds: expected a list of whole numbers from 0 to 2^32 - 1, got [4294967296]"),
        ({"seeds": list(range(3000))}, "grid: expected at most 10,000 trainings, got 12,000"),
        ({"seeds": [1, 2, 1]}, "seeds: expected different seeds, got [1, 2, 1]"),
        ({"options": {"epoch": 3}}, "options.epoch: no such option (did you mean epochs?)"),
        ({"options": {"epochs": None}}, "options.epochs: expected a whole number, got None"),
        ({"options": {"learning_rate": True}}, "options.learning_rate: expected a number, got True"),
        ({"options": {"weight_decay": float("nan")}}, "options.weight_decay: expected finite numbers, got nan"),
        ({"options": {"epochs": "2"}}, "options.epochs: expected a whole number, got '2'"),
        (
            {"grid": {"model_options.width": [1, float("inf")]}},
            "model_options.width: expected finite numbers, got inf",
        ),
        ({"options": {"model_options": {"width": [float("nan")]}}}, "options.model_options: expected finite numbers"),
        ({"options": {"model_options": 3}}, "options.model_options: expected options with values, got 3"),
        ({"options": {"data": 3}}, "options.data: expected a folder or null, got 3"),
        ({"options": {"data": "nowhere"}}, "data: expected a folder, got "),
        ({"options": {"devices": 2}}, "devices: expected 1, and num_nodes 1"),
        ({"options": {"model": "resnet14"}}, "options.model: expected in options or in grid, got it in both"),
        ({"recipe": "dmo"}, "recipe: expected options, a YAML file or one of demo"),
        ({"recipe": {"batch": 3}}, "recipe.batch: no such option (did you mean batch_size?)"),
        ({"metric": "top2"}, "metric: expected one of top1, parameters, flops"),
        ({"metric": ["top1"]}, "metric: expected one of top1, parameters, flops"),
        ({"plot": {"y": "top1"}}, "plot.y: no such key"),
        ({"plot": {"x": "flop"}}, "plot.x: expected one of model_options.width, top1"),
        ({"plot": {"line": "flops"}}, "plot.line: expected one of model, model_options.width, got 'flops'"),
        ({"title": 3}, "title: expected text, got 3"),
        ({"tune": {"seeds": [1]}}, "tune.grid: expected, but missing"),
        (
            {"tune": TUNE | {"seed": 1}},
            "tune.seed: no such key (did you mean seeds?); expected one of fixed, grid, seeds",
        ),
        (
            {"tune": TUNE | {"grid": {"model": ["resnet14"]}}},
            "tune.grid.model: expected in one place, got it in grid too",
        ),
        (
            {"tune": TUNE | {"grid": {"learning_rate": [0.1, -0.1]}}},
            "learning_rate -0.1: learning_rate: expected more than 0",
        ),
    ],
)
def test_what_cannot_be_meant_is_refused_before_anything_starts(change, message, write_plan, tmp_path, capsys):
    path = write_plan(**change)
    assert main(["study", str(path), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert f"{path}: " in error
    assert message in error
    assert not (tmp_path / "out").exists()


def test_tuned_options_are_checked_with_the_grid(write_plan):
    """Each of the two can be meant, but not both together."""
    tune = {"grid": {"accumulate": [1, 3]}, "fixed": {"batch_size": 33}, "seeds": [0]}
    path = write_plan(tune=tune, grid={"batch_size": [32, 33]})
    with pytest.raises(StudyError, match="with accumulate 3, batch_size 32: accumulate: expected a divisor"):
        check_trainings(read_plan(path), path)


@pytest.mark.parametrize("content", ["grid: [", "[]", "3", "\xff", "a: &a {b: *a}", "seeds: [1]\nseeds: [2]"])
def test_what_is_no_yaml_of_options_is_refused(content, tmp_path):
    path = tmp_path / "study.yaml"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(StudyError, match=r"study\.yaml: .*expected"):
        read_plan(path)
    recipe = path.rename(tmp_path / "recipe.yaml")
    path.write_text("recipe: recipe.yaml\ngrid: {epochs: [1]}\nseeds: [0]\n")
    with pytest.raises(StudyError, match=r"recipe\.yaml: .*expected"):
        read_plan(path)
    assert recipe.exists()


@pytest.mark.parametrize("content", ["{", "[" * 100_000, "5", "{}", "\xff"])
def test_a_damaged_plan_of_a_folder_is_refused(content, tmp_path):
    (tmp_path / "plan.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(StudyError, match=r"plan\.json: .*(expected|can't be read)"):
        read_plan(tmp_path / "plan.json")


def test_the_plan_of_a_folder_may_have_options_of_an_earlier_version(write_plan, tmp_path):
    plan = read_plan(write_plan(tune=TUNE))
    stored = plan.as_dict()
    stored["recipe"]["gone"] = 3
    (tmp_path / "plan.json").write_text(json.dumps(stored))
    assert changes(read_plan(tmp_path / "plan.json"), plan) == []


def test_no_such_study_and_no_slots(tmp_path, write_plan, capsys):
    assert main(["study", str(tmp_path / "none.yaml")]) == 2
    assert "expected a YAML file or one of widths, got" in capsys.readouterr().err
    assert main(["study", str(write_plan()), "--parallel", "0", "--out", str(tmp_path / "out")]) == 2
    assert "parallel: expected at least 1 and at most 256, got 0" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_mappings_are_called_by_what_they_do_not_share():
    first, second = {"backbone": "a", "heads": "x", "channels": 3}, {"backbone": "b", "heads": "x", "channels": 3}
    assert labels([first, second]) == ["backbone a", "backbone b"]
    assert labels([first, first | {"border": "mask"}]) == ["{}", "border mask"]
    assert labels([{"a": 1}]) == ["{}"] and labels([0.5, "x"]) == ["0.5", "x"]


def test_a_study_of_detectors_compares_their_figures(tmp_path):
    path = tmp_path / "plan.yaml"
    text = "recipe: retinanet-bccd\ngrid: {model_options: [{heads: attention}, {heads: convolution}]}\nseeds: [0]\n"
    path.write_text(text + "metric: ap50\n")
    assert read_plan(path).metric == "ap50"
    path.write_text(text + "metric: top1\n")
    with pytest.raises(StudyError, match=r"metric: expected one of ap, ap50, .*got 'top1'"):
        read_plan(path)


@pytest.mark.parametrize("name", shipped_plans())
def test_the_packages_studies_can_be_begun(name, tmp_path):
    path = find_plan(type(tmp_path)(name))
    check_trainings(read_plan(path), path)


def test_a_study_may_grow_and_look_different(write_plan):
    before = read_plan(write_plan(tune=TUNE))
    more = {
        "grid": {"model_options.width": [1.0, 2.0, 0.5], "model": ["resnet14", "sasa_resnet14"]},
        "seeds": [2, 1, 0],
    }
    after = read_plan(write_plan(tune=TUNE, title="another", plot={"x": "parameters"}, **more))
    assert changes(before, after) == []
    assert set(keys(before)) < set(keys(after))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"options": {"epochs": 3}}, "recipe.epochs: 2 before, 3 now"),
        ({"seeds": [1, 2]}, "seeds: without 0 now"),
        (
            {"grid": {"model": ["resnet14"], "model_options.width": [0.5, 1.0]}},
            "grid.model: without sasa_resnet14 now",
        ),
        ({"grid": {"model": ["resnet14"]}}, 'grid: ["model", "model_options.width"] before, ["model"] now'),
        ({"metric": "top5"}, "metric: top1 before, top5 now"),
        ({"tune": TUNE}, "tune: null before, {"),
    ],
)
def test_another_study_is_told_from_one_that_grew(change, message, write_plan):
    found, *_ = changes(read_plan(write_plan()), read_plan(write_plan(**change)))
    assert found.startswith(message)
