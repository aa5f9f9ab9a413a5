"""The losses in a training loop: modules, autocast, copies, and several Python threads."""

import copy
import io
import pickle
import threading

import pytest
import torch
from cases import Way, attribution, normal, ways
from every_loss import LOSSES, every_loss_every_way

import debiaskd as dk

pytestmark = pytest.mark.usefixtures("one_thread")
every_loss = pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.name)
every_way_to_match = pytest.mark.parametrize("way", ways("feature_match"), ids=lambda way: way.name)


@every_loss_every_way
@pytest.mark.parametrize("reduction", ("mean", "none"))
def test_module_is_the_function_with_its_options_fixed(loss, way, reduction):
    values, constants = loss.make(way)
    module = loss.module(reduction=reduction)
    with way.active():
        actual, expected = module(values, *constants), loss.call(values, constants, reduction=reduction)
    assert torch.equal(actual, expected)


@every_loss
def test_module_survives_pickling_copying_saving_and_functional_call(loss):
    values, constants = loss.make(ways(loss.op)[0])
    module = loss.module(reduction="sum")
    expected = module(values, *constants)
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    for other in (
        pickle.loads(pickle.dumps(module)),
        copy.deepcopy(module),
        torch.load(file, weights_only=False),
        torch.nn.Sequential(module)[0],
    ):
        assert torch.equal(other(values, *constants), expected)
        assert repr(other) == repr(module)
        assert not other.state_dict()
    assert torch.equal(torch.func.functional_call(module, {}, (values, *constants)), expected)


def test_energy_loss_is_localization_loss_of_kind_energy():
    maps, boxes = normal(2, 5, 6), dk.Boxes.from_lists([[[0, 0, 3, 3]], [[1, 1, 4, 4]]])
    expected = dk.localization_loss(maps, boxes, kind="energy", size=(10, 12), reduction="sum")
    assert torch.equal(dk.energy_loss(maps, boxes, size=(10, 12), reduction="sum"), expected)
    assert torch.equal(dk.EnergyLoss(size=(10, 12), reduction="sum")(maps, boxes), expected)


def test_modules_show_their_options():
    assert repr(dk.FeatureMatchLoss(normalize=True)) == "FeatureMatchLoss(normalize=True, reduction='mean')"
    shown = repr(dk.LocalizationLoss(kind="rrr", size=(7, 8), reduction="none"))
    assert shown == "LocalizationLoss(kind='rrr', size=(7, 8), normalize=False, reduction='none')"


@pytest.mark.parametrize(
    ("module", "options", "error", "message"),
    [
        (dk.FeatureMatchLoss, {"reduction": "avg"}, ValueError, "reduction must be one of .*'mean'.*got 'avg'"),
        (dk.FeatureMatchLoss, {"normalize": 1}, TypeError, "normalize must be True or False, got 1"),
        (dk.LocalizationLoss, {"kind": "iou"}, ValueError, "kind must be one of .*'energy'.*got 'iou'"),
        (dk.LocalizationLoss, {"size": 224}, TypeError, r"size must be a \(height, width\) pair.*got 224"),
        (dk.LocalizationLoss, {"size": (0, 5)}, ValueError, r"size must be .*>= 1, got \(0, 5\)"),
        (dk.LocalizationLoss, {"normalize": None}, TypeError, "normalize must be True or False, got None"),
        (dk.EnergyLoss, {"reduction": "max"}, ValueError, "reduction must be one of .*got 'max'"),
    ],
)
def test_modules_refuse_bad_options_when_they_are_made(module, options, error, message):
    with pytest.raises(error, match=message):
        module(**options)


@every_way_to_match
def test_autocast_matches_a_half_precision_student_to_a_float32_teacher(way: Way):
    model = torch.nn.Linear(8, 16).to(way.device)
    images, teacher = way.put(normal(5, 8)), way.put(normal(5, 16, seed=1))
    with way.active(), torch.autocast(way.device, dtype=torch.bfloat16):
        features = model(images)
        assert features.dtype == torch.bfloat16
        loss = dk.feature_match_loss(features, teacher)
        expected = dk.feature_match_loss(features.detach(), teacher.bfloat16())
    assert loss.dtype == torch.float32
    assert torch.equal(loss.detach(), expected)
    loss.backward()
    assert model.weight.grad.dtype == torch.float32
    assert model.weight.grad.any()
    with pytest.raises(TypeError, match=r"teacher must have the dtype of student, torch.bfloat16, got torch.float32"):
        dk.feature_match_loss(features.detach(), teacher)  # outside of autocast it is a mistake


@pytest.mark.parametrize("way", ways("localization"), ids=lambda way: way.name)
@pytest.mark.parametrize("kind", ("energy", "l1", "ppce", "rrr"))
def test_autocast_changes_nothing_about_a_map(way: Way, kind):
    maps = way.put(attribution(kind, 2, 6, 7, dtype=torch.bfloat16))
    boxes = dk.Boxes.from_lists([[[1, 1, 9, 4]], []]).to(way.device)
    with way.active():
        expected = dk.localization_loss(maps, boxes, kind=kind, size=(12, 14), normalize=True)
        with torch.autocast(way.device, dtype=torch.bfloat16):
            loss = dk.localization_loss(maps, boxes, kind=kind, size=(12, 14), normalize=True)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected)


@every_loss_every_way
def test_python_threads_do_not_disturb_each_other(loss, way):
    values, constants = loss.make(way)
    with way.active():
        result = loss.call(values, constants)
        expected = result.detach(), torch.autograd.grad(result, values)[0]
    failures = []

    def work():
        try:
            for _ in range(20):
                leaf = values.detach().requires_grad_()
                with way.active():
                    result = loss.call(leaf, constants)
                result.backward()
                assert torch.equal(result.detach(), expected[0])
                assert torch.equal(leaf.grad, expected[1])
        except BaseException as error:
            failures.append(error)

    workers = [threading.Thread(target=work) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failures
