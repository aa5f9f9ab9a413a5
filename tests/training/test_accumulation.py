"""A step's loss does not depend on how the step is split: in one pass, in several, on one rank or on two."""

from __future__ import annotations

import copy
import csv
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lightning_fabric")
pytest.importorskip("jsonargparse")
pytest.importorskip("torchdata")
pytest.importorskip("safetensors")

import training_runs as runs
from safetensors.torch import load_file
from term_cases import CPU, Meeting, on_two_ranks, ranks
from test_training import script
from torch import Tensor

import debiaskd as dk
from debiaskd.attribution import draw_target
from debiaskd.data import Batch
from debiaskd.models.frozen_teacher import FrozenTeacher
from debiaskd.terms import (
    TERMS,
    BackdoorOptions,
    Draws,
    GroupDroOptions,
    GuideOptions,
    GuideTerm,
    KdOptions,
    MatchOptions,
    Ranks,
    RelationOptions,
    SampleOptions,
    Setting,
    StepTotals,
    SupervisedOptions,
    Term,
    make_guide,
)
from debiaskd.training.feature_extraction import FeatureExtractor, find_feature_layers
from debiaskd.training.learner import Learner, Step
from debiaskd.training.teacher_outputs import LiveTeacher

pytestmark = pytest.mark.usefixtures("one_thread")

N, K, WIDTH = 16, 3, 6
SETTING = Setting(num_classes=K, multi_label=False, num_groups=4, student_width=WIDTH, teacher_width=WIDTH)
#: Unevenly over passes: the first pass of four has neither group 2 nor an annotated image.
GROUPS = torch.tensor([0, 0, 1, 0, 2, 2, 0, 1, 0, 0, 0, 0, 1, 2, 2, 2])
EPOCH = 1


def batch(*, several: bool = False, ignored: bool = False) -> Batch:
    torch.manual_seed(3)
    target = torch.randint(0, K, (N,))
    if several:
        target = (torch.rand(N, K) < 0.6).to(torch.uint8)
        target[6] = 0  # shows nothing
    rows: list[Any] = [None] * 4 + [[[0, 0, 8, 8], [6, 6, 12, 12]], None, [], [[2, 2, 16, 16]]] * 3
    labels = [[] if row is None else [i % K, (i + 1) % K][: len(row)] for i, row in enumerate(rows)]
    boxes = dk.Boxes.from_lists(rows, labels if several else None)
    areas = dk.Boxes.from_lists([[[0, 0, 5, 5]]] * N, [[i % K] for i in range(N)]) if ignored else None
    return Batch(torch.randn(N, 3, 16, 16), target, boxes, groups=GROUPS, index=torch.arange(N), ignore=areas)


def learner(name: str, options: Any) -> Learner:
    torch.manual_seed(0)
    student, example = runs.Plain(K, WIDTH), torch.randn(2, 3, 16, 16)
    teacher = LiveTeacher(FrozenTeacher(runs.Plain(K, WIDTH), example=example))
    guide = make_guide(options, student) if isinstance(options, GuideOptions) else None
    term: Term = TERMS[name](options, SETTING) if guide is None else GuideTerm(options, guide)  # type: ignore[call-arg]
    if name == "backdoor":
        term.head.context.normal_()  # type: ignore[union-attr, operator]
    extractor = FeatureExtractor(student, find_feature_layers(student, example), {"feature", "pooled"})
    weight = torch.linspace(0.1, 9, N)
    return Learner(extractor, {name: term}, teacher=teacher, guide=guide, weight=weight)


def parts(whole: Batch, ranks: Ranks, passes: int) -> Iterator[Step]:
    """What a rank runs: ranks take turns in the samples of the step."""
    count = N // passes
    for number in range(passes):
        rows = torch.arange(N)[number * count : (number + 1) * count][ranks.rank :: ranks.world_size]
        fields = ("images", "target", "boxes", "groups", "index", "ignore")
        taken = {name: None if getattr(whole, name) is None else getattr(whole, name)[rows] for name in fields}
        draws = Draws(0, 5, ranks, CPU, passes=passes, number=number)
        yield Step(replace(whole, **taken), EPOCH, draws, ranks, number=number)


