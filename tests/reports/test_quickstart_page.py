"""The quickstart's rows, summaries, claims in words, and its page, which stands alone."""

import re

import pytest
import torch
from pages import Loads

from debiaskd.reports import quickstart as report
from debiaskd.reports.gallery import data_uri, glowing
from debiaskd.reports.measured import Example, Look, Measured

METHODS = ("teacher", "erm", "kd", "simkd", "dett")


def row(method, seed, worst, **more):
    return {
        "method": method,
        "seed": seed,
        "average_accuracy": 90.0,
        "worst_group_accuracy": worst,
        "energy_in_box": 50.0,
        "seconds": 2.5,
        "parameters": 1234,
        "group_accuracies": {"open on china": worst, "closed loop on china": 95.0},
        **more,
    }


def rows(teacher=88.0, kd=20.0, simkd=80.0, dett=90.0):
    worst = {"teacher": teacher, "erm": 5.0, "kd": kd, "simkd": simkd, "dett": dett}
    return [row(method, seed, value + seed) for seed in (0, 2) for method, value in worst.items()]


def measured(**changes):
    uri = data_uri(torch.full((3, 16, 16), 100, dtype=torch.uint8))
    groups = ("open on china", "closed loop on china")
    given = {
        "name": "dett",
        "settings": {},
        "fingerprint": "",
        "seed": 7,
        "facts": {"epoch": 3, "figures": {"worst_group_accuracy": 0.5}},
        "data": ("digits-7", "test", 200),
        "pictures": "",
        "validated": "",
        "groups": groups,
        "figures": {
            "accuracy": 0.875,
            "worst_group_accuracy": 0.75,
            "unbiased_accuracy": 0.8,
            "adjusted_accuracy": 0.9,
            "group_0_accuracy": 0.75,
            "group_1_accuracy": None,
            "epg": 0.625,
            "defined": 0.99,
        },
        "parameters": 1234,
        "looked_at": "",
        "steps": [],
        "epochs": [],
        "examples": [Example(i, f"test:{i}", i, groups[i], uri, [[2, 3, 9, 11]], (16, 16)) for i in range(2)],
        "looks": [Look(uri, 0.5, 0.9, "open", i == 0) for i in range(2)],
    }
    return Measured(**{**given, **changes})


RUNS = {method: measured() for method in METHODS}


def document(**worst):
    recipes = {"kd": {"schedule": {"epochs": 3}}, "dett": {"schedule": {"epochs": 8}}}
    settings = {"pictures": {"agreement": 0.95}, "recipes": recipes, "seeds": [0, 2]}
    settings |= {"methods": {"dett": "the <b>best</b> one"}, "selection": "by validation"}
    return {"rows": rows(**worst), "environment": {"torch": "2.x", "seconds": 9.0}, "settings": settings}


def test_a_row_by_hand():
    found = report.row("dett", measured(), 2.5)
    assert set(report.REQUIRED) <= set(found)
    assert found == {
        "method": "dett",
        "seed": 7,
        "average_accuracy": 87.5,
        "worst_group_accuracy": 75.0,
        "energy_in_box": 62.5,
        "seconds": 2.5,
        "parameters": 1234,
        "unbiased_accuracy": 80.0,
        "adjusted_accuracy": 90.0,
        "group_accuracies": {"open on china": 75.0, "closed loop on china": None},
        "maps_without_energy": 2,
        "validation_worst_group_accuracy": 50.0,
        "selected_epoch": 4,
    }


def test_summaries_by_hand():
    summaries = report.summarize([row("a", 0, 10.0), row("b", 0, 1.0), row("a", 1, 20.0), row("a", 2, 60.0)])
    assert [summary.method for summary in summaries] == ["a", "b"]
    figure = summaries[0].figures["worst_group_accuracy"]
    assert figure.mean == 30 and figure.spread == pytest.approx(700**0.5) and figure.values == (10, 20, 60)
    assert figure.text(1) == "30.0 ± 26.5"
    single = summaries[1].figures["worst_group_accuracy"]
    assert single.spread is None and single.text(1) == "1.0"
    assert summaries[0].groups["open on china"].mean == 30
    assert "unbiased_accuracy" not in summaries[0].figures, "a column that rows do not have"


