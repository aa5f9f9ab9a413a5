"""Last layers refitted without annotation: what fits them, what never sees what, and the formulas behind them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("lightning_fabric")
pytest.importorskip("jsonargparse")
pytest.importorskip("torchdata")
pytest.importorskip("safetensors")
pytest.importorskip("sklearn")

import training_runs as runs

from debiaskd import bias
from debiaskd.evaluation.evaluate import LoadedStage, evaluate_run
from debiaskd.pipeline import layer_fits, refits
from debiaskd.pipeline.stages import Pipeline
from debiaskd.recipe import RecipeError, RefitOptions
from debiaskd.training.feature_extraction import Reading
from debiaskd.training.fit import Trainer
from debiaskd.training.run import finished

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.xdist_group("stages")]
FAST = {"epochs": 1, "batch": 12, "learning_rate": 1e-2}
KD: dict[str, Any] = {
    "student": {"name": "plain/4"},
    "schedule": FAST,
    "terms": {"kd": {}},
    "compute": {"accelerator": "cpu"},
}
LABELS: dict[str, Any] = {**KD, "terms": {"supervised": {}}}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.birds(tmp_path_factory.mktemp("refits"))


def chain(folder: Path, path: Path, document: dict[str, Any]) -> Pipeline:
    folder.mkdir(exist_ok=True)
    recipe = runs.read(runs.write(folder / "r.yaml", path, document))
    return Pipeline(recipe, folder / "run", runs.launch(recipe.compute), lambda *news: None)


def seen(monkeypatch: pytest.MonkeyPatch) -> dict[str, set[int]]:
    """Which images of the training split each training of a recipe reads, by its name."""
    found: dict[str, set[int]] = {}
    inner = Trainer.fit

    def fit(self: Trainer, name: str, *arguments: Any, **options: Any) -> dict[str, Any]:
        found[name] = set((options.get("training") or self.train).numbers.tolist())
        return inner(self, name, *arguments, **options)

    monkeypatch.setattr(Trainer, "fit", fit)
    return found


@pytest.mark.parametrize("method", ("afr", "self", "class_balanced", "evals"))
def test_a_teacher(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    monkeypatch.setattr(layer_fits, "COUNTS", {"self": (4, 6), "evals": (1, 2)})
    trainings = seen(monkeypatch)
    options = {"holdout": 0.25} if method != "evals" else {}
    teacher = {"name": "plain/6", "method": method, "schedule": FAST, "refit": options}
    made = chain(
        tmp_path, data, {**KD, "teacher": teacher, "data": {"groups": "none"}, "selection": {"rule": "accuracy"}}
    )
    made.student()
    facts = finished(tmp_path / "run", "teacher").facts
    assert facts["refit"]["method"] == method and 0 <= facts["refit"]["worst_group_of_tuning"] <= 1
    before, after = LoadedStage(tmp_path / "run", "teacher-erm").model, LoadedStage(tmp_path / "run", "teacher").model
    changed = {n for n, t in before.state_dict().items() if not torch.equal(t, after.state_dict()[n])}
    assert changed == {"fc.weight", "fc.bias"}, "the last layer, and nothing else"
    _, held = refits.held_out(made, RefitOptions(**options), method)
    if held is None:
        assert len(trainings["teacher-erm"]) == 48
    else:
        assert len(held) == 12 and held.target.bincount().tolist() == [6, 6]
        for name in {"teacher-erm", "teacher-early"} & set(trainings):
            assert not trainings[name] & set(held.numbers.tolist()), name
            assert len(trainings[name]) == 36
    assert len(trainings["student"]) == 48, "the student learns from all images"


def test_a_students_refit(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainings = seen(monkeypatch)
    teacher = {"name": "plain/8", "method": "erm", "schedule": FAST}
    document = {**KD, "terms": {"match": {}}, "teacher": teacher, "transplant": {"projector": "linear"}}
    document |= {"weights": {"method": "errors", "up": 5}, "refit": {"method": "afr", "holdout": 0.25, "pull": 0.01}}
    made = chain(tmp_path, data, document)
    stage = made.student()
    held = made.trainer.heldout
    assert held is not None and set(trainings) == {"teacher", "identification", "student"}
    for name, numbers in trainings.items():
        assert not numbers & set(held.numbers.tolist()) and len(numbers) == 36, name
    before, after = LoadedStage(tmp_path / "run", "student-before-refit").model, LoadedStage(tmp_path / "run").model
    changed = {n for n, t in before.state_dict().items() if not torch.equal(t, after.state_dict()[n])}
    assert changed and all(".fc." in name or name.startswith(("head.", "fc.")) for name in changed), changed
    assert stage.facts["refit"]["settings"]["pull"] == 0.01
    document_, _ = evaluate_run(tmp_path / "run", "student", "val", None)
    assert document_["figures"]["accuracy"] == pytest.approx(stage.facts["figures"]["accuracy"])
    assert chain(tmp_path, data, document).student().fingerprint == stage.fingerprint, "run again, nothing is made"


def test_afrs_layer_is_the_fit_of_its_formula(data: Path, tmp_path: Path) -> None:
    document = {**LABELS, "refit": {"method": "afr", "holdout": 0.5, "gamma": 3.0, "pull": 0.05}}
    made = chain(tmp_path, data, document)
    made.student()
    held = made.trainer.heldout
    assert held is not None
    model = LoadedStage(tmp_path / "run", "student-before-refit").model
    pictures = LoadedStage(tmp_path / "run").loader(held)
    rows = [pictures.transform(batch) for batch in pictures.dataloader]
    with torch.no_grad():
        feature = torch.cat([model.forward_head(model.forward_features(b.images), pre_logits=True) for b in rows])
    # Weights and loss written out in float64, minimised by another solver.
    start = [model.fc.weight.detach().double(), model.fc.bias.detach().double()]
    logits, target = F.linear(feature.double(), *start), held.target
    weight = torch.exp(-3 * logits.softmax(1)[torch.arange(24), target]) / target.bincount()[target]
    weight = weight / weight.sum()
    free = [tensor.clone().requires_grad_() for tensor in start]
    solver = torch.optim.SGD(free, lr=0.5)
    for _ in range(4000):
        loss = (weight * F.cross_entropy(F.linear(feature.double(), *free), target, reduction="none")).sum()
        loss = loss + 0.05 * sum((one - old).square().sum() for one, old in zip(free, start))
        solver.zero_grad()
        loss.backward()
        solver.step()
    after = LoadedStage(tmp_path / "run").model
    torch.testing.assert_close(after.fc.weight.double(), free[0].detach(), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(after.fc.bias.double(), free[1].detach(), rtol=1e-3, atol=1e-4)


def shortcut(samples: int, agrees: float, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(features, labels, groups): a noisy cause beside a clean shortcut."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(2, (samples,), generator=generator)
    same = torch.rand(samples, generator=generator) < agrees
    sign = 2.0 * labels - 1
    cause = sign + 0.5 * torch.randn(samples, generator=generator)
    short = torch.where(same, sign, -sign) + 0.1 * torch.randn(samples, generator=generator)
    return torch.stack([cause, short], 1), labels, labels * 2 + same.long()


@pytest.mark.parametrize("method", ("afr", "self", "class_balanced", "evals"))
def test_methods_against_a_shortcut(method: str) -> None:
    """Each undoes what it claims to: all but the baseline raise the worst group of a layer that took the shortcut."""
    feature, labels, _ = shortcut(2000, 0.95, 0)
    layer = bias.fit_last_layer(feature, labels, torch.zeros(2, 2), torch.zeros(2), pull=3e-2)

    def read(rows: torch.Tensor) -> Reading:
        return Reading(F.linear(rows, *layer), rows)

    held, target, _ = shortcut(1000, 0.95, 1)
    tuned, tuned_target, _ = shortcut(1000, 0.95, 2)
    environments = bias.find_environments(read(tuned).logits, tuned_target).ids(2)
    early = Reading(4 * torch.stack([-held[:, 1], held[:, 1]], 1), held)  # the shortcut alone
    material = layer_fits.Material(read(held), target, early, read(tuned), tuned_target, environments)
    fit = layer_fits.best_fit(method, RefitOptions(), layer, material)
    test, truth, groups = shortcut(4000, 0.5, 3)

    def worst(layer: Any) -> float:
        right = (F.linear(test, *layer).argmax(1) == truth).double()
        return min(float(right[groups == g].mean()) for g in range(4))

    assert worst(layer) < 0.65
    assert worst(fit.layer) > (worst(layer) - 0.05 if method == "class_balanced" else 0.75)


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"refit": {"gamma": 1.0, "method": "self"}}, "refit.gamma: only for afr, got self"),
        ({"refit": {"holdout": 1.0}}, r"refit.holdout: must lie in \(0, 1\), got 1.0"),
        ({"refit": {"method": "self", "count": 0}}, "refit.count: must be >= 1, got 0"),
        ({"refit": {"holdout": 0.9}}, "schedule.batch: 12 images a step, and the training split has 4"),
        ({"refit": {}, "student": {"name": "ending/4"}}, "refit: afr refits one linear layer"),
    ],
)
def test_what_does_not_fit(data: Path, tmp_path: Path, document: dict[str, Any], message: str) -> None:
    from debiaskd.models import registry

    registry._FAMILIES.setdefault("ending", lambda width, classes, pretrained: Twice(classes, int(width)))
    with pytest.raises(RecipeError, match=message):
        chain(tmp_path, data, {**LABELS, **document})


@pytest.mark.parametrize(
    ("teacher", "more", "message"),
    [
        (
            {"method": "erm", "refit": {}},
            {},
            "teacher.refit: only for methods afr, self, cl",
        ),
        (
            {"method": "afr", "refit": {"holdout": 0.3}},
            {"refit": {}},
            "holdout: the student's refit holds out the same",
        ),
        ({"method": "evals", "refit": {"holdout": 0.3}}, {}, "teacher.refit.holdout: only for afr, self, class_bal"),
    ],
)
def test_what_a_teachers_refit_may_not_say(
    data: Path, tmp_path: Path, teacher: dict[str, Any], more: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        chain(tmp_path, data, {**KD, **more, "teacher": {"name": "plain/6", "schedule": FAST, **teacher}})


class Twice(runs.Plain):
    """Logits that are no layer's output."""

    def forward_head(self, feature: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        out = super().forward_head(feature, pre_logits)
        return out if pre_logits else 2 * out


def test_facts_are_json(data: Path, tmp_path: Path) -> None:
    chain(tmp_path, data, {**LABELS, "refit": {"method": "class_balanced"}}).student()
    facts = json.loads((tmp_path / "run" / "student" / "stage.json").read_text())["facts"]
    assert facts["refit"]["settings"].keys() == {"pull"} and facts["rule"] == "worst_group"
