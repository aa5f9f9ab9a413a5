"""Recipes on LitData's chunks: the same run as on mapped images, to the last byte, interrupted and from afar too."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("PIL", reason="images are prepared with pillow")
pytest.importorskip("litdata", reason="needs the data extra")
pytest.importorskip("lightning_fabric")
pytest.importorskip("jsonargparse")
pytest.importorskip("torchdata")
pytest.importorskip("safetensors")

import training_runs as runs
from cli_runs import GUIDED, command, failed

from debiaskd.data import prepare
from debiaskd.evaluation.evaluate import evaluate_run
from debiaskd.recipe import Data, RecipeError
from debiaskd.training.batches import open_split
from debiaskd.training.loop import TrainingLoop

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.xdist_group("training_litdata"),
    pytest.mark.filterwarnings("ignore::debiaskd.reweight.ErrorSetWarning"),
]
FAST = {"epochs": 2, "batch": 12, "learning_rate": 1e-2}
DISTILLED: dict[str, Any] = {
    "data": {"train": "train[:75%]", "crop_scale": [0.5, 1]},
    "teacher": {"name": "plain/8", "method": "balanced", "schedule": {**FAST, "epochs": 1}, "cache": "fp32"},
    "student": {"name": "plain/6"},
    "transplant": {"projector": "linear"},
    "schedule": FAST,
    "terms": {"match": {}, "kd": {}},
    "compute": {"accelerator": "cpu"},
}


@pytest.fixture(scope="module")
def npy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.birds(tmp_path_factory.mktemp("formats"))


@pytest.fixture(scope="module")
def lit(npy: Path) -> Path:
    """The same images, of each split several chunks."""
    out = npy.parent / "lit"
    prepare("waterbirds", npy.parent / "birds", out, size=16, shard_size=7, format="litdata")
    return out


@pytest.fixture
def far(lit: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(lit, tmp_path / "far", ignore=shutil.ignore_patterns("*.bin", ".lock")))


def train(data: Path, out: Path, document: dict[str, Any], *overrides: str) -> Any:
    return runs.train(runs.write(out.with_suffix(".yaml"), data, document), out, *overrides)


def left(run: Path) -> dict[str, bytes]:
    """All that two runs on the same images have in common, whatever held the images."""
    names = ("*.safetensors", "log.csv", "epochs.csv", "teacher-cache/**/*.npy")
    return {str(path.relative_to(run)): path.read_bytes() for name in names for path in sorted(run.rglob(name))}


def stopping(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    inner = TrainingLoop._step

    def stop(self: TrainingLoop, *arguments: Any) -> None:
        if self.plan.folder.name == "student" and self.step == step:
            raise KeyboardInterrupt
        inner(self, *arguments)

    monkeypatch.setattr(TrainingLoop, "_step", stop)


def test_columns_are_those_of_npy(npy: Path, lit: Path) -> None:
    for key in ("train", "validation", "test"):
        options: dict[str, Any] = {"train": "train[20%:]", "annotated_fraction": 0.5, "dilate": 0.1}
        one, other = (open_split(Data(str(path), **options), key, training=key == "train") for path in (npy, lit))
        assert torch.equal(one.numbers, other.numbers) and torch.equal(one.target, other.target)
        assert one.groups is not None and other.groups is not None and torch.equal(one.groups, other.groups)
        assert torch.equal(one.boxes.coords, other.boxes.coords) and torch.equal(one.boxes.offsets, other.boxes.offsets)
        assert torch.equal(one.boxes.annotated, other.boxes.annotated)


@pytest.mark.parametrize("document", [runs.EVERYTHING, DISTILLED], ids=["everything", "distilled"])
def test_an_interrupted_run_from_afar_ends_as_a_whole_one_on_npy(
    npy: Path, lit: Path, far: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, document: dict[str, Any]
) -> None:
    train(npy, tmp_path / "whole", document)
    url = ["--data.url", f"local:{lit}"]
    with monkeypatch.context() as patch:
        stopping(patch, 4)
        with pytest.raises(KeyboardInterrupt):
            train(far, tmp_path / "run", document, *url)
    assert not (tmp_path / "run" / "student" / "stage.json").exists()
    train(lit, tmp_path / "run", document, "--compute.workers", "1")  # from here, and read by another process
    expected, found = left(tmp_path / "whole"), left(tmp_path / "run")
    assert len(expected) >= 5 and list(found) == list(expected)
    assert [name for name in expected if found[name] != expected[name]] == []
    assert not list(far.rglob("test/*.bin")), "nobody asked for these"


def test_the_same_figures_for_the_same_weights(npy: Path, lit: Path, far: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(far, run, GUIDED, "--data.url", f"local:{lit}", "--pretraining", "null")
    here, _ = evaluate_run(run, "student", None, None)
    assert {path.parent.name for path in far.rglob("*.bin")} == {"train", "val", "test"}
    for moved in (npy, lit):
        there, _ = evaluate_run(run, "student", None, str(moved))
        # What was measured tells the formats apart; what came out does not.
        same = {"fingerprint": None, "data": None, "images": None}
        assert there["data"] != here["data"] and {**there, **same} == {**here, **same}
    assert here["pictures"] == 16 and here["figures"]["epg"] > 0


def test_the_commands(capsys: pytest.CaptureFixture[str], npy: Path, lit: Path, tmp_path: Path) -> None:
    recipe, run = runs.write(tmp_path / "r.yaml", lit, {**GUIDED, "pretraining": None}), tmp_path / "run"
    assert command(capsys, "train", recipe, "--out", run)[0] == 0
    code, out, _ = command(capsys, "evaluate", run)
    assert code == 0 and "worst group" in out
    named = npy.parent / "birds" / "birds" / "3.jpg"
    code, out, err = command(capsys, "explain", run, "val:3", named)
    assert (code, err) == (0, "")
    pictures = [Path(line) for line in out.splitlines()]
    assert len(pictures) == 2 and all(path.is_file() for path in pictures)


@pytest.mark.parametrize(
    ("format", "url", "message"),
    [
        ("npy", "local:there", "data.url: only for data prepared with `--format litdata`, and "),
        ("lit", "", "data.url: "),
        ("far", None, "chunk-0-0.bin: missing; say where it lies (url), or remove "),
    ],
)
def test_what_is_refused(
    capsys: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
    tmp_path: Path,
    format: str,
    url: str | None,
    message: str,
) -> None:
    recipe = runs.write(tmp_path / "r.yaml", request.getfixturevalue(format), GUIDED)
    options = [] if url is None else [f"--data.url={url}"]
    assert message in failed(*command(capsys, "train", recipe, *options, "--out", tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_chunk_that_cannot_be_had_is_one_line(capsys: pytest.CaptureFixture[str], far: Path, tmp_path: Path) -> None:
    recipe = runs.write(tmp_path / "r.yaml", far, {**GUIDED, "pretraining": None})
    found = command(capsys, "train", recipe, "--data.url", f"local:{tmp_path}/nowhere", "--out", tmp_path / "run")
    assert "nowhere/train/chunk-0-0.bin: cannot be fetched (FileNotFoundError" in found[2]
    assert found[0] == 2 and "Traceback" not in found[2]


def test_columns_that_are_missing_are_refused(lit: Path, tmp_path: Path) -> None:
    (Path(shutil.copytree(lit, tmp_path / "b")) / "val" / "00001" / "group.npy").unlink()
    with pytest.raises(RecipeError, match=r"data\.validation: .*group\.npy: missing; remove .*00001\.json and run"):
        open_split(Data(str(tmp_path / "b")), "validation")
