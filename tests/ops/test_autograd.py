"""What autograd may do with a loss: any upstream gradient, twice, never, under no_grad, twice differentiated."""

import pytest
import torch
from cases import Way, every_way, feature_match_oracle, normal, poisoned_memory, uniform
from every_loss import every_loss_every_way, every_native_loss
from torch.multiprocessing.reductions import StorageWeakRef
from torch.profiler import ProfilerActivity, profile

import debiaskd as dk

pytestmark = pytest.mark.usefixtures("one_thread")


def gradient_of(loss, values, upstream=None, **options):
    return torch.autograd.grad(loss, values, upstream, **options)[0]


@every_loss_every_way
@pytest.mark.parametrize("reduction", ("none", "mean"))
def test_gradient_is_linear_in_the_upstream_gradient(loss, way, reduction):
    values, constants = loss.make(way)
    with way.active():
        result = loss.call(values, constants, reduction=reduction)
        unit = gradient_of(result, values, torch.ones_like(result), retain_graph=True)
        for scale in (2.5, -1.0, 0.0):
            upstream = torch.full_like(result, scale)
            if reduction == "none":
                upstream[1] = 7.0
            rows = upstream.reshape(-1, *[1] * (values.dim() - 1))
            # Once by the backward pass of this graph, once by the first one of another.
            again = loss.call(values, constants, reduction=reduction)
            for graph in (result, again):
                gradient = gradient_of(graph, values, upstream, retain_graph=True)
                torch.testing.assert_close(gradient, unit * rows)


@every_loss_every_way
@pytest.mark.parametrize("scale", (1.0, -3.0))
def test_retained_graph_gives_the_same_gradient_twice_in_tensors_of_their_own(loss, way, scale):
    values, constants = loss.make(way)
    with way.active():
        result = loss.call(values, constants) * scale
    first = gradient_of(result, values, retain_graph=True)
    kept = first.clone()
    second = gradient_of(result, values, retain_graph=True)
    third = gradient_of(result, values)
    torch.testing.assert_close(second, first)
    assert torch.equal(third, second)
    assert torch.equal(first, kept)
    assert len({t.untyped_storage().data_ptr() for t in (first, second, third)}) == 3


@every_loss_every_way
def test_loss_used_twice_adds_both_gradients(loss, way):
    values, constants = loss.make(way, torch.float64)
    with way.active():
        result = loss.call(values, constants)
    (result + result.square()).backward()
    with way.active():
        unit = gradient_of(loss.call(values, constants), values)
    torch.testing.assert_close(values.grad, unit * (1 + 2 * result.item()))


@every_loss_every_way
def test_gradient_is_added_to_the_one_that_is_there(loss, way):
    values, constants = loss.make(way)
    with way.active():
        loss.call(values, constants).backward()
        once = values.grad.clone()
        loss.call(values, constants).backward()
    torch.testing.assert_close(values.grad, 2 * once)


@every_loss_every_way
def test_gradient_aliases_nothing_and_inputs_keep_their_bits(loss, way):
    values, constants = loss.make(way)
    tensors = [values, *(t for c in constants for t in ([c] if isinstance(c, torch.Tensor) else [c.coords, c.offsets]))]
    before = [t.detach().clone() for t in tensors]
    with way.active():
        loss.call(values, constants).backward(torch.tensor(3.0, device=way.device))
        again = gradient_of(loss.call(values, constants, reduction="none").sum(), values)
    for tensor, copy in zip(tensors, before):
        assert torch.equal(tensor.detach(), copy)
    memory = {t.untyped_storage().data_ptr() for t in tensors}
    assert values.grad.untyped_storage().data_ptr() not in memory
    assert again.untyped_storage().data_ptr() not in memory
    assert values.grad.untyped_storage().data_ptr() != again.untyped_storage().data_ptr()


@every_loss_every_way
def test_without_a_gradient_to_compute_there_is_no_graph_and_the_same_loss(loss, way):
    values, constants = loss.make(way)
    with way.active():
        expected = loss.call(values, constants)
        assert expected.requires_grad
        for context in (torch.no_grad, torch.inference_mode):
            with context():
                result = loss.call(values, constants)
            assert not result.requires_grad
            assert torch.equal(result, expected.detach())
        result = loss.call(values.detach(), constants)
    assert not result.requires_grad
    assert torch.equal(result, expected.detach())


@every_loss_every_way
def test_second_derivative_is_right_or_an_error_and_never_silence(loss, way):
    values, constants = loss.make(way, torch.float64)
    with way.active():
        result = loss.call(values, constants)
        gradient = gradient_of(result, values, create_graph=True)
        penalty = gradient.square().sum() + values.sum()
        if way.name == "eager":
            assert gradient_of(penalty, values).isfinite().all()
            return
        with pytest.raises(RuntimeError, match=r"differentiated again.*eager"):
            penalty.backward()


@every_native_loss
def test_create_graph_alone_changes_no_gradient(loss, way):
    values, constants = loss.make(way)
    with way.active():
        plain = gradient_of(loss.call(values, constants), values)
        built = gradient_of(loss.call(values, constants), values, create_graph=True)
    assert torch.equal(plain, built.detach())


def assert_gradient_or_complaint(loss, values, expected):
    """Whatever was changed since the forward pass: the gradient of what the loss saw, or an error. Never a third."""
    try:
        gradient = gradient_of(loss, values)
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)
    else:
        assert torch.equal(gradient, expected)


