"""`kd_loss`: its value and its gradient."""

import numpy as np
import pytest
import torch
from cases import DTYPES, GOLDEN, assert_accurate, lay_out, normal
from hypothesis import given
from hypothesis import strategies as st

import debiaskd as dk


def oracle(student, teacher, temperature=4.0, upstream=1.0):
    """Sample by sample, in NumPy."""
    loss, gradient = 0.0, np.zeros(student.shape)
    for i, (s, t) in enumerate(zip(student.detach().double().numpy(), teacher.double().numpy())):
        log_q, log_p = (x / temperature - np.logaddexp.reduce(x / temperature) for x in (s, t))
        loss += temperature**2 / len(student) * (np.exp(log_p) * (log_p - log_q)).sum()
        gradient[i] = upstream * temperature / len(student) * (np.exp(log_q) - np.exp(log_p))
    return torch.tensor(loss, dtype=torch.float64), torch.as_tensor(gradient)


def plain(student, teacher, temperature=4.0):
    """As public code writes it, in the dtype that the loss is returned in."""
    wide = torch.promote_types(student.dtype, torch.float32)
    student, teacher = (x.to(wide) / temperature for x in (student, teacher))
    log_p, log_q = teacher.log_softmax(1), student.log_softmax(1)
    return temperature**2 * (log_p.exp() * (log_p - log_q)).sum() / max(len(student), 1)


def loss_and_gradient(function, student, teacher, temperature=4.0, upstream=1.0):
    student = student.detach().requires_grad_()
    loss = function(student, teacher, temperature)
    (gradient,) = torch.autograd.grad(loss, student, torch.full_like(loss, upstream))
    assert gradient.dtype == student.dtype
    return loss.detach(), gradient


def public(student, teacher, temperature=4.0):
    return dk.kd_loss(student, teacher, temperature=temperature)


@given(
    samples=st.sampled_from((0, 1, 5, 40)),
    classes=st.sampled_from((1, 2, 7, 100)),
    dtypes=st.tuples(st.sampled_from(DTYPES), st.sampled_from(DTYPES)),
    layout=st.sampled_from(("contiguous", "reversed", "stepped", "expanded_batch")),
    temperature=st.sampled_from((1.0, 4.0, 0.5)),
    upstream=st.sampled_from((1.0, -0.3)),
)
def test_any_shape_layout_and_dtype_agrees_with_the_oracle(samples, classes, dtypes, layout, temperature, upstream):
    student = lay_out(normal(samples, classes, dtype=dtypes[0]) * 5, layout)
    teacher = lay_out(normal(samples, classes, seed=1, dtype=dtypes[1]) * 5, layout)
    arguments = (student, teacher, temperature, upstream)
    both = zip(loss_and_gradient(public, *arguments), oracle(*arguments), loss_and_gradient(plain, *arguments))
    for actual, exact, eager in both:
        assert_accurate(actual, exact, eager)


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_and_reductions_are_those_of_samples_taken_by_themselves(dtype):
    student, teacher = normal(5, 7, dtype=dtype) * 5, normal(5, 7, seed=1, dtype=dtype) * 5
    weight = torch.tensor([0.0, 0.5, 1.0, 2.0, 50.0])
    each = torch.stack([dk.kd_loss(s[None], t[None]) for s, t in zip(student, teacher)])
    weighted = weight.to(each.dtype) * each
    for reduction, expected in (("none", weighted), ("sum", weighted.sum()), ("mean", weighted.sum() / weight.sum())):
        torch.testing.assert_close(dk.kd_loss(student, teacher, weight, reduction=reduction), expected)
    torch.testing.assert_close(dk.kd_loss(student, teacher, reduction="none"), each)


def test_gradient_of_weighted_samples():
    student, teacher = normal(4, 6, dtype=torch.float64).requires_grad_(), normal(4, 6, seed=1, dtype=torch.float64)
    weight = torch.tensor([0.0, 1.0, 3.0, 4.0])
    (gradient,) = torch.autograd.grad(dk.kd_loss(student, teacher, weight, temperature=2.0), student)
    q, p = ((x.detach() / 2).softmax(1) for x in (student, teacher))
    torch.testing.assert_close(gradient, weight[:, None].double() / 8 * 2 * (q - p))


def test_nothing_that_has_weight_is_zero():
    loss, gradient = loss_and_gradient(
        lambda s, t, _: dk.kd_loss(s, t, torch.zeros(3)), normal(3, 4), normal(3, 4, seed=1)
    )
    assert loss.item() == 0 and not gradient.any()


@pytest.mark.parametrize("name", ("cid0", "cid1"))
def test_reference_kl_and_gradient_are_reproduced(name):
    with np.load(GOLDEN / "cid.npz") as file:
        reference = {k.removeprefix(f"{name}_"): torch.as_tensor(file[k]) for k in file.files if k.startswith(name)}
    student = reference["student_logits"].requires_grad_()
    loss = dk.kd_loss(student, reference["teacher_logits"], temperature=reference["temperature"].item())
    loss.backward()
    torch.testing.assert_close(loss.detach(), reference["kl"])
    torch.testing.assert_close(student.grad, reference["kl_grad"])


