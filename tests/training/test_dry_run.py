"""What fails in training mode alone is refused before anything is trained, by the key that has to change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lightning_fabric")
pytest.importorskip("jsonargparse")
pytest.importorskip("torchdata")
pytest.importorskip("safetensors")

import training_runs as runs
from torch import Tensor, nn

from debiaskd.models import registry as networks
from debiaskd.pipeline.stages import Pipeline
from debiaskd.recipe import RecipeError
from debiaskd.training.dry_run import DryRun
from debiaskd.training.loop import TrainingLoop

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.xdist_group("stages")]
FAST = {"epochs": 1, "batch": 12, "learning_rate": 1e-2}
LABELS: dict[str, Any] = {
    "student": {"name": "plain/4"},
    "schedule": FAST,
    "terms": {"supervised": {}},
    "compute": {"accelerator": "cpu"},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.birds(tmp_path_factory.mktemp("rehearsal"))


class Normed(runs.Plain):
    """Batch norm of a 1×1 map, as at the end of a ResNet on small images."""

    def __init__(self, classes: int, width: int) -> None:
        super().__init__(classes, width)
        self.body.extend([nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(width)])


class Moody(runs.Plain):
    """Does what `in_training` does in training mode."""

    def forward(self, images: Tensor) -> Any:
        found = super().forward(images)
        return type(self).in_training(found) if self.training else found

    @staticmethod
    def in_training(logits: Tensor) -> Any:
        raise NotImplementedError


class Square(torch.autograd.Function):
    """Can be differentiated once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * gradient


class Once(runs.Plain):
    def forward_features(self, images: Tensor) -> Tensor:
        return Square.apply(super().forward_features(images))  # type: ignore[no-untyped-call, no-any-return]


def never(*arguments: Any) -> Any:
    pytest.fail("trained")


def refused(data: Path, folder: Path, document: dict[str, Any], *overrides: str) -> str:
    """What is said; nothing was trained, and there is no run's folder."""
    with pytest.MonkeyPatch.context() as patch:
        for name, kind in {"normed": Normed, "moody": Moody, "once": Once}.items():
            patch.setitem(networks._FAMILIES, name, lambda width, classes, pretrained, kind=kind: kind(classes, 6))
        patch.setattr(TrainingLoop, "run", never)
        with pytest.raises(RecipeError) as caught:
            runs.train(runs.write(folder / "recipe.yaml", data, document), folder / "run", *overrides)
    assert not (folder / "run").exists() and "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"student": {"name": "normed/6"}, "schedule": {**FAST, "batch": 1}},
            "schedule.batch: gives 1 image a pass, ",
        ),
        (
            {"student": {"name": "normed/6"}, "schedule": {**FAST, "accumulate": 12}},
            "schedule.accumulate: accumulate=12 of batch=12 gives 1 image a pass, and normed/6 needs 2 in training ",
        ),
        (
            {"student": {"name": "normed/6"}, "pretraining": {**FAST, "accumulate": 12}},
            "pretraining.accumulate: accumulate=12 of batch=12 gives 1 image a pass",
        ),
        (
            {
                "terms": {"kd": {}},
                "teacher": {"name": "normed/6", "method": "erm", "schedule": {**FAST, "batch": 1}},
            },
            "teacher.schedule.batch: gives 1 image a pass, and normed/6 needs 2",
        ),
        (
            {
                "student": {"name": "normed/6"},
                "terms": {"match": {}},
                "transplant": {},
                "weights": {},
                "teacher": {"name": "plain/6", "method": "erm", "schedule": FAST},
                "schedule": {**FAST, "accumulate": 12},
            },
            "schedule.accumulate: ",
        ),
        (
            {"student": {"name": "once/6"}, "terms": {"supervised": {}, "guide": {"layer": "body.0"}}},
            "terms.guide: cannot train once/6 (trying to differentiate twice",
        ),
        (
            {"student": {"name": "small/4,4,4,4"}, "terms": {"supervised": {}, "guide": {}}},
            "terms.guide: cannot train small/4,4,4,4 (layer must give a map of several positions, got 'Final', whose "
            "map is 1×1 for images of 16×16",
        ),
        (
            {"student": {"name": "moody/6"}},
            "student.name: moody/6 cannot be trained, in training mode it fails on 12 images a pass (Not",
        ),
    ],
)
def test_what_fails_in_training_is_refused_by_its_key(
    data: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    assert refused(data, tmp_path, {**LABELS, **change}).startswith(message)


def test_a_tuple_of_outputs_and_a_full_memory_are_named(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    document = {**LABELS, "student": {"name": "moody/6"}}
    monkeypatch.setattr(Moody, "in_training", staticmethod(lambda logits: (logits, logits)))
    found = refused(data, tmp_path, document)
    assert found.startswith("student.name: moody/6 ") and "must give logits [N,K], got tuple" in found

    def full(logits: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2.00 GiB")

    monkeypatch.setattr(Moody, "in_training", staticmethod(full))
    found = refused(data, tmp_path, {**document, "schedule": {**FAST, "accumulate": 3}})
    assert found.startswith("schedule.batch: 4 images a pass do not fit in memory; a larger schedule.accumulate needs")


def test_a_rehearsal_leaves_nothing_behind(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    document = {**runs.EVERYTHING, "student": {"name": "small/4,6"}}
    recipe = runs.read(runs.write(tmp_path / "r.yaml", data, document))
    before, inner, ran = torch.get_rng_state(), DryRun.run, []
    monkeypatch.setattr(DryRun, "run", lambda self, learner: ran.append(self.key) or inner(self, learner))
    chain = Pipeline(recipe, tmp_path / "run", runs.launch(recipe.compute), lambda *news: None)
    assert ran == ["teacher", "student", "student"]  # the identification model, and the transplanted student
    assert torch.equal(torch.get_rng_state(), before)
    fresh = chain.trainer.network(recipe.student, "student").state_dict()
    torch.testing.assert_close(chain.student_network.state_dict(), fresh, rtol=0, atol=0)
    assert all(p.grad is None for p in chain.student_network.parameters())


def test_a_finished_run_is_not_rehearsed(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = runs.write(tmp_path / "r.yaml", data, LABELS)
    first = runs.train(recipe, tmp_path / "run")
    monkeypatch.setattr(DryRun, "run", never)
    assert runs.train(recipe, tmp_path / "run").fingerprint == first.fingerprint


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_auxiliary_heads_are_taken_off(name: str) -> None:
    pytest.importorskip("torchvision")
    with torch.device("meta"):
        model = networks.build(f"torchvision/{name}", 5).train()
        logits = model(torch.empty(2, 3, 299, 299))
    assert isinstance(logits, Tensor) and logits.shape == (2, 5)
    assert not [key for key in model.state_dict() if key.lower().startswith("aux")]


def test_a_file_of_weights_may_hold_auxiliary_heads(tmp_path: Path) -> None:
    torchvision = pytest.importorskip("torchvision")
    with torch.device("meta"):
        whole = torchvision.models.googlenet(num_classes=5, init_weights=False)
        model = networks.build("torchvision/googlenet", 5)
    state = {name: torch.full(tensor.shape, 0.5, dtype=tensor.dtype) for name, tensor in whole.state_dict().items()}
    assert "aux1.fc1.weight" in state
    torch.save(state, tmp_path / "googlenet.pth")
    model.to_empty(device="cpu")
    networks.load_weights(model, tmp_path / "googlenet.pth")
    assert all((tensor == torch.full_like(tensor, 0.5)).all() for tensor in model.state_dict().values())
