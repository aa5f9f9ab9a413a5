"""`Run.save_pretrained`: what the folder holds, what loads it, and that nothing half-written is loaded."""

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

import training_runs as runs
import yaml
from safetensors import safe_open

import debiaskd as dk
from debiaskd.evaluation.pretrained import Pretrained
from debiaskd.training.run import RunError

pytestmark = pytest.mark.usefixtures("one_thread")
FAST = {"epochs": 1, "batch": 12, "learning_rate": 1e-2}
CPU = {"accelerator": "cpu", "checkpoints": False}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.birds(tmp_path_factory.mktemp("hub"), 32)


def train(data: Path, out: Path, **document: Any) -> dk.Run:
    recipe = {"terms": {"supervised": {}}, "schedule": FAST, "compute": CPU, **document}
    return dk.train(recipe, data=data, out=out, progress=False)


@pytest.fixture(scope="module")
def timms(data: Path) -> dk.Run:
    """A student that timm builds by itself, evaluated on test."""
    network = {"name": "test_vit", "input": {"mean": [0.5, 0.4, 0.3], "interpolation": "bicubic"}}
    run = train(data, data.parent / "timms", student=network)
    run.evaluate("test")
    return run


def test_timm_and_debiaskd_load_the_same_network(timms: dk.Run, tmp_path: Path) -> None:
    import timm

    folder = timms.save_pretrained(tmp_path / "hub")
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    size = json.loads((folder / "config.json").read_text())["pretrained_cfg"]["input_size"]
    images = torch.rand(3, *size)
    expected = timms.student(images)
    loaded = dk.load(folder)
    assert isinstance(loaded, Pretrained) and not loaded.student.training
    assert torch.equal(loaded.student(images), expected)
    theirs = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    assert torch.equal(theirs(images), expected)
    transform = timm.data.resolve_data_config({}, model=theirs)
    assert tuple(transform["mean"]) == (0.5, 0.4, 0.3) and transform["interpolation"] == "bicubic"
    assert list(transform["input_size"]) == size and transform["crop_pct"] == 1.0
    assert (tuple(loaded.contract.mean), list(loaded.contract.size)) == ((0.5, 0.4, 0.3), size[1:])
    assert loaded.classes == theirs.pretrained_cfg["label_names"] and len(loaded.classes) == 2
    with safe_open(folder / "model.safetensors", "pt") as opened:
        assert opened.metadata()["format"] == "pt"


def test_the_card_says_what_the_run_says(timms: dk.Run, tmp_path: Path) -> None:
    text = (timms.save_pretrained(tmp_path / "hub") / "README.md").read_text()
    front = yaml.safe_load(text.split("---\n")[1])
    assert front == {
        "library_name": "timm",
        "pipeline_tag": "image-classification",
        "tags": ["image-classification", "timm", "debiaskd"],
    }
    figures = json.loads((timms.folder / "evaluation-test.json").read_text())["figures"]
    for key, heading in (("accuracy", "accuracy"), ("worst_group_accuracy", "worst group")):
        assert f"| {heading} | {100 * timms.metrics[key]:.1f} | {100 * figures[key]:.1f} |" in text
    worst = (
        f"| worst group | | {100 * figures['worst_group_accuracy']:.1f} | {100 * figures['worst_group_low']:.1f} to "
    )
    assert worst in text
    for g, name in enumerate(json.loads((timms.folder / "evaluation-test.json").read_text())["groups"]):
        accuracy = figures[f"group_{g}_accuracy"]  # None: no test image is in it
        assert accuracy is None or (f"| {name} | " in text and f" | {100 * accuracy:.1f} | " in text)
    assert "- teacher: none\n" in text and "`supervised` (weight 1.0, " in text and "local-dir:FOLDER" in text
    assert str(timms.folder.parent) not in text, "no paths of the machine"
    assert str(timms.folder.parent) not in (tmp_path / "hub" / "config.json").read_text()


def test_a_transplanted_student_is_loaded_by_debiaskd(data: Path, tmp_path: Path) -> None:
    teacher = train(data, tmp_path / "teacher", student={"name": "small/8"})
    run = train(
        data,
        tmp_path / "run",
        student={"name": "small/4"},
        teacher={"name": "small/8", "weights": str(teacher.folder)},
        transplant={"projector": "linear"},
        terms={"match": {}},
    )
    folder = run.save_pretrained(tmp_path / "hub")
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(dk.load(folder).student(images), run.student(images))
    text = (folder / "README.md").read_text()
    assert "library_name: debiaskd" in text and "timm" not in text
    assert "- teacher: small/8, given by its weights; the student has its last layer" in text
    document = json.loads((folder / "config.json").read_text())
    assert document["debiaskd"]["metrics"]["val (validation)"]["accuracy"] == run.metrics["accuracy"]
    assert str(tmp_path) not in json.dumps(document)


def test_a_module_that_was_given_is_given_again(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch import nn

    from debiaskd.models import own

    def net(width: int = 4) -> nn.Module:
        layers = [nn.Conv2d(3, width, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 2)]
        return nn.Sequential(*layers)

    recipe = {"terms": {"supervised": {}}, "schedule": FAST, "compute": CPU}
    run = dk.train(recipe, data=data, student=net(), out=tmp_path / "run", progress=False)
    folder, images = run.save_pretrained(tmp_path / "hub"), torch.rand(2, 3, 32, 32)
    expected = run.student(images)
    monkeypatch.setattr(own, "_given", {})  # as in another process
    assert torch.equal(dk.load(folder, student=net()).student(images), expected)
    with pytest.raises(RunError, match=r"its student must be object/Sequential-\w{8}, got object/Sequential-\w{8}"):
        dk.load(folder, student=net(5))


def test_what_is_damaged_or_something_else_is_refused(timms: dk.Run, tmp_path: Path) -> None:
    folder = timms.save_pretrained(tmp_path / "hub")
    assert timms.save_pretrained(folder) == folder  # again, over what it wrote
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[:-1] + b"?")
    with pytest.raises(RunError, match=r"model.safetensors: missing or damaged"):
        dk.load(folder)
    (folder / "config.json").unlink()
    with pytest.raises(RunError, match="is not empty and was not written by save_pretrained"):
        timms.save_pretrained(folder)
    with pytest.raises(RunError, match=r"is no run's folder, it has no recipe.yaml"):
        dk.load(folder)
    with pytest.raises(RunError, match="is not empty and was not written by save_pretrained; choose another folder"):
        timms.save_pretrained(timms.folder)


def test_metadata_is_written_in_one_order() -> None:
    """safetensors itself writes several keys in an order that changes from call to call."""
    from safetensors.torch import load, save

    from debiaskd.evaluation.pretrained import _in_order

    tensors = {"b": torch.arange(3.0), "a": torch.ones(2, 2, dtype=torch.int64)}
    metadata = dict.fromkeys("zyxwvuts", "é")
    contents = {_in_order(save(tensors, metadata)) for _ in range(8)}
    assert len(contents) == 1
    found = load(contents.pop())
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items()) and len(found) == 2
