"""The parts of `debiaskd report`: what recipes differ in, what seeds have in common, scales, logs."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lightning_fabric")
pytest.importorskip("jsonargparse")
pytest.importorskip("torchdata")
pytest.importorskip("safetensors")

from debiaskd.reports import curves, sections
from debiaskd.reports.charts import Chart, Point, Scale, Series
from debiaskd.reports.differences import differences
from debiaskd.reports.measured import Measured, _with_checksums
from debiaskd.training.logs import Table, read_table


def test_differences_are_told_in_short() -> None:
    def recipe(**terms: Any) -> dict[str, Any]:
        return {"terms": {"guide": None, "kd": None, **terms}, "data": {"crop_scale": None}}

    guide = {"weight": 1.0, "start": 0, "layer": "Final", "loss": "energy", "steps": None}
    found = differences([recipe(), recipe(guide=guide), recipe(guide={**guide, "layer": "Input"})])
    assert [(one.key, one.values) for one in found] == [
        ("terms.guide", ("–", "weight 1, layer Final", "weight 1, layer Input"))
    ]
    found = differences([recipe(guide=guide), recipe(guide={**guide, "weight": 0.5, "loss": "l1"})])
    assert [(one.key, one.values) for one in found] == [
        ("terms.guide.weight", ("1", "0.5")),
        ("terms.guide.loss", ("energy", "l1")),
    ]
    teacher = {"name": "resnet50", "method": "erm", "schedule": {"epochs": 3, "batch": 64}, "pretrained": True}
    (one,) = differences([{"teacher": None}, {"teacher": teacher}])
    assert one.values == ("–", "resnet50, method erm, schedule (epochs 3), pretrained yes")
    assert differences([recipe()] * 3) == []


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["dett-0", "dett-1"], "dett"),
        (["dett-seed10", "dett-seed11"], "dett"),
        (["resnet50-1", "resnet50-2"], "resnet50"),
        (["a/0", "a/1"], "a"),
        (["left", "right"], "left + 1"),
        (["alone-3"], "alone-3"),
    ],
)
def test_seeds_are_named_by_what_they_have_in_common(given: list[str], expected: str) -> None:
    members = [named(name) for name in given]
    (entry,) = sections.entries(members)
    assert entry.name == expected and list(entry.runs) == members
    assert len(sections.entries([*members, named("other", {"weight": 2})])) == 2


def named(name: str, settings: dict[str, Any] | None = None) -> Any:
    empty: dict[str, Any] = dict.fromkeys(Measured.__dataclass_fields__)
    return Measured(**{**empty, "name": name, "settings": settings or {}, "figures": {}, "groups": (), "parameters": 1})


def test_weights_of_one_name_and_other_content_are_told_apart() -> None:
    settings = {"data": {"size": 8}, "student": {"weights": "w.pth"}, "teacher": {"weights": None}}
    first, second = ({"data": "d" * 64, "student.weights": letter * 64} for letter in "ab")
    found, other = (_with_checksums(settings, "birds", inputs) for inputs in (first, second))
    assert found["student"] == {"weights": "w.pth aaaaaaaa"} and found["teacher"] == settings["teacher"]
    assert found["data"] == {"path": "birds dddddddd", "size": 8}
    assert [one.values for one in differences([found, other])] == [("w.pth aaaaaaaa", "w.pth bbbbbbbb")]


def test_a_figure_that_one_seed_lacks_has_no_mean() -> None:
    first, second = named("a-0"), named("a-1")
    first.figures.update(accuracy=0.5, epg=0.25)
    second.figures.update(accuracy=1.0, epg=None)
    (entry,) = sections.entries([first, second])
    assert entry.summary.figures["accuracy"].text(1) == "75.0 ± 35.4" and "epg" not in entry.summary.figures


@pytest.mark.parametrize("values", [[], [3.0], [0.0], [-5.0, 5.0], [1e-9, 1.1e-9], [0.02, 40.0], [99.0, 100.0], [7, 8]])
@pytest.mark.parametrize("options", [{}, {"log": True}, {"whole": True}, {"bounds": (0.0, 100.0)}])
def test_scales_hold_what_they_are_for(values: list[float], options: dict[str, Any]) -> None:
    if "bounds" in options:
        values = [value for value in values if value >= 0]
    if "whole" in options:
        values = [round(value) for value in values]
    scale = Scale(values, 200, 10, **options)
    assert all(10 <= scale(value) <= 200 for value in values)
    assert sorted(values) == sorted(values, key=lambda value: -scale(value))
    places = [place for place, _ in scale.ticks]
    assert 1 <= len(places) <= 9 and all(10 <= place <= 200 for place in places)
    assert len({text for _, text in scale.ticks}) == len(places), "two ticks of one name"
    assert not options.get("whole") or all(float(text) == int(float(text)) for _, text in scale.ticks)
    assert not math.isnan(scale(1.0))
    assert "bounds" not in options or 0 <= scale.low < scale.high <= 100


def trained(name: str, rows: list[tuple[float, float, float]], validated: str = "v", **settings: Any) -> Any:
    """A run whose front has all epochs but the first, and which ended with the last."""
    epochs = [{"epoch": float(i), "accuracy": a, "epg": e, "iou": u} for i, (a, e, u) in enumerate(rows)]
    steps = [{"step": 3.0, "epoch": 0.0, "learning_rate": 0.1, "loss": 4.0, "kd": None}]
    facts = {"epoch": len(rows) - 1, "front": list(range(1, len(rows)))}
    logs = {"epochs": epochs, "steps": steps, "facts": facts, "validated": validated, "looked_at": "Final"}
    found = replace(named(name, settings), data=("birds", "test", 4), examples=[], **logs)
    found.figures.update(accuracy=rows[-1][0])
    return found


def test_curves_are_in_percent_by_epoch_as_people_count() -> None:
    section = sections.Section([trained("a", [(0.25, 0.1, 0.2), (0.5, 0.2, 0.3), (0.4, 0.3, 0.1)])])
    accuracy, epg, iou = curves.validation(section)
    assert (accuracy.title, epg.title, iou.title) == ("accuracy %", "EPG %", "IoU %")
    assert [(p.x, p.y, p.strong) for p in accuracy.series[0].points] == [(1, 25, False), (2, 50, False), (3, 40, True)]
    assert accuracy.series[0].points[1].title == "a, epoch 2: 50"
    (loss, nothing) = curves.losses(section)
    assert [(p.x, p.y, p.strong) for p in loss.series[0].points] == [(3, 4, False)] and nothing.series == []


def test_the_best_of_a_column_has_the_most() -> None:
    given = {"low": 0.5, "high-0": 0.9, "high-1": 0.7}
    low, high, seed = (trained(name, [(value, 0, 0)], of=name[:3]) for name, value in given.items())
    for run, worst in ((low, 0.4), (high, 0.1), (seed, 0.3)):
        run.figures.update(worst_group_accuracy=worst)
    section = sections.Section([low, high, seed])
    assert section.best == {"accuracy": ["high"], "worst_group_accuracy": ["low"]}
    assert section.headline == "Worst group on test: low, 40.0 %, the highest of 2", "before the average"
    alone = sections.Section([high, seed])
    assert alone.best == {} and alone.headline == "Worst group on test: high, 20.0 ± 14.1 %"


@pytest.mark.parametrize("validated", ["v", "w"])
def test_fronts_say_what_another_run_beats(validated: str) -> None:
    low = trained("low", [(0.9, 0.9, 0.9), (0.2, 0.2, 0.3), (0.6, 0.1, 0.1)])
    high = trained("high", [(0.0, 0.0, 0.0), (0.5, 0.5, 0.5)], validated, weight=2)
    first, *others = curves.pareto(sections.Section([low, high]))
    assert len(others) == 2 and (first.across, first.up) == ("accuracy %", "EPG %")
    found = {(one.name, point.x, point.y): (point.strong, point.beaten) for one in first.series for point in one.points}
    same = validated == "v"  # else they were validated on other images, which do not compare
    assert found == {
        ("low", 20, 20): (False, same),
        ("low", 60, 10): (True, False),
        ("high", 50, 50): (True, False),
    }


def test_a_chart_leaves_out_who_has_nothing_to_show() -> None:
    some = Series("some", 1, (Point(1, 2.0, "a"), Point(3, 4.0, "b")))
    chart = Chart("", "step", "loss", [Series("none", 0, ()), some], joined=True)
    assert chart.series == [some] and chart.path(some) == f"{chart.left},{chart.bottom} {chart.right},{chart.top}"


def test_a_line_through_more_points_than_pixels_keeps_each_pixels_extremes() -> None:
    values = [math.sin(step / 40) + (step == 7777) * 5 - (step == 1234) * 5 for step in range(20_000)]
    line = Series("long", 0, tuple(Point(step, value, "") for step, value in enumerate(values)))
    chart = Chart("", "step", "", [line], joined=True)
    drawn = [tuple(map(float, point.split(","))) for point in chart.path(line).split()]
    assert len(drawn) <= 4 * (chart.right - chart.left + 1)
    assert drawn == sorted(drawn, key=lambda place: place[0])
    shown: dict[int, list[float]] = {}
    for x, y in drawn:
        shown.setdefault(math.floor(x), []).append(y)
    every: dict[int, list[float]] = {}
    for step, value in enumerate(values):
        every.setdefault(math.floor(float(f"{chart.x(step):g}")), []).append(float(f"{chart.y(value):g}"))
    assert {x: (min(ys), max(ys)) for x, ys in shown.items()} == {x: (min(ys), max(ys)) for x, ys in every.items()}
    assert drawn[0][0] == chart.left and drawn[-1][0] == chart.right


def test_logs_are_read_as_they_were_written(tmp_path: Path) -> None:
    log = Table(tmp_path / "log.csv")
    log.append({"step": 1, "loss": 0.1})
    log.append({"step": 2, "loss": 1e-17, "guide": float("nan")})
    first, second = read_table(log.path)
    assert first == {"step": 1.0, "loss": 0.1, "guide": None}
    assert second["loss"] == 1e-17 and math.isnan(second["guide"] or 0.0)
    assert read_table(tmp_path / "none.csv") == []
    (tmp_path / "empty.csv").write_text("")
    assert read_table(tmp_path / "empty.csv") == []
