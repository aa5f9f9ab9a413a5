"""A student with its terms: guidance, what is trained, and what training may not do to teachers, heads and contexts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("jsonargparse")  # what reads recipes, of which the schedule is a part

import training_runs as runs
from term_cases import CPU, TARGET, K, N, ranks, state

import debiaskd as dk
from debiaskd.attribution import draw_target
from debiaskd.data import Batch
from debiaskd.models import SmallNet
from debiaskd.models.frozen_teacher import FrozenTeacher
from debiaskd.models.transplant import transplant
from debiaskd.recipe import Schedule
from debiaskd.terms import (
    Backdoor,
    BackdoorOptions,
    Draws,
    GuideOptions,
    GuideTerm,
    Kd,
    KdOptions,
    Match,
    MatchOptions,
    Sample,
    SampleOptions,
    Setting,
    Supervised,
    SupervisedOptions,
    Term,
    make_guide,
)
from debiaskd.terms.backdoor import Intervened
from debiaskd.training.feature_extraction import FeatureExtractor, find_feature_layers
from debiaskd.training.learner import Learner, Step
from debiaskd.training.schedule import Ema, optimizer, rate
from debiaskd.training.teacher_outputs import LiveTeacher

pytestmark = pytest.mark.usefixtures("one_thread")


# -- guidance ---------------------------------------------------------------------------------------------------------

BOXES = dk.Boxes.from_lists([[[0, 0, 4, 4]], None, [], [[2, 2, 8, 6], [0, 0, 2, 2]]] * 2)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("layer", ["Final", "Input"])
def test_guidance_is_the_guides_own_loss(layer: str, reduction: Any) -> None:
    model = SmallNet((4, 6), (1, 2), K).eval()
    options = GuideOptions(layer=layer, loss="energy", reduction=reduction)
    guide = make_guide(options, model)
    step = state(boxes=BOXES)
    step.seen = guide.watch(step.images)
    found = GuideTerm(options, guide)(step)
    expected = dk.Guide(model, layer, reduction=reduction)(step.images, TARGET, BOXES).loss
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(loss, model.parameters(), allow_unused=True) for loss in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


def test_guidance_without_any_annotation_is_zero() -> None:
    model = SmallNet((4, 6), (1, 2), K).eval()
    guide = make_guide(GuideOptions(), model)
    step = state()
    step.seen = guide.watch(step.images)
    assert GuideTerm(GuideOptions(), guide)(step).item() == 0


def test_guidance_draws_one_of_a_pictures_classes() -> None:
    model = SmallNet((4, 6), (1, 2), K).eval()
    target = torch.tensor([[1, 1, 0], [0, 1, 1], [0, 0, 0], [1, 1, 1]] * 2).float()
    guide, step = make_guide(GuideOptions(), model), state(boxes=BOXES, target=target)
    step.seen = guide.watch(step.images)
    found = GuideTerm(GuideOptions(), guide)(step)
    drawn = draw_target(target, noise=Draws(0, 0, ranks(), CPU).rand((N, K)))
    assert drawn[2] == drawn[6] == -1 and len(drawn.unique()) > 2
    # Images 2 and 6 are annotated, and show nothing: they do not count in the mean either.
    torch.testing.assert_close(found, dk.Guide(model)(step.images, drawn, BOXES).loss)


# -- a learner: what is trained, and what is not ----------------------------------------------------------------------


def batch() -> Batch:
    return Batch(torch.randn(N, 3, 16, 16), TARGET % 2, dk.Boxes.from_lists([[[0, 0, 8, 8]]] * N))


def step(epoch: int) -> Step:
    return Step(replace(batch(), index=torch.arange(N)), epoch, Draws(0, 0, ranks(), CPU), ranks())


def dett() -> tuple[Learner, FrozenTeacher, Any]:
    """A transplanted student with every kind of parameter, its teacher, and the teacher's own model."""
    source = SmallNet((4, 8), (2, 2), 2)
    example = torch.randn(2, 3, 16, 16)
    teacher = FrozenTeacher(source, example=example)
    student = transplant(teacher, SmallNet((4, 6), (2, 2), 2), example=example)
    at = find_feature_layers(student, example)
    setting = Setting(2, False, 0, at.pooled_width, 8)
    terms: dict[str, Term] = {
        "match": Match(MatchOptions(), setting),
        "kd": Kd(KdOptions(weight=0.5), setting),
        "sample": Sample(SampleOptions(weight=0.1), setting),
        "backdoor": Backdoor(BackdoorOptions(start=1), setting),
    }
    extractor = FeatureExtractor(student, at, {"feature", "pooled"})
    return Learner(extractor, terms, teacher=LiveTeacher(teacher), weight=torch.rand(N) + 0.1), teacher, source


def trained(learner: Learner, schedule: Schedule, epochs: int = 3) -> None:
    stepper = optimizer(schedule, learner)
    for epoch in range(epochs):
        learner.train()
        for _ in range(2):
            total, _ = learner(step(epoch))
            total.backward()
            stepper.step()
            stepper.zero_grad()
        learner.end_epoch(epoch, ranks())


