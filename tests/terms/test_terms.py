"""Loss terms against the plain formulas of the papers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from term_cases import CPU, SETTING, TARGET, D, E, K, N, contexts, outputs, ranks, state
from torch import nn
from torch.nn import functional as F

import debiaskd as dk
from debiaskd.models import SmallNet
from debiaskd.terms import (
    TERMS,
    Backdoor,
    BackdoorOptions,
    Draws,
    GroupDro,
    GroupDroOptions,
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
    Term,
    TermOptions,
)
from debiaskd.terms.backdoor import Intervened

pytestmark = pytest.mark.usefixtures("one_thread")


# -- when a term counts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "factors"),
    [
        (TermOptions(weight=2.0), [2, 2, 2, 2, 2]),
        (TermOptions(weight=2.0, start=2), [0, 0, 2, 2, 2]),
        (TermOptions(weight=3.0, start=1, ramp=2), [0, 1, 2, 3, 3]),
        (TermOptions(weight=4.0, ramp=1), [2, 4, 4, 4, 4]),
    ],
)
def test_weight_start_and_ramp(options: TermOptions, factors: list[float]) -> None:
    assert [options.factor(epoch) for epoch in range(5)] == pytest.approx(factors)
    assert [Term(options).active(epoch) for epoch in range(5)] == [factor > 0 for factor in factors]


def test_labels_of_mixed_images_count_by_their_shares() -> None:
    """The cross-entropy of soft targets, with and without smoothing."""
    torch.manual_seed(0)
    partner, share = torch.arange(N).roll(1), torch.rand(N)
    made = state(partner=partner, share=share)
    one_hot = F.one_hot(TARGET, K).float()
    soft = share[:, None] * one_hot + (1 - share[:, None]) * one_hot[partner]
    for smoothing in (0.0, 0.1):
        term = Supervised(SupervisedOptions(label_smoothing=smoothing), SETTING)
        expected = F.cross_entropy(made.student.logits, soft, label_smoothing=smoothing)
        torch.testing.assert_close(term(made), expected)
        plain = term(replace(made, partner=None, share=None))
        torch.testing.assert_close(plain, F.cross_entropy(made.student.logits, TARGET, label_smoothing=smoothing))


@pytest.mark.parametrize("name", [name for name, kind in TERMS.items() if kind.mixes and name != "supervised"])
def test_other_terms_that_follow_mixed_images_read_no_labels(name: str) -> None:
    torch.manual_seed(0)
    kind = {"kd": (Kd, KdOptions), "match": (Match, MatchOptions), "sample": (Sample, SampleOptions)}[name]
    term = kind[0](kind[1](), SETTING)
    made = state(student=outputs(D if name != "match" else E), teacher=outputs(E))
    assert torch.equal(term(made), term(replace(made, target=(TARGET + 1) % K)))


def test_two_ranks_draw_together_what_one_does() -> None:
    whole = Draws(3, 7, ranks(), CPU)
    halves = [Draws(3, 7, ranks(rank, 2), CPU) for rank in (0, 1)]
    for shape in ((5,), (5, 3)):
        expected = whole.rand((2 * shape[0], *shape[1:]))
        found = torch.stack([half.rand(shape) for half in halves], 1).flatten(0, 1)
        assert torch.equal(found, expected)
    again = Draws(3, 7, ranks(), CPU).rand((10,))
    assert torch.equal(again, Draws(3, 7, ranks(), CPU).rand((10,)))
    others = [Draws(3, 8, ranks(), CPU), Draws(4, 7, ranks(), CPU), Draws(7, 3, ranks(), CPU)]
    assert not any(torch.equal(again, other.rand((10,))) for other in others)


# -- labels -----------------------------------------------------------------------------------------------------------


def test_supervised_is_cross_entropy_and_weighted_a_weighted_mean() -> None:
    step = state(weight=torch.rand(N) + 0.1)
    each = -step.student.logits.log_softmax(1)[torch.arange(N), TARGET]
    plain, weighted = (Supervised(SupervisedOptions(weighted=w), SETTING)(step) for w in (False, True))
    torch.testing.assert_close(plain, each.mean())
    assert step.weight is not None
    torch.testing.assert_close(weighted, (step.weight * each).sum() / step.weight.sum())
    smooth = Supervised(SupervisedOptions(label_smoothing=0.3), SETTING)(step)
    spread = -step.student.logits.log_softmax(1).mean(1)
    torch.testing.assert_close(smooth, (0.7 * each + 0.3 * spread).mean())


def test_supervised_of_several_classes_is_the_mean_of_binary_cross_entropies() -> None:
    target = torch.randint(0, 2, (N, K)).float()
    step = state(target=target, weight=torch.rand(N) + 0.1)
    p = step.student.logits.double().sigmoid()
    each = -(target * p.log() + (1 - target) * (1 - p).log()).mean(1)
    assert step.weight is not None
    for weighted, weight in ((False, torch.ones(N)), (True, step.weight)):
        found = Supervised(SupervisedOptions(weighted=weighted), SETTING)(step)
        torch.testing.assert_close(found, ((weight * each).sum() / weight.sum()).float())


def test_group_dro_against_a_loop() -> None:
    term, q, eta = GroupDro(GroupDroOptions(step_size=0.5), SETTING), [0.25] * 4, 0.5
    for step in range(3):
        groups = torch.tensor([[0, 0, 1, 1, 3, 3, 3, 0], [2] * N, [0, 1, 2, 3] * 2][step])
        now = state(groups=groups)
        logits = now.student.logits.requires_grad_()
        losses = []
        for g in range(4):
            rows = [-float(logits[i].detach().log_softmax(0)[TARGET[i]]) for i in range(N) if groups[i] == g]
            losses.append(sum(rows) / len(rows) if rows else 0.0)
        grown = [one * float(torch.tensor(eta * loss).exp()) for one, loss in zip(q, losses)]
        q = [one / sum(grown) for one in grown]
        found = term(now)
        assert term.q.tolist() == pytest.approx(q, rel=1e-5)
        assert found.item() == pytest.approx(sum(a * b for a, b in zip(q, losses)), rel=1e-5)
        (gradient,) = torch.autograd.grad(found, logits)  # q is a constant
        share = torch.tensor([q[int(g)] / int((groups == g).sum()) for g in groups])
        expected = share[:, None] * (logits.softmax(1) - F.one_hot(TARGET, K))
        torch.testing.assert_close(gradient, expected.detach(), rtol=1e-4, atol=1e-6)


# -- teachers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_match_weighted_is_dett_and_unweighted_simkd(dtype: torch.dtype) -> None:
    step = state(student=outputs(E, dtype, side=2), teacher=outputs(E, dtype, side=4), weight=torch.rand(N) + 0.1)
    assert step.student.feature is not None and step.teacher is not None and step.weight is not None
    pooled = F.adaptive_avg_pool2d(step.teacher.feature, 2)
    each = (step.student.feature - pooled).square().mean((1, 2, 3))
    dett, simkd = (Match(MatchOptions(weighted=w), SETTING)(step) for w in (True, False))
    weight = step.weight.to(dtype)
    torch.testing.assert_close(dett, (weight * each).sum() / weight.sum())
    torch.testing.assert_close(simkd, each.mean())
    torch.testing.assert_close(Match(MatchOptions(), SETTING)(replace(step, weight=None)), each.mean())


def test_kd_is_the_softened_divergence() -> None:
    step = state()
    assert step.teacher is not None
    q, p = ((logits / 2).log_softmax(1) for logits in (step.student.logits, step.teacher.logits))
    found = Kd(KdOptions(temperature=2.0), SETTING)(step)
    torch.testing.assert_close(found, 4 * (p.exp() * (p - q)).sum(1).mean())


def test_sample_regresses_and_divides_by_the_teachers_norm() -> None:
    step, term = state(), Sample(SampleOptions(), SETTING)
    assert step.student.pooled is not None and step.teacher is not None and step.teacher.pooled is not None
    t = step.teacher.pooled
    projected = step.student.pooled @ term.regressor.weight.T + term.regressor.bias
    expected = ((projected - t).square().sum(1) / t.square().sum(1)).mean()
    torch.testing.assert_close(term(step), expected)
    term(step).backward()
    assert term.regressor.weight.grad is not None and bool(term.regressor.weight.grad.any())


def test_distillation_by_weight_is_the_weighted_mean_of_each_samples_loss() -> None:
    step = state(weight=torch.rand(N) + 0.1)
    assert step.weight is not None and step.teacher is not None
    share = step.weight / step.weight.sum()
    q, p = ((logits / 4).log_softmax(1) for logits in (step.student.logits, step.teacher.logits))
    found = Kd(KdOptions(weighted=True), SETTING)(step)
    torch.testing.assert_close(found, (share * 16 * (p.exp() * (p - q)).sum(1)).sum())

    sample = Sample(SampleOptions(weighted=True), SETTING)
    assert step.student.pooled is not None and step.teacher.pooled is not None
    t = step.teacher.pooled
    each = (sample.regressor(step.student.pooled) - t).square().sum(1) / t.square().sum(1)
    torch.testing.assert_close(sample(step), (share * each).sum())
    assert not torch.isclose(sample(step), each.mean())
    unweighted = replace(step, weight=None)
    torch.testing.assert_close(sample(unweighted), each.mean())
    torch.testing.assert_close(Kd(KdOptions(weighted=True), SETTING)(unweighted), Kd(KdOptions(), SETTING)(step))


def test_backdoors_cross_entropy_can_be_weighted_and_its_contexts_are_not() -> None:
    step = state(weight=torch.rand(N) + 0.1, epoch=1)
    assert step.weight is not None and step.student.pooled is not None
    weighted, plain = (Backdoor(BackdoorOptions(start=1, weighted=w), SETTING) for w in (True, False))
    plain.load_state_dict(weighted.state_dict())
    found, _ = weighted(step), plain(step)
    each = F.cross_entropy(weighted.head(step.student.pooled, step.student.logits), TARGET, reduction="none")
    torch.testing.assert_close(found, (step.weight * each).sum() / step.weight.sum())
    assert torch.equal(weighted.sums, plain.sums) and torch.equal(weighted.masses, plain.masses)


def test_relation_compares_cosines_within_classes() -> None:
    step = state()
    assert step.student.pooled is not None and step.teacher is not None and step.teacher.pooled is not None
    found = Relation(RelationOptions(), SETTING)(step)
    losses = []
    for k in range(K):
        rows = k == TARGET
        if int(rows.sum()) >= 2:  # of class 2 there is one sample alone
            s, t = (F.normalize(x[rows], dim=1) for x in (step.student.pooled, step.teacher.pooled))
            losses.append((t @ t.T - s @ s.T).square().sum() / int(rows.sum()) ** 2)
    assert len(losses) == 2
    torch.testing.assert_close(found, torch.stack(losses).mean())


# -- contexts ---------------------------------------------------------------------------------------------------------


def test_contexts_are_built_in_the_epoch_before_and_anew_in_every_one() -> None:
    term = Backdoor(BackdoorOptions(start=2, mix=0.25), SETTING)
    student = nn.Identity()
    assert [term.active(epoch) for epoch in range(4)] == [False, True, True, True]
    term.end_epoch(0, ranks())
    assert not term.built and term.deployed(student) is student
    first = [state(epoch=1), state(epoch=1)]
    for step in first:
        found = term(step)
        assert float(found) == 0 and not found.requires_grad
    assert not bool(term.head.context.any())  # before the epoch is over
    term.end_epoch(1, ranks())
    expected = contexts(first)
    torch.testing.assert_close(term.head.context, expected)
    assert isinstance(term.deployed(student), Intervened)

    seldom = torch.tensor([0, 1] * (N // 2))  # class 2 does not occur
    second = [state(epoch=2, target=seldom)]
    loss = term(second[0])
    assert second[0].student.pooled is not None
    adjusted = term.head(second[0].student.pooled, second[0].student.logits)
    torch.testing.assert_close(loss, F.cross_entropy(adjusted, seldom))
    torch.testing.assert_close(term.head.context, expected)  # in this epoch still that of the one before
    term.end_epoch(2, ranks())
    new = contexts(second)
    torch.testing.assert_close(term.head.context[:2], (0.25 * expected + 0.75 * new)[:2])
    assert torch.equal(term.head.context[2], expected[2])
    assert not term.sums.any() and not term.masses.any()


@pytest.mark.parametrize("mode", ["nwgm", "exact"])
def test_the_adjusted_logits_and_their_gradient(mode: Any) -> None:
    term = Backdoor(BackdoorOptions(start=1, mode=mode, temperature=2.0), SETTING)
    term(state())
    term.end_epoch(0, ranks())
    step = state(epoch=1)
    s, logits = step.student.pooled, step.student.logits
    assert s is not None
    s.requires_grad_()
    logits.requires_grad_()
    p, context = (logits / 2).softmax(1).detach(), term.head.context
    weight, bias = term.head.fc.weight, term.head.fc.bias
    if mode == "nwgm":
        expected = torch.cat([s, p @ context], 1) @ weight.T + bias
    else:
        each = (s @ weight[:, :D].T)[:, None] + context @ weight[:, D:].T + bias
        expected = (p[:, :, None] * each.softmax(2)).sum(1).log()
    torch.testing.assert_close(term.head(s, logits), expected, rtol=1e-4, atol=1e-5)
    term(step).backward()
    assert s.grad is not None and logits.grad is None  # the strata's probabilities are constants
    assert weight.grad is not None and not context.requires_grad


def test_the_deployed_student_gives_the_adjusted_logits() -> None:
    student = SmallNet((4, D), (2, 2), K).eval()
    term = Backdoor(BackdoorOptions(start=1), SETTING)
    step = state()
    assert step.student.pooled is not None
    term(step)
    term.end_epoch(0, ranks())
    deployed = term.deployed(student)
    images = torch.randn(5, 3, 8, 8)
    pooled = student.forward_head(student.forward_features(images), pre_logits=True)
    expected = dk.backdoor_logits(
        pooled, student(images), term.head.context, term.head.fc.weight, term.head.fc.bias, temperature=4.0
    )
    torch.testing.assert_close(deployed(images), expected)
    assert not torch.allclose(deployed(images), student(images))
    assert "intervention.context" in deployed.state_dict()
