"""Recipes: their names, what they may say, from files, the command line and Python."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("yaml")

import yaml
from recipe_documents import KD, MATCH, PLAIN, refused, terms, written

from debiaskd.recipe import RecipeError, check, names, read, to_dict

OURS = Path(__file__).parents[2] / "recipes"
RECIPES = {path.relative_to(OURS).with_suffix("").as_posix(): path for path in OURS.rglob("[!_]*.yaml")}


# -- by name -----------------------------------------------------------------------------------------------------------


def test_ours_are_found_by_name_wherever_one_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert names() == sorted(RECIPES) and {"voc2007_energy", "quickstart/dett"} <= set(RECIPES)
    for name, file in RECIPES.items():
        recipe = read(name, ["--seed", "7"])
        assert recipe == read(file, ["--seed", "7"]) and check(recipe) is recipe


def test_a_file_of_ones_own_comes_before_a_name_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("waterbirds_dett").write_text(RECIPES["celeba_dett"].read_text().replace("path: ", "path: mine-"))
    assert read("waterbirds_dett").data.path.startswith("mine-")


def test_another_word_is_answered_with_our_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        RecipeError, match=r"^nosuch: no such file; recipes that come with debiaskd: celeba_dett, .*waterbirds_e2kd$"
    ):
        read("nosuch")
    for path in ("nosuch.yaml", "nosuch/waterbirds_dett"):
        with pytest.raises(FileNotFoundError):
            read(path)


# -- reading ----------------------------------------------------------------------------------------------------------

ALL = (
    "data, student, terms, schedule, teacher, transplant, discovery, weights, pretraining, refit, selection, compute, "
    "seed"
)


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ("a: [", "r.yaml: not YAML (line 1, column 5: while parsing a flow node, expected the node content"),
        ("\x00", "r.yaml: not YAML (unacceptable character"),
        ("- 1", "r.yaml: a recipe is a mapping of keys, got list"),
        ("", "r.yaml: a recipe is a mapping of keys, got nothing"),
        ({"sede": 1}, "r.yaml: sede: no such key; did you mean seed, schedule?"),
        ({"nothing-like-it": 1}, f"r.yaml: nothing-like-it: no such key; did you mean {ALL}?"),
        ({7: 1}, f"r.yaml: 7: no such key; did you mean {ALL}?"),
        ({"schedule": {"epoch": 1}}, "r.yaml: schedule.epoch: no such key; did you mean schedule.epochs?"),
        (terms(guide={"lost": "l1"}), "r.yaml: terms.guide.lost: no such key; did you mean terms.guide.loss"),
        (terms(guidance={}), "r.yaml: terms.guidance: no such key; did you mean terms.guide?"),
        ({"student": {"nam": "a"}}, "r.yaml: student.nam: no such key; did you mean student.name?"),
        ({"teacher": {"name": "a", "shedule": {}}}, "teacher.shedule: no such key; did you mean teacher.schedule?"),
        ({"data": {}}, "r.yaml: the following arguments are required: data.path"),
        ({"student": None}, "r.yaml: student: must be a mapping of keys, got null"),
        ({"terms": None}, "r.yaml: terms: must be a mapping of keys, got null"),
        ({"schedule": None}, "r.yaml: schedule: must be a mapping of keys, got null"),
        ({"schedule": []}, "r.yaml: schedule: must be a mapping of keys, got []"),
        ({"teacher": "resnet50"}, "r.yaml: teacher: must be a mapping of keys, got 'resnet50'"),
        ({"terms": {"supervised": True}}, "r.yaml: terms.supervised: must be a mapping of keys, got True"),
        ({"schedule": {"epochs": 1.5}}, "r.yaml: schedule.epochs: must be of type int, got 1.5"),
        ({"schedule": {"epochs": "many"}}, "r.yaml: schedule.epochs: must be of type int, got many"),
        ({"schedule": {"optimizer": "lion"}}, "schedule.optimizer: must be one of 'adam', 'adamw', 'sgd', got lion"),
        ({"schedule": {"milestones": ["a"]}}, "r.yaml: schedule.milestones: must be a list [int, ...], got ['a']"),
        ({"data": {"path": 3}}, "r.yaml: data.path: must be of type str, got 3"),
        ({"data": {"path": "x", "flip": "maybe"}}, "r.yaml: data.flip: must be of type bool, got maybe"),
        ({"data": {"path": "x", "crop_scale": [1]}}, "r.yaml: data.crop_scale: must be a list [float, float], got [1]"),
        (terms(guide={"loss": "l3"}), "terms.guide.loss: must be one of 'energy', 'l1', 'ppce', 'rrr', got l3"),
        ({"terms": {"supervised": {"weight": "x"}}}, "r.yaml: terms.supervised.weight: must be of type float, got x"),
        ({"compute": {"precision": 8}}, "r.yaml: compute.precision: must be one of '32', 'bf16', '16', got 8"),
    ],
)
def test_what_a_file_may_not_say(tmp_path: Path, document: Any, message: str) -> None:
    refused(written(tmp_path, document if isinstance(document, str) else {**PLAIN, **document}), (), message)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--schedul.epochs", "3"], "--schedul.epochs: no such key; did you mean schedule?"),
        (["--schedule.epoch=3"], "--schedule.epoch: no such key; did you mean schedule.epochs?"),
        (["--recipe", "other.yaml"], f"--recipe: no such key; did you mean {ALL}?"),
        (["--print_config"], f"--print_config: no such key; did you mean {ALL}?"),
        (["--terms.guide.weight.x", "1"], "--terms.guide.weight.x: no such key; did you mean terms.guide.weight?"),
        (["--seed"], "--seed: expected one argument"),
        (["--seed", "x"], "--seed: must be of type int, got x"),
        (["--seed", "1", "2"], "unrecognized arguments: 2"),
        (["-x"], "unrecognized arguments: -x"),
        (["--schedule.learning_rate", "nan"], "schedule.learning_rate: must be of type float, got nan"),
        (["--terms.supervised.weight", "[1]"], "terms.supervised.weight: must be of type float, got [1]"),
        (["--schedule.epochs="], "--schedule.epochs: has no value after '='"),
        (["--schedule.epochs", "{"], "--schedule.epochs: must be of type int, got '{' (not YAML (line 1, column 2: "),
        (["--schedule.epochs", "010"], "--schedule.epochs: must be of type int, got '010' ("),
        (["--schedule.milestones", "1,2"], "--schedule.milestones: must be a list [int, ...], got 1,2"),
        (["--schedule", "{epochs: null}"], "--schedule.epochs: must be of type int, got null"),
        (["--schedule", "{epochs: }"], "--schedule.epochs: has no value"),
        (
            ["--schedule", "{epochs: 1, epochs: 2}"],
            "--schedule: must be a mapping of keys, got '{epochs: 1, epochs: 2}' (",
        ),
        (["--terms.kd", "{temprature: 1}"], "--terms.kd.temprature: no such key; did you mean terms.kd.temperature?"),
        (["--terms.kd", "temperature"], "--terms.kd: must be a mapping of keys, got 'temperature'"),
        (
            ["--schedule.learning-rate", "1"],
            "--schedule.learning-rate: no such key; did you mean schedule.learning_rate?",
        ),
        (["--schedule.epochs.", "1"], "--schedule.epochs.: no such key; did you mean schedule.epochs?"),
        (["--seed", "-1"], "seed: must be >= 0 and < 2**63, got -1"),
        (["--data.seed", "9223372036854775808"], "data.seed: must be >= 0 and < 2**63, got 9223372036854775808"),
        (["--data.flip", "1"], "--data.flip: must be of type bool, got 1"),
        (
            ["--selection.rule", "best"],
            "selection.rule: must be one of 'worst_group', 'worst_environment', 'accuracy', 'f1', 'pareto'",
        ),
    ],
)
def test_what_may_not_be_typed(tmp_path: Path, overrides: list[str], message: str) -> None:
    refused(written(tmp_path, PLAIN), overrides, message)


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match=r"r\.yaml: not YAML \('utf-8' codec"):
        read(tmp_path / "r.yaml")
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "none.yaml")


def test_overrides_are_typed_like_the_file_and_come_after_it(tmp_path: Path) -> None:
    file = written(tmp_path, {**PLAIN, "schedule": {"epochs": 7, "batch": 8}})
    recipe = read(file, ["--schedule.epochs", "5", "--schedule.learning_rate=1e-2", "--data.crop_scale", "[0.5,1]"])
    assert (recipe.schedule.epochs, recipe.schedule.batch, recipe.schedule.learning_rate) == (5, 8, 0.01)
    assert recipe.data.crop_scale == (0.5, 1.0)
    guided = read(file, ["--terms.guide.loss=l1", "--terms.guide.weight", "0.5", "--data.flip", "false"])
    assert guided.terms.guide is not None and guided.data.flip is False
    assert (guided.terms.guide.loss, guided.terms.guide.weight, guided.terms.guide.layer) == ("l1", 0.5, "Final")
    begun = read(written(tmp_path, {**PLAIN, **KD}), ["--terms.kd", "{temperature: 2}"])
    assert begun.terms.kd is not None and begun.terms.kd.temperature == 2


# -- what is typed over it ---------------------------------------------------------------------------------------------


def test_a_typed_mapping_changes_the_keys_that_it_names(tmp_path: Path) -> None:
    file = written(tmp_path, {**PLAIN, **terms(guide={"loss": "l1"}), "pretraining": {"batch": 16}})
    recipe = read(file, ["--terms.guide", "{weight: 0.5}", "--pretraining", "{epochs: 3}", "--schedule={epochs: 4}"])
    assert recipe.terms.guide is not None and recipe.pretraining is not None
    assert (recipe.terms.guide.loss, recipe.terms.guide.weight) == ("l1", 0.5)
    assert (recipe.pretraining.epochs, recipe.pretraining.batch, recipe.schedule.epochs) == (3, 16, 4)


def test_texts_need_no_quotes(tmp_path: Path) -> None:
    file = written(tmp_path, PLAIN)
    assert read(file, ["--data.path", "2024-01-01", "--compute.precision", "16"]).data.path == "2024-01-01"
    assert read(file, ["--data.train=train[:80%]"]).data.train == "train[:80%]"
    assert read(file, ["--student.name", "small/4: #x"]).student.name == "small/4: #x"
    assert read(file, ["--student.weights", "null"]).student.weights is None


def test_null_removes_a_term(tmp_path: Path) -> None:
    file = written(tmp_path, {**PLAIN, **terms(guide={"loss": "l1"})})
    recipe = read(file, ["--terms.guide", "null"])
    assert recipe.terms.guide is None and recipe.terms.supervised is not None
    assert read(written(tmp_path, {**PLAIN, **terms(guide=None)})).terms.guide is None
    refused(file, ["--terms.guide", "null", "--terms.supervised", "null"], "terms: at least one is needed, of supervis")


def test_precision_may_be_a_number_in_yaml(tmp_path: Path) -> None:
    assert read(written(tmp_path, {**PLAIN, "compute": {"precision": 16}})).compute.precision == "16"


def test_a_recipe_is_written_and_read_again_as_it_was(tmp_path: Path) -> None:
    everything = {
        **PLAIN,
        **MATCH,
        "data": {
            "path": "x",
            "crop_scale": [0.25, 0.5],
            "size": 8,
            "color_jitter": [0.4, 0.4, 0.4, 0.1],
            "rand_augment": [2, 9],
        },
        "weights": {"convention": "copies", "up": 3},
        "schedule": {"shape": "steps", "milestones": [1, 2], "ema": 0.5, "clip": 1.0},
        "compute": {"precision": "bf16"},
    }
    first = read(written(tmp_path, everything), ["--terms.backdoor.start", "3"])
    again = read(written(tmp_path, to_dict(first)))
    assert again == first and to_dict(again) == to_dict(first)
    assert yaml.safe_load(yaml.safe_dump(to_dict(first))) == to_dict(first), "lists, and not tuples"
    assert again.data.crop_scale == (0.25, 0.5) and again.weights is not None and again.weights.up == 3


# -- from Python, and what is the user's own ---------------------------------------------------------------------------


def test_a_dict_and_a_recipe_are_read_as_a_file_is(tmp_path: Path) -> None:
    document = {**PLAIN, "data": {"path": tmp_path, "crop_scale": (0.5, 1)}}
    found = read(document, {"schedule": {"epochs": 3}, "terms.supervised.weight": 2})
    file = written(tmp_path, {**PLAIN, "data": {"path": str(tmp_path), "crop_scale": [0.5, 1]}})
    assert found == read(file, ["--schedule.epochs", "3", "--terms.supervised.weight", "2"])
    assert read(found, {"seed": 4}).seed == 4 and found.seed == 0 and document["data"]["crop_scale"] == (0.5, 1)


@pytest.mark.parametrize(
    ("document", "overrides", "message"),
    [
        ({**PLAIN, "studnet": {}}, {}, "recipe: studnet: no such key"),
        ({**PLAIN, "seed": None}, {}, "recipe: seed: must be of type int, got null"),
        (PLAIN, {"schedule.epoch": 3}, "schedule.epoch: no such key"),
        (PLAIN, {"schedule": {"epochs": "many"}}, "must be of type int, got many"),
        (PLAIN, {"seed": object()}, "seed: must be of type int, got <object object at"),
        (
            PLAIN,
            {"student": {"options": {"a": object()}}},
            "student.options: must be a mapping of names to values, got {",
        ),
    ],
)
def test_mistakes_from_python_are_named(document: Any, overrides: Any, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        read(document, overrides)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_home_and_environment_variables_in_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BIRDS", str(tmp_path / "birds"))
    monkeypatch.setenv("HOME", str(tmp_path))
    document = {**KD, "data": {"path": "${BIRDS}/224"}, "student": {"name": "small/4", "weights": "~/s.safetensors"}}
    found = read(document, {"teacher.weights": "$BIRDS/t.safetensors"})
    assert found.data.path == f"{tmp_path}/birds/224" and found.student.weights == f"{tmp_path}/s.safetensors"
    assert found.teacher is not None and found.teacher.weights == f"{tmp_path}/birds/t.safetensors"
    monkeypatch.delenv("BIRDS")
    with pytest.raises(RecipeError, match=r"data.path: \$\{BIRDS\} is not set, in \$\{BIRDS\}/224"):
        read(document)
    odd = tmp_path / "a$b"
    odd.mkdir()
    assert read({**PLAIN, "data": {"path": odd}}).data.path == str(odd)


def test_options_of_networks(tmp_path: Path) -> None:
    file = written(tmp_path, {**PLAIN, "student": {"name": "resnet18", "options": {"img_size": 96, "a": [1, 2]}}})
    found = read(file, ["--student.options.drop_path_rate", "0.1", "--student.options.global_pool", "avg"])
    expected = {"img_size": 96, "a": [1, 2], "drop_path_rate": 0.1, "global_pool": "avg"}
    assert found.student.options == expected and read(to_dict(found)) == found
    assert read(file, ["--student.options", "null"]).student.options is None
    assert read(file, ["--student.options", "{img_size: 64}"]).student.options == {"img_size": 64, "a": [1, 2]}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([1], "student.options: must be a mapping of names to values, got [1]"),
        ({"a b": 1}, "names must be those of keyword arguments, got 'a b'"),
        ({"num_classes": 3}, "student.options.num_classes: comes from the data; leave it out"),
        ({"pretrained": True}, "student.options.pretrained: is student.pretrained; leave it out"),
        ({"in_chans": 1}, "student.options.in_chans: is 3; leave it out"),
        ({"img_size": "big"}, "student.options.img_size: must be an integer >= 1, or two of them, got 'big'"),
    ],
)
def test_options_that_cannot_be(options: Any, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        read({**PLAIN, "student": {"name": "small/4", "options": options}})
    assert message in str(caught.value)
