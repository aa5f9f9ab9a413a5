"""`--over KEY=V1,V2`: how values are parsed, combined and named."""

from __future__ import annotations

import pytest

pytest.importorskip("jsonargparse")

from debiaskd.recipe import RecipeError
from debiaskd.recipe.sweep import Setting, parse_over, settings


def test_all_combinations_in_order() -> None:
    over = parse_over(["weights.up=1,5", "terms.kd.temperature=1,4.5,9"])
    found = [str(one) for one in settings(over)]
    assert found[0] == "weights.up=1, terms.kd.temperature=1" and found[1] == "weights.up=1, terms.kd.temperature=4.5"
    assert len(set(found)) == 6


def test_values_of_every_kind() -> None:
    over = parse_over(
        [
            "terms.guide=null,{weight: 0.1, loss: l1},{}",
            "student.name=resnet18,package.nets:Net",
            "data.flip=true,false",
            "schedule.milestones=[3, 5],[4]",
            "teacher.options={a: 'x,y'},{a: \"z\"}",
        ]
    )
    assert over == {
        "terms.guide": [None, {"weight": 0.1, "loss": "l1"}, {}],
        "student.name": ["resnet18", "package.nets:Net"],
        "data.flip": [True, False],
        "schedule.milestones": [[3, 5], [4]],
        "teacher.options": [{"a": "x,y"}, {"a": "z"}],
    }
    slugs = {one.slug for one in settings(over)}
    assert len(slugs) == 48 and all("/" not in slug and " " not in slug and len(slug) < 120 for slug in slugs)


def test_a_draw_is_always_the_same_and_without_repetition() -> None:
    over = parse_over(["weights.up=1,2,3,4,5", "schedule.epochs=1,2,3,4"])
    drawn = [one.slug for one in settings(over, draw=7)]
    assert drawn == [one.slug for one in settings(over, draw=7)] and len(set(drawn)) == 7
    whole = [one.slug for one in settings(over)]
    assert [whole.index(slug) for slug in drawn] == sorted(whole.index(slug) for slug in drawn)
    assert len(settings(over, draw=20)) == 20
    with pytest.raises(RecipeError, match="--random: must be <= 20, the number of combinations, got 21"):
        settings(over, draw=21)


def test_two_settings_never_share_a_folder() -> None:
    long = ["a" * 150 + "1", "a" * 150 + "2"]
    assert Setting({"student.name": long[0]}).slug != Setting({"student.name": long[1]}).slug
    assert Setting({"student.name": "a/b"}).slug != Setting({"student.name": "a_b"}).slug


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["weights.up"], "--over: must be KEY=V1,V2,…, got 'weights.up'"),
        (["weights.up="], "--over: must be KEY=V1,V2,…, got 'weights.up='"),
        (["weights.up=1,,2"], "--over: weights.up has an empty value, got '1,,2'"),
        (["weights.up=1", "weights.up=2"], "--over: weights.up is given twice"),
        (["weights.up=5,5"], "--over: weights.up has equal values, got 5,5"),
        (["weights.upp=1,2"], "--over: weights.upp: no such key; did you mean weights.up"),
        (["schedule.epochs=null,1"], "--over: schedule.epochs: must be of type int, got null"),
        (["seed=1,2"], "--over: seed cannot be swept: --seeds repeats each combination"),
        (["selection.rule=f1,last"], "--over: selection.rule cannot be swept: all combinations are compared by"),
        (["compute.precision=32,bf16"], "--over: compute.precision cannot be swept"),
        (["selection={rule: f1},{rule: last}"], "--over: selection cannot be swept"),
        (["terms.kd={},null", "terms.kd.temperature=1,4"], "--over: terms.kd holds terms.kd.temperature; sweep one"),
    ],
)
def test_what_cannot_be_swept(texts: list[str], expected: str) -> None:
    with pytest.raises(RecipeError) as raised:
        parse_over(texts)
    assert str(raised.value).startswith(expected)
