"""Runs whose teacher and student read different input: in every stage and in all that looks at a finished run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("lightning_fabric")
pytest.importorskip("jsonargparse")
pytest.importorskip("torchdata")
pytest.importorskip("safetensors")
pytest.importorskip("sklearn")

import training_runs as runs
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from debiaskd.cli import entry as cli
from debiaskd.data import PackedDataset
from debiaskd.evaluation.evaluate import LoadedStage, evaluate_run
from debiaskd.evaluation.explain import _explain, _RunData
from debiaskd.evaluation.probe import _features
from debiaskd.models.input import IMAGENET_MEAN, IMAGENET_STD, InputContract, Preprocess, resize
from debiaskd.pipeline.stages import Pipeline
from debiaskd.training import loop
from debiaskd.training.batches import InputTransform, open_split
from debiaskd.training.learner import Learner
from debiaskd.training.teacher_cache import ViewDraws
from debiaskd.training.validation import attribution_options
from debiaskd.utils.files import sha256

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.xdist_group("inputs")]
#: So far apart that the range of what a network reads tells whose contract it is: [-9, 1] and [-0.2, 1.8].
STUDENT = InputContract((12, 12), (0.9,) * 3, (0.1,) * 3, "bilinear")
TEACHER = InputContract((24, 24), (0.1,) * 3, (0.5,) * 3, "bicubic")
NETWORKS = {6: STUDENT, 8: TEACHER}


def asked(contract: InputContract) -> dict[str, Any]:
    found = {**contract.to_dict(), "size": contract.size[0]}
    del found["channels"]
    return found


RECIPE: dict[str, Any] = {
    "data": {"crop_scale": [0.5, 1]},
    "teacher": {
        "name": "plain/8",
        "method": "dfr",
        "schedule": {"epochs": 1, "batch": 12, "learning_rate": 1e-2},
        "input": asked(TEACHER),
    },
    "student": {"name": "plain/6", "input": asked(STUDENT)},
    "transplant": {"projector": "linear"},
    "weights": {"method": "errors", "epochs": 1},
    "terms": {"match": {}, "kd": {}, "guide": {"weight": 0.1}},
    "schedule": {"epochs": 2, "batch": 12, "learning_rate": 1e-2},
    "selection": {"rule": "last"},
    "compute": {"accelerator": "cpu"},
}


class Reader:
    """What each network read, by its width."""

    def __init__(self) -> None:
        self.batches: dict[int, list[Tensor]] = {6: [], 8: []}
        self.steps: list[tuple[Tensor, Tensor | None]] = []

    def check(self, *widths: int) -> None:
        """Those of these widths read something, and every network only what its contract says."""
        for width, contract in NETWORKS.items():
            read = [images for images in self.batches[width] if len(images) > 4]  # the others are trial runs
            assert (len(read) > 0) == (width in widths), width
            for images in read:
                assert images.shape[1:] == (3, *contract.size)
                low, high = ((edge - contract.mean[0]) / contract.std[0] for edge in (0, 1))
                assert low - 1e-3 <= images.min() and images.max() <= high + 1e-3
            if read:
                assert min(images.min() for images in read) < low + 0.2 * (high - low)
                assert max(images.max() for images in read) > high - 0.2 * (high - low)


@pytest.fixture
def reader(monkeypatch: pytest.MonkeyPatch) -> Reader:
    return extractor(monkeypatch)


def extractor(monkeypatch: pytest.MonkeyPatch) -> Reader:
    found = Reader()
    inner, forward = runs.Plain.forward_features, Learner.forward

    def noted(self: Any, images: Tensor) -> Tensor:
        found.batches[self.body[2].out_channels].append(images.detach())
        return inner(self, images)

    def step(self: Learner, given: Any) -> Any:
        found.steps.append((given.batch.images, given.batch.teacher_images))
        return forward(self, given)

    monkeypatch.setattr(runs.Plain, "forward_features", noted)
    monkeypatch.setattr(Learner, "forward", step)
    return found


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Reader]]:
    """A run of all stages, and what its networks read."""
    root = tmp_path_factory.mktemp("inputs")
    with pytest.MonkeyPatch.context() as patch:
        found = extractor(patch)
        runs.train(runs.write(root / "r.yaml", runs.birds(root), RECIPE), root / "run")
    yield root, found


def stored(root: Path, split: str = "val") -> Any:
    whole = PackedDataset(root / "birds16", split)
    return whole.__getitems__(range(len(whole)))


def expected(run: Path) -> Tensor:
    """The student's logits of the validation images, preprocessed by hand."""
    pixels = resize(stored(run.parent).images.float() / 255, (12, 12))
    with torch.no_grad():
        logits: Tensor = LoadedStage(run).model((pixels - 0.9) / 0.1)
    return logits


