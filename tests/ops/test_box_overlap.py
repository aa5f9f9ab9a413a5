"""`box_overlap`: intersections and unions, counted in pixels, on every backend."""

import math

import pytest
import torch
from cases import DTYPES, LAYOUTS, box_lists, covering, every_way, lay_out, normal, poisoned_memory, threads
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

import debiaskd as dk
from debiaskd.ops.box_overlap import box_overlap

pytestmark = pytest.mark.usefixtures("one_thread")
THRESHOLDS = (0.0, 0.05, 0.3, 0.5, 0.95)
#: Pixels as near as this to a threshold, relative to the largest, may count either way: interpolation rounds.
NEAR = 1e-6


def covered(rows, size):
    found = torch.zeros(size, dtype=torch.bool)
    for x0, y0, x1, y1 in rows or []:
        found[max(y0, 0) : max(y1, 0), max(x0, 0) : max(x1, 0)] = True
    return found


def oracle(one, boxes, thresholds, size, ignore=()):
    """Least and most that the counts of one map may be, [T] each, in float64: nothing but judged pixels in a row."""
    wide = F.interpolate(one.double()[None, None], size=size, mode="bilinear")[0, 0].clamp(min=0)
    mask = covered(boxes, size)
    judged = mask | ~covered(ignore, size)
    pixels, mask = wide[judged], mask[judged]
    near, high = 0.0, float(pixels.max()) if len(pixels) else 0.0
    spread = high - float(pixels.min()) if len(pixels) else 0.0
    if tuple(one.shape) != size and one.max() > one.min():
        near = NEAR * high / spread if spread > NEAR * high else math.inf  # nothing but rounding
    pixels = (pixels - pixels.min()) / spread if spread > 0 and one.max() > one.min() else pixels.sign()
    counts = []
    for shift in (near, -near):
        above = [pixels > t + shift for t in thresholds]
        counts.append(([int((a & mask).sum()) for a in above], [int((a | mask).sum()) for a in above]))
    return counts


def check(way, maps, boxes, size, ignore=None):
    packed = dk.Boxes.from_lists(boxes).to(way.device)
    areas = None if ignore is None else dk.Boxes.from_lists(ignore).to(way.device)
    with way.active():
        both, either, defined = (
            x.cpu() for x in box_overlap(way.put(maps), packed, THRESHOLDS, size=size, ignore=areas)
        )
    assert both.dtype == either.dtype == torch.int64
    assert both.shape == either.shape == (len(boxes), len(THRESHOLDS))
    assert defined.tolist() == [rows is not None for rows in boxes]
    for i, rows in enumerate(boxes):
        if rows is None:
            assert not both[i].any() and not either[i].any()
            continue
        least, most = oracle(maps[i], rows, THRESHOLDS, size or tuple(maps.shape[1:]), ignore[i] if ignore else ())
        for found, low, high in zip((both[i], either[i]), least, most):
            assert all(a <= b <= c for a, b, c in zip(low, found.tolist(), high)), (i, low, found.tolist(), high)


@st.composite
def problems(draw):
    """Maps, boxes and ignored areas: odd and even sizes around the vectors that kernels work in."""
    lengths = st.sampled_from((1, 2, 3, 7, 8, 15, 16, 17, 33, 65))
    images, height, width = draw(st.sampled_from((0, 1, 2, 3))), draw(lengths), draw(lengths)
    size = draw(st.none() | st.tuples(lengths, lengths))
    maps = normal(images, height, width, seed=draw(st.integers(0, 1000)), dtype=draw(st.sampled_from(DTYPES)))
    if draw(st.booleans()):
        maps = maps.abs() + 0.25
    boxes, ignore = (draw(box_lists(images, *(size or (height, width)))) for _ in range(2))
    return lay_out(maps, draw(st.sampled_from(LAYOUTS))), boxes, size, draw(st.sampled_from((None, ignore)))


@every_way("box_overlap")
@given(problem=problems())
def test_any_map_layout_size_and_boxes_agree_with_the_oracle(way, problem):
    check(way, *problem)


@every_way("box_overlap")
@covering(shape__size=[((3, 224, 224), None), ((3, 7, 7), (224, 224))], dtype=DTYPES, ignoring=(False, True))
def test_ordinary_sizes_agree_with_the_oracle(way, shape, size, dtype, ignoring):
    boxes = [[[20, 30, 150, 224], [100, 0, 224, 60]], [[64, 64, 96, 96]], []]
    areas = [[[0, 0, 40, 224]], None, [[3, 3, 5, 5], [200, 200, 300, 300], [-9, -9, 0, 0]]]
    check(way, normal(*shape, dtype=dtype), boxes, size, areas if ignoring else None)


