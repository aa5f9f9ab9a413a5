"""Metrics over batches and ranks, and their benchmark."""

import json
import math
import subprocess
import sys

import distributed_metrics
import processes
import pytest
import torch
from cases import reference

from bench import metrics as bench_metrics
from debiaskd import Boxes, metrics
from debiaskd.metrics import box_size_bins, energy_in_box, energy_pointing_game, group_accuracy, iou_with_boxes


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


def test_boxes_may_be_in_pixels_of_larger_pictures():
    maps = torch.rand(3, 5, 5, generator=torch.Generator().manual_seed(0))
    boxes = Boxes.from_lists([[[0, 0, 4, 4]], [[2, 3, 16, 10]], [[5, 5, 7, 16], [0, 0, 3, 2]]])
    energy, overlap = metrics.EnergyPointingGame(bins=(0.1, 0.2), size=(16, 16)), metrics.BoxIoU(0.5, size=(16, 16))
    energy.update(maps, boxes)
    overlap.update(maps, boxes)
    bins = box_size_bins(boxes, (16, 16), (0.1, 0.2))
    assert energy.compute()["images_bins"].tolist() == bins.bincount().tolist() == [1, 1, 1]
    assert_same(energy.compute()["epg_bins"], energy_in_box(maps, boxes, (16, 16)).double()[bins.argsort()])
    assert_same(overlap.compute()["iou"], iou_with_boxes(maps, boxes, 0.5, (16, 16)).double().mean())


def test_of_thresholds_that_do_equally_well_the_lowest_is_taken():
    metric = metrics.BoxIoU(grid=(0.1, 0.3, 0.4, 0.8))
    metric.update(torch.tensor([[[1.0, 0.6], [0.2, 0.0]]]), Boxes.from_lists([[[0, 0, 2, 1]]]))
    assert metric.compute()["iou_grid"].tolist() == pytest.approx([2 / 3, 1, 1, 0.5])
    assert metric.best_threshold() == 0.3


def test_images_that_are_not_annotated_count_nowhere():
    maps, boxes = torch.ones(2, 4, 4), Boxes.from_lists([[[0, 0, 4, 2]], None])
    energy, overlap = metrics.EnergyPointingGame(), metrics.BoxIoU(0.5)
    energy.update(maps, boxes)
    overlap.update(maps, boxes)
    assert energy.compute()["epg"] == 0.5 and energy.compute()["images"] == 1 and energy.compute()["defined"] == 1
    assert overlap.compute()["iou"] == 0.5


def test_ignored_areas_are_left_out_of_what_is_added_up():
    maps = torch.rand(4, 8, 8, generator=torch.Generator().manual_seed(0))
    boxes, areas = Boxes.from_lists([[[0, 0, 4, 4]]] * 4), Boxes.from_lists([[[2, 2, 8, 8]], [], None, [[0, 0, 8, 3]]])
    energy, overlap = metrics.EnergyPointingGame(bins=(0.2,)), metrics.BoxIoU(0.5)
    for part in (slice(0, 3), slice(3, 4)):
        energy.update(maps[part], boxes[part], areas[part])
        overlap.update(maps[part], boxes[part], ignore=areas[part])
    share = energy_in_box(maps, boxes, ignore=areas).double().mean()
    assert_same(energy.compute()["epg"], share)
    assert_same(energy.compute()["epg_bins"][1], share)
    assert_same(overlap.compute()["iou"], iou_with_boxes(maps, boxes, 0.5, ignore=areas).double().mean())
    assert share > energy_in_box(maps, boxes).double().mean()


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric")
def test_nothing_seen_is_nan_and_has_no_threshold():
    assert metrics.EnergyPointingGame().compute()["epg"].isnan()
    with pytest.raises(ValueError, match=r"best_threshold\(\) needs maps without NaN, got 0 maps"):
        metrics.BoxIoU().best_threshold()
    assert metrics.BoxIoU().compute()["threshold"].isnan() and metrics.BoxIoU(0.5).compute()["threshold"] == 0.5
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


