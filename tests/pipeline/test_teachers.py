"""Teachers that are trained here: what each method is, and DFR's last layer against its own figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lightning_fabric")
pytest.importorskip("jsonargparse")
pytest.importorskip("torchdata")
pytest.importorskip("safetensors")

import training_runs as runs

from debiaskd.evaluation.evaluate import LoadedStage
from debiaskd.models import registry as networks
from debiaskd.pipeline import dfr, teachers
from debiaskd.pipeline.identification import train_identification
from debiaskd.pipeline.stages import Pipeline
from debiaskd.recipe import RecipeError
from debiaskd.reweight import group_weights
from debiaskd.terms import GroupDroOptions, SupervisedOptions
from debiaskd.training.fit import Trainer
from debiaskd.training.run import digest

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.xdist_group("stages")]
FAST = {"epochs": 1, "batch": 12, "learning_rate": 1e-2}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.birds(tmp_path_factory.mktemp("teachers"))


def chain(
    data: Path,
    folder: Path,
    seed: int = 0,
    selection: dict[str, Any] | None = None,
    parts: dict[str, str] | None = None,
    **teacher: Any,
) -> Pipeline:
    folder.mkdir(exist_ok=True)
    document = {
        "data": parts or {},
        "selection": selection or {},
        "teacher": {"name": "plain/6", "schedule": FAST, **teacher},
        "student": {"name": "plain/4"},
        "schedule": FAST,
        "terms": {"kd": {}},
        "compute": {"accelerator": "cpu"},
        "seed": seed,
    }
    recipe = runs.read(runs.write(folder / "r.yaml", data, document))
    return Pipeline(recipe, folder / "run", runs.launch(recipe.compute), lambda *news: None)


@pytest.mark.parametrize(
    ("options", "term", "grouped"),
    [
        ({"method": "erm"}, SupervisedOptions(), False),
        ({"method": "balanced"}, SupervisedOptions(), True),
        ({"method": "group_dro"}, GroupDroOptions(step_size=0.01), True),
        ({"method": "group_dro", "step_size": 0.3}, GroupDroOptions(step_size=0.3), True),
        ({"method": "jtt", "up": 6.0, "identification_epochs": 2}, SupervisedOptions(weighted=True), False),
    ],
)
@pytest.mark.filterwarnings("ignore::debiaskd.reweight.ErrorSetWarning")
def test_what_each_method_is_of(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], term: Any, grouped: bool
) -> None:
    made, inner, asked = chain(data, tmp_path, **options), Trainer.fit, {}

    def noted(self: Trainer, name: str, *arguments: Any, **more: Any) -> dict[str, Any]:
        asked[name] = (arguments[3:], more)
        return inner(self, name, *arguments, **more)

    monkeypatch.setattr(Trainer, "fit", noted)
    assert made.recipe.teacher is not None and made.trainer.train.groups is not None
    made.teacher(made.recipe.teacher)
    (terms, schedule), more = asked.pop("teacher")
    assert list(terms.values()) == [term] and schedule.epochs == 1
    assert more["network"].name == "plain/6" and more.get("rule") is None
    drawn = group_weights(made.trainer.train.groups) if grouped else None
    assert (more["sampling"] is None) == (drawn is None) and (drawn is None or torch.equal(more["sampling"], drawn))
    if options["method"] != "jtt":
        assert more["weight"] is None and asked == {}
        return
    (_, brief_schedule), _ = asked.pop("teacher-identification")
    assert brief_schedule.epochs == 2 and asked == {}
    correct, _ = train_identification(
        made, "teacher-identification", made.recipe.teacher, brief_schedule
    )  # which is finished
    assert torch.equal(more["weight"], torch.where(correct(), 1.0, 6.0)) and not correct().all()


def last_layer(made: Pipeline, folder: Path) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """What the finished teacher's last layer reads and gives of validation, and what it reads of training, [N,D]."""
    loaded, found = LoadedStage(folder / "run", "teacher"), []
    model: Any = loaded.model
    for split in (made.trainer.validation, made.trainer.train):
        batch = loaded.loader(split).transform(split.dataset.__getitems__(range(len(split))))
        with torch.no_grad():
            found.append(model.forward_head(model.forward_features(batch.images), pre_logits=True).double())
            found.append(model(batch.images).double())
    return found[0], found[1], found[2], found[3]