def test_empty_batch_is_zero_with_a_zero_gradient():
    loss, gradient = loss_and_gradient(public, torch.zeros(0, 5), torch.zeros(0, 5))
    assert loss.item() == 0
    assert gradient.shape == (0, 5)


def test_student_that_is_the_teacher_has_no_loss():
    loss, gradient = loss_and_gradient(public, normal(5, 9), normal(5, 9) + 3)
    assert abs(loss.item()) < 1e-5
    assert gradient.abs().max() < 1e-6


def test_class_that_the_teacher_rules_out_counts_nothing():
    student, teacher = normal(3, 4), normal(3, 4, seed=1)
    teacher[:, 1] = -torch.inf
    loss, gradient = loss_and_gradient(public, student, teacher)
    assert loss.isfinite()
    assert gradient.isfinite().all()
    assert (gradient[:, 1] > 0).all()  # the student is to give it up


def test_half_precision_logits_are_widened_before_the_exponential():
    student, teacher = (normal(4, 6, seed=i, dtype=torch.float16) * 1000 for i in (0, 1))
    loss, gradient = loss_and_gradient(public, student, teacher, 1.0)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), oracle(student, teacher, 1.0)[0])
    assert gradient.isfinite().all()


def test_gradcheck_of_both_orders():
    student = normal(3, 4, dtype=torch.float64).requires_grad_()
    teacher = normal(3, 4, seed=1, dtype=torch.float64)
    assert torch.autograd.gradcheck(public, (student, teacher))
    assert torch.autograd.gradgradcheck(public, (student, teacher))


@pytest.mark.parametrize("name", ("eager", "cpp"))
def test_every_backend_that_exists_may_be_asked_for(name):
    with dk.backend(name):
        loss = dk.kd_loss(normal(3, 4), normal(3, 4, seed=1))
    assert torch.equal(loss, dk.kd_loss(normal(3, 4), normal(3, 4, seed=1)))


def test_autocast_changes_nothing():
    student, teacher = normal(5, 7, dtype=torch.bfloat16), normal(5, 7, seed=1, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = loss_and_gradient(public, student, teacher)
    for a, e in zip(actual, loss_and_gradient(public, student, teacher)):
        assert torch.equal(a, e)


@pytest.mark.compiles
def test_one_compiled_graph_equals_the_plain_call():
    torch.compiler.reset()
    compiled = torch.compile(lambda s, t, _: dk.kd_loss(s * 2, t) * 3, backend="aot_eager", fullgraph=True)
    inputs = (normal(5, 7), normal(5, 7, seed=1))
    expected = loss_and_gradient(lambda s, t, _: dk.kd_loss(s * 2, t) * 3, *inputs)
    for a, e in zip(loss_and_gradient(compiled, *inputs), expected):
        torch.testing.assert_close(a, e)


BAD = [
    ({"student_logits": [1.0]}, TypeError, r"student_logits must be a torch\.Tensor, got list"),
    ({"student_logits": torch.zeros(2, 3).long()}, TypeError, r"student_logits must be float32.*got torch\.int64"),
    ({"student_logits": torch.zeros(3)}, ValueError, r"student_logits must have shape \[N,K\], got \[3\]"),
    (
        {"teacher_logits": torch.zeros(2, 4)},
        ValueError,
        r"teacher_logits must have shape that of student_logits=\[2, 3\]",
    ),
    ({"teacher_logits": torch.zeros(2, 3, requires_grad=True)}, ValueError, r"teacher_logits must not require grad"),
    (
        {"teacher_logits": torch.zeros(2, 3, device="meta")},
        ValueError,
        r"teacher_logits must be on the device of student",
    ),
    ({"weight": torch.ones(3)}, ValueError, r"weight must have shape \[N\]=\[2\], got \[3\]"),
    ({"weight": torch.tensor([1.0, -1.0])}, ValueError, r"weight must"),
    ({"weight": torch.ones(2, requires_grad=True)}, ValueError, r"weight must not require grad"),
    ({"reduction": "batchmean"}, ValueError, r"reduction must be one of.*got 'batchmean'"),
    ({"temperature": 0.0}, ValueError, r"temperature must be a finite number > 0, got 0\.0"),
    ({"temperature": float("nan")}, ValueError, r"temperature must be a finite number > 0, got nan"),
    ({"temperature": None}, TypeError, r"temperature must be a number, got NoneType"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_bad_inputs_are_named(change, error, message):
    arguments = {"student_logits": torch.zeros(2, 3), "teacher_logits": torch.zeros(2, 3)} | change
    with pytest.raises(error, match=message):
        dk.kd_loss(**arguments)


def test_module_is_the_function():
    module = dk.KdLoss(temperature=2.0)
    inputs = (normal(5, 7), normal(5, 7, seed=1))
    assert torch.equal(module(*inputs), dk.kd_loss(*inputs, temperature=2.0))
    assert repr(module) == "KdLoss(temperature=2.0, reduction='mean')"
    weight = torch.rand(5)
    expected = dk.kd_loss(*inputs, weight, reduction="none")
    assert torch.equal(dk.KdLoss(reduction="none")(*inputs, weight), expected)
