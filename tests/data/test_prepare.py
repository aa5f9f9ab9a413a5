"""Preparing: what is written, that it is whole or absent, that it goes on, and every kind of bad file."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

pytest.importorskip("PIL", reason="images are decoded with pillow")

import data_trees as trees
import processes
from data_trees import files_of, unfinished

from debiaskd.data import DataError, PackedDataset, prepare
from debiaskd.data.packed import output_folder as output
from debiaskd.data.packed import prepare as preparing
from debiaskd.data.packed import shards

# -- what is written -----------------------------------------------------------------------------------------------


def test_coco_end_to_end(tmp_path: Path) -> None:
    prepared = prepare("coco", trees.coco(tmp_path / "src"), tmp_path / "out", size=20, shard_size=2)
    assert (prepared.written, prepared.reused) == (3, 0)
    assert prepared.manifest["classes"] == ["cat", "dog", "person"]
    data = PackedDataset(tmp_path / "out", verify=True)
    assert len(data) == 5
    assert data.paths() == [f"{i:04d}.png" for i in range(5)]
    assert data.sizes.tolist() == [[30, 40]] * 5
    image, target, boxes = data[0]
    assert target.tolist() == [1, 1, 0]
    # 40×30 squashed to 20×20: x halves, y takes two thirds.
    assert boxes.coords.tolist() == [[2, 2, 7, 6], [10, 7, 15, 14]]
    assert boxes.labels is not None
    assert boxes.labels.tolist() == [1, 0]
    assert image.shape == (3, 20, 20)
    assert data[2][2].annotated.tolist() == [True]
    assert data[2][1].tolist() == [0, 0, 0]


def test_pixels_are_what_pillow_makes_of_them(tmp_path: Path) -> None:
    from PIL import Image

    src = trees.coco(tmp_path / "src", 3)
    prepare("coco", src, tmp_path / "out", size=24)
    data = PackedDataset(tmp_path / "out")
    for i in range(3):
        image = Image.open(src / "train2017" / f"{i:04d}.png").resize((24, 24), Image.Resampling.BILINEAR)
        assert (data[i][0].permute(1, 2, 0).numpy() == np.asarray(image)).all()


def test_crowds_as_areas_to_be_ignored(tmp_path: Path) -> None:
    src = trees.coco(tmp_path / "src")
    prepare("coco", src, tmp_path / "mask", size=20, crowd="mask")
    batch = PackedDataset(tmp_path / "mask").__getitems__([0, 1])
    assert batch.target.tolist() == [[1, 1, 0], [0, 0, 1]]  # the class counts
    assert batch.boxes.offsets.tolist() == [0, 2, 2]
    assert batch.ignore is not None
    assert batch.ignore.mask((20, 20)).sum((1, 2)).tolist() == [0, 400]
    prepare("coco", src, tmp_path / "drop", size=20, crowd="drop")
    batch = PackedDataset(tmp_path / "drop").__getitems__([0, 1])
    assert batch.target.tolist() == [[1, 1, 0], [0, 0, 0]]
    assert batch.ignore is None


def test_waterbirds_end_to_end(tmp_path: Path) -> None:
    prepare("waterbirds", trees.waterbirds(tmp_path / "src"), tmp_path / "out", size=10)
    data = PackedDataset(tmp_path / "out", "train")
    batch = data.__getitems__([2, 0])
    assert batch.target.tolist() == [0, 0]
    assert batch.groups is not None
    assert batch.groups.tolist() == [1, 0]
    assert batch.boxes.coords.tolist() == [[2, 2, 6, 6]] * 2
    assert data.groups[1] == "landbird on water"


def test_folder_end_to_end_with_pad(tmp_path: Path) -> None:
    src = trees.folder(tmp_path / "src", boxes="cat/0.png,0,0,40,30,\n")
    prepare("folder", src, tmp_path / "out", size=20, fit="pad")
    data = PackedDataset(tmp_path / "out")
    image, _, boxes = data[0]
    assert boxes.coords.tolist() == [[0, 2, 20, 17]]
    assert image[:, :2].sum() == 0
    assert data.boxes.annotated.tolist() == [True] + [False] * 5


def test_several_processes_write_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And leave the main module alone: a script without a main guard is not run again."""
    script, main = tmp_path / "mine.py", ModuleType("__main__")
    script.write_text("raise SystemExit('run again')")
    main.__file__ = str(script)
    monkeypatch.setitem(sys.modules, "__main__", main)
    src = trees.coco(tmp_path / "src", 7)
    (src / "train2017" / "0003.png").write_bytes(b"no image")
    prepare("coco", src, tmp_path / "one", size=16, shard_size=2)
    prepare("coco", src, tmp_path / "two", size=16, shard_size=2, workers=2)
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")
    assert sys.modules["__main__"] is main


