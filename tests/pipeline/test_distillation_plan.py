"""What `debiaskd distill` plans, and what it says of the outcome, without training."""

from __future__ import annotations

from pathlib import Path

import pytest

from debiaskd.pipeline.distillation import Asked, Findings, no_gain, plan

FOUND = Findings(
    Path("data"), ("a", "b"), ("a on x", "a on y", "b on x", "b on y"), False, {"train": 80}, {"train": 0},
    (40, 40), (20, 20, 20, 20), 48, {"train": "train", "validation": "val", "test": "test"},
)  # fmt: skip


@pytest.mark.parametrize("pretrained", [False, True])
def test_pretrained_students_start_from_a_fitted_projector(pretrained: bool) -> None:
    made = plan(FOUND, Asked("resnet18", "resnet10t", pretrained=pretrained), Path("out"), 3)
    recipe = made.recipes["debiased"]
    assert recipe is not None
    expected = {"projector": "linear", "init": "least_squares"} if pretrained else {"projector": "depthwise"}
    assert recipe["transplant"] == expected
    assert any("least-squares" in line for line in made.why) is pretrained


@pytest.mark.parametrize(("before", "after", "warned"), [(0.2, 0.1, True), (0.2, 0.2, True), (0.2, 0.3, False)])
def test_a_student_that_gained_nothing_is_warned_of(before: float, after: float, warned: bool) -> None:
    said = no_gain({"worst_group_accuracy": before}, {"worst_group_accuracy": after})
    assert (said is not None) is warned
    assert said is None or f"{100 * after:.1f} and {100 * before:.1f} %" in said
    assert no_gain({"worst_group_accuracy": None}, {"worst_group_accuracy": after}) is None
