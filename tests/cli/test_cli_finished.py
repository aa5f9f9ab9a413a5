"""`debiaskd evaluate` and `explain`: what they print and write, and one line for each mistake."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("lightning_fabric")
pytest.importorskip("jsonargparse")
pytest.importorskip("torchdata")
pytest.importorskip("safetensors")

import numpy as np
import training_runs as runs
from cli_runs import GUIDED, command, failed
from PIL import Image

from debiaskd.cli import entry as cli
from debiaskd.data import PackedDataset

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.xdist_group("cli_finished")]


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


# -- evaluate ---------------------------------------------------------------------------------------------------------


def test_evaluation_prints_and_writes(capsys: pytest.CaptureFixture[str], run: Path) -> None:
    code, out, err = command(capsys, "evaluate", run)
    document = json.loads((run / "evaluation-test.json").read_text())
    facts = json.loads((run / "student" / "stage.json").read_text())["facts"]
    lines = out.splitlines()
    assert (code, err) == (0, "")
    assert lines[0] == f"student of {run}, epoch {facts['epoch'] + 1}, on test (16 images)"
    assert lines[-1] == str(run / "evaluation-test.json")
    assert f"accuracy {document['figures']['accuracy']:.4f}" in out and "worst group" in out and "EPG " in out
    assert document["pictures"] == 16 and document["selection"] == facts["selection"]
    # Chosen on validation, not anew where it is measured.
    assert document["figures"]["iou_threshold"] == facts["figures"]["iou_threshold"]
    code, _, _ = command(capsys, "evaluate", run, "--split", "val")
    again = json.loads((run / "evaluation-val.json").read_text())["figures"]
    assert code == 0
    # Training does not measure how sure its figures are.
    figures = {name: value for name, value in facts["figures"].items() if value is not None}
    assert {name: again[name] for name in figures} == pytest.approx(figures)
    assert {"worst_group_low", "worst_group_high", "ece"} <= again.keys() - figures.keys()


def test_the_threshold_is_the_one_that_was_written_down(capsys: pytest.CaptureFixture[str], run: Path) -> None:
    for written, used in ((0.123, 0.123), (None, 0.5)):  # None: there were no boxes to choose it by
        stage = json.loads((run / "student" / "stage.json").read_text())
        stage["facts"]["figures"]["iou_threshold"] = written
        (run / "student" / "stage.json").write_text(json.dumps(stage))
        assert command(capsys, "evaluate", run)[0] == 0
        assert json.loads((run / "evaluation-test.json").read_text())["figures"]["iou_threshold"] == used


def test_other_stages_splits_and_places(capsys: pytest.CaptureFixture[str], run: Path, data: Path) -> None:
    code, out, _ = command(capsys, "evaluate", run, "--stage", "pretraining", "--split", "train[:25%]")
    assert code == 0 and "on train[:25%] (12 images)" in out
    assert (run / "evaluation-train-25-pretraining.json").is_file()
    assert command(capsys, "evaluate", run, "--split", "train[:10%]")[0] == 0
    figures = json.loads((run / "evaluation-train-10.json").read_text())["figures"]
    # Adjusted to all that it was trained on, though other groups are frequent among these five.
    counts = PackedDataset(data, "train").group_ids.bincount(minlength=4).tolist()  # type: ignore[union-attr]
    groups = [(count, figures[f"group_{g}_accuracy"]) for g, count in enumerate(counts)]
    known = [(count, value) for count, value in groups if value is not None]
    expected = sum(count * value for count, value in known) / sum(count for count, _ in known)
    assert figures["adjusted_accuracy"] == pytest.approx(expected) != pytest.approx(figures["accuracy"])
    moved = Path(shutil.copytree(data, run.parent / "moved"))
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe["data"]["path"] = str(run / "gone")
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert "gone" in failed(*command(capsys, "evaluate", run))
    assert command(capsys, "evaluate", run, "--data", moved)[0] == 0


def test_other_data_is_measured_without_a_training_split_and_has_a_file_of_its_own(
    capsys: pytest.CaptureFixture[str], run: Path, data: Path
) -> None:
    assert command(capsys, "evaluate", run)[0] == 0
    own = (run / "evaluation-test.json").read_text()
    adjusted = json.loads(own)["figures"]["adjusted_accuracy"]
    assert json.loads(own)["data"]["path"] == str(data)
    for name in ("alone", "other/alone"):  # other data of the same name has another fingerprint
        alone = Path(shutil.copytree(data, run.parent / name))
        manifest = json.loads((alone / "manifest.json").read_text())
        manifest["splits"] = {"test": manifest["splits"]["test"]}
        if "/" in name:
            manifest["groups"] = [f"other {group}" for group in manifest["groups"]]
        (alone / "manifest.json").write_text(json.dumps(manifest))
        code, out, _ = command(capsys, "evaluate", run, "--data", alone)
        assert code == 0 and out.splitlines()[0].endswith(f", on test of {alone} (16 images)")
        document = json.loads(Path(out.splitlines()[-1]).read_text())
        assert document["data"]["path"] == str(alone)
        assert Path(out.splitlines()[-1]).name == f"evaluation-test-alone-{document['data']['fingerprint'][:8]}.json"
        # From what the run remembers of its own training images' groups, by their names.
        assert document["figures"]["adjusted_accuracy"] == (None if "/" in name else adjusted)
        assert document["figures"]["smallest_group_pictures"] == 4
    assert len(list(run.glob("evaluation-*.json"))) == 3
    assert (run / "evaluation-test.json").read_text() == own
    moved = Path(shutil.copytree(data, run.parent / "moved"))
    assert command(capsys, "evaluate", run, "--data", moved)[0] == 0
    again = json.loads((run / "evaluation-test.json").read_text())
    assert again["figures"] == json.loads(own)["figures"] and again["data"]["path"] == str(moved)


def test_other_data_may_have_the_classes_in_another_order(
    capsys: pytest.CaptureFixture[str], run: Path, data: Path
) -> None:
    def accuracy(*arguments: object) -> float:
        code, out, _ = command(capsys, "evaluate", run, *arguments)
        assert code == 0
        figures: dict[str, float] = json.loads(Path(out.splitlines()[-1]).read_text())["figures"]
        return figures["accuracy"]

    turned = Path(shutil.copytree(data, run.parent / "turned"))
    manifest = json.loads((turned / "manifest.json").read_text())
    manifest["classes"].reverse()  # each label is that of the other class now
    (turned / "manifest.json").write_text(json.dumps(manifest))
    assert accuracy("--data", turned, "--split", "train") == pytest.approx(1 - accuracy("--split", "train"))


def test_a_run_that_did_not_save_its_groups_reads_them_from_its_data(
    capsys: pytest.CaptureFixture[str], run: Path
) -> None:
    def adjusted() -> float | None:
        assert command(capsys, "evaluate", run)[0] == 0
        return json.loads((run / "evaluation-test.json").read_text())["figures"]["adjusted_accuracy"]

    expected = adjusted()
    for path in run.glob("*/stage.json"):
        stage = json.loads(path.read_text())
        del stage["facts"]["training_groups"]
        path.write_text(json.dumps(stage))
    assert adjusted() == expected


def test_parts_of_a_split_have_files_of_their_own(capsys: pytest.CaptureFixture[str], run: Path) -> None:
    for part in ("[:50%]", "[50%:]", "[:12.5%]", "[12%:50%]"):
        assert command(capsys, "evaluate", run, "--split", f"train{part}")[0] == 0
    names = ["evaluation-train-12-50.json", "evaluation-train-12.5.json", "evaluation-train-50-100.json"]
    assert sorted(path.name for path in run.glob("evaluation-*.json")) == [*names, "evaluation-train-50.json"]


def test_runs_that_cannot_be_evaluated(capsys: pytest.CaptureFixture[str], run: Path, tmp_path: Path) -> None:
    found = failed(*command(capsys, "evaluate", tmp_path / "nothing"))
    assert "nothing: is no run's folder, it has no recipe.yaml" in found
    found = failed(*command(capsys, "evaluate", run, "--stage", "teacher"))
    assert "stage 'teacher' is not finished; finished: pretraining, student" in found
    assert "--split: " in failed(*command(capsys, "evaluate", run, "--split", "tests"))
    model = run / "student" / "model.safetensors"
    model.write_bytes(model.read_bytes()[:-8])
    assert "model.safetensors: missing or damaged; remove" in failed(*command(capsys, "evaluate", run))
    (run / "student" / "stage.json").write_text("{")
    assert "stage.json: damaged; remove" in failed(*command(capsys, "evaluate", run))
    (run / "student" / "stage.json").unlink()
    assert "stage 'student' is not finished; finished: pretraining" in failed(*command(capsys, "evaluate", run))
    assert list(run.glob("evaluation*")) == []


# -- explain ----------------------------------------------------------------------------------------------------------


def lime(path: Path) -> int:
    """How much of a box's outline is seen."""
    pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
    return int(((pixels[..., 1] > 200) & (pixels[..., 0] < 60) & (pixels[..., 2] < 60)).sum())


