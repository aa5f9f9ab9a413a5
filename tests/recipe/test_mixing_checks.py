"""What cannot follow images that are mixed with others is refused by name, before anything is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("jsonargparse")
pytest.importorskip("yaml")

import yaml

from debiaskd.recipe import RecipeError, read
from debiaskd.recipe.mixing_checks import _BY_MISTAKES, _TERMS
from debiaskd.recipe.options import Terms
from debiaskd.terms import TERMS

PLAIN: dict[str, Any] = {"student": {"name": "small/4"}, "terms": {"supervised": {}}}
GIVEN = {"name": "small/8", "weights": "t.safetensors"}


def recipe(folder: Path, *, data: dict[str, Any], **sections: Any) -> Any:
    (folder / "r.yaml").write_text(yaml.safe_dump({**PLAIN, "data": {"path": "x", **data}, **sections}))
    return read(folder / "r.yaml")


def trained(method: str, **more: Any) -> dict[str, Any]:
    return {"terms": {"kd": {}}, "teacher": {"name": "small/8", "schedule": {}, "method": method, **more}}


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"terms": {"supervised": {}, "relation": {}}, "teacher": GIVEN}, "not with terms.relation, which compares images"),
    ({"terms": {"supervised": {}, "backdoor": {}}, "teacher": GIVEN}, "not with terms.backdoor, whose contexts"),
    ({"terms": {"supervised": {}, "guide": {}}}, "not with terms.guide, whose boxes lie in one of two mixed images"),
    ({"terms": {"supervised": {}, "explain": {}}, "teacher": GIVEN}, "not with terms.explain, whose maps"),
    ({"terms": {"kd": {}}, "teacher": {**GIVEN, "cache": "fp32"}}, "not with teacher.cache, whose outputs are of"),
    (trained("group_dro"), "not with teacher.method group_dro, whose losses are of one group an image"),
    (trained("jtt", up=2), "not with teacher.method jtt, which reads what a network gets wrong"),
    (trained("afr"), "not with teacher.method afr, which reads what a network gets wrong"),
    (trained("self"), "not with teacher.method self, which reads what a network gets wrong"),
    (trained("evals"), "not with teacher.method evals, which reads what a network gets wrong"),
    (
        {"terms": {"supervised": {"weighted": True}}, "weights": {"draw": True}},
        "not with weights.method errors, which reads what a network gets wrong",
    ),
    (
        {"terms": {"supervised": {"weighted": True}}, "weights": {"method": "groups"}},
        "not with weights, which are of one image each; weights.draw: true draws images by them",
    ),
    ({"discovery": {}}, "not with discovery, which reads what a network gets wrong"),
    ({"refit": {"method": "afr"}}, "not with refit.method afr, which reads what a network gets wrong"),
    ({"schedule": {"batch": 1}}, "mixes images of one pass, which needs two; schedule.batch=1 with accumulate=1 has"),
    (
        {**trained("erm"), "teacher": {**trained("erm")["teacher"], "schedule": {"batch": 8, "accumulate": 8}}},
        "mixes images of one pass, which needs two; teacher.schedule.batch=8 with accumulate=8 has fewer",
    ),
    ({"pretraining": {"batch": 1}}, "mixes images of one pass, which needs two; pretraining.batch=1"),
]


@pytest.mark.parametrize(("sections", "message"), REFUSED)
@pytest.mark.parametrize("key", ["mixup", "cutmix"])
def test_what_cannot_follow_is_refused(tmp_path: Path, key: str, sections: dict[str, Any], message: str) -> None:
    recipe(tmp_path, data={}, **sections)  # which is right without
    with pytest.raises(RecipeError) as caught:
        recipe(tmp_path, data={key: 0.5}, **sections)
    assert f"data.{key}: {message}" in str(caught.value)


def test_every_term_either_follows_or_is_refused_with_a_reason() -> None:
    names = {name for name in Terms.__dataclass_fields__ if name != "own"}
    assert {name for name in names if not TERMS[name].mixes} == set(_TERMS)
    tested = " ".join(message for _, message in REFUSED)
    assert all(f"terms.{name}" in tested for name in _TERMS)
    assert all(f"method {name}" in tested for name in _BY_MISTAKES)


@pytest.mark.parametrize(
    "sections",
    [
        {"terms": {"supervised": {"label_smoothing": 0.1}, "kd": {}, "sample": {}}, "teacher": GIVEN},
        {"terms": {"match": {}}, "transplant": {}, "teacher": GIVEN},
        trained("erm"),
        trained("balanced"),
        trained("dfr"),
        trained("class_balanced"),
        {"refit": {"method": "class_balanced"}, "pretraining": {}},
        {"terms": {"supervised": {"weighted": True}}, "weights": {"method": "groups", "draw": True}},
    ],
)
def test_what_follows(tmp_path: Path, sections: dict[str, Any]) -> None:
    found = recipe(tmp_path, data={"mixup": 0.2, "cutmix": 1.0}, **sections)
    assert (found.data.mixup, found.data.cutmix, found.data.mixing) == (0.2, 1.0, "data.mixup")


def test_a_term_of_the_users_own_says_whether_it_follows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mixing_terms.py").write_text(
        "import debiaskd as dk\n"
        "class One(dk.Term):\n"
        "    def forward(self, state):\n"
        "        return state.student.logits.mean()\n"
        "class Both(One):\n"
        "    mixes = True\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    recipe(tmp_path, data={"cutmix": 1.0}, terms={"mine": {"of": "mixing_terms:Both"}})
    with pytest.raises(RecipeError, match=r"data.cutmix: not with terms.mine, since mixing_terms:One does not say"):
        recipe(tmp_path, data={"cutmix": 1.0}, terms={"mine": {"of": "mixing_terms:One"}})


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"mixup": 0.0}, "data.mixup: must be a number > 0, got 0.0"),
        ({"cutmix": -1.0}, "data.cutmix: must be a number > 0, got -1.0"),
        ({"rand_augment": [2, 31]}, "data.rand_augment: must be [operations, magnitude] with operations >= 1 and"),
        ({"rand_augment": [0, 9]}, "magnitude in 0..30, got [0, 9]"),
        ({"rand_augment": [2]}, "data.rand_augment: must be a list [int, int], got [2]"),
    ],
)
def test_values_out_of_range(tmp_path: Path, data: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        recipe(tmp_path, data=data)
    assert message in str(caught.value)
