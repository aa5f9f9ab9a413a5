"""The term in the guide trains."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("lightning_fabric")
pytest.importorskip("jsonargparse")
pytest.importorskip("torchdata")
pytest.importorskip("safetensors")

import yaml

import debiaskd as dk

pytestmark = pytest.mark.usefixtures("one_thread")
GUIDE = Path(__file__).parents[2] / "docs" / "guides" / "own_term.md"


def test_the_guides_term_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = GUIDE.read_text(encoding="utf-8")
    (code,), (recipe,) = (re.findall(rf"```{kind}\n(.*?)```", text, re.DOTALL) for kind in ("python", "yaml"))
    assert len(code.splitlines()) <= 32
    (tmp_path / "my_terms.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    sets = [[(torch.rand(3, 16, 16), i % 2) for i in range(count)] for count in (16, 8)]
    brief = {"epochs": 1, "batch": 8}
    run = dk.train(
        {**yaml.safe_load(recipe), "schedule": brief, "compute": {"accelerator": "cpu"}},
        data=sets,
        student="small/4",
        out=tmp_path / "run",
        progress=False,
        teacher="small/6",
        **{"teacher.method": "erm", "teacher.schedule": brief},
    )
    assert run.recipe.terms.own["cosine"].options.weight == 0.5
    header, row = (run.folder / "student" / "log.csv").read_text().splitlines()[:2]
    assert 0 <= float(row.split(",")[header.split(",").index("cosine")]) <= 2
