"""Bad input: every refusal names the argument, what was expected and what came. Boxes' own are in test_boxes.py."""

import re

import pytest
import torch

import debiaskd as dk
from debiaskd.utils import checks

BOXES = dk.Boxes.from_lists([[[0, 0, 2, 2]], []])
NAN, INF = float("nan"), float("inf")


def refuses(error, message, function, *arguments, **options):
    with pytest.raises(error, match=f"^{re.escape(message)}") as caught:
        function(*arguments, **options)
    assert type(caught.value) is error


x = torch.zeros(2, 3)
FEATURE_MATCH = [
    ([1.0], x, None, {}, TypeError, "student must be a torch.Tensor, got list"),
    (x, None, None, {}, TypeError, "teacher must be a torch.Tensor, got NoneType"),
    (x.long(), x.long(), None, {}, TypeError, "student must be float32, bfloat16, float16 or float64, got torch.int64"),
    (x, x.bool(), None, {}, TypeError, "teacher must be float32, bfloat16, float16 or float64, got torch.bool"),
    (
        x.to(torch.complex64),
        x,
        None,
        {},
        TypeError,
        "student must be float32, bfloat16, float16 or float64, got torch.c",
    ),
    (x, x.double(), None, {}, TypeError, "teacher must have the dtype of student, torch.float32, got torch.float64"),
    (x.half(), x, None, {}, TypeError, "teacher must have the dtype of student, torch.float16, got torch.float32"),
    (torch.tensor(1.0), torch.tensor(1.0), None, {}, ValueError, "student must have shape [N, ...], got []"),
    (x, x[:, :2], None, {}, ValueError, "teacher must have shape that of student=[2, 3], got [2, 2]"),
    (x, x[None], None, {}, ValueError, "teacher must have shape that of student=[2, 3], got [1, 2, 3]"),
    (x, x.to("meta"), None, {}, ValueError, "teacher must be on the device of student, cpu, got meta"),
    (
        x,
        x.clone().requires_grad_(),
        None,
        {},
        ValueError,
        "teacher must not require grad (it gets no gradient here), got",
    ),
    (x, x, [1, 2], {}, TypeError, "weight must be a torch.Tensor, got list"),
    (
        x,
        x,
        torch.ones(2).long(),
        {},
        TypeError,
        "weight must be float32, bfloat16, float16 or float64, got torch.int64",
    ),
    (x, x, torch.ones(3), {}, ValueError, "weight must have shape [N]=[2], got [3]"),
    (x, x, torch.ones(2, 1), {}, ValueError, "weight must have shape [N]=[2], got [2, 1]"),
    (x, x, torch.tensor(1.0), {}, ValueError, "weight must have shape [N]=[2], got []"),
    (x, x, torch.ones(2, device="meta"), {}, ValueError, "weight must be on the device of student, cpu, got meta"),
    (
        x,
        x,
        torch.ones(2).requires_grad_(),
        {},
        ValueError,
        "weight must not require grad (it gets no gradient here), got",
    ),
    (
        x,
        x,
        torch.tensor([1.0, -0.5]),
        {},
        ValueError,
        "weight must be finite and >= 0 everywhere, got values in [-0.5, 1]",
    ),
    (
        x,
        x,
        torch.tensor([1.0, NAN]),
        {},
        ValueError,
        "weight must be finite and >= 0 everywhere, got values in [nan, nan]",
    ),
    (
        x,
        x,
        torch.tensor([1.0, INF]),
        {},
        ValueError,
        "weight must be finite and >= 0 everywhere, got values in [1, inf]",
    ),
    (
        x,
        x,
        torch.tensor([INF, 1]).half(),
        {},
        ValueError,
        "weight must be finite and >= 0 everywhere, got values in [1, i",
    ),
    (x, x, None, {"normalize": "yes"}, TypeError, "normalize must be True or False, got 'yes'"),
    (x, x, None, {"reduction": "avg"}, ValueError, "reduction must be one of 'none', 'mean', 'sum', got 'avg'"),
    (x, x, None, {"reduction": None}, ValueError, "reduction must be one of 'none', 'mean', 'sum', got None"),
]


@pytest.mark.parametrize(("student", "teacher", "weight", "options", "error", "message"), FEATURE_MATCH)
@pytest.mark.parametrize("backend", ("eager", None))
def test_feature_match_loss_refuses(backend, student, teacher, weight, options, error, message):
    with dk.backend(backend):
        refuses(error, message, dk.feature_match_loss, student, teacher, weight, **options)


