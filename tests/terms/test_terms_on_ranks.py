"""Loss terms on two ranks: gradients are averaged afterwards, and what comes out is what one process would have."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from term_cases import SETTING, D, E, K, N, contexts, of_rank, on_two_ranks, outputs, state
from torch import Tensor

import debiaskd as dk
from debiaskd.models import SmallNet
from debiaskd.terms import (
    Backdoor,
    BackdoorOptions,
    GroupDro,
    GroupDroOptions,
    GuideOptions,
    GuideTerm,
    Kd,
    KdOptions,
    Match,
    MatchOptions,
    Relation,
    RelationOptions,
    Sample,
    SampleOptions,
    Supervised,
    SupervisedOptions,
    make_guide,
)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (Supervised, SupervisedOptions(weighted=True)),
        (Match, MatchOptions()),
        (Match, MatchOptions(weighted=False)),
        (Kd, KdOptions(weighted=True)),
        (Sample, SampleOptions(weighted=True)),
        (Relation, RelationOptions()),
        (Backdoor, BackdoorOptions(start=1, weighted=True)),
        (GroupDro, GroupDroOptions(step_size=0.5)),
    ],
)
def test_two_ranks_average_to_what_one_has(kind: Any, options: Any) -> None:
    groups = torch.tensor([0, 0, 0, 1, 1, 3, 1, 3])  # each rank lacks one that the other has, and nobody has group 2
    width = E if kind is Match else D
    whole = state(student=outputs(width), weight=torch.rand(N) + 0.1, groups=groups, epoch=1)
    leaves = [part.requires_grad_() for part in whole.student if part is not None]
    term = kind(options, SETTING)
    begun, left = copy.deepcopy(dict(term.named_buffers())), []

    def loss(ranks: Any) -> Tensor:
        for name, tensor in term.named_buffers():
            tensor.copy_(begun[name])
        found: Tensor = term(of_rank(whole, ranks))
        left.append(copy.deepcopy(dict(term.named_buffers())))
        return found

    halves = on_two_ranks(loss)
    alone = loss(whole.ranks)
    torch.testing.assert_close(torch.stack(halves).mean(), alone)
    if kind is GroupDro:
        torch.testing.assert_close(left[2:], [left[-1]] * 3)
    trained = [*leaves, *term.parameters()]
    found, expected = (
        torch.autograd.grad(total, trained, allow_unused=True, materialize_grads=True)
        for total in (torch.stack(halves).mean(), alone)
    )
    assert any(gradient.any() for gradient in expected)
    if kind is not Relation:  # through gathering, gradients of the other rank's use come back
        torch.testing.assert_close(found, expected)


def test_ranks_add_their_weights_up_once_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    step, sums = state(student=outputs(E), weight=torch.rand(N) + 0.1), []
    monkeypatch.setattr(step.ranks, "sum", lambda value: sums.append(value) or value.detach())
    for term in (Match(MatchOptions(), SETTING), Kd(KdOptions(weighted=True), SETTING)):
        term(step)
    Supervised(SupervisedOptions(weighted=True), SETTING)(step)
    assert len(sums) == 1
    Kd(KdOptions(weighted=True), SETTING)(replace(step, epoch=1))
    assert len(sums) == 2


def test_contexts_of_two_ranks_are_those_of_one() -> None:
    whole, terms = state(epoch=1), []

    def end(ranks: Any) -> Tensor:
        term = Backdoor(BackdoorOptions(start=2), SETTING)
        term(of_rank(whole, ranks))
        term.end_epoch(1, ranks)
        terms.append(term)
        return term.head.context

    for context in on_two_ranks(end):
        torch.testing.assert_close(context, contexts([whole]))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("annotated", [range(N), (0, 1, 3, 7), (3,), ()])
def test_guidance_of_two_ranks_averages_to_that_of_one(annotated: Any, reduction: Any) -> None:
    model = SmallNet((4, 6), (1, 2), K).eval()
    options = GuideOptions(reduction=reduction)
    term = GuideTerm(options, make_guide(options, model))
    known = torch.zeros(N, dtype=torch.bool).index_fill_(0, torch.tensor(list(annotated), dtype=torch.int64), True)
    whole = state(boxes=dk.Boxes.from_lists([[[0, 0, 4, 4]]] * N).annotated_where(known))

    def loss(ranks: Any) -> Tensor:
        part = of_rank(whole, ranks)
        found: Tensor = term(replace(part, seen=term.guide.watch(part.images)))
        return found

    torch.testing.assert_close(torch.stack(on_two_ranks(loss)).mean(), loss(whole.ranks))
