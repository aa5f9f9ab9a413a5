"""What the trainings of a recipe share: one seed, and images that must be those that it began with."""

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

import data_trees as trees
import training_runs as runs
from safetensors.torch import load_file

from debiaskd.data import prepare
from debiaskd.evaluation.evaluate import LoadedStage
from debiaskd.pipeline.stages import Pipeline
from debiaskd.recipe import Schedule
from debiaskd.terms.backdoor import Intervened
from debiaskd.training.rebuild import frozen
from debiaskd.training.run import RunError
from debiaskd.training.schedule import brief_schedule
from debiaskd.training.selection import CheckpointSelector
from debiaskd.training.teacher_outputs import LiveTeacher

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.xdist_group("stages")]
PLAIN: dict[str, Any] = {**runs.PLAIN, "schedule": {**runs.PLAIN["schedule"], "epochs": 1}}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.birds(tmp_path_factory.mktemp("fitting"))


def drawn(data: Path, folder: Path, seed: int) -> dict[str, torch.Tensor]:
    """All that a run's seed decides before its first step."""
    folder.mkdir()
    recipe = runs.read(runs.write(folder / "r.yaml", data, {**runs.EVERYTHING, "seed": seed}))
    chain = Pipeline(recipe, folder / "run", runs.launch(recipe.compute), lambda *news: None)
    trainer, options = chain.trainer, recipe.teacher
    assert options is not None
    networks = {name: trainer.network(recipe.student, name) for name in ("student", "identification")}
    still = frozen(trainer.network(options, "teacher"), options, trainer.example(options))
    student: Any = chain._transplanted(still, networks["student"])
    learner = trainer._learner(student, chain._terms(), LiveTeacher(still), None, recipe.student)
    pictures = trainer.loader(trainer.train, recipe.student, training=True, batch=12)
    found = {f"networks.{name}": model.fc.weight for name, model in networks.items()}
    found |= {"teacher": still.get_classifier().weight, "projector": student.projector.weight}
    found |= {f"terms.{name}": tensor for name, tensor in learner.terms.named_parameters() if name.endswith("weight")}
    return found | {"order": torch.tensor(list(pictures.sampler))}


def test_the_seed_alone_decides_beginnings_and_order(data: Path, tmp_path: Path) -> None:
    first = drawn(data, tmp_path / "first", 3)
    torch.manual_seed(99)
    again, other = drawn(data, tmp_path / "again", 3), drawn(data, tmp_path / "other", 4)
    assert {"terms.sample.regressor.weight", "terms.backdoor.head.fc.weight"} <= set(first)
    assert [name for name in first if not torch.equal(first[name], again[name])] == []
    assert [name for name in first if torch.equal(first[name], other[name])] == []
    assert not torch.equal(first["networks.student"], first["networks.identification"])


def test_other_pictures_under_the_same_name_are_noticed(tmp_path: Path) -> None:
    data = runs.birds(tmp_path)
    recipe = runs.write(tmp_path / "r.yaml", data, PLAIN)
    runs.train(recipe, tmp_path / "run")
    shutil.rmtree(data)
    trees.waterbirds(tmp_path / "others", [(i % 2, 0 if i < 48 else 1 if i < 64 else 2, i % 2) for i in range(80)])
    prepare("waterbirds", tmp_path / "others", data, size=16, workers=1)
    with pytest.raises(RunError, match=r"student: was made with data: \w+, not \w+; choose another --out"):
        runs.train(recipe, tmp_path / "run")


@pytest.mark.parametrize("first", [True, False])
def test_a_student_is_loaded_as_it_was_before_its_contexts_and_with_them(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: bool
) -> None:
    monkeypatch.setattr(CheckpointSelector, "_beats", lambda *figures: not first)
    teacher = {"name": "plain/6", "method": "erm", "schedule": PLAIN["schedule"]}
    document = {
        **PLAIN,
        "teacher": teacher,
        "terms": {"supervised": {}, "backdoor": {"start": 2}},
        "schedule": {**PLAIN["schedule"], "epochs": 3},
    }
    stage = runs.train(runs.write(tmp_path / "r.yaml", data, document), tmp_path / "run")
    model = LoadedStage(tmp_path / "run").model
    assert stage.facts["epoch"] == (0 if first else 2) and isinstance(model, Intervened) is not first
    state = load_file(stage.model)
    assert set(state) == set(model.state_dict())
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_an_identification_model_is_trained_briefly_and_plainly() -> None:
    schedule = Schedule(epochs=9, batch=5, ema=0.9, warmup=2, shape="steps", milestones=[3], clip=2.0)
    expected = Schedule(epochs=1, batch=5, clip=2.0)
    assert brief_schedule(schedule, None) == expected and brief_schedule(schedule, 4) == Schedule(
        epochs=4, batch=5, clip=2.0
    )
    assert brief_schedule(Schedule(shape="cosine"), 2).shape == "cosine"
