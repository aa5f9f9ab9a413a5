"""DEBIASKD_DEBUG=1: what is checked on the CPU at once is checked on a GPU by asserts that run there.

On CPU tensors the same assert op raises immediately, which is how the conditions are tested without a GPU.
"""

import os
import subprocess
import sys

import pytest
import torch

import debiaskd as dk
from debiaskd.utils import checks

FEATURE = torch.ones(2, 3)
MAPS = torch.ones(2, 3, 4, 4)


def boxes(coords, offsets):
    return dk.Boxes(torch.tensor(coords, dtype=torch.int32), torch.tensor(offsets))


WRONG = {
    "labels": (lambda: dk.class_relation_loss(FEATURE, FEATURE, torch.tensor([0, -1])), "labels must be >= 0"),
    "labels of classes": (
        lambda: dk.class_context(FEATURE, FEATURE, torch.tensor([0, 3]), 3),
        r"labels must be in \[0, 3\)",
    ),
    "weight": (lambda: dk.feature_match_loss(MAPS, MAPS, torch.tensor([1.0, float("nan")])), "weight must be finite"),
    "negative weight": (lambda: dk.feature_match_loss(MAPS, MAPS, torch.tensor([1.0, -1.0])), "weight must be finite"),
    "prior": (
        lambda: dk.backdoor_logits(
            FEATURE, FEATURE, torch.ones(3, 1), torch.ones(3, 4), mode="exact", prior=torch.zeros(3)
        ),
        "prior must be positive somewhere",
    ),
    "inverted box": (lambda: boxes([[3, 0, 1, 2]], [0, 1]), "coords must have x0 <= x1"),
    "offsets": (lambda: boxes([[0, 0, 1, 2]], [0, 2]), "offsets must rise from 0"),
}


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """CPU tensors are not looked at, and asserted about as those of a GPU."""
    monkeypatch.setattr(checks, "readable", lambda value: False)
    monkeypatch.setattr(checks, "_UNASSERTED", ())


@pytest.mark.parametrize("argument", WRONG)
def test_wrong_values_fail_an_assert_on_the_device(argument, as_on_a_gpu, monkeypatch):
    call, message = WRONG[argument]
    monkeypatch.setattr(checks, "DEBUG", True)
    with pytest.raises(RuntimeError, match=message):
        call()


def test_right_values_pass(as_on_a_gpu, monkeypatch):
    monkeypatch.setattr(checks, "DEBUG", True)
    dk.class_relation_loss(FEATURE, FEATURE, torch.tensor([0, 0]))
    dk.feature_match_loss(MAPS, MAPS, torch.tensor([1.0, 0.0]))
    boxes([[0, 0, 1, 2], [1, 1, 1, 1]], [0, 2, 2])


def test_nothing_is_asserted_without_debugging(as_on_a_gpu, monkeypatch):
    monkeypatch.setattr(torch, "_assert_async", lambda *_: pytest.fail("asserted"))
    checks.finite_nonnegative("weight", torch.tensor([-1.0]))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_wrong_label_on_a_gpu_ends_its_use():
    # In a process of its own: a device-side assert leaves no usable CUDA context behind.
    program = """
import torch, debiaskd as dk
x = torch.ones(2, 3, device="cuda")
dk.class_relation_loss(x, x, torch.tensor([0, -1], device="cuda"))
torch.cuda.synchronize()
"""
    environment = {**os.environ, "DEBIASKD_DEBUG": "1"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert done.returncode != 0
    assert "device-side assert" in done.stderr
