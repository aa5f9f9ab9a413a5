"""MkDocs hook: every notebook in docs/ is a page, with the outputs that are stored in it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

sys.path.insert(0, str(Path(__file__).parent))

from links import ROOT, rewritten


def on_files(files: Files, config: Any) -> Files:
    """Replace each notebook by a page of Markdown."""
    for file in [one for one in files if one.src_uri.endswith(".ipynb")]:
        files.remove(file)
        page = file.src_uri.removesuffix(".ipynb") + ".md"
        text = markdown(json.loads((ROOT / "docs" / file.src_uri).read_text(encoding="utf-8")))
        files.append(File.generated(config, page, content=rewritten(text, f"docs/{file.src_uri}", page)))
    return files


def markdown(document: dict[str, Any]) -> str:
    """Cells of text as they are; code as blocks of Python, each followed by its outputs."""
    parts = []
    for cell in document["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        parts += [shown(output) for output in cell["outputs"]]
    return "\n\n".join(parts) + "\n"


def shown(output: dict[str, Any]) -> str:
    """HTML if the output has it, else text."""
    data = output.get("data", {"text/plain": output.get("text", [])})
    if "text/html" in data:
        lines = "".join(data["text/html"]).splitlines()
        # A blank line would end the block of HTML, and an indented one begin a block of code.
        return '<div class="output">' + "\n".join(line.strip() for line in lines if line.strip()) + "</div>"
    return f"```text\n{''.join(data['text/plain']).rstrip()}\n```"
