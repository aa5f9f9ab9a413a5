"""RandAugment, mixup and CutMix in training: resumed with the same bytes, the same for teacher and student, and not in
validation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lightning_fabric")
pytest.importorskip("jsonargparse")
pytest.importorskip("torchdata")
pytest.importorskip("safetensors")

import training_runs as runs

from debiaskd.boxes import Boxes
from debiaskd.data import Batch
from debiaskd.models.input import InputContract
from debiaskd.recipe import RecipeError, read
from debiaskd.terms import Draws, Ranks
from debiaskd.training.batches import RANDOM, InputTransform, SplitLoader, open_split
from debiaskd.training.dry_run import DryRun
from debiaskd.training.learner import Learner
from debiaskd.training.loop import TrainingLoop

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.xdist_group("training")]
MIXED: dict[str, Any] = {
    **runs.PLAIN,
    "data": {"crop_scale": [0.5, 1], "rand_augment": [2, 9], "color_jitter": [0.2, 0.2, 0.2, 0.1], "mixup": 0.3},
    "compute": {"accelerator": "cpu", "checkpoint_every": 2},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.birds(tmp_path_factory.mktemp("augmented"))


def test_an_interrupted_run_goes_on_with_the_same_bytes(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DryRun, "run", lambda self, learner: None)
    recipe = runs.write(tmp_path / "r.yaml", data, {**MIXED, "data": {**MIXED["data"], "cutmix": 1.0}})
    runs.train(recipe, tmp_path / "whole")
    inner = TrainingLoop._step

    def stops(self: TrainingLoop, *arguments: Any) -> None:
        if self.step == 5:
            raise KeyboardInterrupt
        inner(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainingLoop, "_step", stops)
        with pytest.raises(KeyboardInterrupt):
            runs.train(recipe, tmp_path / "stopped")
    runs.train(recipe, tmp_path / "stopped")
    whole, stopped = ((tmp_path / run / "student" / "model.safetensors") for run in ("whole", "stopped"))
    assert whole.read_bytes() == stopped.read_bytes()


def test_a_steps_loss_is_of_both_labels(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = runs.write(tmp_path / "r.yaml", data, {**MIXED, "schedule": {"epochs": 1, "batch": 12}})
    inner, seen = Learner.forward, []

    def noted(self: Learner, step: Any) -> Any:
        total, losses = inner(self, step)
        batch = step.batch
        assert batch.partner is not None and batch.share is not None
        soft = torch.nn.functional.one_hot(batch.target, 2).float()
        share = batch.share[:, None]
        logits = self.extractor.model(batch.images)
        expected = torch.nn.functional.cross_entropy(logits, share * soft + (1 - share) * soft[batch.partner])
        torch.testing.assert_close(total, expected)
        seen.append(batch.share)
        return total, losses

    monkeypatch.setattr(Learner, "forward", noted)
    runs.train(recipe, tmp_path / "run")
    assert len(seen) == 4 + 1  # and the dry run
    assert torch.cat(seen[1:]).unique().numel() == 48


def loader(data: Path, tmp_path: Path, *, training: bool) -> SplitLoader:
    recipe = read(runs.write(tmp_path / "r.yaml", data, MIXED))
    split = open_split(recipe.data, "train")
    return SplitLoader(split, recipe.data, training=training, batch=12, ranks=Ranks(), device=torch.device("cpu"))


def test_validation_is_neither_augmented_nor_mixed(data: Path, tmp_path: Path) -> None:
    found = loader(data, tmp_path, training=False)
    batch = found.split.whole.__getitems__([0, 1, 2])
    made = found.transform(batch)
    assert made.partner is made.share is None
    assert torch.equal(made.images, InputTransform(found.transform.contract, torch.device("cpu"))(batch).images)
    assert loader(data, tmp_path, training=True).transform(batch).partner is not None


@pytest.mark.parametrize("accumulate", [1, 2])
def test_images_are_mixed_within_a_pass_by_numbers_of_the_step(data: Path, tmp_path: Path, accumulate: int) -> None:
    found = loader(data, tmp_path, training=True)
    batch = found.split.whole.__getitems__(list(range(6)))
    draws = [Draws(3, 4, Ranks(), torch.device("cpu"), passes=accumulate, number=accumulate - 1) for _ in range(2)]
    first, again = (found.transform(batch, one) for one in draws)
    assert torch.equal(first.images, again.images)
    other = found.transform(batch, Draws(3, 5, Ranks(), torch.device("cpu")))
    assert not torch.equal(first.images, other.images)
    assert first.partner is not None
    assert sorted(first.partner.tolist()) == list(range(6))


@pytest.mark.parametrize("crop", [None, (0.4, 1.0)])
def test_teacher_and_student_read_the_same_mixed_images(crop: tuple[float, float] | None) -> None:
    """In other numbers, since each normalises them as it was trained."""
    contracts = [
        InputContract((16, 16), mean=mean, std=std)
        for mean, std in (((0.5, 0.4, 0.3), (0.2, 0.3, 0.1)), ((0.1,) * 3, (1.0,) * 3))
    ]
    options: dict[str, Any] = {
        "color_jitter": (0.3, 0.3, 0.3, 0.1),
        "rand_augment": (2, 12),
        "mixup": 0.4,
        "cutmix": 1.0,
    }
    cpu = torch.device("cpu")
    transform = InputTransform(
        contracts[0],
        cpu,
        teacher=contracts[1],
        with_teacher_input=True,
        stored=(16, 16),
        flip=True,
        crop_scale=crop,
        **options,
    )
    pixels = torch.randint(0, 256, (6, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    batch = Batch(pixels, torch.arange(6), Boxes.from_lists([None] * 6))
    made = transform(batch, Draws(0, 0, Ranks(), cpu))
    assert made.teacher_images is not None and made.share is not None
    shown = [
        images * torch.tensor(contract.std)[:, None, None] + torch.tensor(contract.mean)[:, None, None]
        for images, contract in zip((made.images, made.teacher_images), contracts)
    ]
    torch.testing.assert_close(*shown, rtol=0, atol=1e-6)
    alone = {name: value for name, value in options.items() if name not in ("mixup", "cutmix")}
    plain = InputTransform(contracts[0], cpu, flip=True, crop_scale=crop, **alone)(batch, Draws(0, 0, Ranks(), cpu))
    assert not torch.equal(plain.images, made.images)


def test_all_that_is_random_is_a_key_of_the_data() -> None:
    from debiaskd.recipe import Data

    assert set(RANDOM) <= set(Data.__dataclass_fields__)


def test_a_pass_of_one_image_is_refused_on_several_processes(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = runs.write(tmp_path / "r.yaml", data, {**MIXED, "schedule": {"epochs": 1, "batch": 2}})
    from debiaskd.training.fit import Trainer

    inner = Trainer._share

    def two(self: Trainer, *arguments: Any) -> int:
        self.ranks.world_size = 2
        return inner(self, *arguments)

    monkeypatch.setattr(Trainer, "_share", two)
    text = r"^data.mixup: mixes images of a process's pass, which needs two; schedule.batch=2 in 2 processes has 1$"
    with pytest.raises(RecipeError, match=text):
        runs.train(recipe, tmp_path / "run")
