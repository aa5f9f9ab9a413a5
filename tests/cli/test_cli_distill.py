"""`debiaskd distill`: what it finds, which method it chooses, what it trains and says."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("lightning_fabric")
pytest.importorskip("jsonargparse")
pytest.importorskip("torchdata")
pytest.importorskip("safetensors")
pytest.importorskip("jinja2")
pytest.importorskip("PIL")

from cli_runs import command, failed
from PIL import Image

from debiaskd.cli import entry as cli
from debiaskd.data import prepare
from debiaskd.pipeline import budget, distillation
from debiaskd.recipe import read
from debiaskd.utils import files

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.xdist_group("distill")]
TEACHER, STUDENT = ("--teacher", "small/6"), ("--student", "small/4")


def folder(root: Path, *, bias: bool = True, boxes: bool = True) -> Path:
    """48 training, 16 validation and 16 test images of two classes, each on two grounds."""
    made, generator = root / "pictures", np.random.default_rng(0)
    rows, frames = ["path,bias"], ["path,x0,y0,x1,y1"]
    for split, count in (("train", 48), ("val", 16), ("test", 16)):
        for i in range(count):
            label, ground = i % 2, (i // 2) % 2
            pixels = generator.integers(0, 60, (40, 40, 3), np.uint8)
            pixels[..., 1 + ground] += 100
            pixels[10:30, 10:30, 0] += np.uint8(150 * label)
            path = made / split / ("a", "b")[label] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
            rows.append(f"{path.relative_to(made)},{('land', 'water')[ground]}")
            frames.append(f"{path.relative_to(made)},10,10,30,30")
    if bias:
        (made / "bias.csv").write_text("\n".join(rows))
    if boxes:
        (made / "boxes.csv").write_text("\n".join(frames))
    return made


@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distillation, "EPOCHS", 1)


@pytest.fixture(scope="module")
def distilled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, str]:
    """(the images, the folder of outputs, what was printed)."""
    root, printed = tmp_path_factory.mktemp("distilled"), io.StringIO()
    arguments = ["distill", folder(root), *TEACHER, *STUDENT, "--out", root / "out"]
    with pytest.MonkeyPatch.context() as patched, contextlib.redirect_stdout(printed):
        patched.setattr(distillation, "EPOCHS", 1)
        assert cli.main([str(argument) for argument in arguments]) == 0
    return root / "pictures", root / "out", printed.getvalue()


def test_a_folder_becomes_a_debiased_student_and_a_page(
    distilled: tuple[Path, Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], brief: None
) -> None:
    pictures, out, said = distilled
    for line in (
        "images: 48 in train, 16 in val, 16 in test, stored at 40×40",
        "classes: 2 (a: 24, b: 24)",
        "groups: 4 (a, land: 12, a, water: 12, b, land: 12, b, water: 12)",
        "boxes: 80 images have them",
        "the teacher is trained with its groups drawn alike, since the groups are known",
        "method: DeTT + guidance",
    ):
        assert line in said
    lines = [line for line in said.splitlines() if not line.startswith("warning: ")]
    assert "\n".join(lines).count("in its worst group") == 3
    worst = {
        name: json.loads((out / name / "evaluation-test.json").read_text())["figures"]["worst_group_accuracy"]
        for name in ("plain", "debiased")
    }
    assert ("warning: the debiased student is no better" in said) is (worst["debiased"] <= worst["plain"])
    table = lines[-6:-2]
    assert lines[-2:] == [str(out / "report.html"), str(out / "recipe.yaml")]
    for name, row in (("teacher", table[1]), ("plain", table[2]), ("debiased", table[3])):
        figures = json.loads((out / name / "evaluation-test.json").read_text())["figures"]
        assert f"{100 * figures['accuracy']:.1f}" in row and f"{100 * figures['worst_group_accuracy']:.1f}" in row
    recipe = read(out / "recipe.yaml")
    assert recipe.weights is not None and recipe.weights.method == "errors" and recipe.terms.guide is not None
    page = (out / "report.html").read_text()
    assert "method: DeTT + guidance" in page and page.count("c2") > 0
    models = {
        name: files.sha256(out / name / "student" / "model.safetensors") for name in ("teacher", "plain", "debiased")
    }
    assert command(capsys, "distill", pictures, *TEACHER, *STUDENT, "--out", out)[1] == said  # nothing is trained again
    assert models == {name: files.sha256(out / name / "student" / "model.safetensors") for name in models}
    command(capsys, "train", out / "recipe.yaml", "--out", tmp_path / "second")
    assert files.sha256(tmp_path / "second" / "student" / "model.safetensors") == models["debiased"]
    error = failed(*command(capsys, "distill", pictures, "--teacher", "small/8", *STUDENT, "--out", out))
    assert "was begun with --teacher small/6, not small/8; choose another --out" in error


def test_a_given_teacher_is_measured_and_its_last_layer_fitted_where_it_is_biased(
    distilled: tuple[Path, Path, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    brief: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pictures, teacher = folder(tmp_path, boxes=False), distilled[1] / "teacher"
    given = ("--weights", teacher, "--out")
    monkeypatch.setattr(distillation, "GAP", 2.0)  # never biased
    code, said, _ = command(capsys, "distill", pictures, *TEACHER, *STUDENT, *given, tmp_path / "b")
    assert code == 0 and "the given teacher, on validation: " in said and "method: DeTT\n" in said
    recipe = read(tmp_path / "b" / "recipe.yaml")
    assert recipe.teacher is not None and recipe.teacher.head is None
    assert "refitted" not in said and not (tmp_path / "b" / "teacher").exists()
    own = json.loads((teacher / "evaluation-test.json").read_text())["figures"]["accuracy"]
    assert f"the teacher, on test: {100 * own:.1f} % right on average" in said
    monkeypatch.setattr(distillation, "GAP", -1.0)  # always biased
    code, said, _ = command(capsys, "distill", pictures, *TEACHER, *STUDENT, *given, tmp_path / "c")
    assert code == 0 and "its last layer is refitted, every group counting alike" in said
    recipe = read(tmp_path / "c" / "recipe.yaml")
    assert recipe.teacher is not None and (recipe.teacher.head, recipe.teacher.probe) == ("probe", "groups")
    assert (tmp_path / "c" / "debiased" / "evaluation-test-teacher.json").is_file()


@pytest.mark.parametrize(
    ("annotated", "method", "terms"),
    [
        ({"bias": True, "boxes": False}, "DeTT", ["match"]),
        ({"bias": False, "boxes": True}, "transplanting + guidance", ["match", "guide"]),
        ({"bias": False, "boxes": False}, "transplanting", ["match"]),
    ],
)
def test_the_method_follows_from_what_is_annotated(
    tmp_path: Path, annotated: dict[str, bool], method: str, terms: list[str]
) -> None:
    prepare("folder", folder(tmp_path, **annotated), tmp_path / "data", size=16, workers=1)
    found = distillation.find(tmp_path / "data")
    made = distillation.plan(found, distillation.Asked("small/6", "small/4"), tmp_path, 2)
    assert made.method == method
    recipe = read(made.recipes["debiased"] or {})
    assert list(recipe.terms.given()) == terms and (recipe.weights is not None) == annotated["bias"]
    teacher = read(made.recipes["teacher"] or {})
    assert (teacher.weights is not None) == annotated["bias"]
    assert read(made.recipes["plain"] or {}).schedule.epochs == 2


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["train", "val", "test"], ("train", "val", "test")),
        (["train", "validation"], ("train", "validation[:50%]", "validation[50%:]")),
        (["train", "test"], ("train[:85%]", "train[85%:]", "test")),
        (["train"], ("train[:70%]", "train[70%:85%]", "train[85%:]")),
    ],
)
def test_splits_that_are_not_there_are_parts_of_others(names: list[str], expected: tuple[str, ...]) -> None:
    assert tuple(distillation._splits(names).values()) == expected


def test_a_budget_scales_the_epochs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare("folder", folder(tmp_path), tmp_path / "data", size=16, workers=1)
    found, asked = distillation.find(tmp_path / "data"), distillation.Asked("small/6", "small/4")
    monkeypatch.setattr(budget, "_seconds", lambda model, images, train: 0.5)
    # 4 steps of 12 an epoch, of which each takes five halves of a second: 10 s; and 2 s for the identification.
    assert budget.affordable(found, asked, 1.0) == (
        4,
        "budget of 1 minutes: 4 epochs instead of 30 (one epoch of all networks takes about 10.0 s, measured)",
    )
    assert budget.affordable(found, asked, 0.1)[0] == 1
    epochs, said = budget.affordable(found, asked, 60)
    assert epochs == distillation.EPOCHS and "as without a budget" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--teacher", "small/6"), "the following arguments are required: --student"),
        ((*TEACHER, *STUDENT, "--minutes", "0"), "argument --minutes: must be a number > 0, got '0'"),
        ((*TEACHER, *STUDENT, "--weights", "nothing.pt"), "nothing.pt"),
        (("--teacher", "nobody", *STUDENT), "nobody"),
    ],
)
def test_mistakes_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[Any, ...], message: str
) -> None:
    pictures = folder(tmp_path)
    code, _, err = command(capsys, "distill", pictures, *arguments, "--out", tmp_path / "out", "--size", 16)
    last = err.splitlines()[-1]
    assert code == 2 and message in last and last.startswith("debiaskd: ") and "Traceback" not in err


def test_an_imbalance_and_several_classes_are_told(tmp_path: Path) -> None:
    made = folder(tmp_path, bias=False, boxes=False)
    for path in sorted((made / "train" / "b").iterdir())[2:]:
        path.unlink()
    prepare("folder", made, tmp_path / "data", size=16, workers=1)
    lines = distillation.find(tmp_path / "data").lines()
    assert "imbalance: the largest class has 24 training images, the smallest 2" in lines
    assert lines[-1] == "boxes: none, so nothing is guided"
