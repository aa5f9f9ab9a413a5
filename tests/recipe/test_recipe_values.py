"""Recipes: keys without a value, null, and what YAML takes silently."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest

pytest.importorskip("yaml")

import yaml
from recipe_documents import PLAIN, refused, taught, written

from debiaskd.recipe import read
from debiaskd.recipe.building import convert
from debiaskd.recipe.key_checks import refuse_null
from debiaskd.recipe.keys import Key, keys, nullable
from debiaskd.recipe.overrides import nested

# -- nothing where something should be --------------------------------------------------------------------------------

KEYS = keys()


def only(key: Key, value: str) -> str:
    """A file that says nothing but one key."""
    *above, last = key.name.split(".")
    return (
        "".join(f"{'  ' * depth}{name}:\n" for depth, name in enumerate(above)) + f"{'  ' * len(above)}{last}:{value}\n"
    )


def test_a_key_without_a_value_is_refused_whatever_it_is(tmp_path: Path) -> None:
    for key in KEYS:
        refused(written(tmp_path, only(key, "")), (), f"r.yaml: {key.name}: has no value; ")
    refused(written(tmp_path, only(KEYS[1], "  # later")), (), f"r.yaml: {KEYS[1].name}: has no value; ")


def test_null_is_for_what_may_be_left_out(tmp_path: Path) -> None:
    base = {**PLAIN, **taught()}
    for key in KEYS:
        if nullable(key.kind):
            refuse_null(nested(key.name, None), "")  # says nothing
        else:
            refused(written(tmp_path, only(key, " null")), (), f"r.yaml: {key.name}: must be ")
            refused(base, [f"--{key.name}", "null"], f"--{key.name}: must be ")
        refused(base, [f"--{key.name}="], f"--{key.name}: has no value after '='")


@pytest.mark.parametrize(
    ("document", "message"),
    [
        (
            "terms:\n  match:\n",
            "terms.match: has no value; write `match: {}` for its defaults, or `match: null` to leave",
        ),
        (
            "transplant:\n",
            "transplant: has no value; write `transplant: {}` for its defaults, or `transplant: null` to",
        ),
        ("teacher:\n", "teacher: has no value; write `teacher: {name: …}`, or `teacher: null` to leave it out"),
        ("schedule:\n", "schedule: has no value; must be a mapping of keys"),
        ("schedule: {epochs: }", "schedule.epochs: has no value; must be of type int"),
        ("schedule: {epochs}", "schedule.epochs: has no value; must be of type int"),
        ("schedule:\n  clip:\n", "schedule.clip: has no value; must be of type float, or null to leave it out"),
        (
            "selection: {rule: }",
            "must be one of 'worst_group', 'worst_environment', 'accuracy', 'f1', 'pareto', 'last', or null",
        ),
        ("schedule:\n  milestones:\n  -\n  - 3\n", "schedule.milestones: has no value; must be a list [int, ...]"),
        ("data: &a\nschedule: *a\n", "data: has no value"),
        ("data: {path: ''}", "data.path: must be of type str, got ''"),
        ("student: {weights: ' '}", "student.weights: must be of type str, got ' '"),
    ],
)
def test_what_a_key_without_a_value_should_have(tmp_path: Path, document: str, message: str) -> None:
    refused(written(tmp_path, document), (), message)


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ("seed: 1\ndata: {}\nseed: 2\n", "r.yaml: seed: is given twice, again in line 3"),
        ("terms:\n  kd: {}\n  kd: {}\n", "r.yaml: terms.kd: is given twice, again in line 3"),
        ("schedule: {epochs: 1, epochs: 1}", "r.yaml: schedule.epochs: is given twice, again in line 1"),
        ("schedule: {epochs: 010}", "r.yaml: schedule.epochs: 010 is a number in base 8 in YAML; write it in base 10"),
        ("schedule: {epochs: 1:30}", "r.yaml: schedule.epochs: 1:30 is a number in base 60 in YAML; write it in base"),
        (
            "data:\n\tpath: x\n",
            r"r.yaml: not YAML (line 2, column 1: while scanning for the next token, found character '\t'",
        ),
        ("seed: 1\n---\nseed: 2\n", "r.yaml: not YAML (line 2, column 1: expected a single document in the stream"),
        ("data: !!python/name:os.system {}", "r.yaml: not YAML (line 1, column 7: could not determine a constructor"),
    ],
)
def test_what_yaml_takes_in_silence(tmp_path: Path, document: str, message: str) -> None:
    refused(written(tmp_path, document), (), message)


def test_anchors_and_merged_keys_stay_as_yaml_has_them(tmp_path: Path) -> None:
    file = written(tmp_path, yaml.safe_dump(PLAIN) + "pretraining: &a {epochs: 3}\nschedule:\n  <<: *a\n  batch: 8\n")
    recipe = read(file)
    assert (recipe.schedule.epochs, recipe.schedule.batch) == (3, 8)
    alike = written(tmp_path, yaml.safe_dump(PLAIN) + "pretraining: &a {epochs: 3}\nschedule: *a\n")
    recipe = read(alike, ["--schedule.epochs", "5"])
    assert recipe.pretraining is not None and (recipe.pretraining.epochs, recipe.schedule.epochs) == (3, 5)
    refused(written(tmp_path, "data: &a {path: *a}"), (), "r.yaml: an anchor stands within what it names")


@pytest.mark.parametrize(
    ("kind", "value", "expected"),
    [
        (float, 1, 1.0),
        (float, "1e-2", 0.01),
        (float, "1e5", 1e5),
        (float, ".inf", float("inf")),
        (float, "nan", None),
        (float, True, None),
        (float, 10**400, None),
        (int, " 3", 3),
        (int, "010", None),
        (int, "1e5", None),
        (int, "[", None),
        (int, 1.0, None),
        (bool, "yes", True),
        (bool, 1, None),
        (str, "3", "3"),
        (str, 3, None),
        (Literal["a", "b"], "a", "a"),
        (Literal["a", "b"], "c", None),
        (Literal["1"], 1, None),
        (list[float], "[1, 2.5]", [1.0, 2.5]),
        (list[int], ["1"], [1]),
        (list[int], {"a": 1}, None),
        (list[int], [None], None),
        (tuple[float, float], (0.5, 1), (0.5, 1.0)),
        (tuple[float, float], [1], None),
        (dict[str, Any], "{a: 1}", {"a": 1}),
        (dict[str, Any], [1], None),
    ],
)
def test_values_are_converted_to_the_type_of_their_key_or_refused(kind: Any, value: Any, expected: Any) -> None:
    if expected is None:
        with pytest.raises((TypeError, ValueError, OverflowError)):
            convert(kind, value)
    else:
        for found in (convert(kind, value), convert(kind | None, value)):
            assert found == expected and type(found) is type(expected)
        assert convert(kind | None, "null") is convert(kind | None, None) is None
