"""The quickstart at toy size, end to end: the same metrics twice, one teacher a seed, clean ends."""

import json
import sys

import processes
import pytest
import torch
import yaml

pytest.importorskip("lightning_fabric")
pytest.importorskip("jsonargparse")
pytest.importorskip("sklearn")

from debiaskd.cli import quickstart
from debiaskd.recipe import read
from debiaskd.recipe.sources import description
from debiaskd.training.validation import Evaluator

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::debiaskd.reweight.ErrorSetWarning"),
    pytest.mark.xdist_group("quickstart"),
]
PICTURES = {"train": 80, "val": 16, "test": 24, "size": 24, "agreement": 0.8}
SCHEDULE = {"epochs": 2, "batch": 20, "warmup": 0}
NAMES = ["teacher", "erm", "kd", "simkd", "dett", "guided", "cid", "dett+guided+cid"]


@pytest.fixture(scope="module")
def recipes(tmp_path_factory):
    """Ours, with smaller networks and schedules."""
    folder, found = tmp_path_factory.mktemp("recipes"), {}
    for method, name in quickstart.RECIPES.items():
        toy = {"extends": name, "student": {"name": "small/4,6"}, "schedule": SCHEDULE}
        if read(name).teacher is not None:
            toy["teacher"] = {"name": "small/8,12", "schedule": SCHEDULE}
        if read(name).terms.backdoor is not None:
            toy["terms"] = {"backdoor": {"start": 1}}
        found[method] = folder / f"{method}.yaml"
        found[method].write_text(f"# The toy of {method}.\n{yaml.safe_dump(toy)}")
    return found


def numbers(rows):
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


@pytest.fixture(scope="module")
def outcome(recipes, tmp_path_factory):
    """(directory, results, what the progress was told, how often attributions were looked at) of one run."""
    told, maps = [], []
    out = tmp_path_factory.mktemp("run") / "out"
    with pytest.MonkeyPatch.context() as patched:
        inner = Evaluator.__init__

        def counting(self, *arguments, **options):
            inner(self, *arguments, **options)
            maps.append((self.loader.split.name, self.has_boxes))

        patched.setattr(Evaluator, "__init__", counting)
        progress = lambda task, done: told.append((task, done))  # noqa: E731
        results = quickstart.run(out, 1, recipes=recipes, pictures=PICTURES, progress=progress, workers=1)
    return out, results, told, maps


def test_results_have_the_promised_keys(outcome):
    out, results, *_ = outcome
    document = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert set(document) == {"rows", "environment", "settings"}
    assert [(row["method"], row["seed"]) for row in document["rows"]] == [(name, 0) for name in NAMES]
    for row in document["rows"]:
        assert isinstance(row["parameters"], int) and row["parameters"] > 0
        for key in ("average_accuracy", "worst_group_accuracy", "energy_in_box", "unbiased_accuracy"):
            assert isinstance(row[key], float) and 0 <= row[key] <= 100
        assert isinstance(row["seconds"], float) and row["seconds"] > 0
        assert row["worst_group_accuracy"] == min(row["group_accuracies"].values())
        assert row["unbiased_accuracy"] == pytest.approx(sum(row["group_accuracies"].values()) / 4)
        assert 1 <= row["selected_epoch"] <= 2
    assert document["environment"]["torch"] == torch.__version__
    assert document["environment"]["reused_runs"] == 0
    assert document["settings"]["recipes"]["kd"]["schedule"]["epochs"] == 2
    assert list(document["settings"]["methods"]) == NAMES
    assert document["settings"]["methods"]["kd"] == "The toy of kd."
    assert document == json.loads(json.dumps(results.document()))


def test_the_report_shows_every_method(outcome):
    html = (outcome[0] / "report.html").read_text(encoding="utf-8")
    for name in NAMES:
        assert html.count(f'<td class="method">{name}</td>') == 2 + 1, "table, images, and a row for the seed"


@pytest.fixture(scope="module")
def again(recipes, tmp_path_factory):
    """(directory, results) of some of the methods, for another seed and for the same one, in two worker processes."""
    out, some = tmp_path_factory.mktemp("again"), {name: recipes[name] for name in ("dett", "cid")}
    torch.manual_seed(12345)  # what happens elsewhere in the process does not matter
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("debiaskd.utils.workers.get_context", lambda method: processes.context())
        return out, quickstart.run(out, [1, 0], recipes=some, pictures=PICTURES, workers=2)


def test_the_same_seed_gives_the_same_numbers_to_the_last_bit(outcome, again):
    """Whichever other methods are trained, and in however many processes."""
    assert (outcome[1].environment["workers"], again[1].environment["workers"]) == (1, 2)
    before = {row["method"]: row for row in numbers(outcome[1].rows)}
    rows = numbers(again[1].rows)
    assert rows[3:] == [before["teacher"], before["dett"], before["cid"]]
    assert [(row["method"], row["seed"]) for row in rows[:3]] == [("teacher", 1), ("dett", 1), ("cid", 1)]
    assert all(one["energy_in_box"] != other["energy_in_box"] for one, other in zip(rows[:3], rows[3:]))


