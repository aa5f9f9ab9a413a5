"""Tests that share an expensive fixture run in one process."""

from __future__ import annotations

import pytest


@pytest.mark.xdist_group("shared")
def test_groups_of_tests_stay_together(request: pytest.FixtureRequest) -> None:
    if not getattr(request.config.option, "loadgroup", False):
        pytest.skip("needs pytest-xdist with --dist loadgroup, as make test starts it")
    # pytest-xdist sends tests to processes by this suffix; without it each process makes the fixtures of a group.
    assert request.node.nodeid.endswith("@shared")
