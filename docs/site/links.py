"""MkDocs hooks: the site's pages that are files elsewhere in the repository, and links to them.

Pages in docs/ link to files outside of it with relative paths (`../recipes`, `../examples/plain_pytorch.py`), which
work wherever the repository is read. On the site, README.md is the home page, CHANGELOG.md is a page, and every other
file or folder that some page links to becomes a page that shows its source.
"""

from __future__ import annotations

import os
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
LINK = re.compile(r"(?<=\]\()([^)#\s]+)(#[^)\s]*)?(?=\))")
FENCE = re.compile(r"(^```.*?^```)", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"<code>[^<]*</code>")
PAGES = {"README.md": "index.md", "CHANGELOG.md": "changelog.md"}
LANGUAGES = {".py": "python", ".yaml": "yaml", ".yml": "yaml", ".sh": "bash", ".cpp": "cpp", ".h": "cpp", ".cu": "cpp"}


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that have no file in docs/."""
    texts = {source: (ROOT / source).read_text(encoding="utf-8") for source in PAGES}
    texts |= {f"docs/{page.src_uri}": page.content_string for page in files.documentation_pages()}
    for source, page in PAGES.items():
        content = rewritten(texts[source], source, page)
        files.append(File.generated(config, page, content=content))
    targets = {target for source, text in texts.items() for target in outside(text, source)}
    for target in sorted(targets - PAGES.keys()):
        files.append(File.generated(config, f"source/{target}.md", content=source_page(ROOT / target)))
    return files


def on_page_markdown(markdown: str, page: Any, **kwargs: Any) -> str:
    uri = page.file.src_uri
    return markdown if page.file.generated_by else rewritten(markdown, f"docs/{uri}", uri)


def on_page_content(html: str, **kwargs: Any) -> str:
    """Show `\\|`, which code in a table needs in Markdown, as the bar that is meant."""
    return CODE.sub(lambda match: match[0].replace(r"\|", "|"), html)


def outside(text: str, source: str) -> set[str]:
    """Paths, from the repository's root, of the files and folders outside of docs/ that a page links to."""
    found = {resolved(match[1], source) for match in LINK.finditer(text) if "://" not in match[1]}
    return {path for path in found if not path.startswith("docs/") and (ROOT / path).exists()}


def resolved(target: str, source: str) -> str:
    """A link's target as a path from the repository's root."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(source), target))


def rewritten(text: str, source: str, page: str) -> str:
    """The text of `source` with its links as they are from `page` on the site."""

    def link(match: re.Match[str]) -> str:
        if "://" in match[1]:
            return match[0]
        target = resolved(match[1], source)
        if target.startswith("docs/"):
            uri = re.sub(r"\.ipynb$", ".md", target.removeprefix("docs/"))  # see notebooks.py
        elif (ROOT / target).exists():
            uri = PAGES.get(target, f"source/{target}.md")
        else:
            return match[0]  # the strict build reports it
        return posixpath.relpath(uri, posixpath.dirname(page) or ".") + (match[2] or "")

    parts = FENCE.split(text)  # code between fences is left alone
    return "".join(part if part.startswith("```") else LINK.sub(link, part) for part in parts)


def source_page(path: Path) -> str:
    """A page that shows a file, or the text files of a folder."""
    name = path.relative_to(ROOT).as_posix()
    if path.is_file():
        return f"# {path.name}\n\n`{name}`\n\n{block(path)}"
    shown = [file for file in sorted(path.iterdir()) if file.suffix in LANGUAGES and file.name != "__init__.py"]
    others = [file.name for file in sorted(path.iterdir()) if file.is_file() and file.suffix not in LANGUAGES]
    parts = [f"# {name}{os.sep}", *(f"## {file.name}\n\n{block(file)}" for file in shown)]
    if others:
        parts.append("\n".join(f"- `{name}/{file}`" for file in others))
    return "\n\n".join(parts)


def block(path: Path) -> str:
    """A file as a block of code, in fences longer than any inside."""
    text = path.read_text(encoding="utf-8").rstrip()
    longest = max((len(run) for run in re.findall(r"`{3,}", text)), default=2)
    fence = "`" * (longest + 1)
    return f"{fence}{LANGUAGES.get(path.suffix, 'text')}\n{text}\n{fence}"
