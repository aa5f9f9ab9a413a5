"""`debiaskd train`: what it prints and writes, and one line for each mistake."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml

pytest.importorskip("lightning_fabric")
pytest.importorskip("jsonargparse")
pytest.importorskip("torchdata")
pytest.importorskip("safetensors")

import training_runs as runs
from cli_runs import GUIDED, command, failed

from debiaskd.cli import entry as cli
from debiaskd.models import registry as networks
from debiaskd.training.loop import TrainingLoop

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.xdist_group("cli_train")]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.birds(tmp_path_factory.mktemp("cli"))


@pytest.fixture(scope="module")
def recipe(data: Path) -> Path:
    return runs.write(data.parent / "guided.yaml", data, GUIDED)


@pytest.fixture(scope="module")
def finished(recipe: Path, data: Path) -> Path:
    run = data.parent / "finished"
    assert cli.main(["train", str(recipe), "--out", str(run)]) == 0
    return run


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy that may be written into."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


# -- train ------------------------------------------------------------------------------------------------------------


def test_training_prints_what_was_kept(capsys: pytest.CaptureFixture[str], recipe: Path, tmp_path: Path) -> None:
    code, out, err = command(
        capsys, "train", recipe, "--schedule.epochs", "1", "--out", tmp_path / "run", "--selection.rule=last"
    )
    lines = out.splitlines()
    assert code == 0
    told = [line.partition("% ")[2] for line in err.splitlines()]
    assert [line for line in told if "," not in line] == ["pretraining", "student"]
    assert told[1].startswith("pretraining, input of the student: 3×16×16, mean (0.485, 0.456, 0.406), std ")
    losses = r"student, step \d+: loss [\d.]+, supervised [\d.]+, guide [\d.]+; \d+ images/s"
    assert any(re.fullmatch(losses, line) for line in told)
    assert re.fullmatch(r"student, epoch 1 of 1: accuracy 0\.\d{4}.*, epg 0\.\d{4}, iou 0\.\d{4}", told[-1])
    assert lines[0] == "validation figures of epoch 1 of 1, by the last epoch"
    model = tmp_path / "run" / "student" / "model.safetensors"
    assert lines[-1] == str(model) and model.is_file()
    facts = json.loads((tmp_path / "run" / "student" / "stage.json").read_text())["facts"]
    assert f"accuracy: {facts['figures']['accuracy']:.4f}" in lines
    assert f"epg: {facts['figures']['epg']:.4f}" in lines


def test_the_default_folder_is_named_like_the_recipe(
    capsys: pytest.CaptureFixture[str], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    runs.write(tmp_path / "mine.yaml", data, {**GUIDED, "pretraining": None, "terms": {"supervised": {}}})
    code, out, _ = command(capsys, "train", "mine.yaml", "--schedule.epochs=1")
    assert code == 0 and out.splitlines()[-1] == "runs/mine/student/model.safetensors"


def test_a_recipe_is_printed_whole_and_nothing_trained(
    capsys: pytest.CaptureFixture[str], recipe: Path, tmp_path: Path
) -> None:
    code, out, err = command(
        capsys, "train", recipe, "--print", "--schedule.epochs", "9", "--terms.guide", "null", "--out", tmp_path / "r"
    )
    printed = yaml.safe_load(out)
    assert (code, err) == (0, "")
    assert printed["schedule"]["epochs"] == 9 and printed["schedule"]["batch"] == 12
    assert printed["terms"]["guide"] is None and printed["compute"]["log_every"] == 50  # a default
    assert not (tmp_path / "r").exists()
    (tmp_path / "again.yaml").write_text(out)
    assert command(capsys, "train", tmp_path / "again.yaml", "--print")[1] == out


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--schedule.epoch", "3"], "--schedule.epoch: no such key; did you mean schedule.epochs?"),
        (["--seed", "x"], "seed: must be of type int, got x"),
        (["--schedule.learning_rate", "-1"], "schedule.learning_rate: must be a number > 0, got -1.0"),
        (["--data.path", "nowhere"], "data.train: "),
        (["--data.train", "trains"], "data.train: "),
        (["--student.name", "resnet19x"], "resnet19x: timm has no such network"),
        (["--student.weights", "nowhere.pth"], "nowhere.pth: there is no such file of weights"),
        (["--terms.guide.layer", "stage9"], "terms.guide: layer"),
        (["--selection.rule", "f1"], "selection.rule: f1 needs f1"),
        (["--schedule.batch", "64"], "schedule.batch: 64 images a step, and the training split has 48"),
        (["--compute.precision", "16"], "compute.precision: 16 needs a GPU"),
        (["stray"], "unrecognized arguments: stray"),
    ],
)
def test_mistakes_are_one_line(
    capsys: pytest.CaptureFixture[str], recipe: Path, tmp_path: Path, overrides: list[str], message: str
) -> None:
    found = command(capsys, "train", recipe, *overrides, "--pretraining", "null", "--out", tmp_path / "run")
    assert message in failed(*found)


def test_files_that_are_not_there_or_cannot_be_written(
    capsys: pytest.CaptureFixture[str], recipe: Path, tmp_path: Path
) -> None:
    assert "none.yaml: No such file" in failed(*command(capsys, "train", tmp_path / "none.yaml"))
    (tmp_path / "file").write_text("")
    below = tmp_path / "file" / "run"  # which not even root can make
    assert "Not a directory" in failed(*command(capsys, "train", recipe, "--out", below))
    assert "Not a directory" in failed(*command(capsys, "train", recipe, "--out", tmp_path / "file"))
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "a.tex").write_text("")
    found = failed(*command(capsys, "train", recipe, "--out", tmp_path / "thesis"))
    assert "is neither empty nor a run's folder; choose another --out" in found


def test_a_run_of_another_recipe(capsys: pytest.CaptureFixture[str], recipe: Path, run: Path) -> None:
    found = failed(*command(capsys, "train", recipe, "--out", run, "--seed", "4"))
    assert "was begun with seed: 0, not 4; choose another --out" in found


def test_a_finished_run_is_not_trained_again(capsys: pytest.CaptureFixture[str], recipe: Path, run: Path) -> None:
    code, out, err = command(capsys, "train", recipe, "--out", run)
    assert code == 0 and err == "" and out.startswith("validation figures of epoch")


@pytest.mark.filterwarnings("ignore")
def test_divergence_is_a_failure_and_not_a_mistake(
    capsys: pytest.CaptureFixture[str], recipe: Path, tmp_path: Path
) -> None:
    rate = ["--schedule.learning_rate", "1e30", "--schedule.optimizer", "sgd", "--pretraining", "null"]
    code, out, err = command(capsys, "train", recipe, *rate, "--out", tmp_path / "run")
    assert code == 1 and out == ""
    lines = [line for line in err.splitlines() if line.startswith("debiaskd: ")]
    assert len(lines) == 1 and "training diverged in step" in lines[0] and "A smaller learning rate" in lines[0]


def test_ctrl_c(
    capsys: pytest.CaptureFixture[str], recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(self: TrainingLoop) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(TrainingLoop, "run", interrupted)
    assert failed(*command(capsys, "train", recipe, "--out", tmp_path / "run"), expected=130) == "debiaskd: stopped\n"


def test_a_teachers_weights_that_are_missing(capsys: pytest.CaptureFixture[str], recipe: Path, tmp_path: Path) -> None:
    options = ["--teacher.name", "plain/6", "--teacher.weights", tmp_path / "t.safetensors", "--terms.kd", "{}"]
    found = failed(*command(capsys, "train", recipe, *options, "--out", tmp_path / "run"))
    assert "t.safetensors: there is no such file of weights" in found
    networks.save_weights(runs.Plain(2, 5), tmp_path / "t.safetensors", {})
    found = failed(*command(capsys, "train", recipe, *options, "--out", tmp_path / "run"))
    assert "t.safetensors: of another network: body.2.weight is [5, 4, 3, 3] there and [6, 4, 3, 3] here" in found
    assert not (tmp_path / "run").exists()