def test_every_stage_reads_what_its_network_reads(made: tuple[Path, Reader]) -> None:
    root, reader = made
    reader.check(6, 8)
    assert {path.parent.name for path in root.glob("run/*/stage.json")} == {
        "teacher-erm", "teacher", "identification", "weights", "student",
    }  # fmt: skip


def test_both_networks_read_the_same_crop(made: tuple[Path, Reader]) -> None:
    pairs = [(own, teachers) for own, teachers in made[1].steps if teachers is not None]
    assert len(pairs) == 1 + 8  # in rehearsal, and the student's steps
    for own, teachers in pairs:
        pixels = teachers * 0.5 + 0.1
        assert pixels.min() >= -1e-6 and pixels.max() <= 1 + 1e-6
        torch.testing.assert_close(resize(pixels, (12, 12)) / 0.1 - 9, own, rtol=0, atol=1e-4)


def test_the_contract_is_saved_with_the_weights(made: tuple[Path, Reader]) -> None:
    for stage, contract in {"student": STUDENT, "identification": STUDENT, "teacher": TEACHER}.items():
        with safe_open(made[0] / "run" / stage / "model.safetensors", "pt") as file:
            about = json.loads(file.metadata()["debiaskd"])
        assert about["input"] == contract.to_dict() and about["size"] == contract.size[0]
        assert LoadedStage(made[0] / "run", stage).contract == contract


def test_evaluation_is_what_training_measured(made: tuple[Path, Reader], reader: Reader) -> None:
    run = made[0] / "run"
    document, _ = evaluate_run(run, "student", "val", None)
    measured = LoadedStage(run).stage.facts["figures"]
    for name in ("accuracy", "worst_group_accuracy", "epg", "iou"):
        assert document["figures"][name] == pytest.approx(measured[name], abs=1e-6), name
    read = [images for images in reader.batches[6] if len(images) == 16]
    torch.testing.assert_close(LoadedStage(run).model(read[0]), expected(run))
    reader.check(6)


def test_the_teacher_is_evaluated_on_its_own_input(made: tuple[Path, Reader], reader: Reader) -> None:
    document, _ = evaluate_run(made[0] / "run", "teacher", "val", None)
    reader.check(8)
    model, batch = LoadedStage(made[0] / "run", "teacher").model, stored(made[0])
    with torch.no_grad():
        right = model(Preprocess(TEACHER)(batch.images)).argmax(1) == batch.target
    assert document["figures"]["accuracy"] == pytest.approx(float(right.float().mean()))


def test_explanations(made: tuple[Path, Reader]) -> None:
    run = made[0] / "run"
    assert cli.main(["explain", str(run), "val:3", "--out", str(made[0] / "explained")]) == 0
    loaded = LoadedStage(run)
    shown = _RunData(loaded.recipe)._numbered("val", 3)
    seen = _explain("", loaded, shown, 1, attribution_options(loaded.recipe, "student"))
    assert seen.score == pytest.approx(float(expected(run)[3].softmax(0)[1]), abs=1e-5)


def test_reports(made: tuple[Path, Reader], reader: Reader) -> None:
    from debiaskd.reports.measured import measure

    run = made[0] / "run"
    found = measure(run, "run", "val")
    reader.check(6)
    scores = expected(run).softmax(1)
    weights = load_file(run / "student" / "model.safetensors").values()  # without batch norm all floats are learned
    assert found.parameters == sum(tensor.numel() for tensor in weights if tensor.is_floating_point())
    assert found.looks
    for example, look in zip(found.examples, found.looks):
        assert look.score == pytest.approx(float(scores[example.number, example.target]), abs=1e-5)


def test_probes_read_the_students_input(made: tuple[Path, Reader], reader: Reader) -> None:
    loaded = LoadedStage(made[0] / "run")
    found = _features(loaded, open_split(loaded.recipe.data, "validation"))
    reader.check(6)
    images = Preprocess(STUDENT)(stored(made[0]).images)
    with torch.no_grad():
        pooled = loaded.model.forward_head(loaded.model.forward_features(images), pre_logits=True)  # type: ignore[operator]
    np.testing.assert_allclose(found, pooled.numpy(), atol=1e-5)


