"""A finished run's student teaches, or is trained further: with its transplanted head and CID's intervention."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lightning_fabric")
pytest.importorskip("jsonargparse")
pytest.importorskip("torchdata")
pytest.importorskip("safetensors")

import training_runs as runs
from safetensors.torch import load_file

from debiaskd.boxes import Boxes
from debiaskd.data import Batch
from debiaskd.evaluation.evaluate import LoadedStage, evaluate_run
from debiaskd.models.registry import NetworkError
from debiaskd.models.transplant import Transplanted
from debiaskd.pipeline.stages import Pipeline
from debiaskd.terms.backdoor import Intervened
from debiaskd.training.rebuild import design_of_file
from debiaskd.training.teacher_outputs import LiveTeacher

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.xdist_group("stages")]
FAST = {"epochs": 1, "batch": 12, "learning_rate": 1e-2}
DETT: dict[str, Any] = {
    "transplant": {"projector": "linear"},
    "terms": {"match": {}},
    "schedule": FAST,
    "compute": {"accelerator": "cpu"},
}
CID = {"match": {}, "kd": {}, "sample": {}, "backdoor": {"start": 1}}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.birds(tmp_path_factory.mktemp("run_as_teacher"))


@pytest.fixture(scope="module")
def first(data: Path) -> Path:
    """A transplanted student with CID's intervention, of small/4,6 and with the head of small/4,8."""
    document = {
        **DETT,
        "teacher": {"name": "small/4,8", "method": "erm", "schedule": FAST},
        "student": {"name": "small/4,6"},
        "terms": CID,
        "schedule": {**FAST, "epochs": 2},
        "selection": {"rule": "last"},
    }
    runs.train(runs.write(data / "first.yaml", data, document), data / "first")
    return data / "first"


@pytest.fixture(scope="module")
def simple(data: Path) -> Path:
    """The same without the intervention."""
    teacher = {"name": "small/4,8", "method": "erm", "schedule": FAST}
    document = {**DETT, "teacher": teacher, "student": {"name": "small/4,6"}}
    runs.train(runs.write(data / "simple.yaml", data, document), data / "simple")
    return data / "simple"


def chain(data: Path, folder: Path, document: dict[str, Any]) -> Pipeline:
    recipe = runs.read(runs.write(folder / "r.yaml", data, document))
    return Pipeline(recipe, folder / "run", runs.launch(recipe.compute), lambda *news: None)


IMAGES = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IMAGES)


@pytest.mark.parametrize("which", ["first", "simple"])
def test_a_transplanted_student_teaches_whole(
    data: Path, request: pytest.FixtureRequest, tmp_path: Path, which: str
) -> None:
    run: Path = request.getfixturevalue(which)
    expected = logits(LoadedStage(run).model)
    document = {**DETT, "teacher": {"name": "small/4,6", "weights": str(run)}, "student": {"name": "small/4"}}
    made = chain(data, tmp_path, document)
    assert made.recipe.teacher is not None
    source, _ = made.teacher(made.recipe.teacher)
    assert isinstance(source, Intervened if which == "first" else Transplanted)
    torch.testing.assert_close(logits(source), expected)
    # Its own last layers are what the next student's feature map is read by.
    stage = made.student()
    student: Any = LoadedStage(tmp_path / "run").model
    assert isinstance(student, Transplanted)
    with torch.no_grad():
        feature = source.forward_features(IMAGES)  # type: ignore[operator]
        torch.testing.assert_close(student.forward_head(feature), expected)
    state, before = load_file(stage.model), load_file(run / "student" / "model.safetensors")
    kept = [name for name in state if name.startswith("head.")]
    assert kept and all(any(torch.equal(state[name], tensor) for tensor in before.values()) for name in kept)
    figures, _ = evaluate_run(tmp_path / "run", "student", None, None)
    assert 0 <= figures["figures"]["accuracy"] <= 1


def test_a_run_is_measured_without_the_run_that_taught_it(data: Path, first: Path, tmp_path: Path) -> None:
    shutil.copytree(first, tmp_path / "first")
    document = {**DETT, "teacher": {"name": "small/4,6", "weights": str(tmp_path / "first")}}
    (tmp_path / "second").mkdir()
    chain(data, tmp_path / "second", {**document, "student": {"name": "small/4"}}).student()
    expected = logits(LoadedStage(tmp_path / "second" / "run").model)
    # And a student of that student.
    third = {**document, "teacher": {"name": "small/4", "weights": str(tmp_path / "second" / "run")}}
    (tmp_path / "third").mkdir()
    made = chain(data, tmp_path / "third", {**third, "student": {"name": "small/3"}})
    assert made.recipe.teacher is not None
    torch.testing.assert_close(logits(made.teacher(made.recipe.teacher)[0]), expected)
    made.student()
    third_logits = logits(LoadedStage(tmp_path / "third" / "run").model)
    shutil.rmtree(tmp_path / "first")
    torch.testing.assert_close(logits(LoadedStage(tmp_path / "second" / "run").model), expected)
    shutil.rmtree(tmp_path / "second")
    torch.testing.assert_close(logits(LoadedStage(tmp_path / "third" / "run").model), third_logits)


