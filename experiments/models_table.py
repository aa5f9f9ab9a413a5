"""Format docs/models.md from the rows that experiments/models.py measured."""

from __future__ import annotations

from typing import Any


def table(document: dict[str, Any]) -> str:
    """docs/models.md."""
    rows = document["rows"]
    tried = [row for row in rows if not row.get("skipped")]
    counts = {what: sum(row[what] for row in tried) for what in ("learns", "teaches", "guided")}
    text = [
        HEADER.format(tried=len(tried), **document["versions"], **counts, share=100 * counts["teaches"] / len(tried))
    ]
    for source in ("timm", "torchvision", "transformers"):
        text += [
            f"\n## {source}\n",
            "| family | network | input | map | student | teacher | head | guided |",
            "| --- " * 8 + "|",
        ]
        text += [_line(row) for row in tried if row["family"].startswith(f"{source} ")]
    refused = [(row, what) for row in tried for what in counts if not row[what]]
    if refused:
        text += ["\n## Refused\n"]
        text += [f"- `{row['name']}`, {what}: {row[f'{what}_reason']}" for row, what in refused]
    skipped = [row for row in rows if row.get("skipped")]
    if skipped:
        text += ["\n## Not tried\n"]
        text += [f"- `{row['name']}`: {row.get('reason') or _millions(row) + ' parameters'}" for row in skipped]
    return "\n".join(text) + "\n"


HEADER = """# Networks

The smallest network of each family, with random weights and three classes, tried by `python experiments/models.py`
in several runs (timm {timm}, torchvision {torchvision}, transformers {transformers}, torch {torch}).
Of {tried} families, {learns} can be students, {teaches} ({share:.1f} %) can be teachers, and {guided} can be guided.

- **map**: the input of a student's projector, [C,H,W] at the input size in the table. The layer is named if it is not
  the output of `forward_features`.
- **student**: a transplanted student gets a finite gradient for every parameter.
- **teacher**: at *map* level the last map is matched, at *token* level the input vector of the last layers; the number
  is its channels ([transplanting](transplant.md)).
- **head**: the class that holds the teacher's head, and the type of its last layers.
- **guided**: the layer that `dk.Guide` uses for Final, whose patch tokens reach the logits, and the size of its map;
  *closed* if the closed form holds, otherwise the gradient is computed."""


def _line(row: dict[str, Any]) -> str:
    size = "×".join(map(str, row["input"][1:])) if row["learns"] else ""
    found = "×".join(map(str, row["map"])) if row["learns"] else ""
    layer = "" if row.get("layer") in (None, "forward_features") else f" at `{row['layer']}`"
    teaches = f"{row['level']}, {row['matched'][0]}" if row["teaches"] else "**no**"
    head = f"{row['head']}: {row['last']}" if row["teaches"] else ""
    guided = f"`{row['guided_at']}` {'×'.join(map(str, row['guided_map']))}" if row["guided"] else "**no**"
    guided += ", closed" if row.get("closed_form") else ""
    name = row["name"].partition("/")[2]
    cells = [row["family"].partition(" ")[2], f"`{name}` {_millions(row)}", size, found + layer]
    cells += ["yes" if row["learns"] else "**no**", teaches, head, guided]
    return f"| {' | '.join(cells)} |"


def _millions(row: dict[str, Any]) -> str:
    return f"{row['parameters'] / 1e6:.1f} M"