def test_pictures_are_explained(capsys: pytest.CaptureFixture[str], run: Path, data: Path) -> None:
    known, unknown = data.parent / "birds" / "birds" / "4.jpg", run.parent / "holiday.jpg"
    Image.fromarray(np.full((20, 30, 3), 128, np.uint8)).save(unknown)
    code, out, err = command(capsys, "explain", run, known, unknown, "val:3")
    assert (code, err) == (0, "")
    written = [Path(line) for line in out.splitlines()]
    assert [path.parent for path in written] == [run / "explanations"] * 3
    # The label of an image that the data knows, and otherwise what the student predicts.
    assert [path.name for path in written[::2]] == ["4-landbird.png", "val-3-waterbird.png"]
    assert written[1].name in ("holiday-landbird.png", "holiday-waterbird.png")
    assert lime(written[0]) > 0 and lime(written[2]) > 0 and lime(written[1]) == 0
    width, height = Image.open(written[0]).size
    assert width > 2.5 * height  # the image, before guidance, and after it


def test_a_class_a_folder_and_another_run_may_be_named(
    capsys: pytest.CaptureFixture[str], run: Path, finished: Path, tmp_path: Path
) -> None:
    options = ["--target", "waterbird", "--before", finished, "--out", tmp_path / "shown"]
    code, out, _ = command(capsys, "explain", run, "val:0", *options)
    assert code == 0 and out == f"{tmp_path / 'shown' / 'val-0-waterbird.png'}\n"
    assert command(capsys, "explain", run, "val:0", "--target", "1")[1] == f"{run}/explanations/val-0-waterbird.png\n"


