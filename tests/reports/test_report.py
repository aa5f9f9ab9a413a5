"""Rows to summaries, words, a page that stands alone, and two files that appear together or not at all."""

import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from debiaskd import Boxes
from debiaskd.data.sources.digits import Pictures
from debiaskd.reports import quickstart_table as report
from debiaskd.reports.gallery import SHOWN, Gallery


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


@pytest.fixture
def gallery():
    groups = torch.arange(4).repeat(3)
    pictures = Pictures(
        torch.full((12, 3, 16, 16), 100, dtype=torch.uint8),
        groups // 2,
        groups % 2,
        groups,
        groups,
        Boxes.from_lists([[[2, 3, 9, 11]]] * 12),
    )
    gallery = Gallery.choose(pictures, seed=7)
    for method in ("teacher", "erm", "kd", "simkd", "dett"):
        gallery.add(method, torch.randn(12, 4, 4), torch.randn(12, 2))
    return gallery


def document(**worst):
    settings = {"agreement": 0.95, "student_schedule": {"epochs": 3}, "seeds": [0, 2]}
    settings |= {"methods": {"dett": "the <b>best</b> one"}, "selection": "by validation"}
    return {"rows": rows(**worst), "environment": {"torch": "2.x", "seconds": 9.0}, "settings": settings}


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


class Loads(HTMLParser):
    """Everything that a browser would fetch, and all tags that are open."""

    def __init__(self):
        super().__init__()
        self.found, self.text, self.images = [], "", 0

    def handle_starttag(self, tag, attributes):
        self.images += tag == "image"
        for name, value in attributes:
            if name in ("src", "href", "srcset", "poster", "data", "action", "xlink:href"):
                self.found.append(value)
        if tag in ("script", "link", "iframe", "object"):
            self.found.append(tag)

    def handle_data(self, data):
        self.text += data


def test_the_page_stands_alone(gallery):
    html = report.render(document(), gallery)
    page = Loads()
    page.feed(html)
    assert page.images == sum(SHOWN) * (1 + 5) and len(page.found) == page.images
    assert all(uri.startswith("data:image/png;base64,") for uri in page.found)
    assert not re.search(r"https?://|@import|url\(", html)


def test_the_page_says_what_was_measured(gallery):
    page = Loads()
    page.feed(report.render(document(), gallery))
    text = " ".join(page.text.split())
    assert "the debiased teacher gets 89 % right" in text.replace("\N{NO-BREAK SPACE}", " ")
    for expected in ("91.0 ± 1.4", "1,234", "by validation", "the <b>best</b> one", "student schedule: epochs", "2.x"):
        assert expected in text
    assert "Mean ± sample standard deviation over 2 seeds" in text


def test_a_page_without_groups_and_spread(gallery):
    bare = [{key: value for key, value in row("a", 0, 5.0).items() if key in report.REQUIRED}]
    html = report.render({**document(), "rows": bare}, gallery)
    assert "One seed, so without spread" in html and "±" not in html


def test_gallery_takes_the_first_of_each_group(gallery):
    assert gallery.index.tolist() == [0, 1, 5, 2, 6, 3]
    assert gallery.titles()[1] == "open on flower"
    assert gallery.maps["kd"].shape == (6, 16, 16) and 0 <= gallery.maps["kd"].min() <= gallery.maps["kd"].max() <= 1


def test_gallery_survives_a_map_without_evidence(gallery):
    gallery.add("none", -torch.ones(12, 4, 4), torch.zeros(12, 2))
    assert not gallery.maps["none"].any() and len(gallery.overlays("none")) == 6


def test_both_files_are_written_and_nothing_else(tmp_path):
    target = report.Target(tmp_path / "new" / "place")
    target.write("<html>ü</html>", {"rows": [1, "±"]})
    assert sorted(path.name for path in target.directory.iterdir()) == ["report.html", "results.json"]
    assert json.loads((target.directory / "results.json").read_text(encoding="utf-8")) == {"rows": [1, "±"]}
    assert (target.directory / "report.html").read_text(encoding="utf-8") == "<html>ü</html>"


@pytest.mark.parametrize("failing", [1, 2])
def test_a_full_disk_leaves_the_earlier_results(tmp_path, monkeypatch, failing):
    target = report.Target(tmp_path)
    target.write("old", {"rows": "old"})
    synced = []

    def full(descriptor):
        synced.append(descriptor)
        if len(synced) == failing:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device") as caught:
        target.write("new", {"rows": "new"})
    assert caught.value.filename == str(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "results.json"]
    assert (tmp_path / "report.html").read_text() == "old"


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_results_are_never_there_without_their_report(tmp_path, monkeypatch, error):
    target = report.Target(tmp_path)

    def stopped(*_):
        raise error

    monkeypatch.setattr(os, "replace", stopped)
    with pytest.raises(error):
        target.write("html", {})
    assert list(tmp_path.iterdir()) == []


def test_a_number_that_json_does_not_know_is_no_result(tmp_path):
    with pytest.raises(ValueError, match="JSON compliant"):
        report.Target(tmp_path).write("html", {"rows": float("nan")})
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_no_directory(tmp_path):
    (tmp_path / "taken").write_text("mine")
    with pytest.raises(NotADirectoryError) as caught:
        report.Target(tmp_path / "taken")
    assert caught.value.filename == str(tmp_path / "taken")
    with pytest.raises(OSError):
        report.Target(tmp_path / "taken" / "below")
    assert (tmp_path / "taken").read_text() == "mine"


def test_a_directory_that_cannot_be_written(tmp_path, monkeypatch):
    def refused(*_, dir, **__):  # as root, permissions would not stop anyone
        raise PermissionError(13, "Permission denied", str(Path(dir) / "probe"))

    monkeypatch.setattr(report.tempfile, "mkstemp", refused)
    with pytest.raises(PermissionError) as caught:
        report.Target(tmp_path)
    assert caught.value.filename == str(tmp_path), "a temporary file's name means nothing to a user"