def test_each_seed_trains_one_teacher(outcome, again):
    for out, seeds, taught in ((outcome[0], 1, 5), (again[0], 2, 4)):
        names = [path.name.rpartition("-")[0] for path in (out / "stages").iterdir() if path.name[0] != "."]
        assert [names.count(name) for name in ("teacher", "identification", "weights")] == [seeds] * 3
        weights = list(out.glob("runs/*/teacher/model.safetensors"))
        assert len(weights) == taught and len({path.read_bytes() for path in weights}) == seeds


def test_nothing_is_computed_that_nothing_reads(outcome):
    out, _, _, maps = outcome
    assert {boxed for split, boxed in maps if split == "val"} == {False}
    assert sum(boxed for split, boxed in maps if split == "test") == len(NAMES)
    assert not list(out.rglob("checkpoints")) and not list(out.rglob("*.pt"))


def test_progress_rises_to_one(outcome):
    tasks, shares = zip(*outcome[2])
    assert {f"seed 0: {name}" for name in ("data", *NAMES)} == set(tasks)
    assert list(shares) == sorted(shares) and shares[-1] == pytest.approx(1)


def test_students_begin_with_the_same_weights(recipes, outcome):
    """Of one seed, whatever the method."""
    from debiaskd.training.fit import Trainer

    out, found = outcome[0], []
    for method in ("erm", "dett"):
        recipe = read(recipes[method], ["--data.path", str(out / "data" / "digits-0")])
        trainer = Trainer(recipe, None, lambda *news: None)
        found.append(trainer.network(recipe.student, "student").state_dict())
    assert all(torch.equal(a, b) for a, b in zip(*(state.values() for state in found)))


def test_finished_runs_are_used_again(outcome, recipes, tmp_path):
    (tmp_path / "results.json").write_text("earlier")
    some = {method: recipes[method] for method in ("erm", "kd")}

    def stop(task, done):
        if task.endswith("kd"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quickstart.run(tmp_path, 1, recipes=some, pictures=PICTURES, progress=stop, workers=1)
    assert (tmp_path / "results.json").read_text() == "earlier" and not (tmp_path / "report.html").exists()
    first = quickstart.run(tmp_path, 1, recipes=some, pictures=PICTURES, workers=1)
    again = quickstart.run(tmp_path, 1, recipes=some, pictures=PICTURES, workers=1)
    assert (first.environment["reused_runs"], again.environment["reused_runs"]) == (1, 2)
    assert again.rows == first.rows  # with the seconds that they took
    whole = {row["method"]: row for row in numbers(outcome[1].rows) if row["seed"] == 0}
    assert numbers(again.rows) == [whole["teacher"], whole["erm"], whole["kd"]]


def test_a_bad_directory_is_found_before_anything_is_trained(recipes, tmp_path):
    (tmp_path / "taken").write_text("")
    told = []
    with pytest.raises(NotADirectoryError) as caught:
        quickstart.run(tmp_path / "taken", 1, recipes=recipes, progress=lambda *step: told.append(step))
    assert caught.value.filename == str(tmp_path / "taken" / "report.html") and not told


@pytest.mark.parametrize("seeds", [0, [], [1, 1]])
def test_bad_seeds(tmp_path, seeds):
    with pytest.raises(ValueError, match="seeds must be at least one, each once"):
        quickstart.run(tmp_path, seeds)


def test_bad_workers(tmp_path):
    with pytest.raises(ValueError, match="workers must be >= 1, got 0"):
        quickstart.run(tmp_path, 1, workers=0)


def test_jobs_that_need_no_teacher_can_run_while_it_is_trained(recipes, tmp_path):
    found = {method: read(path) for method, path in recipes.items()}
    jobs = quickstart._jobs(tmp_path, [0, 1], recipes, found, PICTURES)
    after = {job.key: job.after for job in jobs}
    assert [job.key for job in jobs[:5]] == [("data", 0), ("data", 1), ("teacher", 0), ("teacher", 1), ("erm", 0)]
    assert after["erm", 1] == after["guided", 1] == after["teacher", 1] == ("data", 1)
    assert {after[name, 1] for name in NAMES if found.get(name) and found[name].teacher} == {("teacher", 1)}


def test_no_recipe(tmp_path):
    with pytest.raises(ValueError, match="recipes must be at least one, got none"):
        quickstart.run(tmp_path, 1, recipes={})


def test_each_recipe_says_what_it_is():
    for method, name in quickstart.RECIPES.items():
        text = description(name)
        assert text.endswith(".") and "debiaskd" not in text and "#" not in text, method


def test_a_missing_extra_is_known_before_training(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ModuleNotFoundError) as caught:
        quickstart.run(tmp_path, 1)
    assert caught.value.name == "jinja2"
    assert list(tmp_path.iterdir()) == []
