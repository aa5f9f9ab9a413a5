"""Metrics and the closed-form map against numbers by hand, reference vectors and autograd."""

import json
import math
import subprocess
import sys
from pathlib import Path

import distributed_metrics
import numpy as np
import pytest
import torch
from torch import nn

from bench import metrics as bench_metrics
from debiaskd import Boxes, metrics
from debiaskd.attribution import final_layer_map
from debiaskd.metrics import (
    box_coverage,
    box_size_bins,
    energy_in_box,
    energy_pointing_game,
    group_accuracy,
    iou_with_boxes,
)

GOLDEN = Path(__file__).parent / "golden"


def reference(name):
    return {key: torch.from_numpy(value) for key, value in np.load(GOLDEN / name).items()}


def test_accuracies_by_hand():
    groups = torch.tensor([0, 0, 0, 0, 1, 1, 2, 3, 3, 3])
    correct = torch.tensor([1, 1, 1, 0, 1, 0, 0, 1, 1, 1]).bool()
    training = torch.tensor([0] * 6 + [1] * 1 + [2] * 1 + [3] * 2)
    accuracy = group_accuracy(correct, groups, training)
    assert accuracy.groups == (75.0, 50.0, 0.0, 100.0)
    assert accuracy.average == 70.0
    assert accuracy.worst_group == 0.0
    assert accuracy.unbiased == 56.25
    assert accuracy.adjusted == pytest.approx(0.6 * 75 + 0.1 * 50 + 0.1 * 0 + 0.2 * 100)


def test_groups_without_test_samples_count_nowhere():
    accuracy = group_accuracy(
        torch.tensor([True, False, True]), torch.tensor([0, 0, 2]), torch.tensor([0, 1, 1, 1, 2, 2])
    )
    assert accuracy.groups[0] == 50 and math.isnan(accuracy.groups[1]) and accuracy.groups[2] == 100
    assert accuracy.worst_group == 50 and accuracy.unbiased == 75
    assert accuracy.adjusted == pytest.approx((1 * 50 + 2 * 100) / 3)


def test_adjusted_is_the_average_where_test_is_distributed_like_training():
    generator = torch.Generator().manual_seed(0)
    groups = torch.randint(4, (500,), generator=generator)
    correct = torch.rand(500, generator=generator) < 0.7
    accuracy = group_accuracy(correct, groups, groups)
    assert accuracy.adjusted == pytest.approx(accuracy.average)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([1, 0], [0, 0], [0]), TypeError, "correct must be bool"),
        (([True], [0, 1], [0]), ValueError, r"groups must have shape \[N\]=\[1\], got \[2\]"),
        (([True], [0.0], [0]), TypeError, "groups must be int64, got torch.float32"),
        (([True], [-1], [0]), ValueError, "groups must hold ids >= 0"),
        (([True], [1], [0]), ValueError, "training_groups must have a group in common"),
    ],
)
def test_bad_groups(arguments, error, message):
    with pytest.raises(error, match=message):
        group_accuracy(*map(torch.tensor, arguments))


def test_no_samples():
    with pytest.raises(ValueError, match="groups must hold ids >= 0, at least one, got none"):
        group_accuracy(torch.ones(0).bool(), torch.ones(0).long(), torch.tensor([0]))


def test_energy_reproduces_the_reference():
    given = reference("metrics.npz")
    attributions, boxes = given["attributions"], Boxes(given["boxes"], given["offsets"])
    got = energy_in_box(attributions, boxes)
    torch.testing.assert_close(got.double(), given["epg_each"].double(), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(got.double().mean(), given["epg"].double(), rtol=1e-5, atol=1e-7)


def test_energy_of_upsampled_maps_against_a_loop():
    generator = torch.Generator().manual_seed(1)
    maps = torch.randn(5, 6, 6, generator=generator)
    maps[4] = -1.0
    rows = [[[3, 5, 20, 21]], [], [[0, 0, 48, 48]], [[0, 0, 9, 9], [5, 5, 30, 14]], [[1, 1, 2, 2]]]
    got = energy_in_box(maps, Boxes.from_lists(rows), size=(48, 48))
    for value, attribution, boxes in zip(got, maps.double(), rows):
        large = nn.functional.interpolate(attribution[None, None], size=(48, 48), mode="bilinear")[0, 0].clamp(min=0)
        inside = sum(
            float(large[y, x])
            for y in range(48)
            for x in range(48)
            if any(x0 <= x < x1 and y0 <= y < y1 for x0, y0, x1, y1 in boxes)
        )
        expected = inside / float(large.sum()) if large.sum() > 0 else 0.0
        assert float(value) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("attribution", "boxes", "error", "message"),
    [
        (torch.zeros(2, 4), Boxes.from_lists([[], []]), ValueError, r"attribution must have shape \[N,H,W\]"),
        (torch.zeros(2, 4, 4), Boxes.from_lists([[]]), ValueError, "boxes must be of N=2 images, got 1"),
        (torch.zeros(1, 4, 4), [[0, 0, 1, 1]], TypeError, "boxes must be debiaskd.Boxes, got list"),
        (torch.zeros(1, 4, 4).long(), Boxes.from_lists([[]]), TypeError, "attribution must be float32"),
    ],
)
def test_bad_energy_arguments(attribution, boxes, error, message):
    with pytest.raises(error, match=message):
        energy_in_box(attribution, boxes)


