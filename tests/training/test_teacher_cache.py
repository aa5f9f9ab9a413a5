"""A teacher's answers kept on disk: what it would have said, once for each image and view, none half written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lightning_fabric")
pytest.importorskip("jsonargparse")
pytest.importorskip("torchdata")

import training_runs as runs
from safetensors.torch import load_file

from debiaskd.models.frozen_teacher import FrozenTeacher
from debiaskd.training import teacher_cache as caching
from debiaskd.training.dry_run import DryRun
from debiaskd.training.teacher_cache import ViewDraws

pytestmark = pytest.mark.xdist_group("training")
TAUGHT: dict[str, Any] = {
    "data": {"flip": False, "train": "train[:75%]"},
    "teacher": {"name": "plain/8", "method": "erm", "schedule": {"epochs": 1, "batch": 12, "learning_rate": 1e-3}},
    "student": {"name": "plain/6"},
    "transplant": {"projector": "linear"},
    "schedule": {"epochs": 2, "batch": 12, "learning_rate": 1e-3},
    "terms": {"match": {}, "sample": {}, "kd": {}},
    "compute": {"accelerator": "cpu"},
}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    data = runs.birds(tmp_path_factory.mktemp("birds"))
    return runs.write(data.parent / "taught.yaml", data, TAUGHT)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many images the teacher was shown, each time."""
    found: list[int] = []
    inner = FrozenTeacher.forward_features

    def counted(self: FrozenTeacher, images: torch.Tensor) -> torch.Tensor:
        found.extend([len(images)] * (len(images) > 1))  # one is a trial run
        return inner(self, images)

    monkeypatch.setattr(FrozenTeacher, "forward_features", counted)
    monkeypatch.setattr(caching, "SHARD", 20)
    monkeypatch.setattr(DryRun, "run", lambda self, learner: None)
    return found


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "student" / "model.safetensors")


def test_the_same_student_without_asking_the_teacher_again(recipe: Path, tmp_path: Path, asked: list[int]) -> None:
    runs.train(recipe, tmp_path / "live")
    live = sum(asked)
    assert live == 2 * 36
    asked.clear()
    runs.train(recipe, tmp_path / "cached", "--teacher.cache", "fp32")
    assert sum(asked) == 36, "once for each image"
    torch.testing.assert_close(weights(tmp_path / "cached"), weights(tmp_path / "live"), rtol=1e-4, atol=1e-5)
    shards = sorted(path.name for path in (tmp_path / "cached" / "teacher-cache" / "view-00").iterdir())
    assert shards == ["00000", "00001"]


@pytest.mark.parametrize("term", ["match", "kd", "sample", "relation"])
def test_each_term_alone(recipe: Path, tmp_path: Path, term: str) -> None:
    alone = runs.write(tmp_path / "alone.yaml", recipe.parent / "birds16", {**TAUGHT, "terms": {term: {}}})
    runs.train(alone, tmp_path / "live")
    runs.train(alone, tmp_path / "cached", "--teacher.cache", "fp32")
    torch.testing.assert_close(weights(tmp_path / "cached"), weights(tmp_path / "live"), rtol=1e-4, atol=1e-5)
    written = {path.stem for path in (tmp_path / "cached" / "teacher-cache").rglob("*.npy")}
    needed = {"match": {"feature"}, "kd": set(), "sample": {"pooled"}, "relation": {"pooled"}}
    assert written == {"logits", *needed[term]}, "what no term needs would only take room"


def test_half_precision_is_close(recipe: Path, tmp_path: Path, asked: list[int]) -> None:
    for cache in ("fp32", "bf16"):
        runs.train(recipe, tmp_path / cache, "--teacher.cache", cache)
    sizes = [
        sum(path.stat().st_size for path in (tmp_path / cache / "teacher-cache").rglob("feature.npy"))
        for cache in ("fp32", "bf16")
    ]
    assert 1.9 < sizes[0] / sizes[1] < 2.1
    torch.testing.assert_close(weights(tmp_path / "bf16"), weights(tmp_path / "fp32"), rtol=2e-2, atol=5e-3)


