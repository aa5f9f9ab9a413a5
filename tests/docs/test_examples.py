"""The examples teach a student something, and stay short enough to be read."""

from __future__ import annotations

import copy
import importlib
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from debiaskd.data import prepare
from debiaskd.data.sources import digits
from debiaskd.models import registry as networks

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.xdist_group("examples")]


@pytest.fixture(scope="module")
def teachers() -> dict[Any, Any]:
    """States of the teachers that were trained, by their layers and by how many images they saw."""
    return {}


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch, teachers: dict[Any, Any]) -> Any:
    """Imports an example as Python runs a script: its folder comes first. Examples share equal teachers."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    toy = importlib.import_module("toy")
    train = toy.debiased

    def debiased(model: torch.nn.Module, known: Any) -> torch.nn.Module:
        key = (str(model), len(known))
        if key not in teachers:
            teachers[key] = copy.deepcopy(train(model, known).state_dict())
        model.load_state_dict(teachers[key])
        return model.eval()

    monkeypatch.setattr(toy, "debiased", debiased)
    return importlib.import_module


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_examples_are_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) < 80


def test_plain_pytorch(example: Any, capsys: pytest.CaptureFixture[str]) -> None:
    found = example("plain_pytorch").main(["--pictures", "2000", "--epochs", "5"])
    assert found["after"] > found["before"] + 20
    assert f"after {found['after']:.1f}" in capsys.readouterr().out


def test_lightning_module(example: Any) -> None:
    pytest.importorskip("lightning", reason="lightning is not installed: pip install 'debiaskd[examples]'")
    before, after = example("lightning_module").main(["--pictures", "2000", "--epochs", "5"])
    assert after["accuracy"] > before["accuracy"] + 0.1
    assert after["energy in box"] > before["energy in box"] + 0.05


def test_timm_script(example: Any) -> None:
    before, after = example("timm_script").main(["--pictures", "1000", "--epochs", "5"])
    assert after > before + 0.15


def test_hf_trainer(example: Any) -> None:
    for package in ("transformers", "accelerate"):
        pytest.importorskip(package, reason=f"{package} is not installed: pip install 'debiaskd[examples]'")
    before, after = example("hf_trainer").main(["--pictures", "1500", "--epochs", "3"])
    assert after["eval_loss"] < 0.8 * before["eval_loss"]
    assert after["eval_accuracy"] > before["eval_accuracy"] + 0.1


def written(folder: Path, splits: dict[str, int]) -> Path:
    """Digits as files, SPLIT/CLASS/NUMBER.png, with their boxes."""
    image = pytest.importorskip("PIL.Image", reason="images are written with pillow")
    rows = ["path,x0,y0,x1,y1"]
    for split, count in splits.items():
        drawn = digits.load(0, train=count, validation=4, test=4, size=32).train
        for i, pixels in enumerate(drawn.images):
            path = f"{split}/{drawn.labels[i]}/{i}.png"
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            image.fromarray(pixels.permute(1, 2, 0).numpy()).save(folder / path)
            rows.append(",".join(map(str, [path, *drawn.boxes.coords[i].tolist()])))
    (folder / "boxes.csv").write_text("\n".join(rows) + "\n")
    return folder


def test_timm_script_on_a_folder_of_pictures(example: Any, tmp_path: Path) -> None:
    folder = written(tmp_path / "pictures", {"train": 64, "validation": 8})
    torch.save(timm.create_model("test_resnet", num_classes=2).state_dict(), tmp_path / "teacher.pt")
    arguments = ["--data", str(folder), str(tmp_path / "teacher.pt"), "--epochs", "1"]
    assert all(0 <= value <= 1 for value in example("timm_script").main(arguments))


def test_lightning_module_on_prepared_pictures(example: Any, tmp_path: Path) -> None:
    pytest.importorskip("lightning", reason="lightning is not installed: pip install 'debiaskd[examples]'")
    folder = written(tmp_path / "pictures", {"train": 64, "test": 8})
    prepare("folder", folder, tmp_path / "prepared", size=32)
    torch.save(networks.build("small/24,48,96", 2).state_dict(), tmp_path / "teacher.pt")
    arguments = ["--data", str(tmp_path / "prepared"), str(tmp_path / "teacher.pt"), "--epochs", "1"]
    before, after = example("lightning_module").main(arguments)
    assert 0 < before["energy in box"] < 1
    assert after != before
