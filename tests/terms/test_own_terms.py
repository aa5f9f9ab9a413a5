"""Terms of the user's own: named in recipes by their class, their options typed by a dataclass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lightning_fabric")
pytest.importorskip("jsonargparse")
pytest.importorskip("torchdata")
pytest.importorskip("safetensors")

import debiaskd as dk
from debiaskd.recipe import RecipeError, read, to_dict

pytestmark = pytest.mark.usefixtures("one_thread")

TERMS = '''
from dataclasses import dataclass
import torch
import debiaskd as dk

@dataclass
class MarginOptions(dk.TermOptions):
    """Options.

    Args:
        margin: see there.
    """
    margin: float = 1.0

class Margin(dk.Term):
    needs = frozenset({"student.pooled", "teacher.logits"})
    def __init__(self, options: MarginOptions, setting: dk.Setting):
        super().__init__(options)
        self.margin = options.margin
        self.scale = torch.nn.Parameter(torch.ones(setting.student_width))
    def forward(self, state):
        return (self.margin - (state.student.pooled * self.scale).mean(1)).relu().mean() + state.teacher.logits.mean()

class Plain(dk.Term):
    def forward(self, state):
        return state.mean(state.student.logits.square().mean(1), weighted=True)

class Rows(dk.Term):
    def forward(self, state):
        return state.student.logits.mean(1)

class Failing(dk.Term):
    def forward(self, state):
        raise KeyError("no such thing")

class Grouped(Plain):
    needs = frozenset({"groups"})

class Boxed(Plain):
    needs = frozenset({"boxes"})

class Needy(Plain):
    needs = frozenset({"student.features"})

class Deployed(Plain):
    def deployed(self, student):
        return student

class Odd(dk.Term):
    def __init__(self, options: dict):
        super().__init__(options)
    def forward(self, state):
        return 0

class Empty(dk.Term):
    pass

number = 3
'''


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = f"terms_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(TERMS)
    monkeypatch.syspath_prepend(str(tmp_path))
    return name


def recipe(terms: dict[str, Any], **more: Any) -> dict[str, Any]:
    base = {"data": {"path": "x"}, "student": {"name": "small/4"}, "compute": {"accelerator": "cpu"}}
    return {**base, "schedule": {"epochs": 1, "batch": 8}, "terms": terms, **more}


def sets() -> list[Any]:
    return [[(torch.rand(3, 16, 16), i % 2) for i in range(count)] for count in (16, 8)]


def test_options_are_typed_and_come_back(module: str) -> None:
    document = recipe({"supervised": {}, "mine": {"of": f"{module}:Plain", "start": 0, "weight": 2}})
    found = read(document, ["--terms.mine.ramp", "3"])
    assert list(found.terms.given()) == ["supervised", "mine"] and found.terms.kind("mine").__name__ == "Plain"
    assert to_dict(found)["terms"]["mine"] == {"of": f"{module}:Plain", "weight": 2.0, "start": 0, "ramp": 3}
    assert read(to_dict(found)) == found and read(found, {"terms": {"mine": {"weight": 1}}}) != found


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        ({"mine": {"of": "MODULE:Nobody"}}, "terms.mine.of: MODULE:Nobody: "),
        ({"mine": {"of": "nobody:Nobody"}}, "terms.mine.of: nobody:Nobody: there is no module nobody"),
        ({"mine": {"of": "MODULE:number"}}, "must be a subclass of debiaskd.Term, got int"),
        ({"mine": {"of": "MODULE:MarginOptions"}}, "must be a subclass of debiaskd.Term, got MarginOptions"),
        ({"mine": {"of": "MODULE:Empty"}}, "must have a forward(state)"),
        ({"mine": {"of": "MODULE:Deployed"}}, "deployed changes the student"),
        ({"mine": {"of": "MODULE:Needy"}}, "needs must be a set of boxes, groups, student.feature, "),
        ({"mine": {"of": "MODULE:Odd"}}, "options must be annotated with a dataclass that extends TermOptions"),
        ({"mine": {"of": 3}}, "terms.mine.of: must be package.module:Class, got 3"),
        (
            {"mine": {"of": "MODULE:Plain", "wieght": 2}},
            "terms.mine.wieght: no such option of MODULE:Plain; did you mean weight?",
        ),
        ({"mine": {"of": "MODULE:Plain", "weight": "heavy"}}, "terms.mine: "),
        ({"mine": {"of": "MODULE:Plain", "weight": -1}}, "terms.mine.weight: must be a number > 0, got -1.0"),
        ({"mine": {"of": "MODULE:Plain", "start": 4}}, "terms.mine.start: never comes, there are 1 epochs; got 4"),
        ({"mine": {"of": "MODULE:Margin"}}, "teacher: is needed by terms.mine"),
        ({"mine": {"weight": 2}}, "terms.mine: no such key; a term of your own needs `of`, its class"),
        ({"mtach": {"weight": 2}}, "terms.mtach: no such key; did you mean terms.match?"),
        ({"group_dro": {"of": "MODULE:Plain"}}, "terms.group_dro: choose another name for a term of your own"),
    ],
)
def test_what_is_no_term_is_said_in_one_line(module: str, terms: dict[str, Any], message: str) -> None:
    made = {
        name: {k: v.replace("MODULE", module) if k == "of" and isinstance(v, str) else v for k, v in section.items()}
        for name, section in terms.items()
    }
    with pytest.raises(RecipeError) as caught:
        read(recipe({"supervised": {}, **made}))
    assert message.replace("MODULE", module) in str(caught.value) and "\n" not in str(caught.value)


def test_a_run_with_terms_of_ones_own(module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    terms = {"margin": {"of": f"{module}:Margin", "margin": 3}, "plain": {"of": f"{module}:Plain", "weight": 0.5}}
    teacher = {"name": "small/6", "method": "erm", "schedule": {"epochs": 1, "batch": 8}}
    run = dk.train(recipe(terms, teacher=teacher), data=sets(), out=tmp_path / "run", progress=False)
    header = (run.folder / "student" / "log.csv").read_text().splitlines()[0]
    assert "margin" in header and "plain" in header
    monkeypatch.delitem(__import__("sys").modules, module)
    (tmp_path / f"{module}.py").unlink()
    loaded = dk.load(run.folder)  # what was trained needs no term any more
    assert loaded.evaluate("val")["accuracy"] == pytest.approx(run.metrics["accuracy"])
    assert to_dict(loaded.recipe)["terms"]["margin"] == {
        "of": f"{module}:Margin",
        "weight": 1.0,
        "start": 0,
        "ramp": 0,
        "margin": 3.0,
    }
    with pytest.raises(RecipeError, match=f"terms.margin.of: {module}:Margin: there is no module {module}"):
        dk.train(run.folder / "recipe.yaml", out=run.folder, progress=False)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "Rows",
            r"terms.mine: a training step fails \(TypeError: .*forward must give a scalar tensor, got shape \[8\]\)",
        ),
        ("Failing", "terms.mine: a training step fails .KeyError: 'no such thing'"),
        ("Grouped", "terms.mine: needs groups, and the prepared data has none"),
        ("Boxed", "terms.mine: needs boxes, and the training images have none"),
    ],
)
def test_what_fails_is_told_before_training(module: str, tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        dk.train(recipe({"mine": {"of": f"{module}:{name}"}}), data=sets(), out=tmp_path / "run", progress=False)
