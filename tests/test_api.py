"""A run from Python: the same bytes as the command line, own modules and data sets, and what it shows of itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lightning_fabric")
pytest.importorskip("jsonargparse")
pytest.importorskip("torchdata")
pytest.importorskip("safetensors")
pytest.importorskip("jinja2")

import yaml
from cli_runs import command
from torch import nn
from training_runs import PLAIN, birds, write

import debiaskd as dk
from debiaskd.models import own
from debiaskd.models.registry import NetworkError
from debiaskd.recipe import RecipeError
from debiaskd.training.run import RunError
from debiaskd.utils import files

pytestmark = pytest.mark.usefixtures("one_thread")


class Net(nn.Module):
    def __init__(self, num_classes: int = 2, width: int = 4) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, width, 3, 2, 1), nn.ReLU(), nn.Conv2d(width, width, 3, 2, 1), nn.ReLU())
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(width, num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.fc(self.pool(self.body(images)).flatten(1))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return birds(tmp_path_factory.mktemp("birds"))


def sets(count: int = 3) -> list[Any]:
    made = []
    for seed, size in ((0, 16), (1, 8), (2, 8))[:count]:
        generator = torch.Generator().manual_seed(seed)
        made.append([(torch.rand(3, 16, 16, generator=generator), i % 2) for i in range(size)])
    return made


def train(recipe: Any, **options: Any) -> dk.Run:
    return dk.train(recipe, progress=False, **options)


def test_the_same_bytes_as_the_command_line(pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path / "r.yaml", pictures, PLAIN)
    assert command(capsys, "train", file, "--out", tmp_path / "cli", "--seed", 3)[0] == 0
    run = train({**PLAIN, "student": {"name": "wrong"}}, data=pictures, student="plain/4", out=tmp_path / "py", seed=3)
    names = ["recipe.yaml", "begun.yaml", "student/model.safetensors", "student/stage.json", "student/log.csv"]
    for name in names[:-1]:
        assert (tmp_path / "cli" / name).read_bytes() == (run.folder / name).read_bytes(), name
    code, out, _ = command(capsys, "evaluate", tmp_path / "cli")
    assert code == 0 and f"{run.evaluate()['accuracy']:.4f}" in out
    assert (run.folder / "evaluation-test.json").is_file()


def test_a_run_of_a_file_gives_its_parts_and_shows_itself(pictures: Path, tmp_path: Path) -> None:
    train(write(tmp_path / "r.yaml", pictures, PLAIN), out=tmp_path / "run", schedule={"epochs": 1})
    run = dk.load(tmp_path / "run")
    assert run.recipe.schedule.epochs == 1 and run.recipe.schedule.batch == 12
    assert not run.student.training and run.student(torch.zeros(2, 3, 16, 16)).shape == (2, 2)
    assert 0 <= run.metrics["worst_group_accuracy"] <= run.metrics["accuracy"] <= 1
    assert repr(run).startswith(f"Run('{tmp_path / 'run'}', student='plain/4', accuracy=")
    run.evaluate("val[:50%]")
    shown = run._repr_html_()
    assert "worst group" in shown and "val[:50%]" in shown and shown.count("<svg") == 4
    explained = run.explain("test:3", out=tmp_path / "maps")
    assert [path.parent for path in explained] == [tmp_path / "maps"]
    assert explained._repr_html_().count("data:image/png;base64,") == 1
    assert "<html" in run.report().read_text() and run.report(tmp_path / "page.html") == tmp_path / "page.html"


def test_own_data_sets_and_own_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    teacher, student = Net(width=6), Net()
    recipe = {"terms": {"match": {}}, "transplant": {"projector": "linear"}, "compute": {"accelerator": "cpu"}}
    options: dict[str, Any] = {
        "schedule": {"epochs": 1, "batch": 8},
        "teacher.layer": "body.3",
        "student.layer": "body.3",
    }
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    run = train(recipe, data=sets(), teacher=teacher, student=student, out=tmp_path / "run", **options)
    assert all(torch.equal(before[name], tensor) for name, tensor in student.state_dict().items())  # a copy is trained
    images = torch.rand(4, 3, 16, 16)
    expected = run.student(images)
    kept = [tensor for tensor in run.student.state_dict().values() if tensor.shape == teacher.fc.weight.shape]
    assert any(torch.equal(tensor, teacher.fc.weight) for tensor in kept)
    assert run.evaluate("test")["accuracy"] == run.evaluate()["accuracy"]
    again = train(recipe, data=sets(), teacher=teacher, student=student, out=tmp_path / "run", **options)
    assert torch.equal(again.student(images), expected)

    monkeypatch.setattr(own, "_given", {})  # as in another process
    with pytest.raises(NetworkError, match="give one of the same tensors again"):
        dk.load(tmp_path / "run").evaluate()
    loaded = dk.load(tmp_path / "run", student=Net(), teacher=Net(width=6))
    assert torch.equal(loaded.student(images), expected)
    with pytest.raises(RunError, match=r"its student must be object/Net-\w{8}, got object/Net-\w{8}"):
        dk.load(tmp_path / "run", student=Net(width=5))
    with pytest.raises(RunError, match="was begun with other weights of the student; choose another out"):
        train(recipe, data=sets(), teacher=teacher, student=Net(), out=tmp_path / "run", **options)


def test_a_callable_is_built_again_from_its_name_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = f"nets_{tmp_path.name}"
    (tmp_path / f"{module}.py").write_text(
        "from test_api import Net\nclass Mine(Net):\n    def __init__(self, num_classes, width):\n"
        "        super().__init__(num_classes, width)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    recipe = {"terms": {"supervised": {}}, "schedule": {"epochs": 1, "batch": 8}, "compute": {"accelerator": "cpu"}}
    run = train(
        recipe, data=sets(2), student=f"{module}:Mine", out=tmp_path / "run", **{"student.options": {"width": 5}}
    )
    assert run.student.fc.in_features == 5 and dk.load(run.folder).student.fc.in_features == 5
    document = yaml.safe_load((run.folder / "recipe.yaml").read_text())
    assert document["student"]["name"] == f"{module}:Mine" and document["student"]["options"] == {"width": 5}
    with pytest.raises(RecipeError, match="no split 'test'; there are train, val"):
        run.evaluate()
    taught = train(
        {**recipe, "terms": {"kd": {}}},
        data=run.folder / "data",
        teacher=f"{module}:Mine",
        student="small/4",
        out=tmp_path / "taught",
        **{"teacher.options": {"width": 5}, "teacher.weights": run.folder},
    )
    assert taught.metrics["accuracy"] >= 0
    monkeypatch.delitem(__import__("sys").modules, module)
    (tmp_path / f"{module}.py").unlink()
    with pytest.raises(NetworkError, match=f"{module}:Mine: there is no module {module}"):
        dk.load(run.folder).evaluate("val")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"student": 3}, TypeError, "student must be a name or an nn.Module, got int"),
        ({"data": [[]]}, TypeError, r"\(train, validation\[, test\]\) data sets, got list of 1"),
        ({"student": Net(3)}, NetworkError, r"Net: must give logits \[N,2\] for 16×16 images, got \[2, 3\] for 2"),
        ({"student": "nobody:Net"}, NetworkError, "there is no module nobody"),
        ({"epochs": 3}, RecipeError, "epochs: no such key"),
        ({"schedule": {"epochs": 0}}, RecipeError, "schedule.epochs: must be >= 1, got 0"),
        ({"teacher": Net()}, RecipeError, "teacher: nothing uses it"),
    ],
)
def test_mistakes_are_told_before_training(
    pictures: Path, tmp_path: Path, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    recipe = {"terms": {"supervised": {}}, "schedule": {"epochs": 1, "batch": 12}, "compute": {"accelerator": "cpu"}}
    with pytest.raises(error, match=message):
        train(recipe, **{"data": pictures, "student": Net(), "out": tmp_path / "run", **options})
    assert not (tmp_path / "run" / "student").exists()


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="is no run's folder"):
        dk.load(tmp_path)
    (tmp_path / "out" / "given").mkdir(parents=True)
    (tmp_path / "out" / "given" / "thesis.txt").touch()
    recipe = {"terms": {"supervised": {}}, "schedule": {"epochs": 1, "batch": 8}, "compute": {"accelerator": "cpu"}}
    with pytest.raises(RunError, match="is neither empty nor a run's folder"):
        train(recipe, data=sets(2), student="small/4", out=tmp_path / "out")
    assert files.sha256(tmp_path / "out" / "given" / "thesis.txt")


TAUGHT: dict[str, Any] = {
    **PLAIN,
    "schedule": {"epochs": 1, "batch": 12},
    "teacher": {"name": "plain/6", "method": "erm", "schedule": {"epochs": 1, "batch": 12}},
    "terms": {"kd": {}},
}


def test_only_the_teacher(pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path / "r.yaml", pictures, TAUGHT)
    assert command(capsys, "train", file, "--out", tmp_path / "cli", "--only", "teacher")[0] == 0
    weights = dk.train(file, out=tmp_path / "py", only="teacher", progress=False)
    assert weights == tmp_path / "py" / "teacher" / "model.safetensors" and not (tmp_path / "py" / "student").exists()
    assert weights.read_bytes() == (tmp_path / "cli" / "teacher" / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="only must be None or \"teacher\", got 'student'"):
        dk.train(file, out=tmp_path / "no", only="student", progress=False)  # type: ignore[call-overload]
    with pytest.raises(RecipeError, match="the recipe has no teacher"):
        dk.train(PLAIN, data=pictures, out=tmp_path / "no", only="teacher", progress=False)
    assert not (tmp_path / "no").exists()


def test_tuning_writes_what_the_command_writes(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "r.yaml", pictures, TAUGHT)
    over = {"terms.kd.temperature": [1, 4], "schedule.clip": [None, 1.0]}
    for name in ("cli", "py"):  # paths are in the results: the same ones in two working directories
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        (tmp_path / name / "r.yaml").write_bytes((tmp_path / "r.yaml").read_bytes())
        if name == "cli":
            asked = ("--over", "terms.kd.temperature=1,4", "--over", "schedule.clip=null,1.0", "--random", 2)
            code, out, _ = command(capsys, "tune", "r.yaml", *asked, "--out", "tuned")
            assert code == 0
            continue
        found = dk.tune("r.yaml", over, random=2, out="tuned", progress=False)
    assert "\n".join(found.lines) == out.rstrip()
    assert found.results["best"] == found.best and found.recipe.is_file()
    for name in ("best.yaml", "tune.html"):
        assert (tmp_path / "cli" / "tuned" / name).read_bytes() == (tmp_path / "py" / "tuned" / name).read_bytes(), name
    student = next((tmp_path / "py" / "tuned" / "trials").iterdir()).name
    weights = ["tuned", "trials", student, "student", "model.safetensors"]
    assert tmp_path.joinpath("cli", *weights).read_bytes() == tmp_path.joinpath("py", *weights).read_bytes()


@pytest.mark.parametrize(
    ("over", "error", "message"),
    [
        ({}, TypeError, "over must be a dict of values by key"),
        ({"schedule.clip": 3}, TypeError, "over must have a list of values for schedule.clip, got 3"),
        ({"schedule.clpi": [3]}, RecipeError, "schedule.clpi"),
        ({"seed": [1, 2]}, RecipeError, "seed cannot be swept"),
        ({"schedule.clip": [1, 1]}, RecipeError, "schedule.clip has equal values"),
    ],
)
def test_wrong_values_to_tune(over: Any, error: type[Exception], message: str, pictures: Path) -> None:
    with pytest.raises(error, match=message):
        dk.tune(TAUGHT, over, data=pictures, progress=False)


def test_the_command_exports_what_the_run_saves(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train(PLAIN, data=pictures, out=tmp_path / "run")
    run.save_pretrained(tmp_path / "py")
    code, out, _ = command(capsys, "export", run.folder, "--to", tmp_path / "cli")
    names = ["README.md", "config.json", "model.safetensors"]
    assert code == 0 and out.split() == [str(tmp_path / "cli" / name) for name in names]
    for name in names:
        assert (tmp_path / "cli" / name).read_bytes() == (tmp_path / "py" / name).read_bytes()
    code, _, said = command(capsys, "export", tmp_path / "none")
    assert code == 2 and said.count("\n") == 1
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("")
    assert "is not empty" in command(capsys, "export", run.folder, "--to", tmp_path / "full")[2]
