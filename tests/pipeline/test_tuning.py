"""`debiaskd tune`: which trials are trained, which is chosen, and what is said of those that fail."""

from __future__ import annotations

import json
import shutil
import statistics
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lightning_fabric")
pytest.importorskip("jsonargparse")
pytest.importorskip("torchdata")
pytest.importorskip("safetensors")
pytest.importorskip("jinja2")

import data_trees as trees
import training_runs as runs
import yaml
from cli_runs import command, failed
from pages import Loads

from debiaskd.data import PackedDataset, prepare
from debiaskd.pipeline.tuning import Criterion, Outcome, Trial, chosen
from debiaskd.recipe import read
from debiaskd.recipe.sweep import Setting
from debiaskd.reports.tuning import Row, chart
from debiaskd.training.divergence import DivergedError
from debiaskd.training.fit import Trainer

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.xdist_group("tuning"),
    pytest.mark.filterwarnings("ignore::debiaskd.reweight.ErrorSetWarning"),
]
TAUGHT: dict[str, Any] = {
    **runs.taught(terms={"kd": {"weighted": True}}),
    "weights": {"method": "errors", "up": 20},
    "compute": {"accelerator": "cpu", "checkpoints": False},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.birds(tmp_path_factory.mktemp("tuning"))


def recipe(folder: Path, data: Path, document: dict[str, Any] = TAUGHT) -> Path:
    return runs.write(folder / "r.yaml", data, document)


def test_a_grid_over_seeds_shares_stages_and_is_continued(
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    trained: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    opened: list[str] = []
    inner = PackedDataset.__init__

    def noted(self: PackedDataset, path: Any, split: str, **options: Any) -> None:
        opened.append(split)
        inner(self, path, split, **options)

    monkeypatch.setattr(PackedDataset, "__init__", noted)
    monkeypatch.setattr("debiaskd.training.fit.check_overlap", lambda *arguments, **options: None)  # opens test
    out = tmp_path / "sweep"
    more = ("--over", "weights.up=1,20", "--over", "terms.kd.temperature=1,4", "--seeds", 2, "--out", out)
    code, printed, said = command(capsys, "tune", recipe(tmp_path, data), *more)
    assert code == 0 and set(opened) == {"train", "val"}
    assert trained.count("student") == 8 and trained.count("teacher") == trained.count("identification") == 2
    assert "trial 1 of 8, weights.up=1, terms.kd.temperature=1, seed 0" in said
    document = json.loads((out / "results.json").read_text())
    assert len(document["rows"]) == 8 and document["rule"] == "worst_group" and document["split"] == "validation"
    assert {row["seed"] for row in document["rows"]} == {0, 1} and all(row["error"] is None for row in document["rows"])

    # The mean over seeds of what each run's own record says, and the highest of them.
    means = {}
    for setting in document["settings"]:
        rows = [row for row in document["rows"] if row["setting"] == setting["setting"]]
        facts = [json.loads((Path(row["run"]) / "student/stage.json").read_text())["facts"] for row in rows]
        values = [one["figures"]["worst_group_accuracy"] for one in facts]
        assert setting["mean"] == pytest.approx(statistics.fmean(values))
        assert setting["std"] == pytest.approx(statistics.stdev(values))
        means[json.dumps(setting["setting"])] = setting["mean"]
    best = document["best"]
    assert means[json.dumps(best)] == max(means.values())
    written = yaml.safe_load((out / "best.yaml").read_text())
    assert written["weights"]["up"] == best["weights.up"]
    assert written["terms"]["kd"]["temperature"] == best["terms.kd.temperature"]
    assert (written["seed"], written["compute"]["stages"]) == (0, None) and read(out / "best.yaml")
    assert f"weights.up={best['weights.up']}, terms.kd.temperature={best['terms.kd.temperature']}" in printed
    assert printed.splitlines()[-3:] == [str(out / name) for name in ("best.yaml", "results.json", "tune.html")]
    page, spread = (out / "tune.html").read_text(), sum(one["std"] > 0 for one in document["settings"])
    loads = Loads()
    loads.feed(page)
    assert loads.found == [] and page.count('class="chart"') == 2 and page.count('class="whisker"') == 2 * spread
    assert page.count("<tr>") == 5

    trained.clear()
    first = (out / "results.json").read_text()
    assert command(capsys, "tune", recipe(tmp_path, data), *more)[0] == 0
    assert trained == [] and (out / "results.json").read_text() == first
    wider = [option if option != "weights.up=1,20" else "weights.up=1,20,30" for option in more]
    assert command(capsys, "tune", recipe(tmp_path, data), *wider, "--random", 5)[0] == 0
    assert set(trained) <= {"student"} and len(json.loads((out / "results.json").read_text())["rows"]) == 10

    said = failed(*command(capsys, "tune", recipe(tmp_path, data), *more, "--schedule.epochs", 2))
    assert "was begun with schedule.epochs: 1, not 2; choose another --out" in said


def test_a_trial_that_fails_is_named_and_the_others_are_kept(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    inner, failing = Trainer.fit, {2: DivergedError("step 3: loss is nan"), 3: ValueError("of a network")}

    def fit(self: Trainer, name: str, *arguments: Any, **more: Any) -> dict[str, Any]:
        if self.recipe.schedule.epochs in failing:
            raise failing[self.recipe.schedule.epochs]
        return inner(self, name, *arguments, **more)

    monkeypatch.setattr(Trainer, "fit", fit)
    file, out = recipe(tmp_path, data, runs.PLAIN), tmp_path / "sweep"
    options = ("tune", file, "--over", "schedule.epochs=1,2,3", "--out", out)
    code, printed, _ = command(capsys, *options)
    assert code == 0
    assert "failed: schedule.epochs=2, seed 0: step 3: loss is nan\n" in printed
    assert "failed: schedule.epochs=3, seed 0: ValueError: of a network\n" in printed
    document = json.loads((out / "results.json").read_text())
    assert [row["error"] is None for row in document["rows"]] == [True, False, False]
    assert document["best"] == {"schedule.epochs": 1} and "of a network" in (out / "tune.html").read_text()
    failing.pop(2)  # it is tried again
    assert command(capsys, *options)[0] == 0
    assert [row["error"] is None for row in json.loads((out / "results.json").read_text())["rows"]] == [
        True,
        True,
        False,
    ]
    failing[1] = failing[2] = failing[3]
    code, printed, _ = command(capsys, *options[:-1], tmp_path / "none")
    assert code == 1 and "best.yaml" not in printed
    assert "No trial can be compared" in (tmp_path / "none" / "tune.html").read_text()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--over", "schedule.epochs=1,0"], "--over: schedule.epochs=0: schedule.epochs: must be >= 1, got 0"),
        (["--over", "schedule.epochs=1,two"], "--over: schedule.epochs=two: schedule.epochs: must be of type int"),
        (["--over", "student.name=plain/4,resnet_none"], "--over: student.name=resnet_none: resnet_none: timm has no"),
        (["--over", "schedule.batch=12,7", "--schedule.accumulate=2"], "schedule.batch=7: schedule.batch: must be a"),
        (["--over", "terms.guide=null,{weight: 0.1}"], "selection.rule: is left out, and its default differs"),
        (["--over", "schedule.epochs=1,2", "--selection.rule=last"], "selection.rule: last compares no metric"),
        (["--over", "schedule.epochs=1,2", "--random", "3"], "--random: must be <= 2"),
        (["--schedule.epochs", "1"], "the following arguments are required: --over"),
    ],
)
def test_mistakes_are_refused_before_the_first_trial(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], expected: str
) -> None:
    document = {**runs.PLAIN, "selection": {}} | {"data": {"groups": "none"}}
    said = failed(*command(capsys, "tune", recipe(tmp_path, data, document), "--out", tmp_path / "sweep", *options))
    assert expected in said and not (tmp_path / "sweep").exists()


