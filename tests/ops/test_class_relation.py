"""`class_relation_loss`: its value and its gradient, on every backend."""

import numpy as np
import pytest
import torch
from cases import (
    DTYPES,
    GOLDEN,
    LAYOUTS,
    assert_accurate,
    each_layout_and_dtype,
    every_way,
    lay_out,
    normal,
    poisoned_memory,
    threads,
    ways,
)
from hypothesis import given
from hypothesis import strategies as st

import debiaskd as dk


def directions(x):
    norm = np.linalg.norm(x, axis=1, keepdims=True)
    return np.divide(x, norm, out=np.zeros_like(x), where=norm >= 1e-12), norm


def oracle(student, teacher, labels, upstream=1.0, rounding=0.0):
    """Loss and gradient, class by class and row by row, in NumPy; and how far off cosines that are off by `rounding`
    would take each."""
    s, t = (x.detach().cpu().double().numpy() for x in (student, teacher))
    members = [np.flatnonzero(labels.cpu().numpy() == k) for k in labels.unique().tolist()]
    classes = [m for m in members if len(m) > 1]
    (unit, norm), (unit_teacher, _) = directions(s), directions(t)
    loss, gradient, slack, slack_of_gradient = 0.0, np.zeros_like(s), 0.0, np.zeros((len(s), 1))
    for rows in classes:
        factor = 1 / (len(classes) * len(rows) ** 2)
        for i in rows:
            cosine = unit[rows] @ unit[i]
            difference = cosine - unit_teacher[rows] @ unit_teacher[i]
            loss += factor * (difference**2).sum()
            slack += factor * ((2 * abs(difference) + rounding) * rounding).sum()
            if norm[i] >= 1e-12:
                others, pull = rows != i, 4 * upstream * factor / norm[i]
                toward_others = difference[others] @ unit[rows[others]]
                gradient[i] = pull * (toward_others - difference[others] @ cosine[others] * unit[i])
                slack_of_gradient[i] = others.sum() * abs(pull) * rounding
    return tuple(torch.as_tensor(x, dtype=torch.float64) for x in (loss, gradient, slack, slack_of_gradient))


def loss_and_gradient(student, teacher, labels, upstream=1.0):
    student = student.detach().requires_grad_()
    loss = dk.class_relation_loss(student, teacher, labels)
    (gradient,) = torch.autograd.grad(loss, student, torch.full_like(loss, upstream))
    assert gradient.shape == student.shape
    assert gradient.dtype == student.dtype
    return loss.detach(), gradient


def check(way, student, teacher, labels, upstream=1.0):
    with way.active():
        actual = loss_and_gradient(*map(way.put, (student, teacher, labels)), upstream)
    with dk.backend("eager"):
        eager = loss_and_gradient(student, teacher, labels, upstream)
    rounding = 2 * torch.finfo(torch.promote_types(student.dtype, torch.float32)).eps
    results = oracle(student, teacher, labels, upstream, rounding)
    for a, x, slack, e, what in zip(actual, results[:2], results[2:], eager, ("loss", "gradient")):
        assert a.dtype == e.dtype
        # What cosines must lose by rounding is forgiven: where they nearly cancel, eager may happen to lose nothing.
        a = a.cpu().double()
        a = torch.where((a - x).abs() <= slack, x, a).to(e.dtype)
        assert_accurate(a, x, e, f"{what} {student.dtype} {list(student.shape)} {student.stride()} {labels.tolist()}")


widths = st.sampled_from((2, 3, 16, 33, 129))


@st.composite
def problems(draw):
    samples, classes = draw(st.sampled_from((0, 1, 2, 3, 5, 9, 18, 37))), draw(st.sampled_from((1, 2, 5, 100)))
    seed, layouts = draw(st.integers(0, 1000)), st.sampled_from(LAYOUTS)
    student = lay_out(normal(samples, draw(widths), seed=seed, dtype=draw(st.sampled_from(DTYPES))), draw(layouts))
    dtype = draw(st.sampled_from((student.dtype, torch.promote_types(student.dtype, torch.float32))))
    teacher = lay_out(normal(samples, draw(widths), seed=seed + 1, dtype=dtype), draw(layouts))
    labels = torch.randint(0, classes, (samples,), generator=torch.Generator().manual_seed(seed))
    return student, teacher, labels * draw(st.sampled_from((1, 2**40)))