def test_plain_arrays_and_checksums(tmp_path: Path) -> None:
    prepare("coco", trees.coco(tmp_path / "src"), tmp_path / "out", size=20, shard_size=3)
    shard = tmp_path / "out" / "train2017" / "00000"
    images = np.load(shard / "images.npy", mmap_mode="r")
    assert (images.shape, images.dtype) == ((3, 20, 20, 3), np.uint8)
    assert np.load(shard / "offsets.npy").tolist() == [0, 2, 3, 3]
    known = json.loads((shard / "shard.json").read_text())["files"]
    assert set(known) == {path.name for path in shard.glob("*.npy")}
    assert all(known[name]["sha256"] == shards.sha256(shard / name) for name in known)


# -- interrupted and started again ---------------------------------------------------------------------------------


def interrupt_after(monkeypatch: pytest.MonkeyPatch, pictures: int, error: BaseException) -> None:
    """Raises in the middle of a shard, when so many images have been decoded."""
    from debiaskd.data import pixels

    decode, left = pixels.decode, iter(range(pictures))

    def interrupted(path: Path) -> Any:
        if next(left, None) is None:
            raise error
        return decode(path)

    monkeypatch.setattr(pixels, "decode", interrupted)


def test_goes_on_where_it_was_and_rewrites_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    src, out = trees.coco(tmp_path / "src", 8), tmp_path / "out"
    with monkeypatch.context() as patch:
        interrupt_after(patch, 5, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            prepare("coco", src, out, size=16, shard_size=2)
    assert sorted(p.name for p in (out / "train2017").iterdir()) == ["00000", "00001"]  # the third was begun
    assert unfinished(out) == []
    with pytest.raises(DataError, match="did not come to its end; run the same"):
        PackedDataset(out)
    stamps = {p: (p.stat().st_mtime_ns, p.stat().st_ino) for p in (out / "train2017").rglob("*")}
    prepared = prepare("coco", src, out, size=16, shard_size=2)
    assert (prepared.written, prepared.reused) == (2, 2)
    assert all((p.stat().st_mtime_ns, p.stat().st_ino) == stamp for p, stamp in stamps.items())
    prepare("coco", src, tmp_path / "whole", size=16, shard_size=2)
    assert files_of(out) == files_of(tmp_path / "whole")


def test_what_a_killed_run_left_is_cleared(tmp_path: Path) -> None:
    src, out = trees.coco(tmp_path / "src", 4), tmp_path / "out"
    prepare("coco", src, out, size=16, shard_size=2)
    (out / "manifest.json").unlink()
    os.rename(out / "train2017" / "00001", out / "train2017" / f"{shards.TEMPORARY}00001-x")  # killed before the rename
    (out / "train2017" / f"{shards.TEMPORARY}00001-x" / "target.npy").unlink()
    prepared = prepare("coco", src, out, size=16, shard_size=2)
    assert (prepared.written, prepared.reused) == (1, 1)
    assert unfinished(out) == []


def test_finished_is_left_alone(tmp_path: Path) -> None:
    src, out = trees.coco(tmp_path / "src", 3), tmp_path / "out"
    prepare("coco", src, out, size=16)
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.name != ".lock"}
    assert prepare("coco", src, out, size=16).written == 0
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.name != ".lock"} == before


def test_other_options_or_annotations_are_refused(tmp_path: Path) -> None:
    src, out = trees.coco(tmp_path / "src", 3), tmp_path / "out"
    prepare("coco", src, out, size=16)
    before = files_of(out)
    with pytest.raises(DataError, match="begun with size=16, now size=24; choose another OUT"):
        prepare("coco", src, out, size=24)
    with pytest.raises(DataError, match="begun with crowd='keep', now crowd='drop'"):
        prepare("coco", src, out, size=16, crowd="drop")
    trees.coco(src, 3, boxes=[])
    with pytest.raises(DataError, match="the source has changed"):
        prepare("coco", src, out, size=16)
    assert files_of(out) == before