@every_loss_every_way
def test_changing_an_input_between_forward_and_backward_gives_no_wrong_gradient(loss, way):
    values, constants = loss.make(way)
    with way.active():
        expected = gradient_of(loss.call(values, constants), values)
        moved = values * 1
        result = loss.call(moved, constants)
    with torch.no_grad():
        moved.add_(1)
    assert_gradient_or_complaint(result, values, expected)


@every_way("feature_match")
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16), ids=str)
@pytest.mark.parametrize("changed", (1, 2), ids=("teacher", "weight"))
def test_changing_a_constant_between_forward_and_backward_gives_no_wrong_gradient(way: Way, dtype, changed):
    tensors = [way.put(x) for x in (normal(3, 4, dtype=dtype), normal(3, 4, seed=1, dtype=dtype), uniform(3))]
    student = tensors[0].requires_grad_()
    with way.active():
        expected = gradient_of(dk.feature_match_loss(*tensors), student)
        result = dk.feature_match_loss(*tensors)
    tensors[changed].mul_(2)
    assert_gradient_or_complaint(result, student, expected)


@every_way("localization")
@pytest.mark.parametrize("kind", ("energy", "rrr"))
def test_changing_the_boxes_between_forward_and_backward_gives_no_wrong_gradient(way, kind):
    maps = way.put(normal(2, 8, 9)).requires_grad_()
    boxes = dk.Boxes.from_lists([[[1, 1, 4, 5]], []]).to(way.device)
    with way.active():
        expected = gradient_of(dk.localization_loss(maps, boxes, kind=kind), maps)
        result = dk.localization_loss(maps, boxes, kind=kind)
    boxes.coords.add_(2)
    assert_gradient_or_complaint(result, maps, expected)


@every_loss_every_way
def test_backward_through_a_freed_graph_raises(loss, way):
    values, constants = loss.make(way)
    with way.active():
        result = loss.call(values, constants)
    result.backward()
    with pytest.raises(RuntimeError, match="second time"):
        result.backward()


@every_way("feature_match")
def test_expanded_student_gets_the_sum_over_its_repetitions(way):
    row, teacher = normal(1, 5, dtype=torch.float64), normal(4, 5, seed=1, dtype=torch.float64)
    expected = feature_match_oracle(row.expand(4, 5), teacher)[1].sum(0, keepdim=True)
    leaf = row.clone().requires_grad_()
    with way.active():
        dk.feature_match_loss(way.put(leaf.expand(4, 5)), way.put(teacher)).backward()
    torch.testing.assert_close(leaf.grad, expected)


# ---- memory ----


def allocations(function):
    """Bytes of every tensor that PyTorch allocates in `function`, largest first."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        function()
    sizes = (e.self_cpu_memory_usage for e in record.events())
    return sorted((size for size in sizes if size > 0), reverse=True)


@pytest.mark.parametrize("scale", (1.0, 3.0))
def test_feature_match_allocates_one_gradient_and_nothing_else_of_its_size(scale):
    student, teacher = normal(4, 16, 9, 9).requires_grad_(), normal(4, 16, 9, 9, seed=1)

    def step():
        student.grad = None
        (dk.feature_match_loss(student, teacher) * scale).backward()

    with dk.backend("cpp"):
        sizes = allocations(step)
    assert sizes[0] == student.nbytes
    assert sum(sizes[1:]) <= 64
    with dk.backend("eager"):
        assert sum(allocations(step)) > 2 * student.nbytes  # that this measure can see more


def test_feature_match_computes_no_gradient_that_nobody_asked_for():
    student, teacher = normal(4, 16, 9, 9).requires_grad_(), normal(4, 16, 9, 9, seed=1)

    def evaluate():
        with torch.no_grad():
            dk.feature_match_loss(student, teacher)
        dk.feature_match_loss(student.detach(), teacher)

    with dk.backend("cpp"):
        assert sum(allocations(evaluate)) <= 64


def test_energy_allocates_one_bit_a_pixel_and_one_gradient():
    maps = normal(4, 50, 70).requires_grad_()
    boxes = dk.Boxes.from_lists([[[1, 1, 30, 30]], [], None, [[3, 3, 5, 5]]])
    results = []
    with dk.backend("cpp"):
        forward = allocations(lambda: results.append(dk.energy_loss(maps, boxes)))
        backward = allocations(results[0].backward)
    bits = 4 * 50 * 3 * 4  # images, rows, words a row, bytes a word
    assert forward[0] == bits
    assert sum(forward[1:]) <= 128
    assert backward[0] == maps.nbytes
    assert sum(backward[1:]) <= 64


@pytest.mark.parametrize("kind", ("energy", "l1"))
def test_energy_does_not_keep_the_map_alive(kind):
    leaf = normal(2, 30, 40).requires_grad_()
    boxes = dk.Boxes.from_lists([[[1, 1, 30, 30]], []])
    maps = leaf * 1
    memory = StorageWeakRef(maps.untyped_storage())
    with dk.backend("cpp"):
        loss = dk.localization_loss(maps, boxes, kind=kind)
    del maps
    assert memory.expired() == (kind == "energy")  # l1 needs it, which shows that this test can tell
    loss.backward()
    assert leaf.grad.any()


def test_poison_reaches_what_the_native_ops_allocate():
    # Without this, the tests that every element is written would prove nothing.
    student, teacher = normal(2, 3), normal(2, 3, seed=1)
    with poisoned_memory(), profile(activities=[ProfilerActivity.CPU]) as record:
        torch.ops.debiaskd.feature_match(student, teacher, None, False, 1, True)
    names = [e.name for e in record.events()]
    assert names.count("aten::fill_") == 2  # the loss and the gradient
