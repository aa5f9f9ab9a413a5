"""Recipes: what they may say, what is refused, and in which words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("jsonargparse")
pytest.importorskip("yaml")

import yaml

from debiaskd.recipe import RecipeError, check, names, read, to_dict
from debiaskd.recipe.key_checks import refuse_null
from debiaskd.recipe.keys import Key, keys, nullable
from debiaskd.recipe.overrides import nested

OURS = Path(__file__).parents[2] / "recipes"
RECIPES = {path.relative_to(OURS).with_suffix("").as_posix(): path for path in OURS.rglob("[!_]*.yaml")}
PLAIN: dict[str, Any] = {"data": {"path": "x"}, "student": {"name": "small/4"}, "terms": {"supervised": {}}}
TEACHER = {"teacher": {"name": "small/8", "weights": "t.safetensors"}}
KD = {**TEACHER, "terms": {"kd": {}}}
TRAINED = {"name": "small/8", "schedule": {}}
MATCH = {**TEACHER, "transplant": {}, "terms": {"match": {}}}


def written(folder: Path, document: Any) -> Path:
    file = folder / "r.yaml"
    file.write_text(document if isinstance(document, str) else yaml.safe_dump(document))
    return file


def taught(**teacher: Any) -> dict[str, Any]:
    return {"terms": {"kd": {}}, "teacher": {**TRAINED, **teacher}}


def terms(**options: Any) -> dict[str, Any]:
    return {"terms": {"supervised": {}, **options}}


# -- by name -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_ours_are_found_by_name_wherever_one_is(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert names() == sorted(RECIPES)
    assert read(name, ["--seed", "7"]) == read(RECIPES[name], ["--seed", "7"])


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


def refused(file: Path, overrides: Any, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        read(file, overrides)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "typing" not in str(caught.value) and "class '" not in str(caught.value)


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


# -- nothing where something should be --------------------------------------------------------------------------------

KEYS = keys()


def only(key: Key, value: str) -> str:
    """A file that says nothing but one key."""
    *above, last = key.name.split(".")
    return (
        "".join(f"{'  ' * depth}{name}:\n" for depth, name in enumerate(above)) + f"{'  ' * len(above)}{last}:{value}\n"
    )


@pytest.mark.parametrize("key", KEYS, ids=lambda key: key.name)
def test_a_key_without_a_value_is_refused_whatever_it_is(tmp_path: Path, key: Key) -> None:
    refused(written(tmp_path, only(key, "")), (), f"r.yaml: {key.name}: has no value; ")
    refused(written(tmp_path, only(key, "  # later")), (), f"r.yaml: {key.name}: has no value; ")


@pytest.mark.parametrize("key", KEYS, ids=lambda key: key.name)
def test_null_is_for_what_may_be_left_out(tmp_path: Path, key: Key) -> None:
    base = {**PLAIN, **taught()}
    if nullable(key.kind):
        refuse_null(nested(key.name, None), "")  # says nothing
    else:
        refused(written(tmp_path, only(key, " null")), (), f"r.yaml: {key.name}: must be ")
        refused(written(tmp_path, base), [f"--{key.name}", "null"], f"--{key.name}: must be ")
    refused(written(tmp_path, base), [f"--{key.name}="], f"--{key.name}: has no value after '='")


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


@pytest.mark.parametrize("file", RECIPES.values(), ids=RECIPES)
def test_the_recipes_can_be_followed(file: Path) -> None:
    recipe = read(file)
    assert check(recipe) is recipe


def test_there_are_recipes() -> None:
    assert {"voc2007_energy", "quickstart/dett"} <= set(RECIPES)


# -- what does not fit together ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": {"path": "x", "annotated_fraction": 0}}, "data.annotated_fraction: must be a share in (0, 1], got 0"),
        ({"data": {"path": "x", "annotated_fraction": 2}}, "data.annotated_fraction: must be a share in (0, 1], got 2"),
        ({"data": {"path": "x", "annotated_fraction": 0.5}}, "only terms.guide uses boxes, and there is none"),
        ({"data": {"path": "x", "dilate": 0.5}}, "only terms.guide uses boxes, and there is none"),
        ({"data": {"path": "x", "dilate": -1}}, "data.dilate: must be a number >= 0, got -1"),
        ({"data": {"path": "x", "size": 0}}, "data.size: must be >= 1, got 0"),
        ({"data": {"path": "x", "crop_scale": [1, 0.5]}}, "must be (smallest, largest) in (0, 1], got (1.0, 0.5)"),
        ({"data": {"path": "x", "crop_scale": [0.5, 2]}}, "must be (smallest, largest) in (0, 1], got (0.5, 2.0)"),
        ({"data": {"path": "x", "crop_scale": [0, 1]}}, "must be (smallest, largest) in (0, 1], got (0.0, 1.0)"),
        ({"compute": {"devices": 0}}, "compute.devices: must be >= 1, got 0"),
        ({"compute": {"nodes": 0}}, "compute.nodes: must be >= 1, got 0"),
        ({"compute": {"log_every": 0}}, "compute.log_every: must be >= 1, got 0"),
        ({"compute": {"checkpoint_every": 0}}, "compute.checkpoint_every: must be >= 1, got 0"),
        ({"compute": {"workers": -1}}, "compute.workers: must be a number >= 0, got -1"),
        ({"selection": {"every": 0}}, "selection.every: must be >= 1, got 0"),
        ({"terms": {}}, "terms: at least one is needed, of supervised, match, kd, sample, relation, backdoor, guide"),
        ({"terms": {"supervised": {"weight": 0}}}, "terms.supervised.weight: must be a number > 0, got 0"),
        ({"terms": {"supervised": {"weight": float("nan")}}}, "terms.supervised.weight: must be a number > 0, got nan"),
        (terms(guide={"start": -1}), "terms.guide.start: must be a number >= 0, got -1"),
        (terms(guide={"ramp": -1}), "terms.guide.ramp: must be a number >= 0, got -1"),
        (terms(guide={"start": 50}), "terms.guide.start: never comes, there are 50 epochs; got 50"),
        ({"terms": {"supervised": {"start": 1}}}, "terms: none counts in epoch 0; one other than backdoor must have"),
        ({"terms": {"backdoor": {}}, **TEACHER}, "terms: none counts in epoch 0; one other than backdoor must have"),
        ({**TEACHER, **terms(backdoor={"start": 0})}, "terms.backdoor.start: must be >= 1, the epoch before it builds"),
        ({**TEACHER, **terms(backdoor={"mix": 1})}, "terms.backdoor.mix: must lie in [0, 1), got 1"),
        ({**TEACHER, **terms(backdoor={"temperature": 0})}, "terms.backdoor.temperature: must be a number > 0, got 0"),
        ({**TEACHER, **terms(kd={"temperature": -1})}, "terms.kd.temperature: must be a number > 0, got -1"),
        ({"terms": {"supervised": {"label_smoothing": 1}}}, "supervised.label_smoothing: must lie in [0, 1), got 1"),
        (
            {"terms": {"supervised": {"label_smoothing": -0.1}}},
            "supervised.label_smoothing: must lie in [0, 1), got -0.1",
        ),
        (terms(guide={"steps": 4}), "terms.guide.steps: only for integrated_gradients, got attribution left out"),
        (
            terms(guide={"attribution": "integrated_gradients", "steps": 0}),
            "terms.guide.steps: must be >= 1, got 0",
        ),
        (terms(kd={}), "teacher: is needed by terms.kd"),
        (terms(backdoor={"start": 1}), "teacher: is needed by terms.backdoor"),
        ({"transplant": {}}, "teacher: is needed by transplant"),
        (TEACHER, "teacher: nothing uses it; none of the terms match, kd, sample, relation, backdoor, explain, and no"),
        ({**TEACHER, "terms": {"match": {}}}, "terms.match: needs transplant, whose projector gives the maps"),
        (
            {"student": {"name": "bcos/resnet18", "input": {"mean": [0.5, 0.5, 0.5]}}},
            "student.input.mean: not for bcos/resnet18: B-cos networks read pixels in 0..1 with their inverses",
        ),
        ({"student": {"name": "small/4", "input": {"size": 0}}}, "student.input.size: must be >= 1, got 0"),
        (
            {"student": {"name": "small/4", "input": {"mean": [123.7, 116.3, 103.5]}}},
            "student.input.mean: must be three numbers in [0, 1], of red, green and blue pixels in 0..1, got [123.7",
        ),
        (
            {**KD, "teacher": {"name": "a", "weights": "x", "input": {"std": [0.5]}}},
            "teacher.input.std: must be three numbers in [0, 1], of red, green and blue pixels in 0..1, got [0.5]",
        ),
        (
            {"student": {"name": "small/4", "input": {"std": [0.5, 0.0, 0.5]}}},
            "student.input.std: must be three numbers > 0, got [0.5, 0.0, 0.5]",
        ),
        (
            {"student": {"name": "small/4", "input": {"interpolation": "lanczos"}}},
            "student.input.interpolation: must be one of 'nearest', 'bilinear', 'bicubic'",
        ),
        ({"student": {"name": "small/4", "input": {"means": [0.5]}}}, "student.input.means: no such key"),
        (
            {"terms": {"kd": {}}, "teacher": {"name": "a", "weights": "x", "pretrained": True}},
            "teacher.pretrained, teacher.weights: only one of them can be begun from",
        ),
        ({"terms": {"kd": {}}, "teacher": {"name": "a"}}, "teacher: method checkpoint needs weights or pretrained"),
        (taught(weights="x"), "teacher.schedule: method checkpoint trains nothing"),
        (taught(method="erm", schedule=None), "teacher.schedule: is needed by method erm"),
        (taught(method="erm", up=2), "teacher.up: only for method jtt, got erm"),
        (taught(method="dfr", step_size=2), "teacher.step_size: only for method group_dro, got dfr"),
        (taught(method="erm", identification_epochs=2), "teacher.identification_epochs: only for method jtt, got erm"),
        (taught(method="jtt"), "teacher.up: is needed by method jtt"),
        (taught(method="jtt", up=0), "teacher.up: must be a number > 0, got 0"),
        (taught(method="jtt", up=2, identification_epochs=0), "teacher.identification_epochs: must be >= 1, got 0"),
        (taught(method="group_dro", step_size=0), "teacher.step_size: must be a number > 0, got 0"),
        (taught(method="erm", views=2), "teacher.views: must be >= 1, and is for teacher.cache alone; got 2"),
        (taught(method="erm", cache="fp32", views=0), "teacher.views: must be >= 1, and is for teacher.cache alone"),
        (taught(method="erm", schedule={"epochs": 0}), "teacher.schedule.epochs: must be >= 1, got 0"),
        ({"terms": {"supervised": {"weighted": True}}}, "terms.supervised.weighted: there are no weights"),
        ({**TEACHER, "terms": {"kd": {"weighted": True}}}, "terms.kd.weighted: there are no weights"),
        (
            {"weights": {}},
            "weights: no term uses them; of terms supervised, match, kd, sample, backdoor, explain can, with weighted:",
        ),
        ({**MATCH, "terms": {"match": {"weighted": False}}, "weights": {}}, "weights: no term uses them; of terms"),
        ({**MATCH, "weights": {"method": "groups", "up": 3}}, "weights.up: only for method errors, got groups"),
        ({**MATCH, "weights": {"method": "groups", "epochs": 3}}, "weights.epochs: only for method errors, got groups"),
        (
            {**MATCH, "weights": {"method": "groups", "convention": "copies"}},
            "weights.convention: only for method errors, got groups",
        ),
        ({**MATCH, "weights": {"up": 0}}, "weights.up: must be a number > 0, got 0"),
        (
            {**MATCH, "weights": {"up": 1.5, "convention": "copies"}},
            "weights.up: must be a whole number of copies, got 1.5",
        ),
        ({**MATCH, "weights": {"epochs": 0}}, "weights.epochs: must be >= 1, got 0"),
        (
            {"selection": {"rule": "pareto", "attributions": False}},
            "selection.attributions: rule pareto compares EPG and IoU, which are made of them; got False",
        ),
        (
            {**MATCH, "terms": {"match": {"weighted": False}}, "weights": {"draw": True}},
            "weights: no term uses them; of",
        ),
        (
            {"schedule": {"ema_warmup": False}},
            "schedule.ema_warmup: only for schedule.ema, which is left out; got False",
        ),
        ({"schedule": {"epochs": 0}}, "schedule.epochs: must be >= 1, got 0"),
        ({"schedule": {"batch": 0}}, "schedule.batch: must be >= 1, got 0"),
        ({"schedule": {"accumulate": 0}}, "schedule.accumulate: must be >= 1, got 0"),
        ({"schedule": {"batch": 9, "accumulate": 2}}, "schedule.batch: must be a multiple of accumulate=2, got 9"),
        ({"schedule": {"learning_rate": 0}}, "schedule.learning_rate: must be a number > 0, got 0"),
        ({"schedule": {"learning_rate": float("inf")}}, "schedule.learning_rate: must be a number > 0, got inf"),
        ({"schedule": {"weight_decay": -1}}, "schedule.weight_decay: must be a number >= 0, got -1"),
        ({"schedule": {"warmup": -1}}, "schedule.warmup: must be a number >= 0, got -1"),
        ({"schedule": {"clip": 0}}, "schedule.clip: must be a number > 0, got 0"),
        ({"schedule": {"ema": 1}}, "schedule.ema: must lie in (0, 1), got 1"),
        ({"schedule": {"ema": 0}}, "schedule.ema: must lie in (0, 1), got 0"),
        ({"schedule": {"shape": "steps"}}, "schedule.milestones: for shape steps and only for it, got None with steps"),
        ({"schedule": {"shape": "steps", "milestones": []}}, "schedule.milestones: must be epochs >= 1, got []"),
        ({"schedule": {"shape": "steps", "milestones": [0]}}, "schedule.milestones: must be epochs >= 1, got [0]"),
        ({"schedule": {"milestones": [1]}}, "schedule.milestones: for shape steps and only for it, got [1] with const"),
        ({"pretraining": {"batch": 0}}, "pretraining.batch: must be >= 1, got 0"),
        ({"student": {"name": "a", "pretrained": True, "weights": "x"}}, "student.pretrained, student.weights: only"),
        (
            {**terms(guide={}), "compute": {"compile": True}},
            "compute.compile: PyTorch cannot differentiate a compiled student twice, as terms.guide has to",
        ),
        ({**MATCH, "pretraining": {}}, "pretraining: a transplanted student has no classifier of its own"),
    ],
)
def test_what_does_not_fit_together(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    refused(written(tmp_path, {**PLAIN, **change}), (), message)


@pytest.mark.parametrize(
    "change",
    [
        {},
        KD,
        {**MATCH, "weights": {}},
        {**MATCH, "weights": {"method": "groups"}},
        {**TEACHER, "transplant": {}},
        {"terms": {"supervised": {"weighted": True}}, "weights": {"convention": "copies", "up": 3.0}},
        {**TEACHER, **terms(backdoor={"start": 1})},
        {"data": {"path": "x", "annotated_fraction": 0.5, "dilate": 0.1}, **terms(guide={})},
        {"schedule": {"shape": "steps", "milestones": [2]}, "pretraining": {}},
        taught(method="jtt", up=3, identification_epochs=2),
    ],
)
def test_what_does_fit_together(tmp_path: Path, change: dict[str, Any]) -> None:
    assert read(written(tmp_path, {**PLAIN, **change}))


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
        (PLAIN, {"seed": object()}, "holds a value that YAML cannot"),
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
