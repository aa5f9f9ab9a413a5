"""Comparisons of docs/results.md: every run that is trained for them is a recipe, and verdicts say what rows say."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

EXPERIMENTS = Path(__file__).resolve().parents[2] / "experiments"


def script(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"experiments_{name}", EXPERIMENTS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setattr(sys, "path", list(sys.path))
    spec.loader.exec_module(module)
    return module


def test_every_run_of_the_comparisons_is_a_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("lightning_fabric", "jsonargparse", "torchdata", "PIL"):
        pytest.importorskip(name)
    from debiaskd.recipe import read

    evidence = script("evidence", monkeypatch)
    (tmp_path / "cifar10_resnet56-1.th").touch()
    runs: list[tuple[Any, ...]] = []
    for experiment in (evidence.Shortcut, evidence.Cifar):
        made = object.__new__(experiment)  # without its data
        made.out, made.folder, made.weights = tmp_path, tmp_path / "data", tmp_path
        runs.extend(made.runs(0))
    said = [tuple(row.items()) for row, *_ in runs]
    assert len(set(said)) == len(said) and len({(run, stage) for _, run, stage, _ in runs}) == len(runs)
    for _, run, _, document in runs:
        path = run.with_suffix(".yaml")
        path.write_text(yaml.safe_dump({**document, "data": {**document["data"], "path": "x"}}))
        read(path)


def test_every_table_and_claim_is_of_something_that_is_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lightning_fabric")
    comparisons, evidence = script("comparisons", monkeypatch), script("evidence", monkeypatch)
    trained = {("teacher", teacher) for teacher in evidence.TEACHERS}
    trained |= {(name, teacher) for name, (_, teachers) in evidence.METHODS.items() for teacher in teachers}
    shown = {who for rows in comparisons.TABLES.values() for who, _ in rows}
    claimed = {who for _, better, other, _ in comparisons.CLAIMS for who in (better, other)}
    assert shown == trained and claimed <= trained
    assert {who[0] for _, *both, _ in comparisons.CIFAR_CLAIMS for who in both} <= set(evidence.CIFAR_METHODS)


@pytest.mark.parametrize(
    ("ours", "said"),
    [
        ((0.75, 0.5), "| +50.0, +12.5 | yes, in every seed |"),
        ((0.875, 0.25), "| +62.5, -12.5 | on average, not in every seed |"),
        ((0.25, 0.25), "| +0.0, -12.5 | no |"),
    ],
)
def test_verdicts(monkeypatch: pytest.MonkeyPatch, ours: tuple[float, float], said: str) -> None:
    comparisons = script("comparisons", monkeypatch)
    theirs = (0.25, 0.375)
    rows = [
        {"method": method, "teacher": "dfr", "seed": seed, "accuracy": value}
        for method, values in (("a", ours), ("b", theirs))
        for seed, value in enumerate(values)
    ]
    claim = ("accuracy", ("a", "dfr"), ("b", "dfr"), "a is better")
    assert comparisons.verdicts(rows, [claim]).split("\n")[-1] == (
        f"| a is better | average accuracy %: a (dfr) − b (dfr) {said}"
    )


def test_verdicts_rest_on_images_where_these_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("safetensors")
    from debiaskd.evaluation.trust import to_hex

    comparisons = script("comparisons", monkeypatch)
    groups = [0] * 200 + [1] * 200

    def row(method: str, seed: int, right: int) -> dict[str, Any]:
        correct = torch.ones(400, dtype=torch.bool)
        correct[200 + right :] = False
        return {"method": method, "seed": seed, "worst_group_accuracy": right / 200, "correct": to_hex(correct)}

    claims = [(comparisons.WORST, ("a", None), ("b", None), "a is better")]
    sure = [row("a", 0, 150), row("b", 0, 100), row("a", 1, 160), row("b", 1, 90)]
    table = comparisons.verdicts(sure, claims, groups)
    assert "95 % interval" in table and table.endswith("| yes |")
    close = [row("a", 0, 101), row("b", 0, 100), row("a", 1, 101), row("b", 1, 102)]
    assert comparisons.verdicts(close, claims, groups).endswith("| not told apart |")
    assert comparisons.verdicts(sure[::-1], [(claims[0][0], ("b", None), ("a", None), "b")], groups).endswith(
        "| no, the other way round |"
    )
    assert comparisons.verdicts(sure, claims).endswith("| yes, in every seed |"), "without groups the seeds decide"
