"""`map_cosine_loss`: its value and its gradient, on every backend. For autograd's sake: test_autograd.py."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch
from cases import (
    DTYPES,
    LAYOUTS,
    REDUCTIONS,
    assert_accurate,
    covering,
    every_way,
    interpolation,
    lay_out,
    normal,
    poisoned_memory,
    threads,
    uniform,
)

import debiaskd as dk

pytestmark = pytest.mark.usefixtures("one_thread")
SAME, SMALL, LARGE, MIXED = ((6, 9), (6, 9)), ((3, 4), (11, 37)), ((11, 37), (3, 4)), ((3, 21), (8, 10))


def loss_and_gradient(student, teacher, weight=None, upstream=None, **options):
    student = student.detach().requires_grad_()
    loss = dk.map_cosine_loss(student, teacher, weight, **options)
    upstream = torch.ones_like(loss) if upstream is None else torch.as_tensor(upstream).to(loss)
    (gradient,) = torch.autograd.grad(loss, student, upstream)
    assert gradient.shape == student.shape
    assert gradient.dtype == student.dtype
    return loss.detach(), gradient


def oracle(student, teacher, weight=None, reduction="mean", upstream=1.0):
    """Loss and gradient in NumPy: each map as one vector, interpolated by two matrices, and the cosine by hand."""
    student, teacher = (x.detach().cpu().double().numpy() for x in (student, teacher))
    weights = np.ones(len(student)) if weight is None else weight.cpu().double().numpy()
    upstream = np.broadcast_to(np.asarray(upstream, dtype=np.float64), len(student))
    share = 1.0
    if reduction == "mean":
        share = 1 / weights.sum() if weights.sum() > 0 else 0.0
    height, width = (max(student.shape[axis], teacher.shape[axis]) for axis in (-2, -1))
    to = [
        [interpolation(maps.shape[axis], size).numpy() for axis, size in ((-2, height), (-1, width))]
        for maps in (student, teacher)
    ]
    losses, gradient = np.zeros(len(student)), np.zeros_like(student)
    for i in range(len(student)):
        s, t = (tall @ maps[i] @ wide.T for maps, (tall, wide) in zip((student, teacher), to))
        own, other = np.sqrt((s**2).sum()), np.sqrt((t**2).sum())
        if own == 0 or other == 0:
            losses[i] = share * weights[i]
            continue
        cosine = (s * t).sum() / (own * other)
        losses[i] = share * weights[i] * (1 - cosine)
        change = -(t / (own * other) - cosine * s / own**2)
        gradient[i] = upstream[i] * share * weights[i] * (to[0][0].T @ change @ to[0][1])
    loss = losses if reduction == "none" else losses.sum()
    return torch.as_tensor(loss), torch.as_tensor(gradient)


def check(way, student, teacher, weight=None, upstream=1.0, **options):
    """This way against the oracle, judged by what plain PyTorch manages."""
    placed = [None if x is None else way.put(x) for x in (student, teacher, weight)]
    with way.active():
        actual = loss_and_gradient(*placed, upstream, **options)
    with dk.backend("eager"):
        eager = loss_and_gradient(student, teacher, weight, upstream, **options)
    exact = oracle(student, teacher, weight, upstream=upstream, **options)
    for what, found, wanted, plain in zip(("loss", "gradient"), actual, exact, eager):
        assert_accurate(found.cpu(), wanted, plain, what, terms=1.0 if what == "loss" else 0.0)


@every_way("map_cosine")
@covering(
    sizes=(SAME, SMALL, LARGE, MIXED, ((6, 9), (6, 30)), ((1, 5), (7, 5)), ((40, 33), (80, 66)), ((80, 66), (40, 33))),
    dtype=DTYPES,
    reduction=REDUCTIONS,
    channels=(None, 3),
    weighted=(False, True),
    scale=(1.0, -0.3),
)
def test_loss_and_gradient_agree_with_the_oracle(way, sizes, dtype, reduction, channels, weighted, scale):
    lead = (3,) if channels is None else (3, channels)
    student, teacher = (normal(*lead, *size, seed=i, dtype=dtype) for i, size in enumerate(sizes))
    upstream = (scale * normal(3, seed=9).double()).numpy() if reduction == "none" else scale
    weight = torch.tensor([0.5, 0.0, 3.0]) if weighted else None
    check(way, student, teacher, weight, upstream, reduction=reduction)


@every_way("map_cosine")
@pytest.mark.parametrize(
    ("sizes", "layouts"),
    [
        ((SAME, SMALL, LARGE)[(i + j) % 3], (layout, other))
        for i, layout in enumerate(LAYOUTS)
        for j, other in enumerate(("contiguous", "stepped"))
    ],
    ids=str,
)
def test_maps_in_any_layout_agree_with_the_oracle(way, sizes, layouts):
    student, teacher = (
        lay_out(normal(3, 2, *size, seed=i), layout) for i, (size, layout) in enumerate(zip(sizes, layouts))
    )
    check(way, student, teacher)


#: Cosines of a 1×2 map with a 2×2 one and a 1×4 one, worked out by hand.
BY_HAND = [
    # (1, 2) over two equal rows meets [[1, 0], [0, 2]]: 5 / (sqrt(10) sqrt(5)).
    ([[1.0, 2.0]], [[1.0, 0.0], [0.0, 2.0]], 5 / math.sqrt(50)),
    # (0, 4) becomes (0, 1, 3, 4): with (1, 0, 0, 1) that is 4 / (sqrt(26) sqrt(2)).
    ([[0.0, 4.0]], [[1.0, 0.0, 0.0, 1.0]], 4 / math.sqrt(52)),
    # A larger student: the teacher is interpolated.
    ([[1.0, 0.0, 0.0, 1.0]], [[0.0, 4.0]], 4 / math.sqrt(52)),
]


@every_way("map_cosine")
@pytest.mark.parametrize(("student", "teacher", "cosine"), BY_HAND)
def test_cosines_worked_out_by_hand(way, student, teacher, cosine):
    with way.active():
        loss = dk.map_cosine_loss(way.put(torch.tensor([student])), way.put(torch.tensor([teacher])))
    assert loss.item() == pytest.approx(1 - cosine, abs=1e-6)


@every_way("map_cosine")
@pytest.mark.parametrize("sizes", (SAME, SMALL, LARGE), ids=str)
@pytest.mark.parametrize("value", (0.0, 1e-30))
def test_a_map_of_zeros_has_cosine_0_and_gradient_0(way, sizes, value):
    student, teacher = (normal(4, *size, seed=i) for i, size in enumerate(sizes))
    student[1], teacher[2] = value, value
    student[3] = teacher[3] = value
    with way.active():
        loss, gradient = loss_and_gradient(way.put(student), way.put(teacher), reduction="none")
    assert loss[1:].tolist() == [1.0, 1.0, 1.0]
    assert not gradient[1:].any()
    assert gradient[0].any()


@every_way("map_cosine")
@pytest.mark.parametrize(
    ("sizes", "value", "where"),
    [
        (SAME, math.nan, 0),
        (SAME, math.inf, 1),
        (SMALL, math.inf, 0),
        (SMALL, math.nan, 1),
        (LARGE, math.nan, 0),
        (LARGE, math.inf, 1),
    ],
    ids=str,
)
def test_a_broken_map_shows_in_the_loss(way, sizes, value, where):
    maps = [normal(3, *size, seed=i) for i, size in enumerate(sizes)]
    maps[where][1, 2, 3] = value
    maps[1 - where][2] = 0
    maps[where][2, 2, 3] = math.nan
    with way.active():
        loss = dk.map_cosine_loss(*map(way.put, maps), reduction="none")
    assert loss.isfinite().tolist() == [True, False, False]


@every_way("map_cosine")
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_nothing_is_zero_with_a_zero_gradient_and_no_weight_is_zero(way, reduction):
    for student, teacher in (((0, 3, 4), (0, 5, 6)), ((0, 0, 4), (0, 5, 0)), ((0, 6, 3, 4), (0, 6, 3, 4))):
        with way.active():
            loss, _ = loss_and_gradient(
                way.put(torch.zeros(student)), way.put(torch.zeros(teacher)), reduction=reduction
            )
        assert loss.tolist() == ([] if reduction == "none" else 0.0)
    maps, weight = (normal(3, 4, 5), normal(3, 4, 5, seed=1)), torch.zeros(3)
    with way.active():
        loss, gradient = loss_and_gradient(*map(way.put, (*maps, weight)), reduction=reduction)
    assert not loss.any()
    assert not gradient.any()


@every_way("map_cosine")
@covering(sizes=(SAME, SMALL, LARGE, MIXED), dtype=DTYPES, reduction=REDUCTIONS)
def test_every_element_is_written(way, sizes, dtype, reduction):
    student, teacher = (way.put(normal(3, *size, seed=i, dtype=dtype)) for i, size in enumerate(sizes))
    with way.active(), poisoned_memory():
        loss, gradient = loss_and_gradient(student, teacher, reduction=reduction)
        graph = student.detach().requires_grad_()
        total = dk.map_cosine_loss(graph, teacher, reduction=reduction).sum()
        first, second = (torch.autograd.grad(total, graph, retain_graph=True)[0] for _ in range(2))
    for written in (loss, gradient, first, second):
        assert written.isfinite().all()


@every_way("map_cosine")
@pytest.mark.parametrize("sizes", (((70, 90), (70, 90)), ((7, 9), (70, 90)), ((70, 90), (7, 9))), ids=str)
def test_same_inputs_give_the_same_bits_with_one_thread_and_with_two(way, sizes):
    student, teacher = (way.put(normal(7, *size, seed=i)) for i, size in enumerate(sizes))
    results = []
    for count in (1, 2, 2):
        with way.active(), threads(count):
            results.append(loss_and_gradient(student, teacher))
    for loss, gradient in results[1:]:
        assert torch.equal(loss, results[0][0])
        assert torch.equal(gradient, results[0][1])


@every_way("map_cosine")
@covering(sizes=(SAME, SMALL, LARGE, MIXED), reduction=REDUCTIONS)
def test_gradcheck(way, sizes, reduction):
    student, teacher = (way.put(normal(3, *size, seed=i, dtype=torch.float64)) for i, size in enumerate(sizes))
    weight = way.put(torch.tensor([0.5, 0.0, 3.0], dtype=torch.float64))
    with way.active():
        assert torch.autograd.gradcheck(
            lambda s: dk.map_cosine_loss(s, teacher, weight, reduction=reduction),
            (student.requires_grad_(),),
            fast_mode=way.name == "triton",  # interpreted, whose every call takes milliseconds
        )


@every_way("map_cosine")
@pytest.mark.parametrize("sizes", (SAME, SMALL), ids=str)
def test_float16_gradients_below_its_range_survive_a_loss_scaler(way, sizes):
    student, teacher = (300 * normal(64, *size, seed=i) for i, size in enumerate(sizes))
    check(way, student.half(), teacher.half(), uniform(64), upstream=2.0**16)


def test_a_half_precision_student_meets_a_float32_teacher_under_autocast():
    student, teacher = normal(3, 4, 5).bfloat16(), normal(3, 4, 5, seed=1)
    with torch.autocast("cpu"):
        loss = dk.map_cosine_loss(student, teacher)
    assert torch.equal(loss, dk.map_cosine_loss(student, teacher.bfloat16()))


x = torch.zeros(2, 3, 4)
REFUSED = [
    ([1.0], x, None, {}, TypeError, "student must be a torch.Tensor, got list"),
    (x, None, None, {}, TypeError, "teacher must be a torch.Tensor, got NoneType"),
    (x.long(), x, None, {}, TypeError, "student must be float32, bfloat16, float16 or float64, got torch.int64"),
    (x, x.double(), None, {}, TypeError, "teacher must have the dtype of student, torch.float32, got torch.float64"),
    (x[0], x[0], None, {}, ValueError, "student must have shape [N,H,W] or [N,C,H,W], got [3, 4]"),
    (x, x[:, None], None, {}, ValueError, "teacher must have shape [N,H,W] as student has, got [2, 1, 3, 4]"),
    (x, x[:1], None, {}, ValueError, "teacher must have shape [N,H,W] of N=2 as student has, got [1, 3, 4]"),
    (x[None], x[None, :1], None, {}, ValueError, "teacher must have shape [N,C,H,W] of N=1, C=2 as student has, got"),
    (x[:, :0], x, None, {}, ValueError, "student must have at least one pixel a map, got [2, 0, 4]"),
    (x, x[:, :, :0], None, {}, ValueError, "teacher must have at least one pixel a map, got [2, 3, 0]"),
    (x, x.to("meta"), None, {}, ValueError, "teacher must be on the device of student, cpu, got meta"),
    (x, x.clone().requires_grad_(), None, {}, ValueError, "teacher must not require grad (it gets no gradient here)"),
    (x, x, torch.ones(3), {}, ValueError, "weight must have shape [N]=[2], got [3]"),
    (
        x,
        x,
        torch.tensor([1.0, -1.0]),
        {},
        ValueError,
        "weight must be finite and >= 0 everywhere, got values in [-1, 1]",
    ),
    (x, x, None, {"reduction": "avg"}, ValueError, "reduction must be one of 'none', 'mean', 'sum', got 'avg'"),
]


@pytest.mark.parametrize(("student", "teacher", "weight", "options", "error", "message"), REFUSED)
@pytest.mark.parametrize("backend", ("eager", None))
def test_bad_input_is_refused_by_name(backend, student, teacher, weight, options, error, message):
    with dk.backend(backend), pytest.raises(error, match=f"^{re.escape(message)}"):
        dk.map_cosine_loss(student, teacher, weight, **options)
