"""`localization_loss`: every kind's value and gradient, on every backend. For autograd's sake: test_autograd.py."""

import math

import numpy as np
import pytest
import torch
from cases import (
    DTYPES,
    GOLDEN,
    KINDS,
    LAYOUTS,
    REDUCTIONS,
    assert_accurate,
    attribution,
    box_lists,
    covering,
    energy_terms,
    every_way,
    lay_out,
    localization_oracle,
    normal,
    poisoned_memory,
    threads,
)
from hypothesis import given
from hypothesis import strategies as st

import debiaskd as dk

pytestmark = pytest.mark.usefixtures("one_thread")
every_kind = pytest.mark.parametrize("kind", KINDS)


def loss_and_gradient(maps, boxes, upstream=None, **options):
    maps = maps.detach().requires_grad_()
    loss = dk.localization_loss(maps, boxes.to(maps.device), **options)
    upstream = torch.ones_like(loss) if upstream is None else torch.as_tensor(upstream).to(loss)
    (gradient,) = torch.autograd.grad(loss, maps, upstream)
    assert gradient.shape == maps.shape
    assert gradient.dtype == maps.dtype
    return loss.detach(), gradient


def check(way, maps, boxes, upstream=1.0, **options):
    """This way against the oracle, judged by what plain PyTorch manages."""
    packed = dk.Boxes.from_lists(boxes)
    with way.active():
        actual = loss_and_gradient(way.put(maps), packed, upstream, **options)
    with dk.backend("eager"):
        eager = loss_and_gradient(maps, packed, upstream, **options)
    exact = localization_oracle(maps, boxes, upstream=upstream, **options)
    terms = (0.0, 0.0)
    if options["kind"] == "energy":
        terms = (len(boxes), float(np.abs(upstream).max(initial=0)) * energy_terms(maps, options.get("size")))
    for a, x, e, t, what in zip(actual, exact, eager, terms, ("loss", "gradient")):
        assert_accurate(a, x, e, f"{what} {options} {maps.dtype} {list(maps.shape)} {maps.stride()}", t)


@st.composite
def problems(draw):
    """Maps, boxes and options: odd and even sizes around the words and vectors that kernels work in."""
    lengths = st.sampled_from((1, 2, 3, 7, 8, 31, 32, 33, 65))
    images, height, width = draw(st.sampled_from((0, 1, 2, 3))), draw(lengths), draw(lengths)
    size = draw(st.none() | st.tuples(lengths, lengths))
    kind = draw(st.sampled_from(KINDS))
    seed, dtype = draw(st.integers(0, 1000)), draw(st.sampled_from(DTYPES))
    maps = lay_out(attribution(kind, images, height, width, seed=seed, dtype=dtype), draw(st.sampled_from(LAYOUTS)))
    boxes = draw(box_lists(images, *(size or (height, width))))
    return maps, boxes, {"kind": kind, "size": size, "reduction": draw(st.sampled_from(REDUCTIONS))}


@every_way("localization")
@given(problem=problems(), scale=st.sampled_from((1.0, -0.3, 1000.0)))
def test_any_map_layout_size_and_boxes_agree_with_the_oracle(way, problem, scale):
    maps, boxes, options = problem
    upstream = scale
    if options["reduction"] == "none":
        upstream = (scale * normal(len(boxes), seed=9).double()).numpy()
    check(way, maps, boxes, upstream, **options)


@every_way("localization")
@every_kind
@pytest.mark.parametrize("size", [None, (37, 70), (9, 11)], ids=str)
def test_normalize_does_first_what_the_kind_expects(way, kind, size):
    maps = normal(3, 12, 17, dtype=torch.float64)
    check(way, maps, [[[2, 1, 9, 9]], [], None], 2.0, kind=kind, size=size, normalize=True)


BOX_SETS = {
    "none": [],
    "all of it": [[0, 0, 40, 30]],
    "overlapping": [[2, 3, 20, 20], [10, 10, 33, 25], [10, 10, 33, 25], [12, 12, 14, 14]],
    "outside": [[-9, -9, 0, 5], [40, 2, 60, 9], [3, 30, 9, 44], [-5, -9, 50, 0]],
    "over the edges": [[-4, -4, 6, 5], [30, 20, 99, 99], [-9, 10, 99, 12]],
    "touching the edges": [[0, 0, 1, 30], [39, 0, 40, 1], [0, 29, 40, 30]],
    "without area": [[5, 5, 5, 9], [7, 3, 12, 3], [0, 0, 0, 0]],
    "far away": [[-(2**31), -(2**31), 2, 2], [38, 28, 2**31 - 1, 2**31 - 1]],
    "200": [[(7 * i) % 39, (5 * i) % 29, (7 * i) % 39 + 1 + i % 3, (5 * i) % 29 + 1 + i % 2] for i in range(200)],
}