def test_energy_tells_undefined_maps_from_those_that_lie_outside():
    maps = torch.zeros(6, 4, 4)
    maps[0, 3, 3] = 1  # outside of its box
    maps[1] = -1
    maps[3, 0, 0], maps[3, 3, 3] = 3e-30, 1e-30  # far below what the op would divide by
    maps[4, 0, 0] = math.nan
    maps[5] = 1
    boxes = Boxes.from_lists([[[0, 0, 2, 2]]] * 5 + [None])
    share, defined = energy_pointing_game(maps, boxes)
    torch.testing.assert_close(share, torch.tensor([0, 0, 0, 0.75, math.nan, math.nan]), equal_nan=True)
    assert defined.tolist() == [True, False, False, True, True, False]


def test_energy_without_boxes_or_maps():
    share, defined = energy_pointing_game(torch.ones(2, 3, 3), Boxes.from_lists([[], [[3, 3, 9, 9]]]))
    assert share.tolist() == [0, 0] and defined.all()
    share, defined = energy_pointing_game(torch.ones(0, 3, 3), Boxes.from_lists([]), size=(6, 6))
    assert share.shape == defined.shape == (0,)


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16, torch.float64))
@pytest.mark.parametrize("function", (energy_in_box, iou_with_boxes))
def test_dtypes_give_what_float32_gives(dtype, function):
    generator = torch.Generator().manual_seed(2)
    maps = torch.randn(4, 8, 9, generator=generator).to(dtype)
    boxes = Boxes.from_lists([[[1, 2, 7, 6]], [], [[0, 0, 9, 8]], [[3, 3, 5, 5], [0, 0, 4, 4]]])
    got = function(maps, boxes)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, function(maps.float(), boxes), rtol=1e-6, atol=1e-7)
    strided = maps.transpose(1, 2).contiguous().transpose(1, 2)
    torch.testing.assert_close(function(strided, boxes), got, rtol=1e-6, atol=1e-7)


# ---- IoU ----


def iou_by_loop(attribution, boxes, threshold, size):
    positive = attribution.float()
    if positive.shape != size:
        positive = nn.functional.interpolate(positive[None, None], size=size, mode="bilinear")[0, 0]
    positive = positive.clamp(min=0)
    low, high = positive.min(), positive.max()
    if high > low:
        positive = (positive - low) / (high - low)
    elif high > 0:
        positive = torch.ones_like(positive)
    above = {tuple(place) for place in (positive > threshold).nonzero().tolist()}
    covered = {
        (y, x)
        for x0, y0, x1, y1 in boxes
        for y in range(max(y0, 0), min(y1, size[0]))
        for x in range(max(x0, 0), min(x1, size[1]))
    }
    return len(above & covered) / len(above | covered) if above | covered else 0.0


def test_iou_reproduces_the_reference():
    given = reference("metrics.npz")
    got = iou_with_boxes(given["attributions"], Boxes(given["boxes"], given["offsets"]))
    torch.testing.assert_close(got.double(), given["iou_each"], rtol=1e-6, atol=0)
    torch.testing.assert_close(got.double().mean(), given["iou"], rtol=1e-6, atol=0)


ROWS = [[[3, 5, 20, 21]], [], [[0, 0, 24, 24]], [[0, 0, 9, 9], [5, 5, 30, 14]], [[1, 1, 2, 2]], [[-5, -5, 3, 3]]]
THRESHOLDS = (0.0, 0.1, 0.3, 0.5, 0.7, 0.95)