def test_folder_with_something_else_is_refused(tmp_path: Path) -> None:
    src = trees.coco(tmp_path / "src", 1)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("mine")
    with pytest.raises(DataError, match=r"holds 'thesis\.tex' and is not a prepared data set"):
        prepare("coco", src, tmp_path / "out", size=16)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["thesis.tex"]  # not even a lock is left there
    (tmp_path / "other").mkdir()
    for content in ("{", "[1]"):
        (tmp_path / "other" / "prepare.json").write_text(content)
        with pytest.raises(DataError, match=r"prepare\.json: damaged"):
            prepare("coco", src, tmp_path / "other", size=16)
    (tmp_path / "other" / "prepare.json").write_text('{"someone": "else"}')
    with pytest.raises(DataError, match="made in format None None, not debiaskd-packed 1"):
        prepare("coco", src, tmp_path / "other", size=16)
    with pytest.raises(DataError, match="must not lie in the data set"):
        prepare("coco", src, src, size=16)
    with pytest.raises(DataError, match="must not lie in the data set"):
        prepare("folder", trees.folder(tmp_path / "f"), tmp_path / "f" / "out", size=16)


@pytest.mark.parametrize(("few", "expected"), [(200, 1), (6, 2)])
def test_processes_start_by_themselves_for_many_images_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, few: int, expected: int
) -> None:
    made, found = preparing._made, []
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1}, raising=False)
    monkeypatch.setattr(preparing, "FEW", few)
    monkeypatch.setattr(preparing, "_made", lambda jobs, workers: (found.append(workers), made(jobs, 1))[1])
    prepare("coco", trees.coco(tmp_path / "src", 6), tmp_path / "out", size=16, shard_size=1, workers=None)
    assert found == [expected]


@pytest.mark.skipif(sys.platform == "win32", reason="locks files as POSIX does")
def test_two_at_once_are_refused(tmp_path: Path) -> None:
    src, out = trees.coco(tmp_path / "src", 1), tmp_path / "out"
    out.mkdir()
    with output.locked(out), pytest.raises(DataError, match="another process is preparing here"):
        prepare("coco", src, out, size=16)


def test_damaged_shard_is_named(tmp_path: Path) -> None:
    src, out = trees.coco(tmp_path / "src", 4), tmp_path / "out"
    prepare("coco", src, out, size=16, shard_size=2)
    file = out / "train2017" / "00001" / "images.npy"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"00001/images.npy: missing or cut short; remove .*00001 to have it rebuilt"):
        prepare("coco", src, out, size=16, shard_size=2)
    for path in file.parent.iterdir():
        path.unlink()
    file.parent.rmdir()
    assert prepare("coco", src, out, size=16, shard_size=2).written == 1
    PackedDataset(out, verify=True)


@pytest.mark.skipif(sys.platform == "win32", reason="signals as POSIX has them")
@pytest.mark.xdist_group("processes")
@pytest.mark.parametrize("moment", ["while its processes start", "while they write"])
def test_ctrl_c_stops_all_processes_and_leaves_nothing_unfinished(tmp_path: Path, moment: str) -> None:
    src, out = trees.coco(tmp_path / "src", 300), tmp_path / "out"
    code = "import sys; from debiaskd import cli; from debiaskd.data.packed import prepare as preparing\n"
    code += "preparing.prepare.__kwdefaults__['shard_size'] = 2\n"
    code += "if __name__ == '__main__': sys.exit(cli.main(sys.argv[1:]))"
    script = tmp_path / "command.py"
    script.write_text(code)
    command = (script, "prepare", "coco", src, out, "--size", "16", "--workers", "2")
    process = processes.Process(*command, session=True)
    try:
        process.wait_for("stderr", " % ")
        deadline = time.monotonic() + 60
        while moment == "while they write" and not list(out.glob("train2017/0*")) and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(0.3 if moment == "while its processes start" else 0)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the whole group
        code, _, err = process.wait()
        with pytest.raises(ProcessLookupError):
            os.killpg(process.pid, 0)  # all that it started has ended, too
    finally:
        process.kill()
    assert code == 130, err
    assert err.splitlines()[-1] == "debiaskd: stopped"
    assert "Traceback" not in err
    assert unfinished(out) == []
    assert not (out / "manifest.json").exists()


def test_a_shard_gets_its_name_when_it_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names are given by renaming, which happens at once or not at all."""
    rename, named = os.rename, []

    def watched(old: Path, new: Path) -> None:
        named.append(Path(new).name)
        assert not Path(new).exists()
        known = json.loads((Path(old) / "shard.json").read_text())["files"]
        assert all((Path(old) / name).stat().st_size == facts["bytes"] for name, facts in known.items())
        rename(old, new)

    monkeypatch.setattr(os, "rename", watched)
    prepare("coco", trees.coco(tmp_path / "src", 5), tmp_path / "out", size=16, shard_size=2)
    assert named == ["00000", "00001", "00002"]