@every_way("class_relation")
@given(problem=problems(), upstream=st.sampled_from((1.0, -0.3, 1000.0)))
def test_any_shape_layout_and_dtype_agrees_with_the_oracle(way, problem, upstream):
    check(way, *problem, upstream)


@every_way("class_relation")
@pytest.mark.parametrize(
    ("samples", "width", "classes", "dtype"),
    [
        (70, 1030, 2, torch.float32),
        (50, 513, 1, torch.float16),
        (33, 2048, 20, torch.bfloat16),
        (40, 1030, 2, torch.float64),
    ],
    ids=str,
)
def test_large_classes_and_long_rows_are_as_accurate(way, samples, width, classes, dtype):
    labels = torch.randint(0, classes, (samples,), generator=torch.Generator().manual_seed(0))
    check(way, normal(samples, width, dtype=dtype), normal(samples, 300, seed=1, dtype=dtype), labels, 0.5)


# On a GPU classes of 256 or more are multiplied otherwise, over 512 samples have a launch to find their classes, and
# with more pairs than numbers a batch may be gone through in stretches. Where kernels are interpreted, which takes
# long, all of that begins with classes and batches of 33.
@every_way("class_relation")
@pytest.mark.parametrize(
    ("samples", "width", "classes", "dtype"),
    [
        (75, 100, 1, torch.float32),
        (100, 5, 1, torch.float32),
        (50, 3, 1, torch.float64),
        *((256, 264, 1, dtype) for dtype in (torch.float32, torch.bfloat16, torch.float64)),
        (257, 261, 1, torch.float32),
        (258, 5, 1, torch.float32),
        (185, 3, 12, torch.float64),
        (514, 520, 3000, torch.float32),
    ],
    ids=str,
)
def test_large_batches_are_as_accurate(way, samples, width, classes, dtype):
    if way.name == "triton" and samples > 100:
        pytest.skip("interpreted")
    labels = torch.randint(0, classes, (samples,), generator=torch.Generator().manual_seed(0))
    check(way, normal(samples, width, dtype=dtype), normal(samples, 33, seed=1, dtype=dtype), labels)


@every_way("class_relation")
@pytest.mark.parametrize(("samples", "classes"), [(12, 5), (40, 1)], ids=str)
def test_loss_is_the_same_where_no_gradient_is_asked_for(way, samples, classes):
    student, teacher, labels = normal(samples, 6), normal(samples, 4, seed=1), torch.arange(samples) % classes
    with way.active():
        with_gradient, without = (
            dk.class_relation_loss(*map(way.put, (s, teacher, labels)))
            for s in (student.clone().requires_grad_(), student)
        )
    torch.testing.assert_close(without, with_gradient)


@every_way("class_relation")
def test_labels_are_read_with_any_stride(way):
    student, teacher = normal(9, 5), normal(9, 4, seed=1)
    every_second, one = (torch.arange(18) * 7 % 11)[::2], torch.tensor([3]).expand(9)
    for labels in (every_second, one):
        check(way, student, teacher, labels)


@every_way("class_relation")
@pytest.mark.parametrize("name", ("cid0", "cid1"))
def test_reference_class_loss_and_gradient_are_reproduced(way, name):
    with np.load(GOLDEN / "cid.npz") as file:
        reference = {k.removeprefix(f"{name}_"): torch.as_tensor(file[k]) for k in file.files if k.startswith(name)}
    student = way.put(reference["student"]).requires_grad_()
    with way.active():
        loss = dk.class_relation_loss(student, way.put(reference["teacher"]), way.put(reference["labels"]))
        loss.backward()
    torch.testing.assert_close(loss.detach().cpu().double(), reference["class"], rtol=1e-5, atol=0)
    torch.testing.assert_close(student.grad.cpu(), reference["class_grad"], rtol=1e-4, atol=1e-8)