@pytest.mark.parametrize("side", (24, 6))
@pytest.mark.parametrize("at_once", (1, 4, 100))
def test_iou_at_several_thresholds_against_a_loop(monkeypatch, side, at_once):
    monkeypatch.setattr("debiaskd.metrics.localization._maps_at_once", lambda *_: at_once)
    maps = torch.randn(6, side, side, generator=torch.Generator().manual_seed(3))
    maps[0] = maps[0].abs() + 0.2  # positive everywhere: its minimum is taken away
    got = iou_with_boxes(maps, Boxes.from_lists(ROWS), THRESHOLDS, size=(24, 24))
    expected = [[iou_by_loop(a, b, t, (24, 24)) for t in THRESHOLDS] for a, b in zip(maps, ROWS)]
    torch.testing.assert_close(got, torch.tensor(expected), rtol=1e-6, atol=0)
    torch.testing.assert_close(iou_with_boxes(maps, Boxes.from_lists(ROWS), 0.3, size=(24, 24)), got[:, 2])


@pytest.mark.parametrize("scale", (1.0, 0.1, 1 / 3, 1e-20, 1e-44, 3e38 / 40))
def test_iou_of_pixels_at_the_threshold_is_that_of_normalised_maps(scale):
    generator = torch.Generator().manual_seed(4)
    maps = torch.randint(-5, 41, (40, 12, 12), generator=generator).float()
    maps[20:] = maps[20:].clamp(min=3)
    maps = maps * scale
    thresholds = [i / 40 for i in range(40)]
    boxes = [[[i % 7, 2, 6 + i % 6, 9]] for i in range(40)]
    got = iou_with_boxes(maps, Boxes.from_lists(boxes), thresholds)
    positive = maps.clamp(min=0)
    low, high = positive.amin((1, 2), keepdim=True), positive.amax((1, 2), keepdim=True)
    above = ((positive - low) / (high - low))[:, None] > torch.tensor(thresholds)[:, None, None]
    mask = Boxes.from_lists(boxes).mask((12, 12))[:, None]
    expected = (above & mask).sum((2, 3)) / (above | mask).sum((2, 3))
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)


def test_iou_of_odd_maps():
    maps = torch.zeros(7, 4, 4)
    maps[1] = 2.5  # constant: all of it
    maps[2] = -1
    maps[3, 0, 0] = math.nan
    maps[4, 0, 0] = math.inf
    maps[5, 0, 0] = -math.inf
    boxes = Boxes.from_lists([[], [[0, 0, 2, 4]], [[0, 0, 2, 2]], [[0, 0, 2, 2]], [[0, 0, 2, 2]], [[0, 0, 2, 2]], None])
    got = iou_with_boxes(maps, boxes)
    expected = torch.tensor([0, 0.5, 0, math.nan, math.nan, 0, math.nan])
    torch.testing.assert_close(got, expected, equal_nan=True)
    assert iou_with_boxes(maps[:0], boxes[:0], (0.1, 0.2), (9, 9)).shape == (0, 2)


def test_counts_of_large_maps_are_exact(monkeypatch):
    monkeypatch.setattr("debiaskd.metrics.localization.EXACT_PIXELS", 64)
    maps = torch.randn(2, 10, 10, generator=torch.Generator().manual_seed(5))
    boxes = Boxes.from_lists([[[0, 0, 5, 9]], [[2, 2, 4, 4]]])
    got = iou_with_boxes(maps, boxes)
    share = energy_in_box(maps[:, :2, :2], boxes, (10, 10))
    monkeypatch.undo()
    assert got.dtype == share.dtype == torch.float32
    torch.testing.assert_close(got, iou_with_boxes(maps, boxes))
    torch.testing.assert_close(share, energy_in_box(maps[:, :2, :2], boxes, (10, 10)))


# ---- sizes of boxes ----


