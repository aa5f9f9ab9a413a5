"""A guided run and the command line, for tests of `debiaskd train`, `evaluate` and `explain`."""

from __future__ import annotations

from typing import Any

import pytest

from debiaskd.cli import entry as cli

GUIDED: dict[str, Any] = {
    "student": {"name": "plain/4"},
    "pretraining": {"epochs": 1, "batch": 12, "learning_rate": 1e-2},
    "schedule": {"epochs": 2, "batch": 12, "learning_rate": 1e-2},
    "terms": {"supervised": {}, "guide": {"weight": 0.1}},
    "compute": {"accelerator": "cpu"},
}


def command(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = cli.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def failed(code: int, out: str, err: str, expected: int = 2) -> str:
    assert code == expected and out == ""
    assert err.startswith("debiaskd: ") and err.count("\n") == 1 and "Traceback" not in err
    return err
