"""The documentation says what the files say, and what it links to and shows exists."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import processes
import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.mark.xdist_group("processes")
def test_every_figure_is_what_the_result_files_say() -> None:
    done = processes.run("docs/figures.py", "--check", folder=ROOT)
    assert done.returncode == 0, f"run python docs/figures.py: {done.stdout}{done.stderr}"


@pytest.mark.xdist_group("processes")
def test_the_page_of_a_recipes_keys_is_what_the_docstrings_say() -> None:
    done = processes.run("docs/recipe_keys.py", "--check", folder=ROOT)
    assert done.returncode == 0, f"run python docs/recipe_keys.py: {done.stdout}{done.stderr}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_every_op_has_its_row_of_files() -> None:
    from debiaskd.ops import backend

    for op in backend.IMPLEMENTATIONS:
        for path in (f"debiaskd/ops/{op}.py", f"tests/ops/test_{op}.py", f"bench/{op}.py", f"docs/ops/{op}.md"):
            assert (ROOT / path).exists(), f"{op} has no {path}"
        if "cpp" in backend.IMPLEMENTATIONS[op]:
            assert (ROOT / f"csrc/cpu/{op}.cpp").exists()
        if "cuda" in backend.IMPLEMENTATIONS[op]:
            assert (ROOT / f"csrc/cuda/{op}.cu").exists()
        if "triton" in backend.IMPLEMENTATIONS[op]:
            assert (ROOT / f"kernels/{op}.py").exists()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_in_the_pages_is_python(page: Path) -> None:
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)):
        signature = re.fullmatch(r"(dk\.\w+\(.*\).*\n)+", block)  # a page's heading shows the call, not a program
        if not signature:
            compile(block, f"{page.name}:{number}", "exec")


@pytest.mark.parametrize(
    "package", ["debiaskd", *(f"debiaskd.{p}" for p in ("attribution", "bias", "data", "metrics"))]
)
def test_every_public_name_is_in_the_api_reference(package: str) -> None:
    pages = "\n".join(page.read_text() for page in (ROOT / "docs" / "api").glob("*.md"))
    shown = {name.rpartition(".") for name in re.findall(r"^::: (debiaskd\S+)$", pages, re.MULTILINE)}
    names = {name for name in importlib.import_module(package).__all__ if not name.startswith("__")}
    missing = names - {name for where, _, name in shown if where == package or where.startswith(f"{package}.")}
    assert not missing, f"{package}: add ::: lines for {sorted(missing)} to a page in docs/api"


def test_the_sites_links_lead_to_pages_of_the_site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Links that leave docs/ become pages that show the source; those within stay; code is left alone."""
    pytest.importorskip("mkdocs", reason="mkdocs is not installed: pip install 'debiaskd[docs]'")
    monkeypatch.syspath_prepend(str(ROOT / "docs" / "site"))
    links = importlib.import_module("links")
    text = (
        "[a](../../recipes) [b](../../README.md#cite) [c](../data.md#pixels) [d](https://x.org)\n"
        "```\n[a](../../recipes)\n```"
    )
    assert links.rewritten(text, "docs/ops/kd.md", "ops/kd.md") == (
        "[a](../source/recipes.md) [b](../index.md#cite) [c](../data.md#pixels) [d](https://x.org)\n"
        "```\n[a](../../recipes)\n```"
    )
    assert links.rewritten("[e](docs/ops/kd.md) [f](gone)", "README.md", "index.md") == "[e](ops/kd.md) [f](gone)"
    assert links.outside(text, "docs/ops/kd.md") == {"recipes", "README.md"}
    (tmp_path / "page.py").write_text('"""```\n```"""\n')
    monkeypatch.setattr(links, "ROOT", tmp_path)
    assert links.source_page(tmp_path / "page.py") == '# page.py\n\n`page.py`\n\n````python\n"""```\n```"""\n````'


def test_docstrings_are_read_as_sections(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("griffe", reason="griffe is not installed: pip install 'debiaskd[docs]'")
    monkeypatch.syspath_prepend(str(ROOT / "docs" / "site"))
    docstrings = importlib.import_module("docstrings")
    text = "Args:\n    a, b: [N] of\n        two.\n    c: one, or: none.\n\nRaises:\n    TypeError, ValueError: x\n"
    assert docstrings.ARGUMENTS.sub(docstrings.one_name_an_entry, text) == (
        "Args:\n    a: [N] of\n        two.\n    b: [N] of\n        two.\n    c: one, or: none.\n\n"
        "Raises:\n    TypeError, ValueError: x\n"
    )