def test_other_data_under_the_same_path_is_noticed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = runs.birds(tmp_path / "a")
    options = ("tune", recipe(tmp_path, data, runs.PLAIN), "--over", "schedule.epochs=1", "--out", tmp_path / "sweep")
    assert command(capsys, *options)[0] == 0
    shutil.rmtree(data)
    trees.waterbirds(tmp_path / "others", [(i % 2, 0 if i < 48 else 1 if i < 64 else 2, i % 2) for i in range(80)])
    prepare("waterbirds", tmp_path / "others", data, size=16, workers=1)
    assert "was trained on other data than" in failed(*command(capsys, *options))


def outcome(setting: Setting, seed: int, value: float | None, error: str | None = None) -> Outcome:
    trial = Trial(setting, seed, None, Path("x"))  # type: ignore[arg-type]
    return Outcome(trial, None if error else {"figures": {"accuracy": value, "epg": 0.5}}, error=error)


def test_the_highest_mean_wins_and_incomplete_settings_come_last() -> None:
    a, b, c = (Setting({"weights.up": up}) for up in (1, 2, 3))
    criterion = Criterion("accuracy", ("accuracy",))
    found = [outcome(a, 0, 0.9), outcome(a, 1, None, "out of memory"), outcome(b, 0, 0.6), outcome(b, 1, 0.8)]
    assert chosen(found, criterion) == b
    assert chosen([*found, outcome(c, 0, 0.7), outcome(c, 1, 0.7)], criterion) == b, "the first of equals"
    assert chosen(found[:2], criterion) == a
    assert chosen([outcome(a, 0, None)], criterion) is None, "a metric that is undefined"
    assert Criterion("pareto", ("accuracy", "epg"))(found[0]) == pytest.approx(1.4)


def test_charts_have_a_line_for_each_setting_of_the_others_or_the_best_of_many() -> None:
    criterion = Criterion("accuracy", ("accuracy",))
    rows = [
        Row(Setting({"weights.up": up, "schedule.epochs": n}), [outcome(Setting({}), 0, up * n / 200)], criterion)
        for up in (20, 5)
        for n in range(1, 9)
    ]
    by_epochs = chart("schedule.epochs", list(range(1, 9)), rows, "accuracy", 100.0)
    assert [one.name for one in by_epochs.series] == ["weights.up=20", "weights.up=5"]
    assert [point.y for point in by_epochs.series[1].points] == pytest.approx([2.5 * n for n in range(1, 9)])
    by_up = chart("weights.up", [20, 5], rows, "accuracy", 100.0)
    (best,) = by_up.series
    assert [text for _, text in by_up.x.ticks] == ["5", "20"] and best.name == "the best of the other keys' values"
    assert [point.y for point in best.points] == pytest.approx([20.0, 80.0])
    assert by_up.x(0) < by_up.x(1)
