"""`debiaskd export`: its options, and what it prints."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add(commands: Any) -> None:
    """Add the command to argparse's subparsers."""
    export = commands.add_parser(
        "export",
        help="write a run's student in the layout of the Hugging Face hub",
        description="Writes DIR/model.safetensors, DIR/config.json and DIR/README.md, a model card made from the run "
        "and its evaluations; nothing is uploaded. debiaskd.load(DIR) gives the student back, and so does "
        'timm.create_model("local-dir:DIR", pretrained=True) where timm knows the network.',
    )
    export.add_argument("run", type=Path, metavar="RUN")
    export.add_argument(
        "--to", type=Path, metavar="DIR", help="an earlier export in it is replaced; default: RUN/export"
    )


def run(options: argparse.Namespace) -> list[str]:
    """Do it; return the names of the files that were written.

    Raises:
        RunError, NetworkError, OSError: in one line each.
    """
    from debiaskd.reports.model_card import save_pretrained

    folder = save_pretrained(options.run, options.to or options.run / "export")
    return [str(path) for path in sorted(folder.iterdir()) if path.is_file()]