@every_way("localization")
@every_kind
@pytest.mark.parametrize("size", [None, (30, 40)], ids=str)
def test_every_set_of_boxes_makes_its_union(way, kind, size):
    shape = (30, 40) if size is None else (8, 10)
    check(way, attribution(kind, len(BOX_SETS), *shape), list(BOX_SETS.values()), kind=kind, size=size)


@every_way("localization")
@pytest.mark.parametrize(
    ("kind", "dtype", "shape", "size"),
    [
        *((kind, DTYPES[i], (2, 224, 224), None) for i, kind in enumerate(KINDS)),
        *((kind, DTYPES[i - 1], (2, 7, 7), (224, 224)) for i, kind in enumerate(KINDS)),
    ],
    ids=str,
)
def test_ordinary_sizes_are_as_accurate(way, kind, dtype, shape, size):
    boxes = [[[20, 30, 150, 224], [100, 0, 224, 60]], [[64, 64, 96, 96]]]
    check(way, attribution(kind, *shape, dtype=dtype), boxes, 3.0, kind=kind, size=size)


@every_way("localization")
@pytest.mark.parametrize(
    ("kind", "dtype"), [(kind, (torch.float32, torch.bfloat16)[i % 2]) for i, kind in enumerate(KINDS)], ids=str
)
def test_long_sums_of_equal_pixels_do_not_drift(way, kind, dtype):
    # Rounding that always errs to the same side shows in sums of equal numbers, and in no random ones.
    interpreted = way.name in ("triton", "cuda_on_cpu")  # which takes its time
    size = (512, 512) if interpreted else (1024, 1024)
    check(way, torch.full((1, 32, 32), 0.1, dtype=dtype), [[[10, 10, 300, 900]]], kind=kind, size=size)


#: Shapes that kernels have to cut, and sizes; what is interpolated meets a second kind.
CUT = [
    ((2, 40, 600), None),
    ((2, 40, 259), None),
    ((2, 2, 3), (70, 600)),
    ((2, 3, 1), (40, 600)),
    ((2, 3, 9), (40, 600)),
    ((2, 40, 300), (41, 301)),
    ((2, 81, 600), (40, 300)),
    ((2, 3, 600), (40, 30)),
]