@every_way("class_relation")
@pytest.mark.parametrize("labels", ([], [3], [0, 1, 2, 3]), ids=str)
def test_without_two_of_a_class_the_loss_and_its_gradient_are_zero(way, labels):
    labels = torch.tensor(labels, dtype=torch.int64)
    with way.active():
        loss, gradient = loss_and_gradient(
            *map(way.put, (normal(len(labels), 5), normal(len(labels), 3, seed=1), labels))
        )
    assert loss.item() == 0
    assert gradient.shape == (len(labels), 5)
    assert not gradient.any()


@every_way("class_relation")
def test_features_of_no_width_are_zero(way):
    with way.active():
        loss, gradient = loss_and_gradient(*map(way.put, (torch.zeros(3, 0), torch.zeros(3, 0), torch.zeros(3).long())))
    assert loss.item() == 0
    assert gradient.shape == (3, 0)


@every_way("class_relation")
def test_numbers_have_a_sign_and_no_gradient(way):
    # Whatever terms a gradient is made of here, they cancel.
    student, teacher, labels = normal(6, 1), normal(6, 1, seed=1), torch.zeros(6, dtype=torch.int64)
    with way.active():
        loss, gradient = loss_and_gradient(*map(way.put, (student, teacher, labels)))
    torch.testing.assert_close(loss.cpu().double(), oracle(student, teacher, labels)[0])
    assert gradient.abs().max() < 1e-5


@every_way("class_relation")
@pytest.mark.parametrize("tiny", (0.0, 1e-14, 1e-30))
def test_a_row_without_direction_has_cosines_of_zero_and_no_gradient(way, tiny):
    student, teacher, labels = normal(4, 6), normal(4, 6, seed=1), torch.tensor([0, 0, 0, 1])
    student[1] = tiny
    with way.active():
        loss, gradient = loss_and_gradient(*map(way.put, (student, teacher, labels)))
    expected_loss, expected, *_ = oracle(student, teacher, labels)
    torch.testing.assert_close(loss.cpu().double(), expected_loss)
    torch.testing.assert_close(gradient.cpu().double(), expected, rtol=1e-5, atol=1e-7)
    assert not gradient[1].any()
    assert gradient[0].any()


@every_way("class_relation")
def test_loss_ignores_the_length_of_rows(way):
    student, teacher, labels = normal(9, 20), normal(9, 12, seed=1), torch.arange(9) % 3
    scale = torch.logspace(-6, 6, 9)[:, None]
    with way.active():
        plain = dk.class_relation_loss(*map(way.put, (student, teacher, labels)))
        scaled = dk.class_relation_loss(*map(way.put, (student * scale, teacher / scale, labels)))
    torch.testing.assert_close(scaled, plain)


@every_way("class_relation")
def test_student_that_is_the_teacher_has_no_loss(way):
    student, labels = normal(8, 20), torch.arange(8) % 2
    with way.active():
        loss, gradient = loss_and_gradient(*map(way.put, (student, 3 * student, labels)))
    assert loss.item() < 1e-12
    assert gradient.abs().max() < 1e-6


@every_way("class_relation")
def test_half_precision_keeps_a_gradient_that_a_loss_scaler_multiplies(way):
    student, teacher = normal(40, 64, dtype=torch.float16) * 50, normal(40, 64, seed=1, dtype=torch.float16)
    labels = torch.zeros(40, dtype=torch.int64)
    check(way, student, teacher, labels, 65536.0)
    with way.active():
        assert loss_and_gradient(*map(way.put, (student, teacher, labels)), 65536.0)[1].abs().max() > 1e-3


@every_way("class_relation")
@pytest.mark.parametrize("value", (float("nan"), float("inf")))
def test_a_broken_feature_shows_in_the_loss_of_its_class_alone(way, value):
    student, teacher, labels = normal(6, 40), normal(6, 40, seed=1), torch.tensor([0, 0, 1, 1, 2, 3])
    student[1, 7] = value
    with way.active():
        loss, gradient = loss_and_gradient(*map(way.put, (student, teacher, labels)))
        assert not loss.isfinite()
        if way.name != "eager":  # whose product of matrices spreads it
            assert gradient[2:].isfinite().all()
        student[1, 7], student[4, 7] = 0, value  # alone in its class: not looked at
        if way.name != "eager":
            assert loss_and_gradient(*map(way.put, (student, teacher, labels)))[0].isfinite()