def gradient(made: Learner, whole: Batch, ranks: Ranks, passes: int) -> Tensor:
    """Of the step's loss, with that loss at its end; `made` stays as it is but for its buffers."""
    made.zero_grad()
    totals, loss = made.totals(parts(whole, ranks, passes)) if passes > 1 else StepTotals(), torch.zeros(())
    for part in parts(whole, ranks, passes):
        part.totals = totals
        total, _ = made(part)
        (total / passes).backward()
        loss += total.detach() / passes
    return torch.cat([*(p.grad.flatten() for p in made.parameters() if p.grad is not None), loss[None]])


CASES: list[tuple[str, Any, dict[str, bool]]] = [
    ("supervised", SupervisedOptions(weighted=True), {}),
    ("supervised", SupervisedOptions(), {}),
    ("supervised", SupervisedOptions(weighted=True), {"several": True}),
    ("match", MatchOptions(), {}),
    ("match", MatchOptions(weighted=False), {}),
    ("kd", KdOptions(weighted=True), {}),
    ("kd", KdOptions(), {}),
    ("sample", SampleOptions(weighted=True), {}),
    ("sample", SampleOptions(), {}),
    ("backdoor", BackdoorOptions(start=1, weighted=True), {}),
    ("backdoor", BackdoorOptions(start=1), {}),
    ("guide", GuideOptions(), {}),
    ("guide", GuideOptions(reduction="sum"), {}),
    ("guide", GuideOptions(), {"several": True}),
    ("guide", GuideOptions(layer="Input", loss="l1"), {"several": True, "ignored": True}),
    ("group_dro", GroupDroOptions(step_size=0.5), {}),
]


@pytest.mark.parametrize(("name", "options", "how"), CASES)
def test_a_step_is_the_same_in_any_number_of_passes_and_ranks(name: str, options: Any, how: Any) -> None:
    whole, made = batch(**how), learner(name, options)
    expected_model = copy.deepcopy(made)
    expected = gradient(made, whole, ranks(), 1)
    assert expected.count_nonzero() > 10
    four = copy.deepcopy(expected_model)
    four_found = gradient(relinked(four, options), whole, ranks(), 4)
    torch.testing.assert_close(four_found, expected, rtol=1e-5, atol=1e-6)
    buffers = dict(made.terms.named_buffers())
    torch.testing.assert_close(dict(four.terms.named_buffers()), buffers, rtol=1e-5, atol=1e-6)
    left = []

    def of_rank(meeting: Ranks) -> Tensor:
        mine = copy.deepcopy(expected_model)
        found = gradient(relinked(mine, options), whole, meeting, 2)
        left.append(dict(mine.terms.named_buffers()))
        return found

    halves = on_two_ranks(of_rank)
    torch.testing.assert_close(torch.stack(halves).mean(0), expected, rtol=1e-5, atol=1e-6)
    for key, value in buffers.items():
        own = key.partition(".")[2] in made.term(name).own  # each rank's part of a sum
        found = left[2][key] + left[3][key] if own else left[3][key]
        torch.testing.assert_close(found, value, rtol=1e-5, atol=1e-6)


def relinked(copied: Learner, options: Any) -> Learner:
    """A copy whose guide looks at the copied student."""
    if isinstance(options, GuideOptions):
        guide = make_guide(options, copied.extractor.model)
        copied.term("guide").guide = guide  # type: ignore[assignment]
        copied._unregistered = (copied._unregistered[0], guide, *copied._unregistered[2:])
    return copied


def test_relations_are_of_the_pairs_of_a_pass() -> None:
    whole, made = batch(), learner("relation", RelationOptions())
    found = gradient(made, whole, ranks(), 4)[-1]
    student, teacher = made.extractor.model, made._unregistered[0]
    assert isinstance(teacher, LiveTeacher)
    each = []
    for part in parts(whole, ranks(), 4):
        with torch.no_grad():
            pooled = student.forward_features(part.batch.images).mean((2, 3))  # type: ignore[operator]
        each.append(dk.class_relation_loss(pooled, teacher(part.batch, 0).pooled, part.batch.target))
    torch.testing.assert_close(found, torch.stack(each).mean())
    assert not torch.isclose(found, gradient(made, whole, ranks(), 1)[-1], rtol=1e-2)