a = torch.zeros(2, 4, 5)
LOCALIZATION = [
    ("map", BOXES, {}, TypeError, "attribution must be a torch.Tensor, got str"),
    (a.int(), BOXES, {}, TypeError, "attribution must be float32, bfloat16, float16 or float64, got torch.int32"),
    (a[0], BOXES, {}, ValueError, "attribution must have shape [N,H,W], got [4, 5]"),
    (a[:, None], BOXES, {}, ValueError, "attribution must have shape [N,H,W], got [2, 1, 4, 5]"),
    (a[:, :0], BOXES, {}, ValueError, "attribution must have at least one pixel a map, got [2, 0, 5]"),
    (a[:, :0], BOXES, {"size": (4, 4)}, ValueError, "attribution must have at least one pixel a map, got [2, 0, 5]"),
    (a, [[0, 0, 2, 2]], {}, TypeError, "boxes must be a dk.Boxes, got list"),
    (a, BOXES.coords, {}, TypeError, "boxes must be a dk.Boxes, got Tensor"),
    (a, BOXES[0], {}, ValueError, "boxes must be of N=2 images, as attribution is, got 1"),
    (a[:0], BOXES, {}, ValueError, "boxes must be of N=0 images, as attribution is, got 2"),
    (a, BOXES.to("meta"), {}, ValueError, "boxes must be on the device of attribution, cpu, got meta"),
    (a.to("meta"), BOXES, {}, ValueError, "boxes must be on the device of attribution, meta, got cpu"),
    (a, BOXES, {"kind": "iou"}, ValueError, "kind must be one of 'energy', 'l1', 'ppce', 'rrr', got 'iou'"),
    (a, BOXES, {"kind": 0}, ValueError, "kind must be one of 'energy', 'l1', 'ppce', 'rrr', got 0"),
    (a, BOXES, {"reduction": "max"}, ValueError, "reduction must be one of 'none', 'mean', 'sum', got 'max'"),
    (a, BOXES, {"normalize": 1}, TypeError, "normalize must be True or False, got 1"),
    (a, BOXES, {"size": 224}, TypeError, "size must be a (height, width) pair of integers, got 224"),
    (a, BOXES, {"size": (224,)}, TypeError, "size must be a (height, width) pair of integers, got (224,)"),
    (a, BOXES, {"size": (1, 2, 3)}, TypeError, "size must be a (height, width) pair of integers, got (1, 2, 3)"),
    (a, BOXES, {"size": (8.0, 8)}, TypeError, "size must be a (height, width) pair of integers, got (8.0, 8)"),
    (a, BOXES, {"size": "88"}, TypeError, "size must be a (height, width) pair of integers, got '88'"),
    (
        a,
        BOXES,
        {"size": torch.tensor([8, 8])},
        TypeError,
        "size must be a (height, width) pair of integers, got tensor",
    ),
    (a, BOXES, {"size": (8, 0)}, ValueError, "size must be (height, width), both >= 1, got (8, 0)"),
    (a, BOXES, {"size": (-8, 8)}, ValueError, "size must be (height, width), both >= 1, got (-8, 8)"),
]


@pytest.mark.parametrize(("attribution", "boxes", "options", "error", "message"), LOCALIZATION)
@pytest.mark.parametrize("backend", ("eager", None))
def test_localization_loss_refuses(backend, attribution, boxes, options, error, message):
    with dk.backend(backend):
        refuses(error, message, dk.localization_loss, attribution, boxes, **options)


def test_energy_loss_refuses_as_localization_loss_does():
    refuses(ValueError, "attribution must have shape [N,H,W], got [4, 5]", dk.energy_loss, a[0], BOXES)
    refuses(TypeError, "size must be a (height, width) pair", dk.energy_loss, a, BOXES, size=8)
    refuses(ValueError, "reduction must be one of", dk.energy_loss, a, BOXES, reduction="no")


def test_advice_on_a_teacher_that_requires_grad_names_the_way_out():
    with pytest.raises(ValueError, match=r"pass teacher.detach\(\) or compute it under torch.no_grad\(\)"):
        dk.feature_match_loss(x, x.clone().requires_grad_())


def test_values_are_not_looked_at_where_that_would_wait_for_a_device():
    meta = torch.empty(2, 3, device="meta")
    assert dk.feature_match_loss(meta, meta, torch.empty(2, device="meta")).device.type == "meta"


@pytest.mark.parametrize(
    ("value", "options", "error", "message"),
    [
        ("1", {}, TypeError, "it must be a number, got str"),
        (True, {}, TypeError, "it must be a number, got bool"),
        (NAN, {}, ValueError, "it must be a finite number, got nan"),
        (INF, {"minimum": 0}, ValueError, "it must be a finite number >= 0, got inf"),
        (-1, {"minimum": 0}, ValueError, "it must be a finite number >= 0, got -1"),
        (0, {"minimum": 0, "exclusive": True}, ValueError, "it must be a finite number > 0, got 0"),
    ],
)
def test_numbers_are_finite_and_in_range(value, options, error, message):
    refuses(error, message, checks.number, "it", value, **options)


def test_good_values_pass_every_check():
    assert checks.number("it", 3) == 3.0
    assert checks.number("it", 0, minimum=0) == 0.0
    assert checks.size("it", [4, 5]) == (4, 5)
    assert checks.size("it", torch.Size([4, 5])) == (4, 5)
    checks.finite_nonnegative("it", torch.zeros(0))
    checks.finite_nonnegative("it", torch.tensor([0.0, 65504.0]).half())
    dk.feature_match_loss(x, x, torch.ones(2, dtype=torch.float64))  # weights may be of any floating dtype
