"""The notebook in the guides runs, and its page shows what is stored in it."""

from __future__ import annotations

import importlib
import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("lightning_fabric")
pytest.importorskip("jsonargparse")
pytest.importorskip("torchdata")
pytest.importorskip("safetensors")
pytest.importorskip("jinja2")

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.xdist_group("notebook")]
DOCS = Path(__file__).resolve().parents[2] / "docs"


def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_notebook", DOCS / "notebook.py")
    assert spec is not None and spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def test_the_cells_run_and_show_what_is_stored(tmp_path: Path) -> None:
    stored = json.loads((DOCS / "guides" / "notebook.ipynb").read_text(encoding="utf-8"))
    executed = script().execute(stored, tmp_path)
    for cell, before in zip(executed["cells"], stored["cells"], strict=True):
        assert cell["source"] == before["source"]
        now, then = ([sorted(o.get("data", o)) for o in one.get("outputs", [])] for one in (cell, before))
        assert now == then, "run python docs/notebook.py"
    pages = [
        "".join(o["data"]["text/html"])
        for c in executed["cells"]
        for o in c.get("outputs", ())
        if "data" in o and "text/html" in o["data"]
    ]
    assert len(pages) == 3 and all("<table>" in page and "data:image/png" in page for page in pages[:2])
    assert (tmp_path / "runs" / "guided" / "explanations" / "test-0-horizontal.png").is_file()


def test_outputs_are_text_or_html_and_errors_are_raised(tmp_path: Path) -> None:
    def cell(source: str) -> dict[str, object]:
        return {"cell_type": "code", "source": [source], "outputs": [], "execution_count": None}

    run = script().execute
    first, second = run({"cells": [cell("x = 2\nprint('two')"), cell("x + 1")]}, tmp_path)["cells"]
    assert first["outputs"] == [{"name": "stdout", "output_type": "stream", "text": ["two\n"]}]
    assert second["outputs"][0]["data"] == {"text/plain": ["3"]} and second["execution_count"] == 2
    before = Path.cwd()
    with pytest.raises(ZeroDivisionError):
        run({"cells": [cell("1 / 0")]}, tmp_path)
    assert Path.cwd() == before


def test_the_page_has_text_code_and_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mkdocs", reason="mkdocs is not installed: pip install 'debiaskd[docs]'")
    monkeypatch.syspath_prepend(str(DOCS / "site"))
    notebooks = importlib.import_module("notebooks")
    html = {"output_type": "execute_result", "data": {"text/html": ["<b>\n", "\n", "    x</b>"], "text/plain": ["x"]}}
    printed = {"output_type": "stream", "text": ["two\n"]}
    document = {
        "cells": [
            {"cell_type": "markdown", "source": ["# A\n", "b"]},
            {"cell_type": "code", "source": ["1"], "outputs": [printed, html]},
        ]
    }
    assert notebooks.markdown(document) == (
        '# A\nb\n\n```python\n1\n```\n\n```text\ntwo\n```\n\n<div class="output"><b>\nx</b></div>\n'
    )