def test_pictures_of_one_name_are_all_written(capsys: pytest.CaptureFixture[str], run: Path, tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        Image.new("RGB", (16, 16)).save(tmp_path / folder / "same.png")
    code, out, _ = command(
        capsys, "explain", run, tmp_path / "a" / "same.png", tmp_path / "b" / "same.png", "--target", "0"
    )
    assert code == 0 and [Path(line).name for line in out.splitlines()] == ["same-landbird.png", "same-landbird-2.png"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["val:0", "--target", "penguin"],
            "--target: must be a class's name or number, one of landbird, waterbird; got",
        ),
        (["val:0", "--target", "2"], "--target: must be a class's name or number"),
        (["val:16"], "val:16: there are 16 images"),
        (["nonsense:1"], "nonsense"),
        (["val:-1"], "val:-1: "),
        (["none.jpg"], "none.jpg: "),
        (["text.jpg"], "text.jpg: "),
        (["."], ".: "),
        (["val:0", "--before", "nothing"], "nothing: is no run's folder"),
    ],
)
def test_what_cannot_be_explained(
    capsys: pytest.CaptureFixture[str],
    run: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(run.parent)
    Path("text.jpg").write_text("no image")
    assert message in failed(*command(capsys, "explain", run, *arguments))
    assert not (run / "explanations").exists()


def test_a_figure_shows_maps_where_the_boxes_are(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where networks read images of another size than is stored."""
    from debiaskd.evaluation import explain as explaining

    document = {**GUIDED, "data": {"size": 24}, "pretraining": None}
    runs.train(runs.write(tmp_path / "r.yaml", data, document), tmp_path / "run", "--schedule.epochs", "1")
    figures: list[Any] = []
    inner = explaining._figure
    monkeypatch.setattr(explaining, "_figure", lambda *parts: figures.append(inner(*parts)) or figures[-1])
    explaining.explain_run(tmp_path / "run", ["val:0", str(data.parent / "birds" / "birds" / "4.jpg")])
    for figure in figures:
        sides = {tuple(image.get_array().shape[:2]) for axes in figure.axes for image in axes.images}
        assert len(sides) == 1
        (side,) = sides
        (box,) = figure.axes[0].patches
        scale = side[0] / 30, side[1] / 40  # boxes are (8, 6, 24, 18) of 40×30
        expected = np.array([8 * scale[1], 6 * scale[0], 24 * scale[1], 18 * scale[0]])
        found = np.array([box.get_x() + 0.5, box.get_y() + 0.5, *(np.add(box.get_xy(), 0.5))])
        found[2:] += box.get_width(), box.get_height()
        assert np.abs(found - expected).max() <= 1
    assert len(figures) == 2