def test_a_learners_loss_is_the_sum_of_its_terms() -> None:
    learner, teacher, _ = dett()
    learner.eval()
    shown = replace(batch(), index=torch.arange(N).flip(0))
    total, losses = learner(Step(shown, 0, Draws(0, 0, ranks(), CPU), ranks()))
    assert list(losses) == ["match", "kd", "sample"]  # contexts are being built, which is no loss
    torch.testing.assert_close(total, losses["match"] + 0.5 * losses["kd"] + 0.1 * losses["sample"])
    student: Any = learner.extractor.model
    weight = learner._unregistered[3]
    assert weight is not None
    feature, logits = student.forward_features(shown.images), student(shown.images)
    each = (feature - teacher.forward_features(shown.images)).square().mean((1, 2, 3))
    weight = weight.flip(0)  # by the images' numbers
    torch.testing.assert_close(losses["match"], ((weight * each).sum() / weight.sum()).detach())
    expected = dk.kd_loss(logits, teacher.get_classifier()(teacher(shown.images)[0].mean((2, 3))))
    torch.testing.assert_close(losses["kd"], expected.detach())


def test_every_parameter_gets_a_gradient_in_every_epoch() -> None:
    learner, _, _ = dett()
    for epoch in (0, 1):
        total, _ = learner(step(epoch))
        total.backward()
        assert [name for name, p in learner.named_parameters() if p.requires_grad and p.grad is None] == []
        learner.end_epoch(epoch, ranks())


def test_the_teacher_is_asked_in_epochs_that_need_it_alone() -> None:
    _, teacher, _ = dett()
    asked: list[int] = []

    class Counted(LiveTeacher):
        def __call__(self, batch: Batch, epoch: int, numbers: Any = None) -> Any:
            asked.append(epoch)
            return super().__call__(batch, epoch, numbers)

    setting = Setting(2, False, 0, 6, 8)
    terms: dict[str, Term] = {
        "supervised": Supervised(SupervisedOptions(), setting),
        "kd": Kd(KdOptions(start=2), setting),
    }
    alone = Learner(FeatureExtractor(SmallNet((4, 6), (2, 2), 2), None, ()), terms, teacher=Counted(teacher))
    for epoch in range(4):
        alone(step(epoch))
    assert asked == [2, 3]


def test_what_each_rank_has_summed_up_is_its_own_again() -> None:
    learner, _, _ = dett()
    for epoch in (0, 1):
        learner(step(epoch))
    own = learner.own_state()
    assert set(own) == {"backdoor.sums", "backdoor.masses"} and all(tensor.any() for tensor in own.values())
    saved = {name: torch.stack([tensor + 1, tensor + 2]) for name, tensor in own.items()}
    for rank in (1, 0):
        learner.load_own_state(saved, rank)
        torch.testing.assert_close(learner.own_state(), {name: tensor[rank] for name, tensor in saved.items()})
    learner.load_own_state(saved, None)  # another number of ranks: all of it counts, and once
    torch.testing.assert_close(learner.own_state(), {name: tensor.sum(0) for name, tensor in saved.items()})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("debiaskd.training.learner.Ranks", lambda: ranks(1, 3))
        learner.load_own_state(saved, None)
    assert not any(tensor.any() for tensor in learner.own_state().values())


def test_the_teacher_does_not_move_nor_does_its_transplanted_head() -> None:
    learner, _, source = dett()
    student: Any = learner.extractor.model
    before = {k: v.clone() for k, v in source.state_dict().items()}
    head = {k: v.clone() for k, v in student.head.state_dict().items()}
    trained(learner, Schedule(learning_rate=0.1, weight_decay=0.1, optimizer="adamw"))
    for name, tensor in source.state_dict().items():  # batch norm's statistics among them
        assert torch.equal(tensor, before[name]), name
    for name, tensor in student.head.state_dict().items():
        assert torch.equal(tensor, head[name]), name
    assert torch.equal(student.get_classifier().weight, source.fc.weight)
    assert not any("teacher" in name for name in learner.state_dict())


def test_the_optimiser_has_the_projector_and_decays_kernels_alone() -> None:
    learner, _, _ = dett()
    stepper = optimizer(Schedule(weight_decay=0.1), learner)
    names = {id(p): name for name, p in learner.named_parameters()}
    decay = {names[id(p)]: group["weight_decay"] for group in stepper.param_groups for p in group["params"]}
    projector = [name for name in names.values() if ".projector." in name]
    assert projector and set(projector) <= set(decay)
    assert not any(".head." in name and "backdoor" not in name for name in decay)
    assert decay["terms.sample.regressor.weight"] == decay["terms.sample.regressor.bias"] == 0
    assert decay["terms.backdoor.head.fc.weight"] == 0.1
    for name, parameter in learner.named_parameters():
        if "regressor" not in name and parameter.requires_grad:
            assert decay[name] == (0.1 if parameter.dim() > 1 else 0), name
    assert {0.0, 0.1} == set(decay.values())