def test_bins_of_sizes():
    rows = [[[0, 0, 2, 5]], [[0, 0, 5, 5], [0, 0, 2, 2]], [[0, 0, 5, 6], [2, 3, 9, 9]], [], None, [[10, 0, 12, 9]]]
    boxes = Boxes.from_lists([*rows, [[-9, -9, 99, 99]]])
    coverage = box_coverage(boxes, (10, 10))
    expected = boxes.mask((10, 10)).double().mean((1, 2))
    assert coverage[4].isnan() and torch.equal(coverage[boxes.annotated], expected[boxes.annotated])
    assert box_size_bins(boxes, (10, 10), (0.1, 0.25)).tolist() == [1, 2, 2, -1, -1, -1, 2]
    assert box_size_bins(Boxes.from_lists([]), (10, 10), (0.1,)).shape == (0,)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda a, b: iou_with_boxes(a[0], b), ValueError, r"attribution must have shape \[N,H,W\], got \[4, 4\]"),
        (lambda a, b: iou_with_boxes(a[:, :0], b), ValueError, "attribution must have at least one pixel a map"),
        (lambda a, b: iou_with_boxes(a, b[:1]), ValueError, "boxes must be of N=2 images, got 1"),
        (lambda a, b: iou_with_boxes(a, b, 1.0), ValueError, r"threshold must lie in \[0,1\), got \[1.0\]"),
        (lambda a, b: iou_with_boxes(a, b, ()), ValueError, r"threshold must lie in \[0,1\), got \[\]"),
        (lambda a, b: iou_with_boxes(a, b, "0.5"), TypeError, "threshold must be a sequence, got str"),
        (lambda a, b: iou_with_boxes(a, b, [None]), TypeError, r"threshold\[0\] must be a number, got NoneType"),
        (lambda a, b: iou_with_boxes(a, b, size=(4, 0)), ValueError, "size must be"),
        (lambda a, b: box_size_bins(b, (4, 4), [0.5, 0.2]), ValueError, "edges must be rising fractions between 0"),
        (lambda a, b: box_size_bins(b, (4, 4), []), ValueError, "at least one, got"),
        (lambda a, b: box_coverage([[1]], (4, 4)), TypeError, "boxes must be debiaskd.Boxes, got list"),
    ],
)
def test_bad_localization_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call(torch.zeros(2, 4, 4), Boxes.from_lists([[], [[0, 0, 1, 1]]]))


# ---- over batches ----


def assert_same(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0, equal_nan=True)


def test_batches_add_up_to_what_the_functions_give():
    given = reference("metrics.npz")
    maps, boxes = given["attributions"], Boxes(given["boxes"], given["offsets"])
    energy, overlap = metrics.EnergyPointingGame(bins=(0.05, 0.2)), metrics.BoxIoU()
    for part in (slice(0, 5), slice(5, 5), slice(5, 12)):
        energy.update(maps[part], boxes[part])
        overlap.update(maps[part], boxes[part])
    share, defined = energy_pointing_game(maps, boxes)
    bins = box_size_bins(boxes, (56, 64), (0.05, 0.2))
    found = energy.compute()
    assert_same(found["epg"], share.double().mean())
    assert float(found["epg"]) == pytest.approx(float(given["epg"]), rel=1e-6)
    assert_same(found["epg_defined"], share[defined].double().mean())
    assert_same(found["defined"], defined.float().mean())
    assert found["images"] == 12
    for k in range(3):
        assert found["images_bins"][k] == (bins == k).sum()
        assert_same(found["epg_bins"][k], share[bins == k].double().mean())
        assert_same(found["epg_defined_bins"][k], share[(bins == k) & defined].double().mean())
    means = iou_with_boxes(maps, boxes, [i / 20 for i in range(1, 20)]).double().mean(0)
    assert_same(overlap.compute()["iou_grid"], means)
    assert overlap.best_threshold() == pytest.approx((int(means.argmax()) + 1) / 20)
    fixed = metrics.BoxIoU(0.5)
    fixed.update(maps, boxes)
    assert float(fixed.compute()["iou"]) == pytest.approx(float(given["iou"]), rel=1e-6)
    assert fixed.compute().keys() == {"iou", "threshold"}


def test_images_that_are_not_annotated_count_nowhere():
    maps, boxes = torch.ones(2, 4, 4), Boxes.from_lists([[[0, 0, 4, 2]], None])
    energy, overlap = metrics.EnergyPointingGame(), metrics.BoxIoU(0.5)
    energy.update(maps, boxes)
    overlap.update(maps, boxes)
    assert energy.compute()["epg"] == 0.5 and energy.compute()["images"] == 1 and energy.compute()["defined"] == 1
    assert overlap.compute()["iou"] == 0.5


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric")
def test_nothing_seen_is_nan_and_has_no_threshold():
    assert metrics.EnergyPointingGame().compute()["epg"].isnan()
    with pytest.raises(ValueError, match=r"best_threshold\(\) needs maps without NaN, got 0 maps"):
        metrics.BoxIoU().best_threshold()
    with pytest.raises(ValueError, match="GroupAccuracy needs at least one sample"):
        metrics.GroupAccuracy(torch.tensor([0])).compute()


