"""Which epochs are kept: by each rule, of equals, without a figure, and after a resume."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("jsonargparse")
pytest.importorskip("safetensors")

from safetensors.torch import load_file

from debiaskd.training.selection import CheckpointSelector

NAN = float("nan")


def consider(
    selector: CheckpointSelector, rows: list[tuple[float, ...]], start: int = 0, end: int | None = None
) -> None:
    """Epochs whose model is their number."""
    model = torch.nn.Linear(1, 1)
    for epoch in range(start, len(rows) if end is None else end):
        torch.nn.init.constant_(model.bias, epoch)
        figures = dict(zip(selector.names, rows[epoch])) | {"other": float(epoch)}
        selector.update(epoch, figures, model, epoch + 1 == len(rows))


def kept(folder: Path) -> dict[str, float]:
    return {path.stem: float(load_file(path)["bias"]) for path in sorted((folder / "kept").iterdir())}


@pytest.mark.parametrize(
    ("rule", "values", "chosen"),
    [
        ("accuracy", [0.5, 0.7, 0.7, 0.6], 2),
        ("worst_group", [0.0, 0.0, 0.0, 0.0], 3),
        ("f1", [0.9, 0.1, 0.8999, 0.2], 0),
        ("last", [0.9, 0.1, 0.2, 0.3], 3),
    ],
)
def test_the_later_of_the_best(tmp_path: Path, rule: str, values: list[float], chosen: int) -> None:
    selector = CheckpointSelector(tmp_path, rule, None, {"stage": "student"})
    consider(selector, [(value,) for value in values])
    assert (selector.best, selector.selected) == (chosen, [chosen])
    selector.prune()
    assert kept(tmp_path) == {f"epoch-{chosen:04d}": chosen}
    assert selector.figures[str(chosen)]["other"] == chosen, "all figures, not those of the rule alone"


@pytest.mark.parametrize(
    ("rows", "front", "chosen"),
    [
        # The highest sum, not the highest of any one.
        ([(0.9, 0.1, 0.1), (0.5, 0.5, 0.5), (0.1, 0.9, 0.2)], [0, 1, 2], 1),
        # Of equal sums the later, wherever it stands in the front.
        ([(0.75, 0.25, 0.5), (0.25, 0.75, 0.5), (0.0, 0.0, 0.0)], [0, 1], 1),
        # Beaten, within a bin of it, and better.
        ([(0.5, 0.5, 0.5), (0.5, 0.4, 0.5), (0.501, 0.5, 0.5), (0.6, 0.5, 0.5)], [3], 3),
        # What could not be measured is worth nothing, and no reason to fail.
        ([(0.5, NAN, NAN), (0.4, 0.1, NAN), (0.6, NAN, NAN)], [1, 2], 2),
    ],
)
def test_a_front_and_the_highest_sum_of_it(
    tmp_path: Path, rows: list[tuple[float, ...]], front: list[int], chosen: int
) -> None:
    selector = CheckpointSelector(tmp_path, "pareto", None, {})
    consider(selector, rows)
    assert (selector.selected, selector.best) == (front, chosen)
    selector.prune()
    assert kept(tmp_path) == {f"epoch-{epoch:04d}": epoch for epoch in front}


@pytest.mark.parametrize("rule", ["accuracy", "pareto"])
def test_gone_on_with_it_keeps_what_it_would_have_kept(tmp_path: Path, rule: str) -> None:
    rows = torch.rand(8, 3, generator=torch.Generator().manual_seed(0)).tolist()
    for cut in range(1, 8):
        whole, first, second = (
            CheckpointSelector(tmp_path / str(cut) / name, rule, None, {}) for name in ("whole", "run", "run")
        )
        consider(whole, rows)
        consider(first, rows, end=cut)
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        consider(second, rows, start=cut)
        for selector in (whole, second):
            selector.prune()
        assert second.state_dict() == whole.state_dict()
        assert kept(tmp_path / str(cut) / "run") == kept(tmp_path / str(cut) / "whole")


def test_one_process_writes(tmp_path: Path) -> None:
    selector = CheckpointSelector(tmp_path, "accuracy", None, {})
    selector.update(0, {"accuracy": 0.5}, torch.nn.Linear(1, 1), last=True, write=False)
    selector.prune(write=False)
    assert selector.best == 0 and not (tmp_path / "kept").exists()
