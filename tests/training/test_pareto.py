"""The Pareto front against reference vectors and the definition, through resumes, and its image."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from debiaskd.training.pareto import ParetoFront

GOLDEN = Path(__file__).parents[1] / "golden"


def dominated(point, points):
    return any(all(a >= b for a, b in zip(p, point)) and p != point for p in points)


def epochs(front):
    return [candidate.epoch for candidate in front]


def test_front_reproduces_the_reference():
    given = np.load(GOLDEN / "metrics.npz")
    front = ParetoFront()
    for epoch, costs in enumerate(given["pareto_costs"].tolist()):
        front.add(costs, epoch)
    assert epochs(front) == given["pareto_front"].tolist()


@pytest.mark.parametrize("seed", range(20))
def test_front_is_what_no_other_beats_however_epochs_come(seed):
    generator = torch.Generator().manual_seed(seed)
    points = torch.randint(7, (40, 3), generator=generator).div(7).tolist()
    front, held = ParetoFront(bin=1 / 7), set()
    for epoch, point in enumerate(points):
        change = front.add(point, epoch)
        held -= {candidate.epoch for candidate in change.left}
        held |= {epoch} if change.entered else set()
        assert change.entered or not change.left
        assert held == set(epochs(front))
        best = {tuple(p) for p in points[: epoch + 1] if not dominated(p, points[: epoch + 1])}
        assert {candidate.values for candidate in front} == best
        assert len(front) == len(best)  # of equal ones the first alone


def test_differences_within_a_bin_do_not_count():
    front = ParetoFront(("F1", "EPG"))
    assert front.add((0.7, 0.5), 0).entered
    assert not front.add((0.7024, 0.5), 1).entered
    assert front.add((0.7026, 0.5), 2).left == (front.seen[0],)
    assert not front.add((0.71, 0.3), 3).left and 3 in front and 0 not in front and len(front) == 2


def test_values_by_name_and_as_tensors():
    front = ParetoFront()
    front.add({"IoU": torch.tensor(0.25), "loss": 3.0, "F1": np.float32(0.5), "EPG": 1}, 4, payload="epoch4.pt")
    (only,) = front
    assert only.values == (0.5, 1.0, 0.25) and only.epoch == 4 and only.payload == "epoch4.pt"


def test_resumed_front_goes_on_as_if_never_stopped(tmp_path):
    points = torch.rand(30, 3, generator=torch.Generator().manual_seed(0)).tolist()
    whole, first = ParetoFront(), ParetoFront()
    for epoch, point in enumerate(points):
        whole.add(point, epoch, payload=f"{epoch}.pt")
        if epoch < 15:
            first.add(point, epoch, payload=f"{epoch}.pt")
    torch.save(first.state_dict(), tmp_path / "front.pt")
    for state in (json.loads(json.dumps(first.state_dict())), torch.load(tmp_path / "front.pt", weights_only=True)):
        resumed = ParetoFront()
        resumed.load_state_dict(state)
        for epoch in range(15, 30):
            resumed.add(points[epoch], epoch, payload=f"{epoch}.pt")
        assert resumed.front == whole.front and resumed.seen == whole.seen


def test_a_state_is_not_changed_by_what_comes_later():
    front = ParetoFront(("a",))
    front.add([0.1], 0)
    state = front.state_dict()
    other = ParetoFront(("a",))
    other.load_state_dict(state)
    other.add([0.9], 1)
    front.add([0.8], 2)
    assert epochs(front) == [2] and epochs(other) == [1] and len(state["seen"]) == len(state["front"]) == 1


@pytest.mark.parametrize(("ending", "start"), [("png", b"\x89PNG"), ("svg", b"<?xml")])
def test_picture(tmp_path, ending, start):
    front = ParetoFront()
    for epoch, point in enumerate(torch.rand(12, 3, generator=torch.Generator().manual_seed(1)).tolist()):
        front.add(point, epoch)
    path = tmp_path / f"front.{ending}"
    front.plot(path)
    assert path.read_bytes().startswith(start) and path.stat().st_size > 5000
    ParetoFront().plot(tmp_path / f"empty.{ending}")


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ParetoFront(()), ValueError, r"names must be different strings, at least one, got \[\]"),
        (lambda: ParetoFront(("a", "a")), ValueError, "names must be different strings"),
        (lambda: ParetoFront("F1"), TypeError, "names must be a sequence, got str"),
        (lambda: ParetoFront(bin=0), ValueError, "bin must be a finite number > 0, got 0"),
        (lambda: ParetoFront().add([0.1, 0.2], 0), ValueError, r"values must be 3 \(F1, EPG, IoU\), got 2"),
        (lambda: ParetoFront().add({"F1": 0.1}, 0), ValueError, "values must have F1, EPG, IoU, got F1"),
        (lambda: ParetoFront().add([79.4, 0.2, 0.1], 0), ValueError, r"values\['F1'\] must be a fraction .* got 79.4"),
        (lambda: ParetoFront().add([0.1, math.nan, 0], 0), ValueError, r"values\['EPG'\] must be a finite number"),
        (lambda: ParetoFront().add([0.1, "0.2", 0], 0), TypeError, r"values\['EPG'\] must be a number, got str"),
        (lambda: ParetoFront().add([0.1, 0.2, 0], 0.5), TypeError, "epoch must be an integer, got 0.5"),
        (lambda: ParetoFront().load_state_dict({}), ValueError, "state must come from .* got one without 'names'"),
        (
            lambda: ParetoFront(bin=0.01).load_state_dict(ParetoFront().state_dict()),
            ValueError,
            "and bin 0.01, got .* and 0.005",
        ),
        (lambda: ParetoFront(("a",)).plot("x.png"), ValueError, r"plot needs at least two names, got \['a'\]"),
    ],
)
def test_bad_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_refused_values_leave_no_trace():
    front = ParetoFront()
    with pytest.raises(ValueError):
        front.add([0.1, 2.0, 0.1], 0)
    assert not front.seen and not len(front)
