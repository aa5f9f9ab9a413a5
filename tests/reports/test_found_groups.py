"""`debiaskd discover` and `dk.discover`: what they find, write and show, of data, of a run, and of a module."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lightning_fabric")
pytest.importorskip("jsonargparse")
pytest.importorskip("torchdata")
pytest.importorskip("safetensors")
pytest.importorskip("jinja2")

import training_runs as runs

import debiaskd as dk
from debiaskd.cli.entry import main
from debiaskd.reports import found_groups
from debiaskd.training.run import RunError

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.xdist_group("stages")]
FAST = ["--student.name", "plain/4", "--schedule.batch=12", "--discovery.epochs=2", "--compute.accelerator=cpu"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.birds(tmp_path_factory.mktemp("found"))


class Sure(torch.nn.Module):
    """Predicts class 1 for images whose first pixel is brighter than a threshold, of features that it keeps."""

    def __init__(self, threshold: float) -> None:
        super().__init__()
        self.body = torch.nn.Conv2d(3, 2, 1)
        self.fc = torch.nn.Linear(2, 2)
        with torch.no_grad():
            self.body.weight.zero_()
            self.body.weight[1] = 1.0
            self.body.bias.zero_()
            self.fc.weight.copy_(torch.tensor([[0.0, -1.0], [0.0, 1.0]]))
            self.fc.bias.copy_(torch.tensor([threshold, -threshold]))

    def forward_features(self, images: torch.Tensor) -> torch.Tensor:
        return self.body(images)

    def forward_head(self, feature: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        pooled = feature.mean((2, 3))
        return pooled if pre_logits else self.fc(pooled)

    def get_classifier(self) -> torch.nn.Linear:
        return self.fc

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(images))


def test_the_command_on_data_and_on_its_run(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(["discover", str(data), "--out", str(out), *FAST]) == 0
    printed = capsys.readouterr().out
    assert "found-0" in printed and str(out / "bias.csv") in printed
    rows = list(csv.DictReader((out / "bias.csv").read_text().splitlines()))
    assert len(rows) == 64 and {row["path"].partition("/")[0] for row in rows} == {"train", "val"}
    facts = json.loads((out / "groups.json").read_text())
    assert sum(facts["splits"]["train"]["sizes"].values()) == 48
    assert all(0 <= value <= 1 for value in facts["splits"]["train"]["accuracy"].values())
    page = (out / "groups.html").read_text()
    assert "found, not annotated" in page and 'src="http' not in page and "<link" not in page
    # What the stages of a recipe would have found, and what the run of it finds again.
    stage = list(csv.DictReader((out / "run" / "groups" / "bias.csv").read_text().splitlines()))
    assert [row["bias"] for row in stage] == [row["bias"] for row in rows]
    assert main(["discover", str(out / "run"), "--out", str(tmp_path / "again"), "--method", "clusters"]) == 0
    assert main(["discover", str(out / "run"), "--out", str(tmp_path / "same")]) == 0
    assert (tmp_path / "same" / "bias.csv").read_bytes() == (out / "bias.csv").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--stage", "student"], "--stage: only for a run"),
        (["--student.nam", "x"], "no such key"),
    ],
)
def test_usage_of_data(data: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    assert main(["discover", str(data), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_run_without_a_plain_model(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document: dict[str, Any] = {**runs.PLAIN, "terms": {"guide": {"weight": 0.1}, "supervised": {}}}
    runs.train(runs.write(tmp_path / "r.yaml", data, document), tmp_path / "run")
    with pytest.raises(RunError, match="has no model that was trained plainly"):
        dk.discover(tmp_path / "run")
    assert len(dk.discover(tmp_path / "run", stage="student", split="test")) == 16
    assert main(["discover", str(tmp_path / "run"), "--seed", "1"]) == 2
    assert "only for DATA" in capsys.readouterr().err


@pytest.mark.parametrize("method", ("environments", "clusters"))
def test_a_module(data: Path, tmp_path: Path, method: str) -> None:
    model = Sure(0.0)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = dk.discover(model, data, split="train", method=method, smallest=4)
    assert isinstance(found, dk.Groups) and len(found) == 48 == len(found.names)
    assert sum(found.sizes().values()) == 48 and set(found.accuracy()) == set(found.sizes())
    assert [found.group_names[g].partition(",")[0] for g in found.groups.tolist()] == [
        found.classes[label] for label in found.found.labels.tolist()
    ]
    if method == "environments":  # of two classes they are what is right and what is wrong
        assert set(found.accuracy().values()) <= {0.0, 1.0}
        assert found.score()["smallest_group"] > 0
    found.gallery(tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text().count("evidence for its class") >= (1 if len(found.sizes()) > 2 else 0)
    found.to_csv(tmp_path / "bias.csv")
    assert len((tmp_path / "bias.csv").read_text().splitlines()) == 49
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not model.fc._forward_pre_hooks, "the module is left without hooks"


def test_the_gallery_shows_surest_first(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[Any] = []
    monkeypatch.setattr(found_groups, "render", lambda template, **values: shown.append(values) or "page")
    found = dk.discover(Sure(0.0), data)
    found.gallery(tmp_path / "page.html")
    for section in shown[0]["sections"]:
        surest = next(images for title, images in section["rows"] if title == "surest")
        order = [image["confidence"] for image in surest]
        member = [row for row in range(48) if found.group_names[found.groups[row]] == section["name"]]
        assert order == sorted((float(found.found.confidence[row]) for row in member), reverse=True)[: len(order)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "magic"}, "method must be one of 'environments', 'clusters'"),
        ({"stage": "student"}, "stage must be left out for a module"),
        ({"data": None}, "data must be a prepared folder where a module is given"),
    ],
)
def test_bad_arguments(data: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dk.discover(Sure(0.0), **{"data": data, **options})