@every_way("box_overlap")
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
@pytest.mark.parametrize("scale", (1.0, 1 / 3, 1e-20, 1e-44, 1e30, 3e38 / 40))
def test_pixels_at_a_threshold_count_as_in_the_normalised_map(way, dtype, scale):
    maps = torch.randint(-5, 41, (20, 6, 12), generator=torch.Generator().manual_seed(0)).to(dtype)
    maps[10:] = maps[10:].clamp(min=3)
    maps = maps * scale
    thresholds = [i / 40 for i in range(40)] + [1e-300, 1 - 1e-12]
    boxes = dk.Boxes.from_lists([[[i % 7, 1, 6 + i % 6, 5]] for i in range(20)])
    with way.active():
        both, either, _ = (x.cpu() for x in box_overlap(way.put(maps), boxes.to(way.device), thresholds))
    positive = maps.clamp(min=0)
    low, high = positive.amin((1, 2), keepdim=True), positive.amax((1, 2), keepdim=True)
    above = ((positive - low) / (high - low))[:, None] > torch.tensor(thresholds, dtype=dtype)[:, None, None]
    mask = boxes.mask((6, 12))[:, None]
    assert torch.equal(both, (above & mask).sum((2, 3)))
    assert torch.equal(either, (above | mask).sum((2, 3)))


@every_way("box_overlap")
@pytest.mark.parametrize(
    ("dtype", "shape"), [(dtype, ((3, 5), (1, 1), (2, 3), (3, 5))[i]) for i, dtype in enumerate(DTYPES)], ids=str
)
def test_constant_maps_are_marked_whole_or_not_at_all(way, dtype, shape):
    maps = torch.tensor([0.0, -0.0, -2.0, 2.7])[:, None, None].expand(4, *shape).to(dtype)
    boxes = dk.Boxes.from_lists([[[0, 0, 2, 3]]] * 4).to(way.device)
    with way.active():
        both, either, defined = box_overlap(way.put(maps), boxes, (0.0, 0.9), size=(3, 5))
    assert both.tolist() == [[0, 0]] * 3 + [[6, 6]]
    assert either.tolist() == [[6, 6]] * 3 + [[15, 15]]
    assert defined.all()


@every_way("box_overlap")
@covering(dtype=DTYPES, size=[None, (8, 34)], value=(math.nan, -math.nan, math.inf, -math.inf))
def test_nan_and_infinity_show_unless_they_are_ignored(way, dtype, size, value):
    maps = normal(3, 4, 17, dtype=dtype).abs()
    maps[1:, 2, 3] = torch.full((), value, dtype=dtype) if value == value else torch.tensor(math.nan, dtype=dtype)
    if math.copysign(1, value) < 0:
        maps[1:, 2, 3] = torch.copysign(maps[1:, 2, 3], torch.tensor(-1.0, dtype=dtype))
    scale = 1 if size is None else 2
    boxes = dk.Boxes.from_lists([[[9 * scale, 0, 17 * scale, 2]]] * 3).to(way.device)
    around = [[2 * scale - 1, scale, 5 * scale, 4 * scale]]
    areas = dk.Boxes.from_lists([None, None, around]).to(way.device)
    with way.active():
        _, either, defined = box_overlap(way.put(maps), boxes, (0.5,), size=size, ignore=areas)
    shows = value != -math.inf  # which is not positive
    assert defined.tolist() == [True, not shows, True]
    assert (either > 0).flatten().tolist() == defined.tolist()


@every_way("box_overlap")
def test_ignored_areas_are_as_if_they_were_not_there(way):
    maps = normal(1, 5, 8)
    cut = maps[:, :, 3:].clone()
    maps[:, :, :3] = torch.tensor([9.0, -9.0, 0.0])  # would change the smallest and the largest value
    boxes, moved = dk.Boxes.from_lists([[[3, 1, 6, 9]]]), dk.Boxes.from_lists([[[0, 1, 3, 9]]])
    areas = dk.Boxes.from_lists([[[0, 0, 2, 5], [1, 0, 3, 5], [4, 2, 5, 3]]])  # the last lies in the box
    with way.active():
        found = box_overlap(way.put(maps), boxes.to(way.device), THRESHOLDS, ignore=areas.to(way.device))
        expected = box_overlap(way.put(cut), moved.to(way.device), THRESHOLDS)
        none = box_overlap(way.put(maps), boxes.to(way.device), THRESHOLDS)
        unknown = areas.annotated_where(torch.tensor([False])).to(way.device)
        not_known = box_overlap(way.put(maps), boxes.to(way.device), THRESHOLDS, ignore=unknown)
        everything = dk.Boxes.from_lists([[[0, 0, 8, 5]]]).to(way.device)
        nothing = box_overlap(way.put(maps), dk.Boxes.from_lists([[]]).to(way.device), (0.5,), ignore=everything)
    for a, b, c, d in zip(found, expected, not_known, none):
        assert torch.equal(a, b)
        assert torch.equal(c, d)
    assert not torch.equal(found[1], none[1])
    assert [x.tolist() for x in nothing] == [[[0]], [[0]], [True]]


