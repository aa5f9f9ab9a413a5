"""`fit_projector`: the minimum of the match loss over a linear projector, against float64 and against autograd."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

import debiaskd as dk


def network(width: int, stride: int = 2) -> nn.Module:
    body = nn.Sequential(nn.Conv2d(3, width, 3, stride=stride), nn.BatchNorm2d(width), nn.ReLU())
    return nn.Sequential(body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 2))


def made(stride: int = 2) -> tuple[nn.Module, dk.Transplanted]:
    torch.manual_seed(0)
    teacher = network(6, stride).eval().requires_grad_(False)
    return teacher, dk.transplant(teacher, network(4), projector="linear", layer="0", head="3")


def rows(value: torch.Tensor) -> np.ndarray:
    return value.detach().double().permute(0, 2, 3, 1).flatten(0, 2).numpy()


@pytest.mark.parametrize("weighted", [False, True])
def test_it_is_the_ridge_regression_of_the_teachers_maps(weighted: bool) -> None:
    teacher, student = made()
    images = torch.randn(20, 3, 9, 9)
    weight = torch.rand(20) if weighted else None
    wanted = teacher[0](images)
    parts = [(images[part], wanted[part], None if weight is None else weight[part])
             for part in (slice(0, 7), slice(7, 20))]  # fmt: skip
    explained = dk.fit_projector(student, parts, ridge=0.3)

    student.eval()
    x, y = rows(student.body(images)), rows(wanted)
    w = np.ones(20) if weight is None else weight.double().numpy()
    w = np.repeat(w, len(x) // 20)
    w = w / w.sum()
    centred, target = x - w @ x, y - w @ y
    covariance = (centred * w[:, None]).T @ centred
    damped = covariance + 0.3 * covariance.trace() / len(covariance) * np.eye(len(covariance))
    solution = np.linalg.solve(damped, (centred * w[:, None]).T @ target)
    np.testing.assert_allclose(student.projector.weight.detach()[:, :, 0, 0], solution.T, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(student.projector.bias.detach(), w @ y - w @ x @ solution, rtol=1e-4, atol=1e-6)
    error = (w[:, None] * (target - centred @ solution) ** 2).sum() / (w[:, None] * target**2).sum()
    assert explained == pytest.approx(1 - error, abs=1e-6)


def test_without_a_penalty_the_match_loss_has_no_gradient_there() -> None:
    teacher, student = made()
    images, weight = torch.randn(30, 3, 9, 9), torch.rand(30)
    dk.fit_projector(student, [(images, teacher[0](images), weight)], ridge=0)
    student.eval()
    loss = dk.feature_match_loss(student.forward_features(images), teacher[0](images), weight)
    loss.backward()
    assert student.body.model[0][0].weight.grad.abs().max() > 1e-3
    assert student.projector.weight.grad.abs().max() < 1e-6
    assert student.projector.bias.grad.abs().max() < 1e-6


def test_a_teacher_within_reach_is_reproduced() -> None:
    """The teacher's maps are a linear function of the student's body: explained as a whole, with equal logits."""
    teacher, student = made()
    lift = nn.Conv2d(4, 6, 1).requires_grad_(False)
    images = torch.randn(40, 3, 9, 9)
    student.eval()
    wanted = lift(student.body(images)).detach()
    assert dk.fit_projector(student, [(images, wanted)], ridge=0) == pytest.approx(1, abs=1e-6)
    torch.testing.assert_close(student(images), teacher[3](wanted.mean((2, 3))), rtol=1e-4, atol=1e-5)


def test_maps_of_other_sizes_and_vectors_are_pooled_as_match_spatial_does() -> None:
    teacher, student = made(stride=1)
    images = torch.randn(30, 3, 9, 9)
    for wanted in (teacher[0](images), teacher[0](images).mean((2, 3))):
        dk.fit_projector(student, [(images, wanted)], ridge=0)
        student.eval()
        loss = dk.feature_match_loss(*dk.match_spatial(student.forward_features(images), wanted))
        (gradient,) = torch.autograd.grad(loss, student.projector.weight)
        assert gradient.abs().max() < 1e-6


def test_modes_and_statistics_stay_and_constant_channels_do_no_harm() -> None:
    teacher, student = made()
    student.train()
    student.body.model[0][0].weight.data[1] = 0
    before = copy.deepcopy(student.body.state_dict())
    images = torch.randn(10, 3, 9, 9)
    dk.fit_projector(student, [(images, teacher[0](images))], ridge=0)
    assert student.body.training and student.projector.training and not student.head.training
    for name, value in student.body.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)
    assert student.projector.weight.isfinite().all()


def test_two_processes_that_read_a_part_each_sum_their_moments() -> None:
    teacher, student = made()
    images = torch.randn(16, 3, 9, 9)
    dk.fit_projector(student, [(images, teacher[0](images))])
    whole = student.projector.weight.detach().clone()
    sums: list[list[torch.Tensor]] = [[], []]
    for rank in (0, 1):
        part = images[rank::2]
        dk.fit_projector(student, [(part, teacher[0](part))], total=lambda v, own=sums[rank]: own.append(v) or v)
    others = iter(sums[1])
    dk.fit_projector(student, [(images[0::2], teacher[0](images[0::2]))], total=lambda v: v + next(others))
    torch.testing.assert_close(student.projector.weight.detach(), whole)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"student": nn.Linear(2, 2)}, TypeError, "student must be made by dk.transplant, got Linear"),
        ({"projector": "dense"}, TypeError, "must be of projector='linear', got Sequential"),
        ({"ridge": -1}, ValueError, "ridge must be .*, got -1"),
        ({"batches": []}, ValueError, "batches must hold at least one image, got none"),
        ({"weight": torch.zeros(4)}, ValueError, "batches must hold a positive weight, got a sum of 0.0"),
        ({"images": torch.full((4, 3, 9, 9), torch.nan)}, ValueError, "must give finite maps and weights"),
    ],
)
def test_bad_arguments(change: dict, error: type[Exception], message: str) -> None:
    teacher, student = made()
    if "projector" in change:
        student = dk.transplant(teacher, network(4), projector=change["projector"], layer="0", head="3")
    images = change.get("images", torch.randn(4, 3, 9, 9))
    before = copy.deepcopy(student.state_dict())
    batches = change.get("batches", [(images, teacher[0](images), change.get("weight"))])
    with pytest.raises(error, match=message):
        dk.fit_projector(change.get("student", student), batches, ridge=change.get("ridge", 0.1))
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())
