"""The ops under `torch.compile`: registration, graphs without a break, and a backend that stays the caller's choice."""

import shutil

import pytest
import torch
import torch.fx.experimental._config
from cases import attribution, lay_out, normal, uniform, ways
from every_loss import every_loss_of_other_shapes, every_loss_once, every_native_loss_once

import debiaskd as dk
from debiaskd.ops import (
    backend,
    box_overlap,  # noqa: F401  (registers its op)
)
from debiaskd.ops.localization import KINDS as KIND_CODES

pytestmark = [pytest.mark.usefixtures("one_thread", "no_compiled_code"), pytest.mark.compiles]
needs_native = pytest.mark.skipif(not backend.native, reason="the native libraries are not built")


@pytest.fixture
def no_compiled_code():
    """Each test compiles for itself, and none runs into the limit of recompilations."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def loss_and_gradient(function, values, upstream=None):
    values = values.detach().requires_grad_()
    loss = function(values)
    return loss.detach(), torch.autograd.grad(loss, values, upstream)[0]


def assert_same(actual, expected):
    for a, e in zip(actual, expected):
        torch.testing.assert_close(a, e)


@every_loss_once
def test_one_compiled_graph_equals_the_plain_call(loss, way):
    values, constants = loss.make(way, torch.bfloat16 if "upsampled" in loss.name else torch.float32)

    def function(x):
        return loss.call(x * 2, constants, reduction="mean") * 3

    with way.active():
        compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
        assert_same(loss_and_gradient(compiled, values), loss_and_gradient(function, values))
        with torch.no_grad():
            torch.testing.assert_close(compiled(values), function(values))


@every_loss_of_other_shapes
@torch.fx.experimental._config.patch(use_duck_shape=False)  # sizes that are alike by chance may differ the next time
def test_boxes_and_batches_of_other_sizes_run_in_the_same_dynamic_graph(loss, way):
    graphs = []

    def count(module, inputs):
        graphs.append(module)
        return module.forward

    def function(values, *constants):
        return loss.call(values, constants, reduction="sum")

    values, constants = loss.make(way)
    with way.active():
        compiled = torch.compile(function, backend=count, fullgraph=True, dynamic=True)
        for images in ([0, 1, 2], [2, 0], [0, 1, 2, 1, 0]):
            batch = values.detach()[images]
            chosen = [c[images] for c in constants]
            torch.testing.assert_close(compiled(batch, *chosen), function(batch, *chosen))
    assert len(graphs) == 1


@every_native_loss_once
def test_another_backend_is_taken_up_after_compilation(loss, way):
    if not backend.native:
        pytest.skip("needs two backends")
    values, constants = loss.make(way)
    ops = []

    def record(module, inputs):
        ops.append({str(node.target) for node in module.graph.nodes if node.op == "call_function"})
        return module.forward

    compiled = torch.compile(lambda x: loss.call(x, constants), backend=record, fullgraph=True)
    native = f"{backend.NAMESPACES[way.name]}.{loss.op}"
    for name, expected in ((way.name, True), ("eager", False), (way.name, True)):
        with dk.backend(name), torch.no_grad():
            torch.testing.assert_close(compiled(values), loss.call(values, constants))
        assert any(native in op for op in ops[0 if expected else 1]) == expected
    assert len(ops) == 2  # the third call found the first one's graph again


@needs_native
def test_backend_may_be_chosen_inside_the_compiled_function():
    student, teacher, targets = normal(3, 4), normal(3, 4, seed=1), []

    def record(module, inputs):
        targets.extend(str(node.target) for node in module.graph.nodes)
        return module.forward

    def function(x):
        with dk.backend("eager"):
            return dk.feature_match_loss(x, teacher)

    torch.testing.assert_close(torch.compile(function, backend=record, fullgraph=True)(student), function(student))
    assert targets
    assert not any("debiaskd" in target for target in targets)
    assert backend.requested() is None


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_inductor_runs_both_ops_in_a_training_step():
    torch.manual_seed(0)
    model = torch.nn.Linear(12, 24)
    images, teacher = normal(3, 12), normal(3, 24, seed=1)
    boxes = dk.Boxes.from_lists([[[1, 1, 4, 3]], [], None])

    def step(x):
        features = model(x)
        return dk.feature_match_loss(features, teacher) + dk.energy_loss(features.reshape(3, 4, 6), boxes, size=(8, 12))

    expected = step(images)
    gradients = torch.autograd.grad(expected, list(model.parameters()))
    loss = torch.compile(step, fullgraph=True)(images)
    torch.testing.assert_close(loss, expected)
    assert_same(torch.autograd.grad(loss, list(model.parameters())), gradients)


# ---- registration ----


def opcheck(way, op, *arguments):
    pytest.importorskip("expecttest")  # which opcheck needs
    placed = tuple(way.put(x) if isinstance(x, torch.Tensor) else x for x in arguments)
    kernels = backend.kernels(way.name.split("-")[0])
    results = torch.library.opcheck(getattr(kernels, op).default, placed)
    assert set(results.values()) == {"SUCCESS"}, results


def registered(op):
    """The test runs once for each backend and device that `op` has kernels for, given as `way`."""
    found = [way for way in ways(op) if way.name.split("-")[0] in backend.NAMESPACES]
    return pytest.mark.parametrize("way", [pytest.param(way, id=way.name) for way in found])


@registered("feature_match")
@pytest.mark.parametrize(("samples", "layout"), ((0, "contiguous"), (3, "channels_last")))
def test_feature_match_is_registered_as_it_behaves(way, samples, layout):
    dtype = torch.bfloat16 if layout == "channels_last" else torch.float32
    student, teacher = (lay_out(normal(samples, 4, 3, 5, seed=i, dtype=dtype), layout) for i in range(2))
    for weight, normalize, reduction in ((None, False, 1), (uniform(samples), True, 0)):
        upstream = uniform(samples) if reduction == 0 else torch.tensor(2.0)
        for with_gradient in (True, False):
            opcheck(way, "feature_match", student, teacher, weight, normalize, reduction, with_gradient)
        opcheck(way, "feature_match_backward", upstream, student, teacher, weight, normalize, reduction)
        opcheck(way, "feature_match_scale_", student.clone(), upstream)


@registered("map_cosine")
@pytest.mark.parametrize(
    ("samples", "sizes"),
    [(0, ((4, 7), (4, 7))), (3, ((4, 7), (4, 7))), (3, ((2, 3), (5, 9))), (0, ((5, 9), (2, 3)))],
    ids=str,
)
def test_map_cosine_is_registered_as_it_behaves(way, samples, sizes):
    student, teacher = (normal(samples, 2, *size, seed=i) for i, size in enumerate(sizes))
    for weight, reduction in ((None, 1), (uniform(samples), 0)):
        upstream = uniform(samples) if reduction == 0 else torch.tensor(2.0)
        for with_gradient in (True, False):
            opcheck(way, "map_cosine", student, teacher, weight, reduction, with_gradient)
        opcheck(way, "map_cosine_backward", upstream, student, teacher, weight, reduction)


@registered("localization")
@pytest.mark.parametrize(
    ("kind", "images", "layout", "size"),
    [
        ("energy", 3, "reversed", (5, 40)),
        ("energy", 3, "reversed", (9, 50)),
        ("rrr", 3, "reversed", (9, 50)),
        ("ppce", 0, "contiguous", (5, 40)),
    ],
    ids=str,
)
def test_localization_is_registered_as_it_behaves(way, kind, images, layout, size):
    dtype = torch.bfloat16 if layout == "reversed" else torch.float32
    maps = way.put(lay_out(attribution(kind, images, 5, 40, dtype=dtype), layout))
    boxes = dk.Boxes.from_lists([[[2, 1, 9, 4]], [], None][:images])
    mask = None if images == 0 else way.put(torch.arange(3 * size[1], dtype=torch.int32).reshape(3, 1, -1))
    packed = (*map(way.put, (boxes.coords, boxes.offsets, boxes.annotated)), mask)
    for reduction, upstream in ((0, uniform(images)), (1, torch.tensor(2.0))):
        options = (KIND_CODES[kind], *size, reduction)
        for with_state in (True, False):
            opcheck(way, "localization", maps, *packed, *options, with_state)
        kernels = backend.kernels(way.name.split("-")[0])
        _, coefficients, positive = kernels.localization(maps, *packed, *options, True)
        saved = None if positive.numel() else maps
        opcheck(
            way, "localization_backward", upstream, saved, *packed, coefficients, positive, *options[:3], 5, 40, dtype
        )


@registered("box_overlap")
@pytest.mark.parametrize(("images", "layout"), ((0, "contiguous"), (3, "contiguous"), (3, "reversed")))
@pytest.mark.parametrize("size", [(5, 40), (9, 50)], ids=["own", "up"])
def test_box_overlap_is_registered_as_it_behaves(way, images, layout, size):
    maps = lay_out(normal(images, 5, 40, dtype=torch.bfloat16 if layout == "reversed" else torch.float32), layout)
    boxes, areas = (dk.Boxes.from_lists([row, [], None][:images]) for row in ([[2, 1, 9, 4]], [[0, 0, 3, 3]]))
    packed = (boxes.coords, boxes.offsets, boxes.annotated, None)
    mask = torch.arange(images * size[1], dtype=torch.int32).reshape(images, 1, size[1])
    for ignore in ((None, None, None, None), (areas.coords, areas.offsets, areas.annotated, mask)):
        opcheck(way, "box_overlap", maps, *packed, *ignore, [0.25, 0.5], *size)