def test_ranks_wait_for_each_other_once_a_step() -> None:
    made, meeting = learner("group_dro", GroupDroOptions()), Meeting(0, None)
    totals = made.totals(parts(batch(), meeting, 2))
    assert len(meeting.sent) == 1 and set(totals.values) == {"weight", "group_dro.counts", "group_dro.sums"}
    for part in parts(batch(), meeting, 2):
        part.totals = totals
        made(part)
    assert len(meeting.sent) == 1


def test_a_step_of_several_passes_is_not_run_without_its_totals() -> None:
    made = learner("supervised", SupervisedOptions(weighted=True))
    part = next(parts(batch(), ranks(), 2))
    part.totals = StepTotals(2)
    with pytest.raises(KeyError, match="weight"):
        made(part)


@pytest.mark.parametrize(("world_size", "passes"), [(1, 4), (2, 2), (4, 1)])
def test_a_sample_draws_the_same_however_its_step_is_split(world_size: int, passes: int) -> None:
    whole = Draws(3, 7, ranks(), CPU)
    drawn = [
        Draws(3, 7, ranks(r, world_size), CPU, passes=passes, number=p)
        for p in range(passes)
        for r in range(world_size)
    ]
    for shape in ((5,), (5, 3)):
        expected = whole.rand((shape[0] * world_size * passes, *shape[1:]))
        found = [one.rand(shape) for one in drawn]
        passed = [torch.stack(found[i : i + world_size], 1).flatten(0, 1) for i in range(0, len(found), world_size)]
        assert torch.equal(torch.cat(passed), expected)


def test_one_of_a_pictures_classes_is_drawn_alike() -> None:
    labels = batch(several=True).target
    whole = draw_target(labels, noise=Draws(0, 5, ranks(), CPU).rand((N, K)))
    found = [
        draw_target(part.batch.target, noise=part.draws.rand(tuple(part.batch.target.shape)))
        for part in parts(batch(several=True), ranks(), 4)
    ]
    assert torch.equal(torch.cat(found), whole) and len(whole.unique()) == K + 1


# -- whole runs -------------------------------------------------------------------------------------------------------


def everything(passes: int) -> dict[str, Any]:
    """Every stage and every term but relation, with crops and flips; the networks have no batch norm."""
    schedule = {"epochs": 2, "batch": 12, "learning_rate": 0.05, "optimizer": "sgd", "accumulate": passes}
    return {
        **runs.EVERYTHING,
        "teacher": {**runs.EVERYTHING["teacher"], "schedule": {**schedule, "epochs": 1}},
        "schedule": {**schedule, "clip": 5.0},
        "terms": {**runs.EVERYTHING["terms"], "relation": None, "backdoor": {"start": 1, "weighted": True}},
    }


@pytest.mark.xdist_group("processes")
def test_a_run_is_the_same_in_one_pass_in_four_and_in_two_on_two_ranks(tmp_path: Path) -> None:
    data = runs.birds(tmp_path)
    recipes = {passes: runs.write(tmp_path / f"{passes}.yaml", data, everything(passes)) for passes in (1, 2, 4)}
    runs.train(recipes[1], tmp_path / "one")
    runs.train(recipes[4], tmp_path / "four")
    assert script(recipes[2], tmp_path / "two", ranks=2) == 0
    for stage in ("teacher", "identification", "student"):
        logs, states = {}, {}
        for run in ("one", "four", "two"):
            states[run] = load_file(tmp_path / run / stage / "model.safetensors")
            with open(tmp_path / run / stage / "log.csv") as file:
                rows = [[float(cell or "nan") for cell in row] for row in list(csv.reader(file))[1:]]
            logs[run] = torch.tensor(rows, dtype=torch.float64)
        for run in ("four", "two"):
            torch.testing.assert_close(logs[run], logs["one"], rtol=1e-5, atol=1e-5, equal_nan=True)
            torch.testing.assert_close(states[run], states["one"], rtol=1e-5, atol=1e-5)
