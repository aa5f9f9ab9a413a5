"""The sweep over networks: a few rows are rebuilt, and docs/models.md is what its file says."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).parents[2]
DOCUMENT: dict[str, Any] = json.loads((ROOT / "docs" / "models.json").read_text())
#: Kinds of heads and maps, each by its smallest network.
FEW = [
    ("timm", "timm resnet"),
    ("timm", "timm efficientnet"),
    ("timm", "timm convnext"),
    ("timm", "timm vision_transformer"),
    ("timm", "timm mobilenetv3"),
    ("torchvision", "torchvision squeezenet"),
    ("torchvision", "torchvision mobilenetv3"),
    ("transformers", "transformers dinov2"),
]


@pytest.fixture(scope="module")
def models() -> ModuleType:
    spec = importlib.util.spec_from_file_location("models_sweep", ROOT / "experiments" / "models.py")
    assert spec is not None and spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "experiments"))
        spec.loader.exec_module(made)
    return made


def test_the_page_is_the_files(models: ModuleType) -> None:
    assert (ROOT / "docs" / "models.md").read_text() == models.table(DOCUMENT)


def test_what_the_sweep_found() -> None:
    names = [row["name"] for row in DOCUMENT["rows"]]
    assert len(set(names)) == len(names)
    tried = [row for row in DOCUMENT["rows"] if not row.get("skipped")]
    assert [row["name"] for row in tried if not row["learns"] or not row["guided"]] == []
    assert sum(row["teaches"] for row in tried) >= 0.97 * len(tried)


@pytest.mark.parametrize("package, family", FEW)
def test_a_row_made_anew(models: ModuleType, package: str, family: str) -> None:
    pytest.importorskip(package)
    expected = {row["family"]: row for row in DOCUMENT["rows"]}[family]
    assert {"family": family, **models.look(expected["name"])} == expected
