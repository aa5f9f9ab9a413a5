"""docs/recipe.md: every key of a recipe, from the docstrings.

python docs/recipe_keys.py             write it
python docs/recipe_keys.py --check     exit with 1 where it differs from what the docstrings say
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from debiaskd.recipe.reference import as_markdown

PAGE = Path(__file__).resolve().parent / "recipe.md"
HEAD = "# Every key of a recipe\n\n<!-- made by docs/recipe_keys.py -->\n\n[What recipes do](training.md#recipes). "


def main(arguments: list[str]) -> int:
    if arguments not in ([], ["--check"]):
        print(__doc__, file=sys.stderr)
        return 2
    text = HEAD + as_markdown()
    stale = not PAGE.exists() or PAGE.read_text(encoding="utf-8") != text
    if stale and not arguments:
        PAGE.write_text(text, encoding="utf-8")
    if stale:
        print(PAGE.relative_to(PAGE.parent.parent))
    return 1 if stale and arguments else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