def test_f1_reproduces_the_reference_and_counts_by_hand():
    given = reference("metrics.npz")
    logits, targets = given["multilabel_logits"], given["multilabel_targets"]
    micro, each = metrics.MultilabelF1(20), metrics.MultilabelF1(20, "none")
    for part in (slice(0, 17), slice(17, 50)):
        micro.update(logits[part], targets[part])
        each.update(logits[part], targets[part])
    assert float(micro.compute()) == pytest.approx(float(given["multilabel_fscore"]), rel=1e-6)
    predicted, true = logits >= 0, targets > 0
    expected = 2 * (predicted & true).sum(0) / (predicted.sum(0) + true.sum(0))
    torch.testing.assert_close(each.compute(), expected)


def test_f1_of_logits_that_look_like_probabilities():
    metric = metrics.MultilabelF1(2)
    metric.update(torch.tensor([[0.1, 1e-12], [0.0, -1e-12]]), torch.tensor([[True, True], [True, False]]))
    assert metric.compute() == 1


def test_average_precision_against_the_sum_over_ranks():
    generator = torch.Generator().manual_seed(6)
    logits, targets = torch.randn(60, 4, generator=generator), torch.randint(2, (60, 4), generator=generator)
    logits[:30] = logits[:30].sigmoid()  # a batch that looks like probabilities
    logits[30:] += 20  # beyond what a sigmoid in float32 tells apart
    metric = metrics.MultilabelMeanAveragePrecision(4, "none")
    metric.update(logits[:30], targets[:30])
    metric.update(logits[30:], targets[30:])
    for k in range(4):
        ranked = targets[logits[:, k].argsort(descending=True), k]
        precision = ranked.cumsum(0) / torch.arange(1, 61)
        assert float(metric.compute()[k]) == pytest.approx(float(precision[ranked == 1].mean()), rel=1e-5)


