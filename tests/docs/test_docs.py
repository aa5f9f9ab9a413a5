"""The documentation says what the files say, and what it links to and shows exists."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]


def test_every_figure_is_what_the_result_files_say() -> None:
    done = subprocess.run([sys.executable, "docs/figures.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, f"run python docs/figures.py: {done.stdout}{done.stderr}"


def test_the_page_of_a_recipes_keys_is_what_the_docstrings_say() -> None:
    done = subprocess.run([sys.executable, "docs/recipe_keys.py", "--check"], cwd=ROOT, capture_output=True, text=True)
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
