"""Names and numbers as other tools write them."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from debiaskd.data.sources.names import fold_case, match_paths, of_tools, split_name, whole
from debiaskd.data.sources.problems import Problems


@settings(max_examples=40)
@given(st.integers(-(10**20), 10**20))
def test_whole_numbers_in_any_writing(number: int) -> None:
    writings: list[Any] = [number, str(number), f" {number}.0 ", f"{number}."]
    if abs(number) < 1 << 53:
        writings.append(float(number))
    assert [whole(writing) for writing in writings] == [number] * len(writings)


@pytest.mark.parametrize(
    "value",
    [None, True, 1.5, float("nan"), float("inf"), "", "1.5", "x1", "1e3", "\u0661", "1 2", "0x1", [1], "9" * 41],
)
def test_what_is_no_whole_number(value: Any) -> None:
    assert whole(value) is None


def test_split_names() -> None:
    words = ("Train", "TRAINING", "val", "Valid", "Validation", "TEST", "testing", "trainval", "train2017", "dev")
    found = [split_name(word) for word in words]
    assert found == ["train", "train", "val", "valid", "validation", "test", "test", None, None, None]


def test_folders_of_tools() -> None:
    assert all(map(of_tools, ("__MACOSX", ".git", "@eaDir", "$RECYCLE.BIN")))
    assert not any(map(of_tools, ("gull", "_gull", "MACOSX")))


WORDS = st.text("aAbBß", min_size=1, max_size=2)


@settings(max_examples=50)
@given(st.dictionaries(st.sampled_from(["train", "val", "test"]), st.sets(WORDS, max_size=5), max_size=3))
def test_classes_are_folded_only_where_no_split_has_both(by_split: dict[str, set[str]]) -> None:
    problems = Problems()
    used = fold_case(by_split, problems)
    assert set(used) == set().union(*by_split.values())
    for name, chosen in used.items():
        assert chosen.casefold() == name.casefold()
        assert used[chosen] == chosen
    for names in by_split.values():  # no two classes of a split become one
        assert len({used[name] for name in names}) == len(names)
    folded = [name for name, chosen in used.items() if chosen != name]
    assert len(problems.notes.get("class written in another case", [])) == len(folded)


@settings(max_examples=50)
@given(st.sets(st.text("aAb/", min_size=1, max_size=4), max_size=6), st.sets(st.text("aAb/", min_size=1, max_size=4)))
def test_paths_mean_a_file_or_nothing(written: set[str], present: set[str]) -> None:
    made = match_paths(written, present, "src")
    for path in written:
        same = [p for p in present if p.casefold() == path.casefold()]
        assert made.get(path) == (same[0] if path not in present and len(same) == 1 else None)


def test_paths_from_the_folder_above_on() -> None:
    assert match_paths(["SRC/Cat/0.PNG", "src/x", "other/cat/0.png"], ["cat/0.png"], "src") == {
        "SRC/Cat/0.PNG": "cat/0.png"
    }