@every_way("box_overlap")
@pytest.mark.parametrize("size", [None, (20, 40)], ids=str)
def test_every_element_is_written_and_threads_change_nothing(way, size):
    maps = way.put(normal(7, 13, 37))
    boxes = dk.Boxes.from_lists([[[2, 3, 9, 9]], [], None, [[0, 0, 9, 9]], None, [[1, 1, 2, 2]], []]).to(way.device)
    results = []
    for count in (1, 2):
        with way.active(), poisoned_memory(), threads(count):
            results.append(box_overlap(maps, boxes, THRESHOLDS, size=size))
    assert all(torch.equal(a, b) for a, b in zip(*results))
    assert all(0 <= int(x.min()) <= int(x.max()) <= 20 * 40 for x in results[0][:2])
    assert results[0][2].tolist() == boxes.annotated.tolist()


@pytest.mark.parametrize("at_once", (1, 2, 100))
def test_eager_takes_as_many_maps_at_once_as_it_likes(monkeypatch, at_once):
    maps, boxes = normal(5, 6, 6), dk.Boxes.from_lists([[[0, 0, 9, 9]], [[2, 2, 5, 5]], None, [], [[1, 1, 3, 3]]])
    with dk.backend("eager"):
        expected = box_overlap(maps, boxes, THRESHOLDS, size=(12, 12), ignore=boxes[[4, 3, 2, 1, 0]])
        monkeypatch.setattr("debiaskd.ops.box_overlap.maps_at_once", lambda *_: at_once)
        found = box_overlap(maps, boxes, THRESHOLDS, size=(12, 12), ignore=boxes[[4, 3, 2, 1, 0]])
    assert all(torch.equal(a, b) for a, b in zip(found, expected))


@every_way("box_overlap")
def test_maps_that_ask_for_a_gradient_get_none(way):
    maps = way.put(normal(1, 3, 3)).requires_grad_()
    with way.active():
        found = box_overlap(maps, dk.Boxes.from_lists([[]]).to(way.device), (0.5,))
    assert not any(x.requires_grad for x in found)


@pytest.mark.parametrize("name", ("cuda", "triton"))
def test_under_backends_without_it_it_is_a_composition(name):
    """So that a model can be judged where it is trained on a backend that was asked for."""
    maps, boxes = torch.rand(2, 4, 4), dk.Boxes.from_lists([[[0, 0, 2, 3]], []])
    with dk.backend("eager"):
        expected = box_overlap(maps, boxes, (0.5,))
    with dk.backend(name):
        found = box_overlap(maps, boxes, (0.5,))
    assert all(torch.equal(a, b) for a, b in zip(found, expected))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"attribution": [[1.0]]}, TypeError, "attribution must be a torch.Tensor, got list"),
        ({"attribution": torch.zeros(2, 4, 4).long()}, TypeError, "attribution must be float32, .*, got torch.int64"),
        ({"attribution": torch.zeros(2, 4)}, ValueError, r"attribution must have shape \[N,H,W\], got \[2, 4\]"),
        ({"attribution": torch.zeros(2, 0, 4)}, ValueError, "attribution must have at least one pixel a map"),
        ({"boxes": [[0, 0, 1, 1]]}, TypeError, "boxes must be debiaskd.Boxes, got list"),
        ({"boxes": dk.Boxes.from_lists([[]])}, ValueError, "boxes must be of N=2 images, got 1"),
        ({"boxes": dk.Boxes.from_lists([[], []]).to("meta")}, ValueError, "boxes must be on the device of attribution"),
        ({"ignore": torch.zeros(2, 4)}, TypeError, "ignore must be debiaskd.Boxes, got Tensor"),
        ({"ignore": dk.Boxes.from_lists([[]] * 3)}, ValueError, "ignore must be of N=2 images, got 3"),
        ({"ignore": dk.Boxes.from_lists([[], []]).to("meta")}, ValueError, "ignore must be on the device of attribu"),
        ({"thresholds": 0.5}, TypeError, "thresholds must be a sequence, got float"),
        ({"thresholds": ()}, ValueError, r"thresholds must lie in \[0,1\), got \[\]"),
        ({"thresholds": (0.5, 1.0)}, ValueError, r"thresholds must lie in \[0,1\), got \[0.5, 1.0\]"),
        ({"size": (4, 0)}, ValueError, r"size must be \(height, width\), both >= 1, got \(4, 0\)"),
    ],
)
def test_bad_input_is_named(change, error, message):
    arguments = {"attribution": torch.zeros(2, 4, 4), "boxes": dk.Boxes.from_lists([[], []]), "thresholds": (0.5,)}
    with pytest.raises(error, match=message):
        box_overlap(**{**arguments, **change})