def test_methods_are_not_known_by_name():
    summaries = report.summarize([row("guided", 0, 70.0), row("dett+guided+cid", 0, 80.0)])
    assert report.findings(summaries) == []
    said = report.headline(summaries).replace("\N{NO-BREAK SPACE}", " ")
    assert said == "The best worst-group accuracy is that of dett+guided+cid: 80 %."


def test_a_row_without_a_required_key():
    broken = row("a", 0, 1.0)
    del broken["seconds"], broken["parameters"]
    with pytest.raises(ValueError, match="got one without seconds, parameters"):
        report.summarize([broken])
    with pytest.raises(ValueError, match="rows must be at least one"):
        report.summarize([])


@pytest.mark.parametrize(
    ("worst", "held"),
    [
        ({}, [True, True, True]),
        ({"kd": 75.0}, [True, True, True]),
        ({"kd": 75.1}, [False, True, True]),
        ({"teacher": 92.0}, [True, True, True]),
        ({"teacher": 92.1}, [True, False, True]),
        ({"simkd": 90.0}, [True, True, False]),
        ({"dett": 10.0}, [False, False, False]),
    ],
)
def test_findings_say_what_came_out(worst, held):
    summaries = report.summarize(rows(**worst))
    assert [finding.held for finding in report.findings(summaries)] == held
    failed = held.count(False)
    assert (f"{failed} of 3 checks failed" in report.headline(summaries)) == (failed > 0)


@pytest.mark.parametrize(
    ("energy", "average", "held"),
    [(60.0, 69.0, [True, True]), (59.9, 69.0, [False, True]), (61.0, 68.9, [True, False])],
)
def test_findings_look_at_more_than_the_worst_group(energy, average, held):
    erm = {**row("erm", 0, 5.0), "energy_in_box": 45.0, "average_accuracy": 70.0}
    guided = {**row("guided", 0, 5.0), "energy_in_box": energy, "average_accuracy": average}
    found = report.findings(report.summarize([erm, guided]))
    assert [finding.held for finding in found] == held
    assert found[0].text.startswith(f"energy in box %: guided {energy} against erm 45.0")


def test_the_page_stands_alone():
    html = report.render(document(), RUNS)
    page = Loads()
    page.feed(html)
    assert page.images == 2 * (1 + 5) and len(page.found) == page.images
    assert all(uri.startswith("data:image/png;base64,") for uri in page.found)
    assert not re.search(r"https?://|@import|url\(", html)


def test_the_page_says_what_was_measured():
    page = Loads()
    page.feed(report.render(document(), RUNS))
    text = " ".join(page.text.split())
    assert "the debiased teacher gets 89 % right" in text.replace("\N{NO-BREAK SPACE}", " ")
    for expected in ("91.0 ± 1.4", "1,234", "by validation", "the <b>best</b> one", "schedule.epochs", "2.x"):
        assert expected in text
    assert "Mean ± sample standard deviation over 2 seeds" in text
    assert text.count("✓ open") == text.count("✗ open") == 5


def test_a_page_without_groups_and_spread():
    bare = [{key: value for key, value in row("a", 0, 5.0).items() if key in report.REQUIRED}]
    html = report.render({**document(), "rows": bare}, {"a": measured()})
    assert "One seed, so without spread" in html and "±" not in html


def test_a_map_glows_on_the_grey_image():
    images = torch.zeros(1, 3, 2, 2, dtype=torch.uint8)
    images[0, 0] = 90
    glow = glowing(images, torch.tensor([[[0.0, 1.0], [0.0, 0.0]]]))
    assert glow[0, :, 0, 0].tolist() == [24, 24, 24]
    assert glow[0, :, 0, 1].tolist() == [round(24 * 0.15 + value * 0.85) for value in (255, 96, 0)]