@pytest.mark.parametrize("path", ["student", "student/model.safetensors"])
def test_distillation_from_adjusted_logits(data: Path, first: Path, tmp_path: Path, path: str) -> None:
    document = {
        **DETT,
        "transplant": None,
        "terms": {"kd": {}, "sample": {}},
        "teacher": {"name": "small/4,6", "weights": str(first / path), "cache": "fp32"},
        "student": {"name": "small/4"},
        "data": {"flip": False},
    }
    made = chain(data, tmp_path, document)
    assert made.recipe.teacher is not None
    source, _ = made.teacher(made.recipe.teacher)
    outputs = LiveTeacher(made._freeze_teacher(source, made.recipe.teacher))(
        Batch(IMAGES, torch.zeros(3).long(), Boxes.from_lists([None] * 3)), 0
    )
    expected = LoadedStage(first).model.eval()
    torch.testing.assert_close(outputs.logits, logits(expected))
    with torch.no_grad():
        pooled = expected.forward_head(expected.forward_features(IMAGES), pre_logits=True)  # type: ignore[operator]
    torch.testing.assert_close(outputs.pooled, pooled)
    made.student()


def test_a_transplanted_student_is_trained_further_whole(data: Path, first: Path, tmp_path: Path) -> None:
    slow = {**FAST, "learning_rate": 1e-12}
    document = {
        "student": {"name": "small/4,6", "weights": str(first)},
        "terms": {"supervised": {}},
        "schedule": slow,
        "compute": {"accelerator": "cpu"},
    }
    made = chain(data, tmp_path, document)
    torch.testing.assert_close(logits(made.student_network), logits(LoadedStage(first).model))
    stage = made.student()
    state, before = load_file(stage.model), load_file(first / "student" / "model.safetensors")
    assert state.keys() == before.keys()
    trained = {name: tensor for name, tensor in before.items() if "running" not in name and "num_batches" not in name}
    torch.testing.assert_close({name: state[name] for name in trained}, trained, rtol=0, atol=1e-6)
    assert isinstance(LoadedStage(tmp_path / "run").model, Intervened)


@pytest.mark.parametrize(("which", "projector"), [("first", "linear"), ("simple", "linear"), ("simple", "depthwise")])
def test_with_another_teacher_the_body_goes_on_and_the_projector_where_it_fits(
    data: Path, request: pytest.FixtureRequest, tmp_path: Path, which: str, projector: str
) -> None:
    run: Path = request.getfixturevalue(which)
    document = {
        **DETT,
        "transplant": {"projector": projector},
        "teacher": {"name": "small/5,8", "method": "erm", "schedule": FAST},
        "student": {"name": "small/4,6", "weights": str(run)},
        "schedule": {**FAST, "learning_rate": 1e-12},
    }
    stage = chain(data, tmp_path, document).student()
    state, before = load_file(stage.model), load_file(run / "student" / "model.safetensors")
    before = {name.removeprefix("student."): tensor for name, tensor in before.items()}
    body = [name for name in state if name.startswith("body.") and name.endswith("weight")]
    assert body and all(torch.allclose(state[name], before[name], rtol=0, atol=1e-6) for name in body)
    fits = projector == "linear"
    names = [name for name in state if name.startswith("projector.") and name.endswith("weight")]
    assert all(
        (name in before and torch.allclose(state[name], before[name], rtol=0, atol=1e-6)) == fits for name in names
    )
    teacher = load_file(tmp_path / "run" / "teacher" / "model.safetensors")
    assert any(torch.equal(teacher["fc.weight"], tensor) for name, tensor in state.items() if name.startswith("head."))
    assert type(LoadedStage(tmp_path / "run").model) is Transplanted


def test_what_a_run_is_not_is_told(data: Path, first: Path, tmp_path: Path) -> None:
    teacher = {"name": "small/4", "weights": str(first)}
    with pytest.raises(NetworkError, match=r"^teacher\.name: must be small/4,6, as .*first has it, got small/4$"):
        chain(data, tmp_path, {**DETT, "teacher": teacher, "student": {"name": "small/4"}})
    with pytest.raises(NetworkError, match=r"^teacher\.bias_free: must be False, as .*first has it, got True$"):
        changed = {**teacher, "name": "small/4,6", "bias_free": True}
        chain(data, tmp_path, {**DETT, "teacher": changed, "student": {"name": "small/4"}})
    assert not (tmp_path / "run").exists()
    assert design_of_file(first / "teacher").plain and not design_of_file(first).plain  # type: ignore[union-attr]
    assert design_of_file(tmp_path) is None


def test_a_given_head_cannot_begin_anew(first: Path) -> None:
    design = design_of_file(first)
    assert design is not None
    from debiaskd.training.rebuild import StartingNetwork

    with pytest.raises(
        NetworkError, match=r"its small/4,6 knows 2 classes and the data has 5; a head that it was given"
    ):
        StartingNetwork(design, new_head=False).begin(str(first), design.contract, 5)