def test_group_accuracy_over_batches():
    generator = torch.Generator().manual_seed(7)
    groups, correct = torch.randint(3, (50,), generator=generator), torch.rand(50, generator=generator) < 0.7
    training = torch.tensor([0, 1, 1, 2, 4])
    metric = metrics.GroupAccuracy(training, num_groups=6)
    for part in (slice(0, 20), slice(20, 20), slice(20, 50)):
        metric.update(correct[part], groups[part])
    found, expected = metric.compute(), group_accuracy(correct, groups, training)
    for name in ("average", "worst_group", "unbiased", "adjusted"):
        assert float(found[name]) == pytest.approx(getattr(expected, name))
    assert_same(found["groups"][:5], torch.tensor(expected.groups, dtype=torch.float64))
    metric.reset()
    metric.update(torch.tensor([True]), torch.tensor([2]))
    assert metric.compute()["average"] == 100


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: metrics.EnergyPointingGame(bins=[]), ValueError, "bins must be rising fractions"),
        (lambda: metrics.EnergyPointingGame(size=224), TypeError, "size must be"),
        (lambda: metrics.BoxIoU(-0.1), ValueError, r"threshold must lie in \[0,1\), got \[-0.1\]"),
        (lambda: metrics.BoxIoU(grid=[0.5, 2]), ValueError, "grid must lie in"),
        (lambda: metrics.MultilabelF1(1), ValueError, "num_labels must be an integer >= 2, got 1"),
        (lambda: metrics.MultilabelF1(2, "mean"), ValueError, "average must be one of 'micro'"),
        (lambda: metrics.MultilabelF1(2).update(torch.zeros(1, 3), torch.zeros(1, 3)), ValueError, "logits must have"),
        (lambda: metrics.MultilabelF1(2).update(torch.zeros(1, 2), torch.zeros(2)), ValueError, "targets must have"),
        (
            lambda: metrics.MultilabelF1(2).update(torch.zeros(1, 2), torch.full((1, 2), 0.5)),
            ValueError,
            r"targets must hold 0 and 1 alone, got \[0.5\]",
        ),
        (
            lambda: metrics.MultilabelMeanAveragePrecision(2).update(torch.full((1, 2), math.nan), torch.zeros(1, 2)),
            ValueError,
            "logits must not hold NaN",
        ),
        (lambda: metrics.GroupAccuracy(torch.tensor([2]), 2), ValueError, "num_groups must be at least 3"),
        (
            lambda: metrics.GroupAccuracy(torch.tensor([0])).update(torch.tensor([True]), torch.tensor([1])),
            ValueError,
            "groups must hold ids < 1",
        ),
    ],
)
def test_bad_arguments_of_metrics(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_torchmetrics_is_needed_by_nothing_else():
    program = """
import sys
sys.modules["torchmetrics"] = None
import debiaskd.metrics
assert debiaskd.metrics.energy_in_box
try:
    debiaskd.metrics.BoxIoU
except ModuleNotFoundError as error:
    assert error.name == "torchmetrics"
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "debiaskd.metrics.BoxIoU needs torchmetrics" in done.stdout, done.stderr
    assert "pip install 'debiaskd[train]'" in done.stdout
    with pytest.raises(AttributeError, match="no attribute 'Accuracy'"):
        metrics.Accuracy  # noqa: B018


@pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()), reason="needs gloo"
)
def test_metrics_over_ranks_are_those_of_one_process(tmp_path):
    ranks = range(distributed_metrics.RANKS)
    torch.multiprocessing.spawn(distributed_metrics.run, args=(str(tmp_path),), nprocs=len(ranks))
    alone = distributed_metrics.computed(tuple(ranks))
    for rank in ranks:
        found = torch.load(tmp_path / f"metrics{rank}.pt")
        assert found.keys() == alone.keys()
        for name, expected in alone.items():
            assert_same(found[name], expected)


def test_the_benchmark_runs_and_checks_what_it_times(tmp_path, monkeypatch):
    threads = torch.get_num_threads()
    try:
        assert bench_metrics.main(["--quick", "--threads", "1", "--rounds", "2", "--out", str(tmp_path)]) == 0
        monkeypatch.setattr(bench_metrics, "energy_in_box", lambda *arguments: energy_in_box(*arguments) + 1e-3)
        assert bench_metrics.main(["--quick", "--threads", "1"]) == 1
    finally:
        torch.set_num_threads(threads)
    (path,) = tmp_path.glob("metrics-*.json")
    document = json.loads(path.read_text())
    assert {"date", "cpu", "threads", "torch"} <= document["environment"].keys()
    assert len(document["metrics"]) == 5
    for found in document["metrics"]:
        assert (found["case"] in bench_metrics.table(document["metrics"])) == ("ratio" in found)
        assert 0 < found["seconds"]["batched"]["p10"] <= found["seconds"]["batched"]["p90"]


# ---- the closed-form map ----


def test_final_layer_map_reproduces_the_reference():
    given = reference("attribution.npz")
    cases = {key.split("_")[0] for key in given if key.endswith("cam_weight")}
    assert cases
    for case in cases:
        one = {key.removeprefix(f"{case}_"): value for key, value in given.items() if key.startswith(f"{case}_")}
        got = final_layer_map(one["feature"], one["cam_weight"], one["target"])
        torch.testing.assert_close(got, one["cam_ixg"], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(got.clamp(min=0), one["cam_gradcam"], rtol=1e-4, atol=1e-6)


def test_final_layer_map_is_input_times_gradient():
    torch.manual_seed(0)
    feature = torch.randn(4, 7, 5, 3, dtype=torch.float64, requires_grad=True)
    linear, target = nn.Linear(7, 3).double(), torch.tensor([2, 0, 1, 1])
    logits = linear(feature.mean((2, 3)))
    (gradient,) = torch.autograd.grad(logits.gather(1, target[:, None]).sum(), feature)
    got = final_layer_map(feature.detach(), linear.weight.detach(), target)
    torch.testing.assert_close(got, (gradient * feature).sum(1).detach())
    own = logits.gather(1, target[:, None])[:, 0] - linear.bias[target]
    torch.testing.assert_close(got.sum((1, 2)), own.detach())


def test_final_layer_map_of_no_sample():
    assert final_layer_map(torch.ones(0, 2, 3, 3), torch.ones(4, 2), torch.ones(0).long()).shape == (0, 3, 3)


@pytest.mark.parametrize(
    ("feature", "weight", "target", "error", "message"),
    [
        (torch.ones(2, 3), torch.ones(2, 3), torch.zeros(2).long(), ValueError, "feature must have shape"),
        (torch.ones(2, 3, 4, 4), torch.ones(2, 5), torch.zeros(2).long(), ValueError, "weight must have shape"),
        (torch.ones(2, 3, 4, 4), torch.ones(2, 3), torch.zeros(3).long(), ValueError, r"target must have shape \[N\]"),
        (torch.ones(2, 3, 4, 4), torch.ones(2, 3), torch.zeros(2), TypeError, "target must be int64"),
    ],
)
def test_bad_map_arguments(feature, weight, target, error, message):
    with pytest.raises(error, match=message):
        final_layer_map(feature, weight, target)
