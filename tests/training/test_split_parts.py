"""Parts of splits: which images they hold, and what is said where they share some."""

from __future__ import annotations

import dataclasses
import shutil
import warnings
from pathlib import Path

import pytest

pytest.importorskip("lightning_fabric")
pytest.importorskip("jsonargparse")

import training_runs as runs

from debiaskd.recipe import Data, Network, Recipe, RecipeError, Selection, Terms
from debiaskd.terms import SupervisedOptions
from debiaskd.training.split_parts import OverlapWarning, check_overlap, numbers, parse, shared


@pytest.fixture(scope="module")
def birds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.birds(tmp_path_factory.mktemp("parts"))  # 48, 16 and 16 images


def recipe(path: Path, rule: str | None = None, **splits: str) -> Recipe:
    terms = Terms(supervised=SupervisedOptions())
    return Recipe(Data(str(path), **splits), Network("plain/4"), terms, selection=Selection(rule))  # type: ignore[arg-type]


def test_parts_that_meet_are_disjoint_and_together_the_whole() -> None:
    found = [numbers(parse(f"train[{part}]", "k"), 10, 3, "k").tolist() for part in (":30%", "30%:55%", "55%:")]
    assert [len(part) for part in found] == [3, 3, 4] and found[0] == sorted(found[0])
    assert sorted(number for part in found for number in part) == list(range(10))
    assert numbers(parse("train", "k"), 10, 3, "k").tolist() == list(range(10))


@pytest.mark.parametrize("text", ["train[:1]", "train[", "", "train[50%]", "train[:50%][:50%]", "train[-5%:]"])
def test_what_is_no_part(text: str) -> None:
    with pytest.raises(RecipeError, match=r'^data\.train: must be a split such as "train" or "train\[:80%\]", got'):
        parse(text, "data.train")
    with pytest.raises(RecipeError, match=r"^k: \[60%:60%\] of 10 images holds none$"):
        numbers(parse("a[60%:60%]", "k"), 10, 0, "k")


@pytest.mark.parametrize(
    ("train", "validation", "count"),
    [
        ("train", "val", 0),
        ("train[:50%]", "train[50%:]", 0),
        ("train[:75%]", "train[50%:]", 12),
        ("train", "train", 48),
        ("train", "train[:25%]", 12),
        ("train[:75%]", "test", 0),
        ("train", "nosuch", 0),  # said when it is opened
    ],
)
def test_how_many_pictures_parts_share(birds: Path, train: str, validation: str, count: int) -> None:
    data = Data(str(birds), train=train, validation=validation)
    assert shared(data, "train", "validation") == shared(data, "validation", "train") == count
    assert shared(dataclasses.replace(data, seed=5), "train", "validation") == count


def test_no_epoch_is_chosen_by_pictures_that_were_trained_on(birds: Path) -> None:
    parts = {"train": "train[:75%]", "validation": "train[50%:]"}
    message = (
        r"^data\.validation: train\[50%:\] and data\.train: train\[:75%\] share 12 images, by which no epoch can be "
        r"chosen; take other parts, or selection\.rule: last$"
    )
    with pytest.raises(RecipeError, match=message):
        check_overlap(recipe(birds, **parts))
    with pytest.warns(OverlapWarning, match=r"share 12 images: figures on validation are partly of what was trained"):
        check_overlap(recipe(birds, "last", **parts))


def test_a_test_that_is_not_of_its_own_is_said(birds: Path) -> None:
    parts = {"train": "train[:50%]", "validation": "train[50%:]"}
    with pytest.warns(OverlapWarning) as told:
        check_overlap(recipe(birds, test="train[25%:75%]", **parts))
    assert [str(one.message).partition(": the test")[0] for one in told] == [
        "data.test: train[25%:75%] and data.train: train[:50%] share 12 images",
        "data.test: train[25%:75%] and data.validation: train[50%:] share 12 images",
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_overlap(recipe(birds, test="train[25%:75%]", **parts), warn=False)
        check_overlap(recipe(birds))


def test_a_split_that_is_a_copy_of_another(birds: Path, tmp_path: Path) -> None:
    """The same images under two names."""
    source, both = tmp_path / "source", tmp_path / "both"
    for split in ("train", "val"):
        for name in ("a", "b"):
            (source / split / name).mkdir(parents=True)
            for i, picture in enumerate(sorted(birds.parent.glob("birds/**/*.jpg"))[:4]):
                shutil.copy(picture, source / split / name / f"{i}.jpg")
    from debiaskd.data import prepare

    prepare("folder", source, both, size=16, workers=1)
    with pytest.raises(RecipeError, match=r"data\.validation: val and data\.train: train share 8 images"):
        check_overlap(recipe(both))
