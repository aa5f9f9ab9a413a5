"""From a template of this folder to a page."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def render(template: str, **values: Any) -> str:
    """The page.

    Args:
        template: a file's name in this folder.
        values: what it shows. Text is escaped; a value that the template asks for and does not get is an error.

    Raises:
        ModuleNotFoundError: jinja2 is not installed.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )
    return environment.get_template(template).render(**values)
