"""Pickles of arrays are read; those that would do harm do none."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("PIL", reason="the small data sets are made with pillow")

import more_trees as more

from debiaskd.data import DataError
from debiaskd.data.sources import cifar, pickled
from debiaskd.data.sources.records import Problems


class Call:
    """Pickled, it is the call of a function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("file", ["data_batch_3", "batches.meta"])
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_nothing_is_run(tmp_path: Path, file: str, protocol: int) -> None:
    src, mark = more.cifar10(tmp_path / "src", "python", [1, 2, 3, 4, 5], [6]), tmp_path / "harm"
    (src / file).write_bytes(pickle.dumps({"data": Call(os.mkdir, str(mark))}, protocol))
    with pytest.raises(DataError, match=rf"{file}: refused as a pickle: it asks for \w+\.mkdir, where only arrays are"):
        cifar.read(src, Problems())
    assert not mark.exists()
    pickle.loads((src / file).read_bytes())
    assert mark.exists()  # it would have been


@pytest.mark.parametrize(
    "content",
    [
        pickle.dumps(Call(eval, "1")),
        b"cnumpy\nload\n(Vx\ntR.",
        b"\x80\x04\x8c\x05numpy\x8c\x11ndarray.__class__\x93.",  # a dot walks on from attribute to attribute
        b"\x80\x02\x82\x01.",  # a code of the extension registry
        b"c_codecs\nencode\n(Vx\nVzip\ntR.",
        b"Px\n.",  # a persistent id
        b"",
        b"no pickle",
    ],
)
def test_other_names_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(DataError, match="x: refused as a pickle"):
        pickled.load(tmp_path / "x")


def test_arrays_that_lie_about_themselves(tmp_path: Path) -> None:
    """What numpy itself would have to be trusted with: here they are no arrays."""
    made = more.python2_pickle({b"a": np.arange(6, dtype=np.uint8).reshape(2, 3)})
    (tmp_path / "x").write_bytes(made)
    array = pickled.array(pickled.load(tmp_path / "x")["a"])
    assert array is not None
    assert array.tolist() == [[0, 1, 2], [3, 4, 5]]
    for old, new in ((b"K\x02K\x03\x86", b"K\x02K\x04\x86"), (b"K\x02K\x03\x86", b"J\xff\xff\xff\xffK\x03\x86")):
        assert made.count(old) == 1
        (tmp_path / "x").write_bytes(made.replace(old, new))
        assert pickled.array(pickled.load(tmp_path / "x")["a"]) is None
    by_columns = np.asfortranarray(np.arange(6, dtype=np.uint8).reshape(2, 3))
    for value, expected in ((by_columns, by_columns.tolist()), (np.zeros(2, np.float32), None), (np.array([{}]), None)):
        (tmp_path / "x").write_bytes(more.python2_pickle({b"a": value}))
        array = pickled.array(pickled.load(tmp_path / "x")["a"])
        assert (None if array is None else array.tolist()) == expected