@every_way("class_relation")
@each_layout_and_dtype
def test_every_element_is_written(way, layout, dtype):
    student = way.put(lay_out(normal(7, 21, dtype=dtype), layout))
    teacher, labels = way.put(normal(7, 9, seed=1, dtype=dtype)), way.put(torch.tensor([4, 0, 4, 2, 9, 4, 9]))
    with way.active(), poisoned_memory():
        for written in (*loss_and_gradient(student, teacher, labels), dk.class_relation_loss(student, teacher, labels)):
            assert written.isfinite().all()


# PyTorch cuts a product of matrices differently for each number of threads, which leaves eager out of this promise. An
# interpreted kernel has one thread.
NATIVE = [way for way in ways("class_relation") if not way.name.startswith("eager") and way.name != "triton"]


@pytest.mark.parametrize("way", NATIVE, ids=lambda way: way.name)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", (1, 7, 60))
def test_same_inputs_give_the_same_bits_with_one_thread_and_with_two(way, dtype, classes):
    labels = torch.randint(0, classes, (120,), generator=torch.Generator().manual_seed(0))
    inputs = [way.put(x) for x in (normal(120, 700, dtype=dtype), normal(120, 90, seed=1, dtype=dtype), labels)]
    results = []
    for count in (1, 2, 2):
        with way.active(), threads(count):
            results.append(loss_and_gradient(*inputs))
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0]))


@every_way("class_relation")
def test_gradcheck(way):
    student = way.put(lay_out(normal(6, 2, dtype=torch.float64), "stepped")).requires_grad_()
    teacher, labels = way.put(normal(6, 4, seed=1, dtype=torch.float64)), way.put(torch.tensor([0, 5, 0, 5, 5, 2]))
    with way.active():
        assert torch.autograd.gradcheck(lambda s: dk.class_relation_loss(s, teacher, labels), (student,))


BAD = [
    ({"student": [1.0]}, TypeError, r"student must be a torch\.Tensor, got list"),
    ({"student": torch.zeros(2, 3).long()}, TypeError, r"student must be float32.*got torch\.int64"),
    ({"student": torch.zeros(2, 3, 1)}, ValueError, r"student must have shape \[N,D\], got \[2, 3, 1\]"),
    ({"teacher": torch.zeros(2)}, ValueError, r"teacher must have shape \[N,E\], got \[2\]"),
    ({"teacher": torch.zeros(3, 4)}, ValueError, r"teacher must have shape \[N,E\]=\[2, 4\], got \[3, 4\]"),
    ({"teacher": torch.zeros(2, 4, requires_grad=True)}, ValueError, r"teacher must not require grad"),
    ({"teacher": torch.zeros(2, 4, device="meta")}, ValueError, r"teacher must be on the device of student, cpu"),
    ({"labels": [0, 0]}, TypeError, r"labels must be a torch\.Tensor, got list"),
    ({"labels": torch.zeros(2)}, TypeError, r"labels must be int64, got torch\.float32"),
    ({"labels": torch.zeros(2, dtype=torch.int32)}, TypeError, r"labels must be int64, got torch\.int32"),
    ({"labels": torch.zeros(3).long()}, ValueError, r"labels must have shape \[N\]=\[2\], got \[3\]"),
    ({"labels": torch.zeros(2, 1).long()}, ValueError, r"labels must have shape \[N\]=\[2\], got \[2, 1\]"),
    ({"labels": torch.tensor([0, -1])}, ValueError, r"labels must be >= 0 everywhere, got values in \[-1, 0\]"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_bad_inputs_are_named(change, error, message):
    arguments = {"student": torch.zeros(2, 3), "teacher": torch.zeros(2, 4), "labels": torch.zeros(2).long()} | change
    with pytest.raises(error, match=message):
        dk.class_relation_loss(**arguments)


def test_module_is_the_function():
    inputs = (normal(6, 5), normal(6, 3, seed=1), torch.arange(6) % 2)
    assert torch.equal(dk.ClassRelationLoss()(*inputs), dk.class_relation_loss(*inputs))
