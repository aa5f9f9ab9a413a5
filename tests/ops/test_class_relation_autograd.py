"""What autograd, autocast and compilation may do with `class_relation_loss`."""

import pytest
import torch
from cases import every_way, lay_out, normal

import debiaskd as dk
from debiaskd.ops import backend

needs_native = pytest.mark.skipif(not backend.native, reason="the native libraries are not built")


def small(way, dtype=torch.float32):
    inputs = (normal(6, 5, dtype=dtype), normal(6, 3, seed=1, dtype=dtype), torch.arange(6) % 2)
    student, teacher, labels = map(way.put, inputs)
    return student.requires_grad_(), teacher, labels


@every_way("class_relation")
@pytest.mark.parametrize(("dtype", "scale"), ((torch.float32, -3.0), (torch.float16, 1.0)), ids=str)
def test_retained_graph_gives_the_same_gradient_twice_in_tensors_of_their_own(way, dtype, scale):
    student, teacher, labels = small(way, dtype)
    with way.active():
        loss = dk.class_relation_loss(student, teacher, labels) * scale
        gradients = [torch.autograd.grad(loss, student, retain_graph=i < 2)[0] for i in range(3)]
        unit = torch.autograd.grad(dk.class_relation_loss(student, teacher, labels), student)[0]
    torch.testing.assert_close(gradients[0], unit * scale)
    assert torch.equal(gradients[1], gradients[0])
    assert torch.equal(gradients[2], gradients[0])
    assert len({g.untyped_storage().data_ptr() for g in gradients}) == 3
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, student)


@every_way("class_relation")
def test_second_derivative_is_right_or_an_error_and_never_silence(way):
    student, teacher, labels = small(way, torch.float64)
    with way.active():
        loss = dk.class_relation_loss(student, teacher, labels)
        (gradient,) = torch.autograd.grad(loss, student, create_graph=True)
        if way.name == "eager":
            assert torch.autograd.grad(gradient.square().sum(), student)[0].isfinite().all()
            return
        with pytest.raises(RuntimeError, match=r"class_relation_loss was differentiated again.*eager"):
            gradient.square().sum().backward()


@every_way("class_relation")
@pytest.mark.parametrize("changed", (0, 1, 2), ids=("student", "teacher", "labels"))
def test_changing_an_input_between_forward_and_backward_gives_no_wrong_gradient(way, changed):
    student, teacher, labels = small(way)
    with way.active():
        expected = torch.autograd.grad(dk.class_relation_loss(student, teacher, labels), student)[0]
        inputs = [student * 1, teacher, labels]
        loss = dk.class_relation_loss(*inputs)
    with torch.no_grad():
        inputs[changed].add_(1)
    try:
        (gradient,) = torch.autograd.grad(loss, student)
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)
    else:
        assert torch.equal(gradient, expected)


@every_way("class_relation")
def test_autocast_with_a_float32_teacher_changes_nothing(way):
    student, teacher, labels = normal(6, 5, dtype=torch.bfloat16), normal(6, 3, seed=1), torch.arange(6) % 2
    inputs = [way.put(student).requires_grad_(), way.put(teacher), way.put(labels)]

    with way.active():
        losses = [dk.class_relation_loss(*inputs)]
        with torch.autocast(way.device, dtype=torch.bfloat16):
            losses.append(dk.class_relation_loss(*inputs))
    assert losses[1].dtype == torch.float32
    assert torch.equal(*losses)
    assert torch.equal(*(torch.autograd.grad(loss, inputs[0])[0] for loss in losses))


@pytest.mark.compiles
@every_way("class_relation")
def test_one_compiled_graph_equals_the_plain_call(way):
    student, teacher, labels = small(way, torch.float16)
    torch.compiler.reset()

    def function(s):
        return dk.class_relation_loss(s * 2, teacher, labels) * 3

    with way.active():
        compiled = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=True)
        for both in (
            (compiled(student), function(student)),
            (
                torch.autograd.grad(compiled(student), student)[0],
                torch.autograd.grad(function(student), student)[0],
            ),
        ):
            torch.testing.assert_close(*both)
        with torch.no_grad():
            torch.testing.assert_close(compiled(student), function(student))


@needs_native
@pytest.mark.compiles
@pytest.mark.parametrize(
    ("samples", "layout", "dtype"),
    [(0, "contiguous", torch.float32), (5, "reversed", torch.bfloat16), (5, "expanded", torch.float32)],
    ids=str,
)
def test_op_is_registered_as_it_behaves(samples, layout, dtype):
    student, teacher = lay_out(normal(samples, 4, dtype=dtype), layout), normal(samples, 3, seed=1)
    for with_gradient in (True, False):
        arguments = (student, teacher, torch.arange(samples) % 2, with_gradient)
        pytest.importorskip("expecttest")  # which opcheck needs
        results = torch.library.opcheck(torch.ops.debiaskd.class_relation.default, arguments)
        assert set(results.values()) == {"SUCCESS"}, results
