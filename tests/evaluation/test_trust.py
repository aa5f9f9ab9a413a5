"""Intervals, calibration, faithfulness and paired comparisons: in `debiaskd evaluate`, its files and reports."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("lightning_fabric")
pytest.importorskip("jsonargparse")
pytest.importorskip("torchdata")
pytest.importorskip("safetensors")
pytest.importorskip("jinja2")

import report_runs

from debiaskd.cli.entry import main
from debiaskd.evaluation.evaluate import LoadedStage, evaluate_run, evaluation_split
from debiaskd.evaluation.trust import in_turns, read_judged, trusted, write_judged
from debiaskd.metrics import calibration_error, worst_group_interval
from debiaskd.reports.comparison import write_report
from debiaskd.reports.paired import comparisons
from debiaskd.training.validation import Judged

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.xdist_group("stages")]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return report_runs.make(tmp_path_factory.mktemp("trust"), ["erm-0", "erm-1", "guided"])


def judged(correct: list[int], groups: list[int] | None) -> Judged:
    sure = torch.full((len(correct),), 0.75)
    return Judged(
        torch.tensor(correct).bool(), sure, None if groups is None else torch.tensor(groups), torch.arange(len(correct))
    )


def test_evaluate_says_how_sure_it_is(root: Path) -> None:
    document, path = evaluate_run(root / "erm-0", "student", None, None, faithful=6)
    figures = document["figures"]
    assert figures["worst_group_low"] <= figures["worst_group_accuracy"] <= figures["worst_group_high"]
    by_group = [figures[key] for key in figures if key.startswith("group_") and key.endswith("_ece")]
    assert 0 <= figures["ece"] <= 1 and figures["worst_group_ece"] == max(by_group)
    assert 0 <= figures["deletion"] <= 1 and 0 <= figures["deletion_random"] <= 1
    assert document["groups_are"] == "known" and document["images"] == "evaluation-test.safetensors"
    found = read_judged(path.with_suffix(".safetensors"))
    assert found is not None and found.groups is not None
    # What the file holds is what a loop over the images finds.
    loaded = LoadedStage(root / "erm-0")
    split = evaluation_split(loaded, None)
    pictures = loaded.loader(split)
    batches = [pictures.transform(batch) for batch in pictures.dataloader]
    with torch.no_grad():
        logits = torch.cat([loaded.model(batch.images) for batch in batches])
    assert found.correct.tolist() == (logits.argmax(1) == split.target).tolist()
    torch.testing.assert_close(found.confidence, logits.softmax(1).amax(1))
    assert torch.equal(found.groups, split.groups) and torch.equal(found.index, split.numbers)
    interval = worst_group_interval(found.correct, found.groups)
    assert (figures["worst_group_low"], figures["worst_group_high"]) == (interval.low, interval.high)
    assert figures["ece"] == calibration_error(found.confidence, found.correct)


def test_the_command_prints_and_refuses(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(root / "erm-0"), "--faithfulness", "4"]) == 0
    printed = capsys.readouterr().out
    for words in ("worst group, lower end", "ECE", "deletion at random", "smallest group, images"):
        assert words in printed
    assert main(["evaluate", str(root / "erm-0"), "--faithfulness", "0"]) == 2
    assert "--faithfulness: must be a number of images >= 1, got 0" in capsys.readouterr().err


def test_a_report_has_intervals_and_pairs(root: Path, tmp_path: Path) -> None:
    write_report([root / name for name in ("erm-0", "erm-1", "guided")], tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text()
    assert "How sure that is" in page and "95 % intervals of the worst group" in page
    assert "not told apart" in page or "is better" in page
    # Of an evaluation whose images are lost, the page has no pairs, and is made all the same.
    evaluation = json.loads((root / "guided" / "evaluation-test.json").read_text())
    (root / "guided" / evaluation["images"]).write_bytes(b"damaged")
    write_report([root / name for name in ("erm-0", "guided")], tmp_path / "s.html")
    page = (tmp_path / "s.html").read_text()
    assert "How sure that is" in page and "less that of" not in page


def test_pairs_of_several_seeds() -> None:
    groups = [0] * 60 + [1] * 60
    good, bad = [1] * 55 + [0] * 5 + [1] * 50 + [0] * 10, [1] * 55 + [0] * 5 + [1] * 20 + [0] * 40
    (found,) = comparisons([("bad", [judged(bad, groups)] * 2), ("good", [judged(good, groups)])])
    assert (found.first, found.second, found.verdict) == ("good", "bad", "good is better")
    assert found.difference.value == pytest.approx(0.5) and found.difference.low > 0.3
    (same,) = comparisons([("a", [judged(good, groups)]), ("b", [judged(good, groups)])])
    assert same.verdict == "not told apart" and same.difference.low == same.difference.high == 0
    many = comparisons([(str(i), [judged(good if i == 3 else bad, groups)]) for i in range(6)])
    assert [one.first for one in many] == ["3"] * 5, "many entries are compared with the best"


@pytest.mark.parametrize(
    "entries",
    [
        [("a", [None]), ("b", [judged([1, 0], [0, 1])])],
        [("a", [judged([1, 0], None)]), ("b", [judged([1, 0], None)])],
        [("a", [judged([1], [0])]), ("b", [judged([1, 0], [0, 1])])],
        [("a", [judged([1, 0], [0, 1])])],
    ],
)
def test_no_pairs_of_what_is_not_known(entries) -> None:
    assert comparisons(entries) == []


def test_found_groups_are_called_environments(tmp_path: Path) -> None:
    one = judged([1, 1, 0, 1], [0, 0, 1, 1])
    assert set(trusted(one, found=True)) == {
        "ece",
        "worst_environment_low",
        "worst_environment_high",
        "worst_environment_ece",
        "environment_0_ece",
        "environment_1_ece",
    }
    assert set(trusted(judged([1, 0], None), found=False)) == {"ece"}
    write_judged(tmp_path / "j.safetensors", judged([1, 0], None))
    found = read_judged(tmp_path / "j.safetensors")
    assert found is not None and found.groups is None and found.correct.tolist() == [True, False]
    assert read_judged(tmp_path / "none.safetensors") is None


def test_images_in_turns() -> None:
    assert in_turns(torch.tensor([0, 0, 0, 1, 2, 1]), 4).tolist() == [0, 3, 4, 1]
