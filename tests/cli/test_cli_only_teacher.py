"""`debiaskd train --only teacher`: the teacher's stages alone, and what continues from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lightning_fabric")
pytest.importorskip("jsonargparse")
pytest.importorskip("torchdata")
pytest.importorskip("safetensors")

import training_runs as runs
from cli_runs import command, failed

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.xdist_group("cli_train")]
TAUGHT = runs.taught()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.birds(tmp_path_factory.mktemp("teacher"))


@pytest.mark.parametrize(
    ("teacher", "stages", "line"),
    [
        ({}, ["teacher"], "validation figures of epoch 1 of 1, by worst-group accuracy"),
        ({"method": "dfr"}, ["teacher-erm"], "fitted_on: 16"),
        ({"method": "checkpoint", "schedule": None, "pretrained": False, "head": "probe"}, [], "by: plain"),
    ],
)
def test_nothing_after_the_teacher_is_trained_until_it_is_asked_for(
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    trained: list[str],
    teacher: dict[str, Any],
    stages: list[str],
    line: str,
) -> None:
    document = {**TAUGHT, "teacher": {**TAUGHT["teacher"], **teacher}}
    if document["teacher"].get("head") == "probe":
        given = runs.train(
            runs.write(tmp_path / "given.yaml", data, {**runs.PLAIN, "student": {"name": "plain/6"}}),
            tmp_path / "given",
        )
        document["teacher"]["weights"] = str(given.folder)
        trained.clear()
    recipe, run = runs.write(tmp_path / "r.yaml", data, document), tmp_path / "run"
    code, out, _ = command(capsys, "train", recipe, "--only", "teacher", "--out", run)
    assert code == 0 and trained == stages and line in out
    assert out.splitlines()[-1] == str(run / "teacher" / "model.safetensors")
    assert not (run / "student").exists()
    before = (run / "teacher" / "stage.json").read_bytes()
    code, out, _ = command(capsys, "evaluate", run, "--stage", "teacher")
    assert code == 0 and out.startswith(f"teacher of {run}")
    assert command(capsys, "train", recipe, "--out", run)[0] == 0
    assert trained == [*stages, "student"] and (run / "teacher" / "stage.json").read_bytes() == before


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        (runs.PLAIN, "--only teacher: the recipe has no teacher"),
        (
            {**TAUGHT, "teacher": {"name": "plain/6", "weights": "teacher.pt"}},
            "--only teacher: teacher.method is checkpoint, so that there is no teacher to be trained",
        ),
    ],
)
def test_a_recipe_that_trains_no_teacher_is_refused(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], document: dict[str, Any], expected: str
) -> None:
    recipe = runs.write(tmp_path / "r.yaml", data, document)
    said = failed(*command(capsys, "train", recipe, "--only", "teacher", "--out", tmp_path / "run"))
    assert expected in said and not (tmp_path / "run").exists()
    assert "invalid choice: 'student'" in failed(*command(capsys, "train", recipe, "--only", "student"))


def test_patience_needs_validation_that_fitted_nothing(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    document = {**TAUGHT, "teacher": {**TAUGHT["teacher"], "method": "dfr"}, "schedule": {**runs.FAST, "patience": 1}}
    recipe = runs.write(tmp_path / "r.yaml", data, document)
    said = failed(*command(capsys, "train", recipe, "--out", tmp_path / "run"))
    assert "schedule.patience: all of validation fits the dfr teacher's last layer" in said