@pytest.mark.parametrize(
    "augmentation",
    [
        ["--data.flip", "true", "--data.crop_scale", "[0.3, 1]"],
        ["--data.color_jitter", "[0.4, 0.4, 0.4, 0.1]"],
        ["--data.rand_augment", "[2, 15]"],
    ],
    ids=lambda options: options[0],
)
def test_views_take_turns_and_the_teacher_saw_each(
    recipe: Path, tmp_path: Path, asked: list[int], augmentation: list[str]
) -> None:
    options = [*augmentation, "--teacher.cache", "fp32", "--teacher.views", "2", "--schedule.epochs", "4"]
    seen: list[tuple[int, torch.Tensor, torch.Tensor]] = []
    inner = caching.CachedTeacher.__call__

    def noted(self: caching.CachedTeacher, batch: Any, epoch: int, numbers: Any) -> Any:
        assert torch.equal(numbers, batch.index), "the host's own copy, so that nothing waits for a device"
        outputs = inner(self, batch, epoch, numbers)
        teacher = frozen[-1]  # the first was a rehearsal's
        expected = teacher.body(batch.images)
        torch.testing.assert_close(outputs.feature, expected, rtol=1e-4, atol=1e-5)
        order = batch.index.argsort()
        seen.append((epoch, batch.index[order], batch.images[order]))
        return outputs

    frozen: list[FrozenTeacher] = []
    built = FrozenTeacher.__init__

    def kept(self: FrozenTeacher, *arguments: Any, **more: Any) -> None:
        built(self, *arguments, **more)
        frozen.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(caching.CachedTeacher, "__call__", noted)
        patch.setattr(FrozenTeacher, "__init__", kept)
        runs.train(recipe, tmp_path / "run", *options)
    assert sum(asked) == 2 * 36
    shown: list[dict[int, torch.Tensor]] = [{} for _ in range(4)]
    for epoch, numbers, images in seen:
        shown[epoch] |= dict(zip(numbers.tolist(), images))
    always = sorted(set.intersection(*(set(one) for one in shown)))
    first, second, third, fourth = (torch.stack([one[number] for number in always]) for one in shown)
    assert torch.equal(first, third) and torch.equal(second, fourth) and not torch.equal(first, second)


def test_an_interrupted_cache_goes_on(recipe: Path, tmp_path: Path, asked: list[int]) -> None:
    inner, calls = caching._write, []

    def stops(*arguments: Any) -> None:
        calls.append(arguments)
        if len(calls) == 2:
            (arguments[0] / "feature.npy").write_bytes(b"half")
            raise KeyboardInterrupt
        inner(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(caching, "_write", stops)
        with pytest.raises(KeyboardInterrupt):
            runs.train(recipe, tmp_path / "run", "--teacher.cache", "fp32")
    assert not (tmp_path / "run" / "teacher-cache" / "stage.json").exists()
    first = sum(asked)
    runs.train(recipe, tmp_path / "run", "--teacher.cache", "fp32")
    assert (first, sum(asked)) == (20, 36), "only the shard that was missing"
    names = [path.name for path in (tmp_path / "run" / "teacher-cache" / "view-00").iterdir()]
    assert sorted(names) == ["00000", "00001"]


def test_a_view_is_of_the_picture_alone() -> None:
    numbers, device = torch.tensor([5, 9, 2]), torch.device("cpu")
    together = ViewDraws(3, numbers, 1, device).rand((3, 4))
    alone = ViewDraws(3, numbers[1:2], 1, device).rand((1, 4))
    assert torch.equal(together[1:2], alone)
    assert not torch.equal(ViewDraws(3, numbers, 0, device).rand((3, 4)), together)
    assert not torch.equal(ViewDraws(4, numbers, 1, device).rand((3, 4)), together)
