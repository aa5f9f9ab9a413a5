"""What a command imports, in a fresh process: nothing before it is needed, nothing heavy before the first step."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import training_runs as runs

pytest.importorskip("lightning_fabric")
pytest.importorskip("jsonargparse")

#: What a run of a network of debiaskd's own, on images with groups and boxes, needs after its first step or never.
LATER = ("timm", "torchvision", "torchmetrics", "transformers", "scipy", "sklearn", "pandas", "matplotlib", "jinja2")
LATER += ("litdata", "lightning", "pytorch_lightning", "wandb", "mlflow", "onnx")
PROGRAM = f"""
import json, os, sys

def present(*names):
    return [name for name in names if name in sys.modules]

import debiaskd, debiaskd.cli.entry
imported = present("PIL", "rich", "lightning_fabric", "jsonargparse", *{LATER!r})
from debiaskd.training.loop import TrainingLoop
inner = TrainingLoop._step

def step(self, *arguments):
    inner(self, *arguments)
    sys.__stdout__.write(json.dumps([imported, present("lightning_fabric", *{LATER!r})]))
    sys.__stdout__.flush()
    os._exit(0)

TrainingLoop._step = step
sys.exit(debiaskd.cli.entry.main(["train", *sys.argv[1:]]))
"""


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    folder = tmp_path_factory.mktemp("first_step")
    document = {**runs.PLAIN, "student": {"name": "small/4,4/1"}}
    recipe = runs.write(folder / "recipe.yaml", runs.birds(folder), document)
    command = [sys.executable, "-c", PROGRAM, str(recipe), "--out", str(folder / "run")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_importing_needs_no_extra(seen):
    """What only a command needs is imported when the command runs."""
    assert seen[0] == []


def test_the_first_step_of_a_run_waits_for_no_package_that_it_does_not_use(seen):
    assert seen[1] == ["lightning_fabric"]