@pytest.mark.filterwarnings("error")
def test_classes_without_a_picture_have_no_average_precision_and_are_not_counted_as_zero():
    """torchmetrics counts each of them as 0: 4 of 20 classes would give a fifth of what the mean over the four is."""
    generator = torch.Generator().manual_seed(8)
    logits, targets = torch.randn(40, 20, generator=generator), torch.zeros(40, 20, dtype=torch.int64)
    shown = [1, 4, 5, 17]
    targets[:, shown] = torch.randint(2, (40, 4), generator=generator)
    four = metrics.MultilabelMeanAveragePrecision(4, "none")
    four.update(logits[:, shown], targets[:, shown])
    expected = four.compute()
    found = {name: metrics.MultilabelMeanAveragePrecision(20, name) for name in ("macro", "weighted", "none")}
    for metric in found.values():
        metric.update(logits[:25], targets[:25])
        metric.update(logits[25:], targets[25:])
        assert metric.classes() == 4
    torch.testing.assert_close(found["macro"].compute(), expected.mean())
    support = targets[:, shown].sum(0)
    torch.testing.assert_close(found["weighted"].compute(), (expected * support).sum() / support.sum())
    each = found["none"].compute()
    torch.testing.assert_close(each[shown], expected)
    assert int(each.isnan().sum()) == 16


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("average", ["macro", "micro", "weighted"])
def test_without_a_single_positive_picture_there_is_no_average_precision(average):
    metric = metrics.MultilabelMeanAveragePrecision(3, average)
    metric.update(torch.randn(4, 3), torch.zeros(4, 3))
    assert metric.compute().isnan() and metric.classes() == 0


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("average", ["micro", "macro", "weighted", "none"])
@pytest.mark.parametrize("kind", [metrics.MultilabelF1, metrics.MultilabelMeanAveragePrecision])
def test_a_batch_may_be_empty(kind, average):
    generator = torch.Generator().manual_seed(10)
    logits, targets = torch.randn(6, 3, generator=generator), torch.randint(2, (6, 3), generator=generator)
    metric, whole = kind(3, average), kind(3, average)
    metric.update(logits[:0], targets[:0])
    assert metric.compute().isnan().all()
    metric.update(logits, targets)
    whole.update(logits, targets)
    assert torch.equal(metric.compute(), whole.compute())


def test_f1_of_classes_that_nothing_is_known_of():
    logits = torch.tensor([[1.0, -1, -1, 1], [1, -1, -1, -1]])
    targets = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 0]])  # F1: 2/3, none, 0, 0
    found = {}
    for average in ("none", "macro", "weighted", "micro"):
        metric = metrics.MultilabelF1(4, average)
        metric.update(logits, targets)
        found[average] = metric.compute()
    torch.testing.assert_close(found["none"], torch.tensor([2 / 3, math.nan, 0, 0]), equal_nan=True)
    assert float(found["macro"]) == pytest.approx(2 / 9) and float(found["weighted"]) == pytest.approx(1 / 3)
    assert float(found["micro"]) == pytest.approx(2 / 5)
    nothing = metrics.MultilabelF1(4)
    nothing.update(torch.full((2, 4), -1.0), torch.zeros(2, 4))
    assert nothing.compute().isnan()


def test_group_accuracy_where_nothing_is_known_of_training():
    metric = metrics.GroupAccuracy(None, num_groups=3)
    metric.update(torch.tensor([True, False, True]), torch.tensor([1, 1, 2]))
    found = metric.compute()
    assert found["adjusted"].isnan() and found["worst_group"] == 50 and found["smallest"] == 1
    with pytest.raises(ValueError, match="num_groups must be given where training_groups is None"):
        metrics.GroupAccuracy(None)


def every_metric():
    """(metric, what one update takes) for each."""
    generator = torch.Generator().manual_seed(9)
    maps, boxes = torch.randn(6, 5, 5, generator=generator), Boxes.from_lists([[[0, 0, 2, 3]]] * 6)
    logits, targets = torch.randn(6, 3, generator=generator), torch.randint(2, (6, 3), generator=generator)
    correct, groups = torch.rand(6, generator=generator) < 0.5, torch.tensor([0, 1, 2, 0, 1, 2])
    yield lambda: metrics.EnergyPointingGame(bins=(0.1,)), (maps, boxes)
    yield metrics.BoxIoU, (maps, boxes)
    yield lambda: metrics.MultilabelF1(3), (logits, targets)
    yield lambda: metrics.MultilabelF1(3, "none"), (logits, targets)
    yield lambda: metrics.MultilabelMeanAveragePrecision(3), (logits, targets)
    yield lambda: metrics.GroupAccuracy(torch.tensor([0, 1, 2])), (correct, groups)


def parts(given):
    return [tuple(one[part] for one in given) for part in (slice(0, 4), slice(4, 6))]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("number", range(6))