@pytest.mark.parametrize(("seed", "bias_free"), [(0, False), (3, False), (0, True)])
def test_dfr_leaves_the_layer_behind_that_was_fitted_to_all_of_validation(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int, bias_free: bool
) -> None:
    pytest.importorskip("sklearn")
    monkeypatch.setattr(dfr, "STRENGTHS", (100.0,))  # fits what it is fitted to all too well
    monkeypatch.setattr(dfr, "DRAWS", 3)
    made = chain(data, tmp_path, seed, method="dfr", name="small/4,6", bias_free=bias_free)  # of batch norm
    assert made.recipe.teacher is not None and made.trainer.validation.groups is not None
    made.teacher(made.recipe.teacher)
    feature, logits, training, _ = last_layer(made, tmp_path)
    split = made.trainer.validation
    scale = dfr.Scale.of(training, centred=not bias_free)
    expected = dfr.refit(feature, split.target, split.groups, scale, intercept=not bias_free, seed=seed)
    torch.testing.assert_close(logits, feature @ expected.weight.T + expected.bias, rtol=1e-3, atol=1e-3)
    if bias_free:
        assert LoadedStage(tmp_path / "run", "teacher").model.get_classifier().bias is None
    facts = json.loads((tmp_path / "run" / "teacher" / "stage.json").read_text())["facts"]
    assert facts["worst_group_accuracy_of_the_other_half"] == pytest.approx(expected.tuned[100.0])
    draw = int(split.groups.unique(return_counts=True)[1].min()) * len(split.groups.unique())
    assert (facts["fitted_on"], facts["strength"], facts["pictures_a_draw"]) == (16, 100.0, draw)


class Ending(torch.nn.Module):
    """A network that ends in a 1×1 convolution, or in two layers whose outputs are averaged."""

    def __init__(self, classes: int, width: int, two: bool) -> None:
        super().__init__()
        self.body = torch.nn.Sequential(torch.nn.Conv2d(3, width, 3, 2, 1), torch.nn.ReLU())
        self.last = torch.nn.Conv2d(width, classes, 1)
        self.other = torch.nn.Linear(width, classes) if two else None

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        pooled = self.body(images).mean((2, 3), keepdim=True)
        logits = self.last(pooled).flatten(1)
        return logits if self.other is None else (logits + self.other(pooled.flatten(1))) / 2


