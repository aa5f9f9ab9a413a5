"""The command line: one file a command."""

from debiaskd.cli.entry import main

__all__ = ["main"]
