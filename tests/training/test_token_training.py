"""Teachers whose logits read a class token, or whose head no cut could be made of, in whole recipes."""

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
pytest.importorskip("timm")

import timm
import training_runs as runs
from safetensors.torch import load_file, save_file
from timm.models.deit import VisionTransformerDistilled as Distilled
from timm.models.resnet import BasicBlock, ResNet
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from debiaskd.cli import entry as cli
from debiaskd.evaluation.evaluate import LoadedStage, evaluate_run
from debiaskd.models import registry as networks
from debiaskd.models.transplant import Transplanted
from debiaskd.pipeline import head_probe as head_fitting
from debiaskd.recipe import RecipeError
from debiaskd.training.feature_extraction import FeatureExtractor, find_feature_layers
from debiaskd.training.loop import TrainingLoop

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.xdist_group("stages"),
    pytest.mark.filterwarnings("ignore::debiaskd.reweight.ErrorSetWarning"),
]
FAST = {"epochs": 1, "batch": 12, "learning_rate": 1e-2}
VIT = {"img_size": 16, "patch_size": 4, "embed_dim": 12, "depth": 1, "num_heads": 2}


class Functional(nn.Module):
    """Logits without any last layer to be found: a matrix and a function."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, 2)
        self.matrix = nn.Parameter(torch.randn(classes, 4))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.stem(images).amax((2, 3)) @ self.matrix.T


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    def vit(name: str, classes: int, pretrained: bool) -> nn.Module:
        kinds = {"token": VisionTransformer, "distilled": Distilled}
        return kinds[name](num_classes=classes, **VIT)

    monkeypatch.setitem(networks._FAMILIES, "vit", vit)
    monkeypatch.setitem(networks._FAMILIES, "functional", lambda name, classes, pretrained: Functional(classes))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.birds(tmp_path_factory.mktemp("tokens"))


def recipe(teacher: str, student: str, **more: Any) -> dict[str, Any]:
    found = {
        "teacher": {"name": teacher, "method": "erm", "schedule": FAST},
        "student": {"name": student},
        "schedule": {**FAST, "epochs": 2},
        "compute": {"accelerator": "cpu"},
    }
    return {**found, **more}


DETT = {"transplant": {}, "terms": {"match": {}}, "weights": {"method": "errors", "up": 20, "epochs": 1}}


@pytest.mark.parametrize(
    "teacher, student", [("vit/token", "small/4,6"), ("vit/distilled", "small/4,6"), ("plain/6", "vit/token")]
)
def test_dett_between_transformers_and_convolutions(data: Path, tmp_path: Path, teacher: str, student: str) -> None:
    document = recipe(teacher, student, **DETT)
    file = runs.write(tmp_path / "r.yaml", data, document)
    runs.train(file, tmp_path / "run")
    loaded = LoadedStage(tmp_path / "run")
    assert isinstance(loaded.model, Transplanted)
    assert loaded.model.num_features == {"vit/token": 12, "vit/distilled": 24, "plain/6": 6}[teacher]
    found = LoadedStage(tmp_path / "run", "teacher").model
    held = dict(loaded.model.head.named_buffers())
    last = [t for n, t in found.named_parameters() if n.rpartition(".")[0] in ("head", "head_dist", "fc")]
    assert all(any(torch.equal(t, h) for h in held.values()) for t in last)
    figures, _ = evaluate_run(tmp_path / "run", "student", None, None)
    assert 0 <= figures["figures"]["accuracy"] <= 1


def test_a_teachers_class_token_is_remembered(data: Path, tmp_path: Path) -> None:
    document = recipe("vit/token", "small/4,6", **DETT)
    document["terms"] = {"match": {}, "kd": {}, "sample": {}, "guide": {"weight": 0.1}}
    live = runs.train(runs.write(tmp_path / "r.yaml", data, document), tmp_path / "live")
    document["teacher"]["cache"] = "fp32"
    document["data"] = {"flip": False}
    runs.train(runs.write(tmp_path / "c.yaml", data, document), tmp_path / "cached")
    assert (tmp_path / "cached" / "teacher-cache" / "view-00" / "00000" / "feature.npy").exists()
    assert json.loads((live.folder / "stage.json").read_text())["facts"]["epochs"] == 2


def test_an_interrupted_run_ends_in_the_same_student(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    document = recipe("vit/distilled", "small/4,6", **DETT)
    document["compute"]["checkpoint_every"] = 2
    file = runs.write(tmp_path / "r.yaml", data, document)
    whole = load_file(runs.train(file, tmp_path / "whole").model)
    inner = TrainingLoop._step

    def dying(self: TrainingLoop, *arguments: Any) -> None:
        if self.plan.folder.name == "student" and self.step == 5:
            raise KeyboardInterrupt
        inner(self, *arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(TrainingLoop, "_step", dying)
        runs.train(file, tmp_path / "run")
    resumed = load_file(runs.train(file, tmp_path / "run").model)
    torch.testing.assert_close(resumed, whole, rtol=0, atol=0)


@pytest.mark.parametrize("teacher", ["functional/x", "vit/token"])
def test_kd_asks_for_no_cut(data: Path, tmp_path: Path, teacher: str) -> None:
    document = recipe(teacher, "functional/x", terms={"kd": {}})
    runs.train(runs.write(tmp_path / "r.yaml", data, document), tmp_path / "run")


def test_match_asks_for_a_cut(data: Path, tmp_path: Path) -> None:
    document = {**recipe("functional/x", "functional/x"), **DETT}
    with pytest.raises(RecipeError, match=r"(teacher|transplant): "):
        runs.train(runs.write(tmp_path / "m.yaml", data, document), tmp_path / "match")


def test_pooled_features_ask_for_no_map(data: Path, tmp_path: Path) -> None:
    document = recipe("vit/distilled", "vit/token", terms={"kd": {}, "sample": {}, "relation": {}})
    runs.train(runs.write(tmp_path / "r.yaml", data, document), tmp_path / "run")


# -- a last layer that was not loaded ---------------------------------------------------------------------------------


@timm.models.register_model
def debiaskd_test_resnet(pretrained: bool = False, num_classes: int = 7, **more: object) -> ResNet:
    """Stands in for a pretrained network of seven classes; nothing is downloaded."""
    shape = {"block": BasicBlock, "layers": (1, 1, 1, 1), "channels": (4, 4, 4, 6)}
    config = {"url": "", "num_classes": 7, "classifier": "fc", "input_size": (3, 16, 16)}
    if pretrained:
        torch.save(ResNet(**shape, num_classes=7).state_dict(), Path(more["folder"]) / "seven.pth")
        config["file"] = str(Path(more.pop("folder")) / "seven.pth")
    return timm.models.build_model_with_cfg(
        ResNet, "debiaskd_test_resnet", pretrained, pretrained_cfg=config, **shape, num_classes=num_classes
    )


def pretrained(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    inner = timm.create_model
    folder = {"folder": str(tmp_path)}
    monkeypatch.setattr(timm, "create_model", lambda name, **o: inner(name, **o, **folder if o["pretrained"] else {}))


def test_a_random_last_layer_is_no_checkpoint(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pretrained(monkeypatch, tmp_path)
    document = recipe("debiaskd_test_resnet", "small/4", terms={"kd": {}})
    document["teacher"] = {"name": "debiaskd_test_resnet", "pretrained": True}
    file = runs.write(tmp_path / "r.yaml", data, document)
    assert cli.main(["train", str(file), "--out", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err.strip()
    assert "teacher.pretrained: the pretrained weights of debiaskd_test_resnet have a last layer of 7 classes" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("probe", ["plain", "groups", "weights"])
def test_a_probe_fits_the_last_layer_alone(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, probe: str
) -> None:
    pytest.importorskip("sklearn")
    pretrained(monkeypatch, tmp_path)
    document = recipe("debiaskd_test_resnet", "small/4", **DETT)
    document["teacher"] = {"name": "debiaskd_test_resnet", "pretrained": True, "head": "probe", "probe": probe}
    runs.train(runs.write(tmp_path / "r.yaml", data, document), tmp_path / "run")
    seven = torch.load(tmp_path / "seven.pth")
    teacher, student = LoadedStage(tmp_path / "run", "teacher").model, LoadedStage(tmp_path / "run")
    for name, tensor in teacher.state_dict().items():
        if not name.startswith("fc."):
            torch.testing.assert_close(tensor, seven[name])
    torch.testing.assert_close(student.model.head.fc.weight, teacher.fc.weight)
    facts = json.loads((tmp_path / "run" / "teacher" / "stage.json").read_text())["facts"]
    assert facts["by"] == probe and facts["fitted_on"] == 48


def test_a_fitted_head_is_the_weighted_regression(monkeypatch: pytest.MonkeyPatch) -> None:
    linear = pytest.importorskip("sklearn.linear_model")
    monkeypatch.setattr(head_fitting, "STRENGTHS", (1.0,))
    feature = torch.randn(90, 4, generator=torch.Generator().manual_seed(0)) * 3 + 1
    target = (feature[:, 0] + feature[:, 1] > 2).long() + (feature[:, 2] > 3).long()
    weight = torch.rand(90, generator=torch.Generator().manual_seed(1))
    made, bias, strength, _ = head_fitting.fit(feature, target, weight)
    scaled = (feature - feature.mean(0)) / feature.std(0)
    solver = linear.LogisticRegression(C=1.0, max_iter=500).fit(scaled, target, sample_weight=weight / weight.mean())
    probabilities = torch.from_numpy(solver.predict_proba(scaled.numpy())).float()
    torch.testing.assert_close((feature @ made.T + bias).softmax(1), probabilities, rtol=1e-3, atol=1e-3)
    assert strength == 1.0
    several = torch.stack([target > 0, target > 1], 1).float()
    made, bias, _, right = head_fitting.fit(feature, several, None)
    assert made.shape == (2, 4) and bias.shape == (2,) and right > 0.75


@pytest.mark.parametrize("teacher, width", [("vit/token", 12), ("vit/distilled", 24), ("debiaskd_test_resnet", 6)])
def test_a_head_from_a_file_gives_the_logits(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, teacher: str, width: int
) -> None:
    weight, bias = torch.randn(2, width), torch.randn(2)
    save_file({"weight": weight, "bias": bias}, tmp_path / "head.safetensors")
    document = recipe(teacher, "small/4", **DETT)
    network = networks.build(teacher, 2)
    save_file(network.state_dict(), tmp_path / "weights.safetensors")
    document["teacher"] = {
        "name": teacher,
        "weights": str(tmp_path / "weights.safetensors"),
        "head": str(tmp_path / "head.safetensors"),
    }
    file = runs.write(tmp_path / "r.yaml", data, document)
    made = runs.Pipeline(runs.read(file), tmp_path / "run", runs.launch(runs.read(file).compute), lambda *news: None)
    model, _ = made.teacher(made.recipe.teacher)
    at = find_feature_layers(model, torch.rand(1, 3, 16, 16), wanted=("pooled",))
    outputs, _ = FeatureExtractor(model, at, ("pooled",)).eval()(torch.rand(5, 3, 16, 16))
    torch.testing.assert_close(outputs.logits, outputs.pooled @ weight.T + bias, rtol=1e-3, atol=1e-3)
    made.student()
    assert LoadedStage(tmp_path / "run").model.head.in_features == width


@pytest.mark.parametrize(
    "teacher, message",
    [
        ({"head": "probe", "method": "erm", "schedule": FAST}, "teacher.head: probe is for method checkpoint, got erm"),
        ({"weights": "w", "probe": "plain"}, "teacher.probe: only with teacher.head probe, got head left out"),
        ({"weights": "w", "head": "probe", "probe": "weights"}, "teacher.probe: weights needs the recipe's weights"),
        ({"weights": "W", "head": "none.safetensors"}, "teacher.head: none.safetensors: not readable as safetensors"),
        ({"weights": "W", "head": "W"}, r"teacher.head: .*must hold weight \[K,D\]=\[2, 6\], got tensors"),
    ],
)
def test_heads_that_cannot_be(data: Path, tmp_path: Path, teacher: dict[str, Any], message: str) -> None:
    save_file(networks.build("plain/6", 2).state_dict(), tmp_path / "w.safetensors")
    found = {key: str(tmp_path / "w.safetensors") if value == "W" else value for key, value in teacher.items()}
    document = recipe("plain/6", "small/4", terms={"kd": {}})
    document["teacher"] = {"name": "plain/6", **found}
    with pytest.raises(RecipeError, match=message):
        runs.train(runs.write(tmp_path / "r.yaml", data, document), tmp_path / "run")


def test_a_student_makes_no_head(data: Path, tmp_path: Path) -> None:
    document = recipe("plain/6", "small/4", terms={"kd": {}})
    document["student"]["head"] = "probe"
    with pytest.raises(RecipeError, match=r"student\.head: must name a layer, got probe"):
        runs.train(runs.write(tmp_path / "r.yaml", data, document), tmp_path / "run")