def test_what_was_computed_before_is_not_given_again(number):
    make, given = list(every_metric())[number]
    first, second = parts(given)
    whole = make()
    whole.update(*given)
    expected = whole.compute()
    one, other = make(), make()
    one.update(*first)
    other.update(*second)
    before = one.compute()
    assert not same(before, expected), "or nothing is shown"
    one.merge_state(other)
    assert same(one.compute(), expected)
    state, dictionary = make(), other.metric_state
    state.update(*first)
    state.compute()
    state.merge_state(dictionary)
    assert same(state.compute(), expected)
    empty = make()
    empty.merge_state(whole)  # which has seen nothing itself, and does not warn of that
    assert same(empty.compute(), expected)
    stepwise = make()
    stepwise(*first)
    assert same(stepwise.compute(), before)
    stepwise(*second)
    assert same(stepwise.compute(), expected)
    stepwise.reset()
    stepwise.update(*first)
    assert same(stepwise.compute(), before)
    saved = make()
    saved.persistent(True)
    saved.update(*given)
    content = {name: value.clone() for name, value in saved.state_dict().items() if isinstance(value, torch.Tensor)}
    one.persistent(True)
    one.reset()
    one.update(*first)
    one.compute()
    one.load_state_dict(saved.state_dict())
    assert same(one.compute(), expected)
    one.update(*first)
    for name, value in content.items():
        assert torch.equal(saved.state_dict()[name], value), "of the caller"


def same(found, expected):
    if isinstance(expected, dict):
        return all(same(found[name], value) for name, value in expected.items())
    return torch.allclose(found.double(), expected.double(), rtol=1e-6, equal_nan=True)


def test_what_was_computed_before_synchronising_is_not_given_after_it():
    """With `sync_on_compute=False`, `sync` decides whose states `compute` sees."""
    metric = metrics.MultilabelF1(2, sync_on_compute=False)
    metric.update(torch.tensor([[1.0, -1.0]]), torch.tensor([[1, 1]]))
    alone = metric.compute()
    metric.sync(dist_sync_fn=lambda state, group=None: [state, state + 1], distributed_available=lambda: True)
    assert metric.compute() != alone


@pytest.mark.parametrize(
    ("one", "other", "message"),
    [
        (lambda: metrics.BoxIoU(0.3), lambda: metrics.BoxIoU(0.5), "must be of threshold=0.3, as this metric, got 0.5"),
        (lambda: metrics.BoxIoU(0.3), metrics.BoxIoU, "must be of threshold=0.3"),
        (
            lambda: metrics.EnergyPointingGame(size=(4, 4)),
            metrics.EnergyPointingGame,
            r"must be of size=\(4, 4\), as this metric, got None",
        ),
        (lambda: metrics.MultilabelF1(3, "none"), lambda: metrics.MultilabelF1(3), "must be of average=none"),
        (lambda: metrics.BoxIoU(0.3), lambda: metrics.BoxIoU().metric_state, r"\['ious'\] must have shape \[1\]"),
    ],
)
def test_metrics_of_other_settings_do_not_add_up(one, other, message):
    with pytest.raises(ValueError, match=message):
        one().merge_state(other())


def test_group_accuracy_over_batches():
    generator = torch.Generator().manual_seed(7)
    groups, correct = torch.randint(3, (50,), generator=generator), torch.rand(50, generator=generator) < 0.7
    training = torch.tensor([0, 1, 1, 2, 4])
    metric = metrics.GroupAccuracy(training, num_groups=6)
    for part in (slice(0, 20), slice(20, 20), slice(20, 50)):
        metric.update(correct[part], groups[part])
    found, expected = metric.compute(), group_accuracy(correct, groups, training)
    for name in ("average", "worst_group", "unbiased", "adjusted", "smallest"):
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
@pytest.mark.xdist_group("processes")
def test_metrics_over_ranks_are_those_of_one_process(tmp_path):
    ranks = range(distributed_metrics.RANKS)
    processes.spawn(distributed_metrics.run, str(tmp_path), ranks=len(ranks))
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
        assert found["case"] in bench_metrics.table(document["metrics"])
        assert ("over_read" in found) == ("read" in found["seconds"]) == (" to " not in found["case"])
        assert ("ratio" in found) == ("loop" in found["seconds"])
        assert 0 < found["seconds"]["batched"]["p10"] <= found["seconds"]["batched"]["p90"]