@every_way("localization")
@pytest.mark.parametrize(
    ("shape", "size", "kind", "dtype"),
    [
        (*cut, KINDS[(i + 2 * j) % 4], (torch.float32, torch.float64)[(i // 4 + j) % 2])
        for i, cut in enumerate(CUT)
        for j in range(2)
        if j == 0 or i in (2, 5, 6)
    ],
    ids=str,
)
def test_maps_that_kernels_have_to_cut_agree_with_the_oracle(way, kind, dtype, shape, size):
    boxes = [[[250, 30, 262, 34], [0, 31, 300, 33], [509, 0, 600, 9], [20, 2, 28, 40]], [[3, 3, 590, 39]]]
    check(way, attribution(kind, *shape, dtype=dtype), boxes, 2.0, kind=kind, size=size)


@every_way("localization")
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_great_many_maps_count_each_for_itself(way, reduction):
    count = 100 if way.name == "triton" else 8_300  # what kernels do not leave to one program or block
    maps = normal(count, 1, 1)
    annotated, covered = torch.arange(count) % 3 > 0, torch.arange(count) % 2 > 0
    coords = torch.stack([torch.zeros(count), torch.zeros(count), covered, covered], 1).int()
    boxes = dk.Boxes(coords, torch.arange(count + 1), annotated=annotated)
    with way.active():
        loss, gradient = loss_and_gradient(way.put(maps), boxes, kind="rrr", reduction=reduction)
    outside = (annotated & ~covered) * maps[:, 0, 0].double()
    each, share = outside**2, 1 / annotated.sum() if reduction == "mean" else 1
    torch.testing.assert_close(loss.cpu().double(), each if reduction == "none" else each.sum() * share)
    torch.testing.assert_close(gradient[:, 0, 0].cpu().double(), 2 * outside * share, rtol=1e-6, atol=0)


@every_way("localization")
@pytest.mark.parametrize("kind", ("energy", "l1"))
def test_boxes_are_read_with_any_strides(way, kind):
    maps = way.put(attribution(kind, 3, 20, 40))
    boxes = dk.Boxes.from_lists([[[2, 3, 9, 9], [30, 1, 40, 18]], None, [[0, 0, 20, 20]]]).to(way.device)
    spread = dk.Boxes(
        boxes.coords.t().contiguous().t(),
        torch.stack([boxes.offsets, boxes.offsets + 1], 1)[:, 0],
        annotated=torch.stack([boxes.annotated, ~boxes.annotated], 1)[:, 0],
    )
    with way.active():
        expected, actual = (loss_and_gradient(maps, b, kind=kind) for b in (boxes, spread))
    assert torch.equal(actual[0], expected[0])
    assert torch.equal(actual[1], expected[1])


def golden(prefix, kind):
    with np.load(GOLDEN / "localization.npz") as file:
        found = {k.removeprefix(f"{prefix}_{kind}_"): torch.as_tensor(file[k]) for k in file.files}
    return found, dk.Boxes(found["boxes"], found["offsets"])


@every_way("localization")
@every_kind
@pytest.mark.parametrize("name", ("loc0", "loc1"))
def test_reference_losses_of_finished_maps_are_reproduced(way, kind, name):
    expected, boxes = golden(name, kind)
    maps = expected["attributions"]
    with way.active():
        loss, gradient = loss_and_gradient(way.put(maps), boxes, kind=kind, reduction="none")
    compare_with_reference(loss.cpu(), gradient.cpu(), expected, maps < 1 if kind == "ppce" else None)


@every_way("localization")
@every_kind
@pytest.mark.parametrize("name", ("up0", "up1", "up2"))
def test_reference_losses_of_raw_small_maps_are_reproduced(way, kind, name):
    expected, boxes = golden(name, kind)
    options = {"kind": kind, "size": tuple(expected["size"].tolist()), "normalize": True, "reduction": "none"}
    raw = expected["raw"]
    with way.active():
        loss, gradient = loss_and_gradient(way.put(raw), boxes, **options)
    # Through the interpolation, pixels that are exactly 1 reach the map's largest value alone.
    below = raw < raw.amax((1, 2), keepdim=True) if kind == "ppce" else None
    compare_with_reference(loss.cpu(), gradient.cpu(), expected, below)


def compare_with_reference(loss, gradient, expected, where):
    """`where`: the reference's binary cross-entropy has gradient 0, and not -1 over the area, at exactly 1."""
    torch.testing.assert_close(loss, expected["loss"], rtol=2e-6, atol=1e-7)
    where = torch.ones_like(gradient, dtype=torch.bool) if where is None else where
    largest = expected["grad"].abs().max().item()
    assert where.float().mean() > 0.9
    torch.testing.assert_close(gradient[where], expected["grad"][where], rtol=1e-4, atol=2e-6 * largest)


@every_way("localization")
def test_energy_of_a_map_without_positive_values_is_one_without_a_gradient(way):
    maps = way.put(torch.stack([torch.zeros(4, 5), -torch.ones(4, 5), torch.full((4, 5), 1e-10)]))
    with way.active():
        loss, gradient = loss_and_gradient(maps, dk.Boxes.from_lists([[[0, 0, 3, 3]]] * 3), reduction="none")
    assert loss[:2].tolist() == [1, 1]
    assert loss[2].item() == pytest.approx(1, abs=1e-6)
    assert not gradient[:2].any()
    assert gradient[2, 0, 0] == -1  # below 1e-7 nothing is divided: 1 - sum of what is inside


@every_way("localization")
@every_kind
@pytest.mark.parametrize("normalize", (False, True))
def test_exact_zeros_have_a_finite_gradient_that_agrees_with_the_oracle(way, kind, normalize):
    # Maps behind a ReLU are full of exact zeros, where clamp, log and division have their traps.
    maps = torch.tensor([[[0.0, 0.5, 0.0], [1.0, 0.0, 0.25]], [[0.0] * 3] * 2])
    boxes = [[[0, 0, 2, 1]], [[0, 0, 2, 1]]]
    exact = localization_oracle(maps, boxes, kind, normalize=normalize, reduction="none")
    with way.active():
        loss, gradient = loss_and_gradient(
            way.put(maps), dk.Boxes.from_lists(boxes), kind=kind, normalize=normalize, reduction="none"
        )
    torch.testing.assert_close(loss.cpu().double(), exact[0])
    torch.testing.assert_close(gradient.cpu().double(), exact[1])


@every_way("localization")
@every_kind
def test_images_that_are_not_annotated_count_nothing(way, kind):
    maps = attribution(kind, 4, 9, 11)
    boxes = [[[1, 1, 5, 5]], None, [], None]
    broken = maps.clone()
    broken[1], broken[3] = -50, 1e6
    with way.active():
        loss, gradient = loss_and_gradient(way.put(maps), dk.Boxes.from_lists(boxes), kind=kind)
        assert (loss, gradient[1].any(), gradient[3].any()) == (
            dk.localization_loss(way.put(maps[[0, 2]]), dk.Boxes.from_lists([boxes[0], []]).to(way.device), kind=kind),
            False,
            False,
        )
        other, _ = loss_and_gradient(way.put(broken), dk.Boxes.from_lists(boxes), kind=kind)
    assert other == loss


@every_way("localization")
@covering(kind=KINDS, reduction=REDUCTIONS, images=(0, 2))
def test_nothing_annotated_is_zero_with_a_zero_gradient(way, kind, reduction, images):
    maps = way.put(attribution(kind, images, 5, 6))
    for size in (None, (9, 9)):
        with way.active():
            loss, gradient = loss_and_gradient(
                maps, dk.Boxes.from_lists([None] * images), kind=kind, reduction=reduction, size=size, normalize=True
            )
        assert loss.tolist() == ([0.0] * images if reduction == "none" else 0.0)
        assert not gradient.any()


@every_way("localization")
@covering(kind=KINDS, inside=(True, False), size=[None, (16, 66)])
def test_nan_in_a_map_shows_in_its_loss(way, kind, inside, size):
    maps = attribution(kind, 2, 8, 33)
    maps[(1, 4, 15) if inside else (1, 1, 30)] = math.nan
    scale = 1 if size is None else 2
    boxes = dk.Boxes.from_lists([[[10 * scale, 2 * scale, 20 * scale, 7 * scale]]] * 2)
    with way.active():
        loss = dk.localization_loss(way.put(maps), boxes.to(way.device), kind=kind, size=size, reduction="none")
    ignored = kind == "ppce" and not inside
    assert loss.isnan().tolist() == [False, not ignored]


@every_way("localization")
@covering(kind=KINDS, dtype=DTYPES, size=[None, (20, 40)], layout=("contiguous", "reversed", "stepped"))
def test_every_element_is_written(way, kind, dtype, size, layout):
    maps = way.put(lay_out(attribution(kind, 3, 13, 37, dtype=dtype), layout))
    boxes = dk.Boxes.from_lists([[[2, 3, 9, 9]], [], None])
    for reduction in ("none", "mean"):
        with way.active(), poisoned_memory():
            loss, gradient = loss_and_gradient(maps, boxes, kind=kind, size=size, reduction=reduction)
        assert loss.isfinite().all()
        assert gradient.isfinite().all()


@every_way("localization")
@pytest.mark.parametrize(
    ("kind", "size"), [("energy", None), ("rrr", None), ("energy", (50, 90)), ("ppce", (50, 90))], ids=str
)
def test_same_inputs_give_the_same_bits_with_one_thread_and_with_two(way, kind, size):
    maps = way.put(attribution(kind, 5, 47, 83))
    boxes = dk.Boxes.from_lists([[[2, 3, 40, 30], [10, 9, 70, 47]]] * 5)
    results = []
    for count in (1, 2, 2):
        with way.active(), threads(count):
            results.append(loss_and_gradient(maps, boxes, kind=kind, size=size))
    for loss, gradient in results[1:]:
        assert torch.equal(loss, results[0][0])
        assert torch.equal(gradient, results[0][1])


@every_way("localization")
@covering(kind=KINDS, size=[None, (7, 9), (3, 2)], normalize=(False, True))
def test_gradcheck(way, kind, size, normalize):
    # Values apart from each other and from 0 and 1: no kink, and no second largest value, within a finite difference.
    order = torch.randperm(60, generator=torch.Generator().manual_seed(3)).double()
    maps = ((order + 1) / 64).reshape(3, 4, 5)
    if kind in ("energy", "rrr"):
        maps = maps - 0.503
    maps = way.put(lay_out(maps, "reversed")).requires_grad_()
    boxes = dk.Boxes.from_lists([[[0, 0, 2, 2], [1, 1, 3, 3]], [[1, 0, 2, 9]], None]).to(way.device)
    interpreted = way.name == "triton"  # where a call takes a tenth of a second
    for reduction in ("none",) if interpreted else ("none", "mean"):
        with way.active():
            assert torch.autograd.gradcheck(
                lambda a, r=reduction: dk.localization_loss(
                    a, boxes, kind=kind, size=size, normalize=normalize, reduction=r
                ),
                (maps,),
                fast_mode=interpreted,
            )
