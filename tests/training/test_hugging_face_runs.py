"""Runs with networks of transformers: trained, guided, measured, rebuilt; what is missing is told."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from cli_runs import command
from hugging_face_folders import TINY, saved
from training_runs import birds, write

import debiaskd as dk
from debiaskd.models.registry import NetworkError

pytestmark = pytest.mark.usefixtures("one_thread")
RECIPE: dict[str, Any] = {
    "teacher": {"pretrained": True, "input": {"size": 32}, "head": "probe"},
    "student": {"name": "hf/resnet", "options": TINY["resnet"]},
    "transplant": {"projector": "linear"},
    "schedule": {"epochs": 1, "batch": 12},
    "terms": {"match": {}, "guide": {"weight": 0.1}},
    "compute": {"accelerator": "cpu"},
}


def test_a_folders_teacher_and_a_student_from_a_configuration(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MODELS", str(tmp_path))
    data, folder = birds(tmp_path, 32), tmp_path / "vit"
    saved(folder, "vit", classes=5)
    recipe = {**RECIPE, "teacher": {**RECIPE["teacher"], "name": "hf/$MODELS/vit"}}
    file = write(tmp_path / "r.yaml", data, recipe)
    code, _, said = command(capsys, "train", file, "--out", tmp_path / "run", "--teacher.head", "null")
    assert code == 2 and "have a last layer of 5 classes, the data has 2" in said
    run = dk.train(file, out=tmp_path / "run", progress=False)
    assert run.recipe.teacher is not None and run.recipe.teacher.name == f"hf/{folder}"
    assert 0 <= run.evaluate("test")["accuracy"] <= 1
    assert [path.suffix for path in run.explain(["val:1"])] == [".png"]
    images = torch.rand(2, 3, 32, 32)
    logits = dk.load(tmp_path / "run").student(images)
    run.save_pretrained(tmp_path / "hub")
    torch.testing.assert_close(dk.load(tmp_path / "hub").student(images), logits)
    shutil.rmtree(folder)
    with pytest.raises(NetworkError, match=rf"there is no folder {folder}: a network is built from the configuration"):
        dk.load(tmp_path / "run").student  # noqa: B018
    code, _, said = command(capsys, "evaluate", tmp_path / "run")
    assert code == 2 and f"there is no folder {folder}" in said and said.count("\n") == 1
