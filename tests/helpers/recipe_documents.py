"""Small recipes, for tests of what they may say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from debiaskd.recipe import RecipeError, read

PLAIN: dict[str, Any] = {"data": {"path": "x"}, "student": {"name": "small/4"}, "terms": {"supervised": {}}}
TEACHER = {"teacher": {"name": "small/8", "weights": "t.safetensors"}}
KD = {**TEACHER, "terms": {"kd": {}}}
TRAINED = {"name": "small/8", "schedule": {}}
MATCH = {**TEACHER, "transplant": {}, "terms": {"match": {}}}


def written(folder: Path, document: Any) -> Path:
    file = folder / "r.yaml"
    file.write_text(document if isinstance(document, str) else yaml.safe_dump(document))
    return file


def taught(**teacher: Any) -> dict[str, Any]:
    return {"terms": {"kd": {}}, "teacher": {**TRAINED, **teacher}}


def terms(**options: Any) -> dict[str, Any]:
    return {"terms": {"supervised": {}, **options}}


def refused(file: Path, overrides: Any, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        read(file, overrides)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "typing" not in str(caught.value) and "class '" not in str(caught.value)