@pytest.mark.parametrize(
    ("name", "kind", "options"),
    [
        ("sgd", torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
        ("adam", torch.optim.Adam, {"betas": (0.9, 0.999)}),
        ("adamw", torch.optim.AdamW, {"betas": (0.9, 0.999)}),
    ],
)
def test_optimisers_are_the_ones_named(name: Any, kind: type, options: dict[str, Any]) -> None:
    found = optimizer(Schedule(optimizer=name, learning_rate=0.25), dett()[0])
    assert type(found) is kind and all(group["lr"] == 0.25 for group in found.param_groups)
    assert {key: found.defaults[key] for key in options} == options


def test_an_average_of_weights_leaves_contexts_alone() -> None:
    learner, _, _ = dett()
    ema = Ema(learner, 0.75)
    statistics = dict(learner.extractor.named_buffers())["model.body.model.body.bn1.running_mean"]
    begun = statistics.clone()
    kernel = learner.terms["sample"].regressor.weight  # type: ignore[union-attr]
    start = kernel.detach().clone()  # type: ignore[union-attr, operator]
    trained(learner, Schedule(learning_rate=0.1))
    moved = statistics.clone()
    context, now = learner.terms["backdoor"].head.context.clone(), kernel.detach().clone()  # type: ignore[union-attr, operator]
    ema.update(learner, 1)
    ema.swap(learner)
    torch.testing.assert_close(kernel.detach(), 0.75 * start + 0.25 * now)  # type: ignore[union-attr, operator]
    torch.testing.assert_close(
        statistics, 0.75 * begun + 0.25 * moved
    )  # or batch norm would fit weights of another time
    assert not torch.equal(begun, moved)
    assert context.any() and torch.equal(learner.terms["backdoor"].head.context, context)  # type: ignore[union-attr]
    assert isinstance(learner.deployed(), Intervened)
    ema.swap(learner)
    assert torch.equal(kernel.detach(), now)  # type: ignore[union-attr, operator]


def test_an_average_warms_up_as_timms() -> None:
    timm_utils = pytest.importorskip("timm.utils")
    learner, _, _ = dett()
    kernel: Any = learner.terms["sample"].regressor.weight  # type: ignore[union-attr]
    reference = timm_utils.ModelEmaV3(learner.terms["sample"], decay=0.8, use_warmup=True)
    ema, constant = Ema(learner, 0.8, warmup=True), Ema(learner, 0.8)
    begun, values = kernel.detach().clone(), []
    for number in range(1, 25):
        with torch.no_grad():
            kernel.normal_()
        values.append(kernel.detach().clone())
        for average in (ema, constant):
            average.update(learner, number)
        reference.update(learner.terms["sample"], step=number)
        torch.testing.assert_close(ema.tensors["terms.sample.regressor.weight"], reference.module.regressor.weight)
        if number == 1:  # nothing is left of the initial weights
            assert torch.equal(ema.tensors["terms.sample.regressor.weight"], kernel)
    plain = 0.8**24 * begun + 0.2 * sum(0.8 ** (23 - i) * value for i, value in enumerate(values))
    torch.testing.assert_close(constant.tensors["terms.sample.regressor.weight"], plain)
    assert round(1 - 3700 ** (-2 / 3), 4) == 0.9958 and round(0.9999**3700, 2) == 0.69  # docs/training.md


# -- rates ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        (Schedule(epochs=4), [1, 1, 1, 1]),
        (Schedule(epochs=4, warmup=2), [0.25, 0.75, 1, 1]),
        (Schedule(epochs=4, shape="cosine"), [1, 0.853553, 0.5, 0.146447]),
        (Schedule(epochs=4, shape="cosine", warmup=2), [0.25, 0.75, 1, 0.5]),
        (Schedule(epochs=4, shape="steps", milestones=[1, 3]), [1, 0.1, 0.1, 0.01]),
    ],
)
def test_rates_of_a_schedule(schedule: Schedule, rates: list[float]) -> None:
    schedule.learning_rate = 2.0
    found = [rate(schedule, 2 * epoch, 2) for epoch in range(4)]  # two steps an epoch
    assert found == pytest.approx([2 * share for share in rates], rel=1e-5)


def test_a_plain_network_is_watched_at_the_right_places() -> None:
    model = runs.Plain(2, 6)
    images = torch.randn(2, 3, 16, 16)
    at = find_feature_layers(model, images)
    found, _ = FeatureExtractor(model, at, {"feature", "pooled"})(images)
    assert (at.classifier, at.width, at.pooled_width) == ("fc", 6, 6)
    assert found.feature is not None and found.pooled is not None
    assert torch.equal(found.feature, model.forward_features(images))
    assert torch.equal(found.pooled, found.feature.mean((2, 3))) and torch.equal(found.logits, model(images))
