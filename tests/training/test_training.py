"""Training: gone on with after a kill as if nothing had been, on two ranks as on one, and never half done unnoticed."""

from __future__ import annotations

import errno
import os
import random
import signal
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lightning_fabric")
pytest.importorskip("jsonargparse")
pytest.importorskip("torchdata")
pytest.importorskip("safetensors")

import processes
import training_runs as runs
from safetensors.torch import load_file

from debiaskd.models import registry as networks
from debiaskd.recipe import RecipeError
from debiaskd.training.checkpoint import CheckpointError, Checkpoints, CheckpointWarning
from debiaskd.training.divergence import DivergedError
from debiaskd.training.loop import TrainingLoop
from debiaskd.training.run import RunError

pytestmark = pytest.mark.xdist_group("processes")
STEPS = 16
ONE = {"OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.birds(tmp_path_factory.mktemp("birds"))


@pytest.fixture(scope="module")
def recipe(data: Path) -> Path:
    return runs.write(data.parent / "everything.yaml", data, runs.EVERYTHING)


@pytest.fixture(scope="module")
def whole(recipe: Path) -> Path:
    """A run that nothing interrupted, of one thread as the others."""
    out = recipe.parent / "whole"
    assert script(recipe, out) == 0
    return out


def script(recipe: Path, out: Path, *options: str, ranks: int = 1) -> int:
    command = (Path(__file__).parents[1] / "helpers" / "training_runs.py", recipe, out, *options)
    ended = processes.run_ranks(*command, ranks=ranks) if ranks > 1 else [processes.run(*command, environment=ONE)]
    for done in ended:
        assert done.returncode in (0, -signal.SIGKILL), done.stderr[-3000:]
    return ended[0].returncode


def outcome(run: Path) -> dict[str, bytes]:
    """All that a run leaves behind, but for how long it took."""
    return {
        str(path.relative_to(run)): path.read_bytes()
        for path in sorted(run.rglob("*"))
        if path.is_file()
        and path.name not in ("speed.csv", "seconds.json", "pareto.png")
        and "tensorboard" not in path.parts
    }


def test_a_killed_run_ends_as_one_that_was_not(recipe: Path, whole: Path, tmp_path: Path) -> None:
    run, generator = tmp_path / "run", random.Random(os.getpid())
    steps = sorted(generator.sample(range(1, STEPS - 1), 2))  # two checkpoints are still to come
    for step in steps:
        assert script(recipe, run, "--kill-at", str(step)) == -signal.SIGKILL, steps
        assert not (run / "student" / "stage.json").exists()
    assert script(recipe, run, "--kill-writing", "1") == -signal.SIGKILL, steps
    assert script(recipe, run) == 0, steps
    expected, found = outcome(whole), outcome(run)
    assert list(found) == list(expected), steps
    assert [name for name in expected if found[name] != expected[name]] == [], steps


def test_what_a_run_leaves_behind(whole: Path) -> None:
    files = set(outcome(whole))
    assert {"recipe.yaml", "weights/weights.safetensors", "teacher/model.safetensors"} <= files
    assert {"student/log.csv", "student/epochs.csv", "student/stage.json", "student/model.safetensors"} <= files
    assert not any("checkpoints" in name or "unfinished" in name for name in files)
    log = (whole / "student" / "log.csv").read_text().splitlines()
    assert log[0].startswith("step,epoch,learning_rate,loss,match") and log[0].endswith("backdoor")
    assert [line.partition(",")[0] for line in log[1:]] == ["3", "6", "9", "12", "15", "16"]
    assert (whole / "student" / "model.safetensors").read_bytes() in [
        path.read_bytes() for path in (whole / "student" / "kept").iterdir()
    ]


def test_two_processes_train_as_one(recipe: Path, whole: Path, tmp_path: Path) -> None:
    # Killed in the middle of an epoch that builds contexts, of which each process has a part; one goes on alone.
    assert script(recipe, tmp_path / "run", "--kill-at", "11", ranks=2) == -signal.SIGKILL
    assert not (tmp_path / "run" / "student" / "stage.json").exists()
    assert script(recipe, tmp_path / "run") == 0
    for stage in ("teacher", "identification", "student"):
        for table in ("log.csv", "epochs.csv"):
            expected, found = (
                [
                    [float(cell or "nan") for cell in line.split(",")]
                    for line in (run / stage / table).read_text().splitlines()[1:]
                ]
                for run in (whole, tmp_path / "run")
            )
            torch.testing.assert_close(
                torch.tensor(found, dtype=torch.float64),
                torch.tensor(expected, dtype=torch.float64),
                rtol=1e-5,
                atol=1e-5,
                equal_nan=True,
            )
        expected_state, state = (load_file(run / stage / "model.safetensors") for run in (whole, tmp_path / "run"))
        torch.testing.assert_close(state, expected_state, rtol=1e-5, atol=1e-5)
    weights = [load_file(run / "weights" / "weights.safetensors")["weights"] for run in (whole, tmp_path / "run")]
    assert torch.equal(*weights)


# -- what was finished, and what goes wrong ---------------------------------------------------------------------------

QUICK: dict[str, Any] = {
    "student": {"name": "plain/4"},
    "schedule": {"epochs": 2, "batch": 12, "learning_rate": 1e-3},
    "terms": {"supervised": {}},
    "compute": {"accelerator": "cpu", "checkpoint_every": 2},
}


@pytest.fixture
def quick(data: Path, tmp_path: Path) -> Path:
    return runs.write(tmp_path / "quick.yaml", data, QUICK)


def test_a_finished_stage_is_used_again(quick: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = runs.train(quick, tmp_path / "run")
    monkeypatch.setattr(TrainingLoop, "run", lambda self: pytest.fail("trained again"))
    again = runs.train(quick, tmp_path / "run", "--compute.log_every", "7", "--data.test", "val")
    assert again.fingerprint == first.fingerprint and again.facts == first.facts


def test_a_changed_recipe_is_refused(quick: Path, tmp_path: Path) -> None:
    runs.train(quick, tmp_path / "run")
    with pytest.raises(RunError, match=r"was begun with schedule.learning_rate: 0.001, not 0.01; choose another --out"):
        runs.train(quick, tmp_path / "run", "--schedule.learning_rate", "0.01")


def test_batch_norm_that_cannot_be_synchronised_is_refused(quick: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"^compute\.sync_batchnorm: .* on GPUs only"):
        runs.train(quick, tmp_path / "run", "--compute.sync_batchnorm", "true")
    assert not (tmp_path / "run").exists()


def test_a_damaged_result_is_refused(quick: Path, tmp_path: Path) -> None:
    runs.train(quick, tmp_path / "run")
    model = tmp_path / "run" / "student" / "model.safetensors"
    model.write_bytes(model.read_bytes()[:-1] + b"x")
    with pytest.raises(RunError, match=r"model\.safetensors: missing or damaged; remove"):
        runs.train(quick, tmp_path / "run")


def test_a_folder_of_something_else_is_refused(quick: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("")
    with pytest.raises(RunError, match="neither empty nor a run's folder"):
        runs.train(quick, tmp_path / "run")


def test_a_loss_that_is_not_a_number_stops(quick: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inner = TrainingLoop._step

    def spoil(self: TrainingLoop, *arguments: Any) -> None:
        if self.step == 5:
            next(self.learner.parameters()).data.fill_(float("nan"))
        inner(self, *arguments)

    monkeypatch.setattr(TrainingLoop, "_step", spoil)
    with pytest.raises(
        DivergedError, match=r"step 5, epoch 1: terms.supervised nan; images \d+, .* of train; the last"
    ):
        runs.train(quick, tmp_path / "run")
    kept = Checkpoints(tmp_path / "run" / "student" / "checkpoints", "")._written()
    assert [path.stem.lstrip("0") for path in kept] == ["2", "4"]  # none from after it
    assert not (tmp_path / "run" / "student" / "stage.json").exists()


@pytest.mark.parametrize(("step", "kept"), [(3, ["2"]), (5, ["2", "4"])])  # the last of an epoch, and of a checkpoint
def test_weights_that_are_no_numbers_are_not_kept(
    quick: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int, kept: list[str]
) -> None:
    inner, steps = torch.optim.Optimizer.zero_grad, count()

    def spoil(self: torch.optim.Optimizer, *arguments: Any) -> None:
        if next(steps) == step:
            self.param_groups[0]["params"][0].data[0] = float("inf")
        inner(self, *arguments)

    monkeypatch.setattr(torch.optim.Adam, "zero_grad", spoil)
    message = (
        rf"by step {step}, epoch {step // 4}: its losses were finite, and the weights after it are not \(.*weight\); "
    )
    with pytest.raises(DivergedError, match=message):
        runs.train(quick, tmp_path / "run")
    found = Checkpoints(tmp_path / "run" / "student" / "checkpoints", "")._written()
    assert [path.stem.lstrip("0") for path in found] == kept
    monkeypatch.undo()
    runs.train(quick, tmp_path / "run")  # and goes on from there


class Dropping(runs.Plain):
    """Drops half of its channels."""

    def __init__(self, classes: int, width: int) -> None:
        super().__init__(classes, width)
        self.body.append(torch.nn.Dropout2d(0.5))


def test_dropout_is_of_the_seed_and_the_step_alone(
    quick: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(
        networks._FAMILIES, "dropping", lambda width, classes, pretrained: Dropping(classes, int(width))
    )
    options = ("--student.name", "dropping/4", "--schedule.accumulate", "2")
    whole = runs.train(quick, tmp_path / "whole", *options).model
    inner = TrainingLoop._step

    def stops(self: TrainingLoop, *arguments: Any) -> None:
        if self.step == 3:  # between two checkpoints
            raise KeyboardInterrupt
        inner(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(TrainingLoop, "_step", stops)
        with pytest.raises(KeyboardInterrupt):
            runs.train(quick, tmp_path / "run", *options)
    torch.manual_seed(99)
    assert runs.train(quick, tmp_path / "run", *options).model.read_bytes() == whole.read_bytes()


# -- checkpoints ------------------------------------------------------------------------------------------------------


def test_the_last_two_checkpoints_are_kept_and_verified(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "c", "me")
    assert checkpoints.load() is None
    for step in (10, 20, 30):
        checkpoints.save(step, {"value": torch.tensor(float(step))})
    assert checkpoints.load() == (30, {"value": torch.tensor(30.0)})
    assert sorted(path.stem for path in (tmp_path / "c").glob("*.pt")) == ["0000000020", "0000000030"]
    newest = tmp_path / "c" / "0000000030.pt"
    content = newest.read_bytes()
    for damaged in (content[:-10], content[:500] + bytes([content[500] ^ 1]) + content[501:], b""):
        newest.write_bytes(damaged)
        with pytest.warns(CheckpointWarning, match=r"0000000030.pt: damaged.*going on from step 20"):
            assert checkpoints.load() == (20, {"value": torch.tensor(20.0)})
    (tmp_path / "c" / "0000000020.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"0000000030\.pt: damaged.*0000000020\.pt: damaged"):
        checkpoints.load()


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("failed writing file")]
)
def test_a_full_disk_leaves_the_checkpoint_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    checkpoints = Checkpoints(tmp_path, "me")
    checkpoints.save(1, {"value": torch.tensor(1.0)})

    def full(document: Any, path: Path) -> None:
        path.write_bytes(b"half")
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(OSError) as caught:
            checkpoints.save(2, {"value": torch.tensor(2.0)})
    assert caught.value.errno == errno.ENOSPC and Path(caught.value.filename).parent == tmp_path
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0000000001.json", "0000000001.pt"]
    assert checkpoints.load() == (1, {"value": torch.tensor(1.0)})


def test_a_checkpoint_of_something_else_is_refused(tmp_path: Path) -> None:
    Checkpoints(tmp_path, "me").save(1, {})
    with pytest.raises(CheckpointError, match="of another training; choose another --out"):
        Checkpoints(tmp_path, "you").load()


class Malicious:
    def __reduce__(self) -> Any:
        return os.mkdir, (Malicious.target,)

    target = ""


def test_loading_runs_no_code_from_a_file(tmp_path: Path) -> None:
    from debiaskd.utils import files

    Malicious.target = str(tmp_path / "was-run")
    checkpoints = Checkpoints(tmp_path / "c", "me")
    checkpoints.save(1, {})
    path = tmp_path / "c" / "0000000001.pt"
    torch.save({"identity": "me", "step": 1, "state": Malicious()}, path)
    files.write_json(path.with_suffix(".json"), {"step": 1, "bytes": path.stat().st_size, "sha256": files.sha256(path)})
    with pytest.raises(CheckpointError, match="damaged"):
        checkpoints.load()
    torch.save({"state_dict": Malicious()}, tmp_path / "weights.pth")
    with pytest.raises(networks.NetworkError, match="cannot be read without running code from the file"):
        networks.load_weights(runs.Plain(2, 4), tmp_path / "weights.pth")
    assert not (tmp_path / "was-run").exists()