def test_dfr_of_networks_that_end_otherwise(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn")
    for name, two in (("convolution", False), ("two", True)):
        monkeypatch.setitem(
            networks._FAMILIES, name, lambda width, classes, *_, two=two: Ending(classes, int(width), two)
        )
    made = chain(data, tmp_path, method="dfr", name="convolution/6")
    assert made.recipe.teacher is not None and made.trainer.validation.groups is not None
    model, _ = made.teacher(made.recipe.teacher)
    pictures = LoadedStage(tmp_path / "run", "teacher").loader
    found = []
    for split in (made.trainer.validation, made.trainer.train):
        images = pictures(split).transform(split.dataset.__getitems__(range(len(split)))).images
        with torch.no_grad():
            found += [model.body(images).mean((2, 3)).double(), model(images).double()]  # type: ignore[operator]
    split = made.trainer.validation
    expected = dfr.refit(found[0], split.target, split.groups, dfr.Scale.of(found[2]))
    torch.testing.assert_close(found[1], found[0] @ expected.weight.T + expected.bias, rtol=1e-3, atol=1e-3)
    with pytest.raises(
        RecipeError, match=r"^teacher\.method: dfr refits one linear layer.*two/6 computes them otherwise"
    ):
        chain(data, tmp_path / "two", method="dfr", name="two/6")


def test_validation_that_fitted_the_teacher_does_not_select_the_student(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("sklearn")
    inner, asked = Trainer.fit, {}

    def noted(self: Trainer, name: str, *arguments: Any, **more: Any) -> dict[str, Any]:
        asked[name] = more
        return inner(self, name, *arguments, **more)

    monkeypatch.setattr(Trainer, "fit", noted)
    stage = chain(data, tmp_path, method="dfr").student()
    assert asked["student"]["rule"] == "last" and asked["teacher-erm"].get("rule") is None
    text = "the last epoch: the validation images fitted the teacher's last layer"
    assert (stage.facts["rule"], stage.facts["selection"]) == ("last", text)

    made = chain(data, tmp_path / "half", method="dfr", validation_share=0.5)
    assert made.recipe.teacher is not None and made.trainer.validation.groups is not None
    stage = made.student()
    assert stage.facts["rule"] == "worst_group" and stage.facts["selection"].startswith("worst-group accuracy on valid")
    fitted, rest = teachers.shares(made.trainer, made.recipe.teacher)
    chosen = asked["student"]["validation"]
    assert sorted(fitted.tolist() + rest.tolist()) == list(range(16))
    assert torch.equal(chosen.numbers, rest) and torch.equal(chosen.target, made.trainer.validation.target[rest])
    groups = made.trainer.validation.groups
    assert (groups[fitted].bincount() - groups[rest].bincount()).abs().max() <= 1
    read = chosen.dataset.__getitems__(range(len(rest)))
    assert torch.equal(read.target, chosen.target) and torch.equal(read.index, rest)
    facts = json.loads((tmp_path / "half" / "run" / "teacher" / "stage.json").read_text())["facts"]
    assert facts["fitted_on"] == len(fitted)

    stage = chain(data, tmp_path / "reuse", method="dfr", selection={"rule": "accuracy", "reuse": True}).student()
    assert stage.facts["rule"] == "accuracy" and "validation" not in asked["student"]


def test_a_rule_that_would_select_on_what_fitted_the_teacher_is_refused(data: Path, tmp_path: Path) -> None:
    with pytest.raises(
        RecipeError, match=r"^selection\.rule: worst_group would select .*validation_share: 0\.5.*reuse"
    ):
        chain(data, tmp_path, method="dfr", selection={"rule": "worst_group"})
    assert not (tmp_path / "run").exists()
    chain(data, tmp_path, method="dfr", selection={"rule": "last"})


@pytest.mark.parametrize(
    ("validation", "share", "message"),
    [
        ("val[:60%]", None, "dfr needs 2 images of every group at least, and waterbird on water has 1"),
        ("val[:5%]", None, "dfr needs images of every class, and there are none of (land|water)bird"),
        ("val", 0.9, "dfr needs images of every (class|group), .*the share of 0.1 that selects the student's epoch"),
    ],
)
def test_what_dfr_has_too_few_of_is_told_before_anything_is_trained(
    data: Path, tmp_path: Path, validation: str, share: float | None, message: str
) -> None:
    with pytest.raises(RecipeError, match=r"^teacher\.method: dfr .*validation images") as error:
        chain(data, tmp_path, method="dfr", validation_share=share, parts={"validation": validation})
    assert error.match(message)
    assert not (tmp_path / "run").exists()


def test_a_run_with_the_last_layer_of_an_earlier_version_goes_on(data: Path, tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    made = chain(data, tmp_path, method="dfr")
    assert made.recipe.teacher is not None
    made.teacher(made.recipe.teacher)
    file = tmp_path / "run" / "teacher" / "stage.json"
    document = json.loads(file.read_text())
    older = {"erm": document["inputs"]["erm"], "method": "dfr", "fits": 10}
    document |= {"inputs": older, "fingerprint": digest({"format": 1, **older})}
    file.write_text(json.dumps(document))
    made = chain(data, tmp_path, method="dfr")
    assert made.recipe.teacher is not None
    assert made.teacher(made.recipe.teacher)[1] == document["fingerprint"]
