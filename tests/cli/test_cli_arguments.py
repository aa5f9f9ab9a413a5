"""Options stand before or after what they belong to; `train --help` has every key."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from debiaskd.cli import entry as cli
from debiaskd.cli.arguments import UsageError, parse


def parsed(*arguments: str) -> dict[str, Any]:
    return {
        key: str(value) if "Path" in type(value).__name__ else value for key, value in vars(_parse(arguments)).items()
    }


def _parse(arguments: Any) -> Any:
    return parse(cli._parser(), list(arguments))


def everywhere(*parts: list[str]) -> list[list[str]]:
    return [list(itertools.chain(*order)) for order in itertools.permutations(parts)]


@pytest.mark.parametrize(
    "arguments",
    everywhere(["train"], ["r.yaml"], ["--out", "x"], ["--schedule.epochs", "5"], ["--seed=-1"]),
    ids=" ".join,
)
def test_train(arguments: list[str]) -> None:
    if arguments.index("r.yaml") < arguments.index("train"):
        with pytest.raises(UsageError, match=r"invalid choice: 'r\.yaml'"):
            _parse(arguments)
        return
    found = parsed(*arguments)
    assert (found["command"], found["recipe"], found["out"], found["print"]) == ("train", "r.yaml", "x", False)
    assert found["overrides"] in everywhere(["--schedule.epochs", "5"], ["--seed=-1"])


@pytest.mark.parametrize(
    "arguments",
    everywhere(["prepare"], ["coco"], ["src"], ["--size", "32"], ["--split", "a", "--split=b"]),
    ids=" ".join,
)
def test_prepare(arguments: list[str]) -> None:
    if not arguments.index("prepare") < arguments.index("coco") < arguments.index("src"):
        with pytest.raises(UsageError):
            _parse([*arguments, "out"])
        return
    found = parsed(*arguments, "out")
    assert (found["source"], found["src"], found["out"]) == ("coco", "src", "out")
    assert (found["size"], found["split"]) == (32, ["a", "b"])


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("explain run a.png --target gull b.png", {"run": "run", "images": ["a.png", "b.png"], "target": "gull"}),
        ("explain --target gull run a.png b.png", {"run": "run", "images": ["a.png", "b.png"], "target": "gull"}),
        ("explain --out -x run -- -a.png", {"run": "run", "images": ["-a.png"], "out": "-x"}),
        ("evaluate --probe d --probe-splits a b run", {"run": "run", "probe": "d", "probe_splits": ["a", "b"]}),
        ("--split val evaluate run", {"run": "run", "split": "val"}),
        ("quickstart --seeds 2 --out x", {"out": "x", "seeds": 2}),
        ("--seeds=2 quickstart", {"seeds": 2}),
        ("bench kd --device cpu", {"rest": ["kd", "--device", "cpu"]}),
        ("train --print r --terms.guide null", {"print": True, "recipe": "r", "overrides": ["--terms.guide", "null"]}),
        ("train --seed -1 r", {"recipe": "r", "overrides": ["--seed", "-1"]}),
    ],
)
def test_the_other_commands(arguments: str, expected: dict[str, Any]) -> None:
    found = parsed(*arguments.split())
    assert {key: found[key] for key in expected} == expected


def test_runs_of_a_report_on_both_sides_of_an_option() -> None:
    found = _parse(["report", "a", "--out", "x.html", "b"])
    assert [str(run) for run in found.runs] == ["a", "b"] and str(found.out) == "x.html"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            "evaluate run --splt val",
            "unrecognized arguments: --splt; did you mean --split? (see debiaskd evaluate --help)",
        ),
        ("evaluate run --spli val", "unrecognized arguments: --spli; did you mean --split?"),
        ("evaluate run val", "unrecognized arguments: val"),
        ("evaluate run --split", "argument --split: expected one argument"),
        ("evaluate --split --stage x run", "argument --split: expected one argument"),
        ("train --out", "argument --out: expected one argument"),
        ("train --schedule.epochs 5", "the following arguments are required: RECIPE"),
        ("train a b", "unrecognized arguments: b"),
        ("train -x a", "unrecognized arguments: -x"),
        ("", "the following arguments are required: COMMAND"),
        ("--sede 3 quickstart", "unrecognized arguments: --sede; did you mean --seeds?"),
        ("prepare --size 3", "the following arguments are required"),
    ],
)
def test_mistakes(arguments: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        _parse(arguments.split())
    assert message in str(caught.value)


# -- every key ---------------------------------------------------------------------------------------------------------


def test_help_has_every_key_with_its_meaning_in_80_columns(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from debiaskd.recipe.keys import keys

    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as stopped:
        cli.main(["train", "--help"])
    out = capsys.readouterr().out
    words = " ".join(out.split())
    assert stopped.value.code == 0 and max(map(len, out.splitlines())) <= 80
    for key in keys():
        assert key.meaning, f"{key.name}: its dataclass says nothing of it"
        assert " ".join(key.meaning.split()) in words
        assert key.section is not None or f"--{key.name} " in words
    assert "--schedule.learning_rate float (0.0001)" in words and "--data.path str (required)" in words
    assert "--terms.backdoor.start (20)" in words and "--schedule.clip float (left out)" in words


def test_the_page_has_every_key() -> None:
    from debiaskd.recipe.keys import keys
    from debiaskd.recipe.reference import as_markdown

    page = as_markdown()
    for key in keys():
        assert f"`{key.name}`" in page or f"## {key.name}" in page
