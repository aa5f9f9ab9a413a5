"""`extends:` in recipes: what is merged, which recipes are found, and which are refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("jsonargparse")
pytest.importorskip("yaml")

import yaml

from debiaskd.recipe import RecipeError, names, read, to_dict

BASE: dict[str, Any] = {
    "data": {"path": "x", "flip": False},
    "student": {"name": "small/4"},
    "terms": {"supervised": {"label_smoothing": 0.1}},
    "schedule": {"epochs": 3, "shape": "steps", "milestones": [1, 2]},
    "pretraining": {"epochs": 2},
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path / "base.yaml", BASE)
    return tmp_path


def write(path: Path, document: Any) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(document if isinstance(document, str) else yaml.safe_dump(document))
    return path


def test_mappings_are_merged_and_other_values_replaced(folder: Path) -> None:
    child = {
        "extends": "base.yaml",
        "data": {"path": "y"},
        "terms": {"supervised": {"weight": 2.0}},
        "schedule": {"milestones": [2]},
        "pretraining": None,
    }
    found = read(write(folder / "child.yaml", child), ["--schedule.epochs", "5"])
    assert (found.data.path, found.data.flip) == ("y", False)
    assert found.terms.supervised is not None
    assert (found.terms.supervised.weight, found.terms.supervised.label_smoothing) == (2.0, 0.1)
    assert (found.schedule.milestones, found.schedule.epochs, found.pretraining) == ([2], 5, None)
    assert "extends" not in to_dict(found)


def test_a_path_is_relative_to_the_file_that_names_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(folder / "inner" / "middle.yaml", {"extends": "../base.yaml", "seed": 4})
    outer = write(folder / "outer.yaml", {"extends": "inner/middle.yaml", "data": {"size": 8}})
    monkeypatch.chdir(folder.parent)
    found = read(outer)
    assert (found.seed, found.data.size, found.data.path) == (4, 8, "x")


def test_a_recipe_of_ours_is_extended_by_name(tmp_path: Path) -> None:
    child = write(tmp_path / "child.yaml", {"extends": "waterbirds_dett", "weights": {"up": 20}})
    assert read(child) == read("waterbirds_dett", ["--weights.up", "20"])


def test_what_others_share_is_not_listed() -> None:
    assert not [name for name in names() if name.rpartition("/")[2].startswith("_")]
    with pytest.raises(RecipeError, match=r"^_cifar100_cid: .* required: student.name, teacher.name$"):
        read("_cifar100_cid")


def test_a_folder_does_not_hide_a_recipe_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "waterbirds_dett").mkdir()
    assert read("waterbirds_dett").transplant is not None


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (3, "child.yaml: extends: must be the name of a recipe, or a path that ends in .yaml, got 3"),
        (None, "child.yaml: extends: must be the name of a recipe, or a path that ends in .yaml, got null"),
        (" ", "child.yaml: extends: must be the name of a recipe, or a path that ends in .yaml, got ' '"),
        ("nosuch", "child.yaml: extends: nosuch: no such recipe; a path ends in .yaml, and recipes that come with"),
        ("nosuch.yaml", "nosuch.yaml: no such file"),
    ],
)
def test_what_cannot_be_extended_is_named(folder: Path, value: Any, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        read(write(folder / "child.yaml", {"extends": value}))
    assert message in str(caught.value)
    assert "child.yaml: extends" in str(caught.value)


def test_without_a_value(folder: Path) -> None:
    with pytest.raises(RecipeError, match=r"child.yaml: extends: must be the name of a recipe, .* got null"):
        read(write(folder / "child.yaml", "extends:\nseed: 1\n"))


def test_cycles_are_refused_with_their_members(folder: Path) -> None:
    write(folder / "a.yaml", {"extends": "b.yaml"})
    write(folder / "b.yaml", {"extends": "inner/c.yaml"})
    write(folder / "inner" / "c.yaml", {"extends": "../a.yaml"})
    with pytest.raises(RecipeError, match=r"^\S*a.yaml: extends: a cycle: \S*a.yaml -> \S*b.yaml -> \S*c.yaml -> \S*a"):
        read(folder / "a.yaml")
    with pytest.raises(RecipeError, match=r"self.yaml: extends: a cycle"):
        read(write(folder / "self.yaml", {"extends": "self.yaml"}))


def test_a_wrong_key_is_refused_in_the_name_of_its_file(folder: Path) -> None:
    write(folder / "base.yaml", {**BASE, "sed": 1})
    child = write(folder / "child.yaml", {"extends": "base.yaml"})
    with pytest.raises(RecipeError, match=r"base.yaml: sed: no such key; did you mean seed"):
        read(child)
    with pytest.raises(RecipeError, match=r"other.yaml: extend: no such key; did you mean extends"):
        read(write(folder / "other.yaml", {"extend": "base.yaml"}))


def test_it_is_for_files_alone(folder: Path) -> None:
    with pytest.raises(RecipeError, match="--extends: no such key"):
        read(folder / "base.yaml", ["--extends", "base.yaml"])
