"""The stages of a recipe: teachers that are trained here or come from files, weights, pretraining, the student."""

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
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from debiaskd.data import Augment, PackedDataset
from debiaskd.evaluation.evaluate import LoadedStage
from debiaskd.models import registry as networks
from debiaskd.models.registry import NetworkError
from debiaskd.pipeline import weights as weights_stage
from debiaskd.pipeline.stages import Pipeline
from debiaskd.recipe import RecipeError
from debiaskd.reweight import ErrorSetWarning
from debiaskd.terms import State, Supervised
from debiaskd.training.dry_run import DryRun
from debiaskd.training.run import RunError

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.xdist_group("stages"),
    pytest.mark.filterwarnings("ignore::debiaskd.reweight.ErrorSetWarning"),
]
FAST = {"epochs": 1, "batch": 12, "learning_rate": 1e-2}
SUPERVISED: dict[str, Any] = {
    "student": {"name": "plain/4"},
    "schedule": FAST,
    "terms": {"supervised": {}},
    "compute": {"accelerator": "cpu"},
}


class Bare(nn.Module):
    """Functional pooling and no method but forward: how torchvision's networks are written."""

    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, 2, 1)
        self.stage = nn.Sequential(nn.Conv2d(4, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU())
        self.last = nn.Linear(width, classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.last(self.stage(self.stem(images).relu()).mean((2, 3)))


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(networks._FAMILIES, "bare", lambda width, classes, pretrained: Bare(classes, int(width)))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.birds(tmp_path_factory.mktemp("stages"))


def distilled(method: str | None, **teacher: Any) -> dict[str, Any]:
    made = {"name": "plain/6", **teacher}
    if method is not None:
        made |= {"method": method, "schedule": FAST}
    return {**SUPERVISED, "terms": {"kd": {}}, "teacher": made}


def run(data: Path, folder: Path, document: dict[str, Any], *overrides: str) -> Any:
    return runs.train(runs.write(folder / "recipe.yaml", data, document), folder / "run", *overrides)


def stage_of(folder: Path, name: str) -> dict[str, Any]:
    return json.loads((folder / "run" / name / "stage.json").read_text())


# -- teachers that are trained here -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "teacher", "stages"),
    [
        ("erm", {}, {"teacher", "student"}),
        ("balanced", {}, {"teacher", "student"}),
        ("group_dro", {"step_size": 0.1}, {"teacher", "student"}),
        ("jtt", {"up": 5.0, "identification_epochs": 2}, {"teacher-identification", "teacher", "student"}),
        ("dfr", {}, {"teacher-erm", "teacher", "student"}),
    ],
)
def test_a_teacher_of_each_method(
    data: Path, tmp_path: Path, method: str, teacher: dict[str, Any], stages: set[str]
) -> None:
    if method == "dfr":
        pytest.importorskip("sklearn")
    run(data, tmp_path, distilled(method, **teacher))
    found = {path.parent.name for path in (tmp_path / "run").glob("*/stage.json")}
    assert found == stages
    loaded = LoadedStage(tmp_path / "run", "teacher")
    assert loaded.classes == ["landbird", "waterbird"] and loaded.network.name == "plain/6"
    if method == "jtt":
        assert stage_of(tmp_path, "teacher-identification")["facts"]["epochs"] == 2


def test_methods_make_different_teachers_of_the_same_beginnings(data: Path, tmp_path: Path) -> None:
    states = {}
    for method, options in {"erm": {}, "balanced": {}, "group_dro": {}, "jtt": {"up": 20.0}}.items():
        folder = tmp_path / method
        folder.mkdir()
        run(data, folder, distilled(method, **options), "--teacher.schedule.learning_rate", "1e-3")
        states[method] = load_file(folder / "run" / "teacher" / "model.safetensors")["fc.weight"]
    found = list(states.values())
    assert not any(torch.equal(a, b) for i, a in enumerate(found) for b in found[:i])
    torch.testing.assert_close(states["balanced"], states["group_dro"], rtol=0, atol=0.02)  # of the same images


def test_dfr_changes_the_last_layer_alone(data: Path, tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    run(data, tmp_path, distilled("dfr"))
    erm, dfr = (load_file(tmp_path / "run" / name / "model.safetensors") for name in ("teacher-erm", "teacher"))
    assert {name for name in erm if not torch.equal(erm[name], dfr[name])} == {"fc.weight", "fc.bias"}
    facts = stage_of(tmp_path, "teacher")["facts"]
    assert facts["fitted_on"] == 16  # all of the validation images
    assert 0 <= facts["worst_group_accuracy_of_the_other_half"] <= 1


# -- weights ----------------------------------------------------------------------------------------------------------


def mistakes(data: Path, run: Path, stage: str) -> torch.Tensor:
    """What the identification model gets wrong once it is trained, computed from its file."""
    loaded = LoadedStage(run, stage)
    split = PackedDataset(data, "train")
    images = Augment(16, flip=False)(split.__getitems__(range(len(split)))).images
    with torch.no_grad():
        return loaded.model(images).argmax(1) != split.target


@pytest.mark.parametrize(("convention", "heaviest"), [("weight", 7.0), ("copies", 8.0)])
def test_weights_are_the_trained_models_mistakes(data: Path, tmp_path: Path, convention: str, heaviest: float) -> None:
    document = {
        **SUPERVISED,
        "student": {"name": "small/4,6"},  # of batch norm, which would see other mistakes in training mode
        "terms": {"supervised": {"weighted": True}},
        "weights": {"up": 7.0, "convention": convention, "epochs": 3},
        "schedule": {**FAST, "ema": 0.99, "warmup": 1, "epochs": 2},
    }
    run(data, tmp_path, document)
    weights = load_file(tmp_path / "run" / "weights" / "weights.safetensors")["weights"]
    wrong = mistakes(data, tmp_path / "run", "identification")
    assert 0 < int(wrong.sum()) < 48
    assert torch.equal(weights, torch.where(wrong, heaviest, 1.0))
    facts = stage_of(tmp_path, "weights")["facts"]
    assert facts == {"pictures": 48, "heaviest": heaviest, "heaviest_pictures": int(wrong.sum())}
    train_identification = stage_of(tmp_path, "identification")
    brief, facts = train_identification["inputs"]["schedule"], train_identification["facts"]
    assert (brief["epochs"], brief["ema"], brief["warmup"]) == (3, None, 0)
    assert (facts["rule"], facts["epoch"]) == ("last", 2)  # its best epoch would make fewer of the mistakes


@pytest.mark.parametrize("draw", [False, True])
def test_pictures_are_drawn_by_their_weights_instead_of_weighing_the_loss(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, draw: bool
) -> None:
    seen: list[tuple[torch.Tensor, torch.Tensor | None]] = []
    inner = Supervised.forward

    def noting(self: Supervised, state: State) -> torch.Tensor:
        loss = inner(self, state)
        if not draw:
            assert state.weight is not None and not torch.equal(
                loss, F.cross_entropy(state.student.logits, state.target)
            )
        else:
            torch.testing.assert_close(loss, F.cross_entropy(state.student.logits, state.target))
        assert state.groups is not None
        seen.append((state.groups, state.weight))
        return loss

    monkeypatch.setattr(Supervised, "forward", noting)
    monkeypatch.setattr(DryRun, "run", lambda self, learner: None)
    monkeypatch.setattr("debiaskd.pipeline.weights.group_weights", lambda groups: torch.where(groups == 2, 30.0, 1.0))
    document = {**SUPERVISED, "terms": {"supervised": {"weighted": True}}}
    document["weights"] = {"method": "groups", "draw": draw}
    run(data, tmp_path, document, "--schedule.epochs", "2", "--data.train", "train[:60%]")
    share = torch.cat([groups for groups, _ in seen]).eq(2).float().mean()
    assert all((weight is None) is draw for _, weight in seen)
    assert share > 0.8 if draw else share < 0.4  # of 29 images 8 are of that group


def test_weights_of_a_part_of_the_pictures_are_those_pictures(data: Path, tmp_path: Path) -> None:
    document = {**SUPERVISED, "terms": {"supervised": {"weighted": True}}, "weights": {"method": "groups"}}
    recipe = runs.write(tmp_path / "r.yaml", data, {**document, "data": {"train": "train[:50%]"}})
    read_recipe = runs.read(recipe)
    chain = Pipeline(read_recipe, tmp_path / "run", runs.launch(read_recipe.compute), lambda *news: None)
    split = chain.trainer.train
    spread = chain.scatter_weights(torch.arange(24.0) + 1)
    assert torch.equal(spread[split.numbers], torch.arange(24.0) + 1)
    assert int((spread > 0).sum()) == 24 and len(spread) == 48


def test_an_empty_error_set_is_warned_of(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inner = weights_stage.error_weights
    monkeypatch.setattr(
        weights_stage, "error_weights", lambda correct, *rest, **more: inner(torch.ones_like(correct), *rest, **more)
    )
    document = {**SUPERVISED, "terms": {"supervised": {"weighted": True}}, "weights": {}}
    with pytest.warns(ErrorSetWarning, match="the error set is empty"):
        run(data, tmp_path, document)


# -- beginnings -------------------------------------------------------------------------------------------------------


def test_a_teacher_from_files(data: Path, tmp_path: Path) -> None:
    run(data, tmp_path, {**SUPERVISED, "student": {"name": "plain/6"}})
    model = tmp_path / "run" / "student" / "model.safetensors"
    state = load_file(model)
    torch.save({"state_dict": {f"module.{name}": tensor for name, tensor in state.items()}}, tmp_path / "t.pth")
    states = []
    for number, weights in enumerate((model, tmp_path / "run", tmp_path / "t.pth")):
        folder = tmp_path / str(number)
        folder.mkdir()
        stage = run(data, folder, distilled(None, weights=str(weights)))
        states.append(load_file(stage.model))
        assert not (folder / "run" / "teacher").exists()
    assert all(torch.equal(states[0][name], other[name]) for other in states[1:] for name in states[0])
    (tmp_path / "other").mkdir()
    changed = {**state, "fc.bias": state["fc.bias"] + torch.tensor([3.0, 0])}
    save_file(changed, tmp_path / "other.safetensors")
    other = load_file(run(data, tmp_path / "other", distilled(None, weights=str(tmp_path / "other.safetensors"))).model)
    assert not torch.equal(other["fc.bias"], states[0]["fc.bias"])


def test_what_was_taken_from_a_file_is_said_once(data: Path, tmp_path: Path) -> None:
    state = runs.Plain(2, 6).state_dict()
    torch.save({"model": {f"module.{name}": tensor for name, tensor in state.items()}}, tmp_path / "t.pth")
    recipe = runs.read(runs.write(tmp_path / "r.yaml", data, distilled(None, weights=str(tmp_path / "t.pth"))))
    news: list[tuple[str, str]] = []
    made = Pipeline(
        recipe, tmp_path / "run", runs.launch(recipe.compute), lambda task, done, new: news.append((task, new))
    )
    made.student()
    said = [(task, new) for task, new in news if new.startswith("weights")]
    assert said == [("teacher", f"weights {tmp_path / 't.pth'}: took 'model', took off the prefix 'module.'")]


def test_other_weights_under_the_same_name_are_noticed(data: Path, tmp_path: Path) -> None:
    torch.manual_seed(3)
    for name in ("student", "teacher"):
        (tmp_path / name).mkdir()
        weights = tmp_path / f"{name}.safetensors"
        networks.save_weights(runs.Plain(2, 4), weights, {})
        document = distilled(None, weights=str(weights))
        document["teacher"]["name"] = "plain/4"
        if name == "student":
            document = {**SUPERVISED, "student": {"name": "plain/4", "weights": str(weights)}}
        run(data, tmp_path / name, document)
        networks.save_weights(runs.Plain(2, 4), weights, {})
        with pytest.raises(RunError, match=f"student: was made with .*{name}"):
            run(data, tmp_path / name, document)


def test_a_student_begins_from_weights_and_from_its_pretraining(data: Path, tmp_path: Path) -> None:
    torch.manual_seed(7)
    begun = runs.Plain(2, 4)
    networks.save_weights(begun, tmp_path / "w.safetensors", {})
    slow = {**SUPERVISED, "schedule": {**FAST, "learning_rate": 1e-9}}
    stage = run(data, tmp_path, {**slow, "student": {"name": "plain/4", "weights": str(tmp_path / "w.safetensors")}})
    torch.testing.assert_close(load_file(stage.model), begun.state_dict(), rtol=0, atol=1e-6)
    folder = tmp_path / "pretrained"
    folder.mkdir()
    stage = run(data, folder, {**slow, "pretraining": {**FAST, "epochs": 2}})
    before = load_file(folder / "run" / "pretraining" / "model.safetensors")
    torch.testing.assert_close(load_file(stage.model), before, rtol=0, atol=1e-6)
    assert stage_of(folder, "pretraining")["facts"]["epochs"] == 2


def test_weights_of_other_classes_are_for_what_is_trained_alone(data: Path, tmp_path: Path) -> None:
    torch.manual_seed(7)
    begun = runs.Plain(5, 4)
    networks.save_weights(begun, tmp_path / "w.safetensors", {})
    slow, weights = {**FAST, "learning_rate": 1e-9}, str(tmp_path / "w.safetensors")
    teacher = {"name": "plain/4", "weights": weights, "method": "erm", "schedule": slow}
    document = {**distilled(None), "schedule": slow, "student": {"name": "plain/4", "weights": weights}}
    with pytest.warns(networks.LastLayerWarning, match="is of 5 classes and not of 2"):
        run(data, tmp_path, {**document, "teacher": teacher})
    for stage in ("teacher", "student"):
        found = load_file(tmp_path / "run" / stage / "model.safetensors")
        body = {name: tensor for name, tensor in begun.state_dict().items() if not name.startswith("fc.")}
        torch.testing.assert_close({name: found[name] for name in body}, body, rtol=0, atol=1e-6)
        assert found["fc.weight"].shape == (2, 4)
    document = {**distilled(None), "teacher": {"name": "plain/4", "weights": weights}}
    with pytest.raises(networks.NetworkError, match=r"of another network: fc\.weight is \[5, 4\] there"):
        run(data, tmp_path, document)


def test_networks_without_timms_protocol(data: Path, tmp_path: Path) -> None:
    dett = {
        **SUPERVISED,
        "student": {"name": "bare/4"},
        "teacher": {"name": "bare/6", "method": "erm", "schedule": FAST},
        "transplant": {"projector": "linear"},
        "terms": {"match": {}, "sample": {}, "backdoor": {"start": 1}},
        "schedule": {**FAST, "epochs": 2},
    }
    stage = run(data, tmp_path, dett)
    state, teacher = load_file(stage.model), load_file(tmp_path / "run" / "teacher" / "model.safetensors")
    assert any(torch.equal(tensor, teacher["last.weight"]) for tensor in state.values())
    assert LoadedStage(tmp_path / "run").model(torch.randn(2, 3, 16, 16)).shape == (2, 2)
    named = {**distilled("erm"), "student": {"name": "bare/4", "layer": "stage.1", "head": "last"}}
    (tmp_path / "named").mkdir()
    run(data, tmp_path / "named", {**named, "terms": {"sample": {}, "supervised": {}}})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"student": {"name": "bare/4", "head": "stem"}}, "bare/4: head must name a layer of the model that gives one"),
        ({"student": {"name": "bare/4", "layer": "stag"}}, "bare/4: layer"),
        ({"teacher": {"name": "bare/4", "method": "erm", "schedule": FAST, "layer": "x"}}, "teacher: layer"),
        ({"transplant": {"projector": "identity"}}, "transplant: "),
        ({"terms": {"sample": {}, "guide": {"layer": "stagee"}}}, "terms.guide: layer"),
        ({"terms": {"sample": {}, "guide": {"attribution": "bcos"}}}, "terms.guide: "),
        (
            {"terms": {"sample": {}, "backdoor": {"start": 1}}, "schedule": {**FAST, "epochs": 2}},
            "terms.backdoor: needs a student with timm's forward_features, or a transplanted one",
        ),
        ({"selection": {"rule": "f1"}}, "selection.rule: f1 needs f1, and the validation images give accuracy, wors"),
        ({"data": {"train": "train[30%"}}, "data.train: must be a split such as"),
        ({"data": {"train": "train[1.2.3%:]"}}, "data.train: must be a split such as"),
        ({"data": {"train": "train[50%:50%]"}}, r"data.train: [50%:50%] of 48 images holds none"),
        ({"data": {"validation": "vall"}}, "data.validation: "),
        ({"compute": {"precision": "16", "accelerator": "cpu"}}, "compute.precision: 16 needs a GPU"),
    ],
)
def test_what_does_not_fit_is_said_before_anything_is_trained(
    data: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    document = {**distilled("erm"), "student": {"name": "bare/4"}, "terms": {"sample": {}}, **change}
    with pytest.raises(RecipeError) as caught:
        run(data, tmp_path, document)
    assert message in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_more_pictures_a_step_than_there_are(data: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"schedule.batch: 64 images a step, and the training split has 48"):
        run(data, tmp_path, SUPERVISED, "--schedule.batch", "64")
    with pytest.raises(RecipeError, match=r"teacher.schedule.batch: 49 images a step, and the training split has 48"):
        run(data, tmp_path, distilled("erm"), "--teacher.schedule.batch", "49")
    assert not (tmp_path / "run").exists()  # begun, it would hold the next try to these settings


def test_networks_of_other_pictures_are_refused(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(networks._FAMILIES, "vast", lambda *ignored: nn.Sequential(nn.Conv2d(3, 4, 33)))
    with pytest.raises(NetworkError, match="Sequential: does not run on 16×16 images"):
        run(data, tmp_path, {**SUPERVISED, "student": {"name": "vast/plain"}})