def test_a_run_that_was_killed_goes_on(made: tuple[Path, Reader], tmp_path: Path, monkeypatch: Any) -> None:
    inner = loop.TrainingLoop._step

    def dying(self: loop.TrainingLoop, *arguments: Any) -> None:
        if self.plan.folder.name == "student" and self.step == 5:
            raise KeyboardInterrupt
        inner(self, *arguments)

    shutil.copytree(made[0] / "run", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "student")
    monkeypatch.setattr(loop.TrainingLoop, "_step", dying)
    with pytest.raises(KeyboardInterrupt):
        runs.train(made[0] / "r.yaml", tmp_path / "run")
    monkeypatch.setattr(loop.TrainingLoop, "_step", inner)
    runs.train(made[0] / "r.yaml", tmp_path / "run")
    files = [root / "run" / "student" / "model.safetensors" for root in (made[0], tmp_path)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_another_contract_is_another_run(made: tuple[Path, Reader], tmp_path: Path) -> None:
    shutil.copytree(made[0] / "run", tmp_path / "run")
    with pytest.raises(ValueError, match=r"was begun with student\.input\.size: 12, not 14; choose another --out"):
        runs.train(made[0] / "r.yaml", tmp_path / "run", "--student.input.size", "14")


def test_a_finished_runs_teacher_brings_its_contract(made: tuple[Path, Reader], tmp_path: Path, reader: Reader) -> None:
    document = {
        **RECIPE,
        "data": {},
        "weights": None,
        "teacher": {"name": "plain/8", "weights": str(made[0] / "run" / "teacher")},
        "terms": {"kd": {}},
        "schedule": {"epochs": 1, "batch": 24},
    }
    runs.train(runs.write(tmp_path / "r.yaml", made[0] / "birds16", document), tmp_path / "run")
    reader.check(6, 8)


def test_a_finished_runs_student_teaches_at_its_own_input(made: tuple[Path, Reader], tmp_path: Path) -> None:
    document = {
        **runs.PLAIN,
        "teacher": {"name": "plain/6", "weights": str(made[0] / "run")},
        "student": {"name": "plain/5"},
        "terms": {"kd": {}},
        "schedule": {"epochs": 1, "batch": 24},
    }
    steps: list[Any] = []
    inner = Learner.forward

    def noted(self: Learner, step: Any) -> Any:
        steps.append(step.batch)
        return inner(self, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Learner, "forward", noted)
        runs.train(runs.write(tmp_path / "r.yaml", made[0] / "birds16", document), tmp_path / "run")
    for batch in steps[-2:]:
        assert batch.images.shape[1:] == (3, 16, 16) and batch.teacher_images.shape[1:] == (3, 12, 12)
        mean, std = (torch.tensor(part)[:, None, None] for part in (IMAGENET_MEAN, IMAGENET_STD))
        pixels = resize(batch.images * std + mean, (12, 12))
        torch.testing.assert_close(batch.teacher_images * 0.1 + 0.9, pixels, rtol=0, atol=1e-5)


# -- the teacher's cache ----------------------------------------------------------------------------------------------


def cached(root: Path, folder: Path, **data: Any) -> Path:
    teacher = {"name": "plain/8", "weights": str(root / "run" / "teacher"), "input": asked(TEACHER)}
    document = {**RECIPE, "weights": None, "teacher": teacher, "terms": {"match": {}, "kd": {}}, "data": data}
    return runs.write(folder / "r.yaml", root / "birds16", document)


def test_a_cached_teacher_makes_the_same_student(made: tuple[Path, Reader], tmp_path: Path) -> None:
    recipe = cached(made[0], tmp_path, flip=False)
    runs.train(recipe, tmp_path / "live")
    runs.train(recipe, tmp_path / "cached", "--teacher.cache", "fp32")
    weights = [load_file(tmp_path / name / "student" / "model.safetensors") for name in ("live", "cached")]
    torch.testing.assert_close(*weights, rtol=1e-4, atol=1e-5)


def test_the_cache_is_of_the_crops_that_the_student_reads(made: tuple[Path, Reader], tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        reader = extractor(patch)
        recipe = cached(made[0], tmp_path, crop_scale=[0.4, 1])
        runs.train(recipe, tmp_path / "run", "--teacher.cache", "fp32", "--schedule.epochs", "1")
    reader.check(6, 8)
    stage = json.loads((tmp_path / "run" / "teacher-cache" / "stage.json").read_text())
    assert stage["inputs"]["teacher.input"] == TEACHER.to_dict()
    assert stage["inputs"]["student.input"] == STUDENT.to_dict()
    numbers = torch.arange(48)
    together = InputTransform(
        STUDENT,
        torch.device("cpu"),
        flip=True,
        crop_scale=(0.4, 1.0),
        teacher=TEACHER,
        with_teacher_input=True,
        stored=(16, 16),
    )
    views = ViewDraws(stage["inputs"]["seed"], numbers, 0, torch.device("cpu"))
    placed = together(stored(made[0], "train"), views)
    with torch.no_grad():
        logits = LoadedStage(made[0] / "run", "teacher").model(placed.teacher_images)
    kept = np.load(tmp_path / "run" / "teacher-cache" / "view-00" / "00000" / "logits.npy")
    torch.testing.assert_close(torch.from_numpy(kept), logits, rtol=1e-4, atol=1e-5)
    assert all(teachers is None for _, teachers in reader.steps[-4:])  # training has no use for it
    read = torch.cat([own for own, _ in reader.steps[-4:]])
    order = torch.cdist(read.flatten(1), placed.images.flatten(1)).min(1)
    assert order.values.max() < 0.1 and len(order.indices.unique()) == 48


# -- other networks, other times --------------------------------------------------------------------------------------


def test_what_each_network_reads_is_said_once_when_training_begins(made: tuple[Path, Reader], tmp_path: Path) -> None:
    document = {**runs.PLAIN, "schedule": {"epochs": 1, "batch": 12}, "weights": {}, "teacher": None}
    document["terms"] = {"supervised": {"weighted": True}}
    recipe = runs.read(runs.write(tmp_path / "r.yaml", made[0] / "birds16", document))
    said: list[tuple[str, float, str]] = []

    def train() -> list[str]:
        said.clear()
        Pipeline(recipe, tmp_path / "run", runs.launch(recipe.compute), lambda *news: said.append(news)).student()
        return [news for _, _, news in said if news.startswith("input")]

    line = "input of the student: 3×16×16, mean (0.485, 0.456, 0.406), std (0.229, 0.224, 0.225), bilinear "
    assert train() == [line + "(ImageNet's mean and std by default)"]
    assert (said[0][0], said[0][2]) == ("identification", "")
    assert train() == []  # a finished run trains nothing


def test_a_network_of_one_size_reads_that_beside_a_small_student(made: tuple[Path, Reader], tmp_path: Path) -> None:
    """And the finished run is built again with that."""
    pytest.importorskip("timm")
    document = {
        **runs.PLAIN,
        "data": {"train": "train[:50%]"},
        "teacher": {"name": "levit_128s", "method": "erm", "schedule": {"epochs": 1, "batch": 24}},
        "student": {"name": "plain/6", "input": {"size": 12}},
        "transplant": {"projector": "linear"},
        "terms": {"match": {}},
        "schedule": {"epochs": 1, "batch": 24},
    }
    runs.train(runs.write(tmp_path / "r.yaml", made[0] / "birds16", document), tmp_path / "run")
    assert LoadedStage(tmp_path / "run", "teacher").contract == InputContract((224, 224))
    document, _ = evaluate_run(tmp_path / "run", "student", "val", None)
    assert document["figures"]["accuracy"] is not None
    assert LoadedStage(tmp_path / "run").contract == InputContract((12, 12))


@pytest.mark.parametrize("swapped", (False, True))
def test_b_cos_networks_and_others_teach_each_other(made: tuple[Path, Reader], tmp_path: Path, swapped: bool) -> None:
    pytest.importorskip("bcos")
    names = ["bcos/cifar10_resnet20", "plain/6"]
    teacher, student = reversed(names) if swapped else names
    document = {
        **runs.PLAIN,
        "teacher": {"name": teacher, "method": "erm", "schedule": {"epochs": 1, "batch": 24}},
        "student": {"name": student},
        "terms": {"kd": {}, "sample": {}},
        "schedule": {"epochs": 1, "batch": 24},
    }
    runs.train(runs.write(tmp_path / "r.yaml", made[0] / "birds16", document), tmp_path / "run")
    channels = [LoadedStage(tmp_path / "run", stage).contract.channels for stage in ("teacher", "student")]
    assert channels == ([3, 6] if swapped else [6, 3])


def test_a_run_of_before_there_were_contracts(made: tuple[Path, Reader], tmp_path: Path) -> None:
    """Its weights do not say what they read: ImageNet's mean and std, at the size that is written in them."""
    runs.train(
        runs.write(tmp_path / "r.yaml", made[0] / "birds16", {**runs.PLAIN, "data": {"size": 12}}), tmp_path / "run"
    )
    run = tmp_path / "run"
    stage, file = run / "student" / "stage.json", run / "student" / "model.safetensors"
    document = json.loads(stage.read_text())
    assert not any(key.endswith(".input") for key in document["inputs"])
    figures = evaluate_run(run, "student", "val", None)[0]["figures"]
    tensors = load_file(file)
    with safe_open(file, "pt") as opened:
        about = json.loads(opened.metadata()["debiaskd"])
    assert about.pop("input") == InputContract((12, 12)).to_dict()
    save_file(tensors, file, metadata={"debiaskd": json.dumps(about)})
    document["outputs"]["model.safetensors"] = sha256(file)
    stage.write_text(json.dumps(document))
    assert LoadedStage(run).contract == InputContract((12, 12))
    assert evaluate_run(run, "student", "val", None)[0]["figures"] == figures
