"""Preparing what is bad, in places that are bad: each is named in one line, and nothing unfinished looks whole."""

from __future__ import annotations

import concurrent.futures
import errno
import json
import os
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("PIL", reason="images are decoded with pillow")

import data_trees as trees
from data_trees import spoiled, unfinished

from debiaskd.cli import entry as cli
from debiaskd.data import DataError, PackedDataset, prepare
from debiaskd.data.packed import shards
from debiaskd.data.packed import write_shard as making
from debiaskd.data.packed.prepare import READERS


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = cli.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


# -- bad files -----------------------------------------------------------------------------------------------------


def test_bad_files_are_named_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    code, printed, err = run(capsys, "prepare", "coco", spoiled(tmp_path / "src"), out, "--size", 16, "--workers", 1)
    assert code == 0
    assert "train2017: 3 images, 2 boxes, 3 left out" in printed
    assert "1 × missing file: 0004.png" in printed
    assert "2 × truncated or non-image file: 0001.png" in printed
    assert err == "  0 % train2017\n"
    problems = (out / "problems.txt").read_text().splitlines()
    assert [line.split(" (")[0] for line in problems] == [
        "missing file: 0004.png",
        "truncated or non-image file: 0001.png",
        "truncated or non-image file: 0003.png",
    ]
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["splits"]["train2017"]["skipped"] == [1, 3, 4]
    assert {kind: found["count"] for kind, found in manifest["problems"].items()} == {
        "missing file": 1,
        "truncated or non-image file": 2,
    }
    code, again, _ = run(capsys, "prepare", "coco", tmp_path / "src", out, "--size", 16, "--workers", 1)
    assert code == 0
    assert again == printed.replace(
        f"{out / 'manifest.json'}", f"shards: 0 written, 1 were there already\n{out / 'manifest.json'}"
    )
    data = PackedDataset(out)
    assert data.paths() == ["0000.png", "0002.png", "0005.png"]
    assert data.boxes.offsets.tolist() == [0, 2, 2, 2]


def test_strict_stops_at_the_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    src, out = spoiled(tmp_path / "src"), tmp_path / "out"
    code, printed, err = run(capsys, "prepare", "coco", src, out, "--size", 4, "--workers", 1, "--strict")
    assert (code, printed) == (2, "")
    assert err.splitlines()[-1].startswith("debiaskd: truncated or non-image file: 0001.png")
    assert not (out / "manifest.json").exists()
    assert unfinished(out) == []


def test_nothing_readable_is_an_error(tmp_path: Path) -> None:
    src = trees.coco(tmp_path / "src", 2)
    for path in (src / "train2017").iterdir():
        path.write_text("no image")
    with pytest.raises(DataError, match="train2017: none of its 2 images could be read; 2 × truncated"):
        prepare("coco", src, tmp_path / "out", size=16)


def test_boxes_that_do_not_fit_their_picture(tmp_path: Path) -> None:
    boxes = [
        {"image_id": 10, "bbox": [50, 5, 10, 10], "category_id": 3},  # beside it
        {"image_id": 10, "bbox": [30, 20, 100, 100], "category_id": 7},  # over its edge
        {"image_id": 11, "bbox": [1, 1, 5, 5], "category_id": 3},
    ]

    def change(document: dict[str, Any]) -> None:
        document["images"][1]["width"] = 80

    prepared = prepare("coco", trees.coco(tmp_path / "src", 2, boxes=boxes, change=change), tmp_path / "out", size=20)
    assert prepared.problems.found["box outside of its image"] == ["0000.png"]
    (name,) = prepared.problems.found["image of another size than annotated, its boxes not used"]
    assert name == "0001.png (40×30, annotated 80×30)"
    data = PackedDataset(tmp_path / "out")
    assert data.boxes.coords.tolist() == [[15, 13, 20, 20]]
    assert data.boxes.annotated.tolist() == [True, False]
    assert data.target.tolist() == [[0, 1, 0], [1, 0, 0]]


def test_every_mode_of_picture_in_one_folder(tmp_path: Path) -> None:
    from PIL import Image

    trees.folder(tmp_path / "src", 1, None)
    cats, dot = tmp_path / "src" / "cat", Image.new("RGB", (1, 1), (9, 9, 9))
    Image.new("L", (8, 8), 9).save(cats / "gray.jpg")
    Image.new("CMYK", (8, 8), (246, 246, 246, 0)).save(cats / "cmyk.jpg", quality=100)
    Image.fromarray(np.full((8, 8), 9 * 257, np.uint16)).save(cats / "sixteen.png")
    dot.resize((8, 8)).quantize(2).save(cats / "palette.png")
    dot.save(cats / "dot.png")
    prepared = prepare("folder", tmp_path / "src", tmp_path / "out", size=6)
    assert prepared.problems.found == {}
    data = PackedDataset(tmp_path / "out")
    for i, name in enumerate(data.paths()):
        if not name.endswith("0.png"):
            assert (data[i][0].int() - 9).abs().max() <= 3, name


# -- the place it is written to ------------------------------------------------------------------------------------


class FullDisk:
    """A file on a disk that takes so many bytes more."""

    def __init__(self, file: Any, room: int) -> None:
        self.file, self.room = file, room

    def write(self, content: Any) -> int:
        self.room -= len(memoryview(content).cast("B"))
        if self.room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return int(self.file.write(content))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


def test_full_disk(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    src, out = trees.coco(tmp_path / "src", 4), tmp_path / "out"
    init = shards.NpyWriter.__init__

    def cramped(self: shards.NpyWriter, *arguments: Any) -> None:
        init(self, *arguments)
        self.pixels = FullDisk(self.pixels, 2000)  # type: ignore[assignment]

    with monkeypatch.context() as patch:
        patch.setattr(shards.NpyWriter, "__init__", cramped)
        code, _, err = run(capsys, "prepare", "coco", src, out, "--size", 16, "--workers", 1)
    assert code == 2
    assert err.splitlines()[-1] == f"debiaskd: {out / 'train2017'}: No space left on device"
    assert unfinished(out) == []
    assert list((out / "train2017").iterdir()) == []
    assert run(capsys, "prepare", "coco", src, out, "--size", 16, "--workers", 1)[0] == 0  # with room again it goes on


@pytest.mark.parametrize("name", ["manifest.json", "prepare.json", "shard.json"])
def test_full_disk_at_the_small_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    src, out = trees.coco(tmp_path / "src", 2), tmp_path / "out"
    write_text = Path.write_text

    def cramped(self: Path, text: str, *rest: Any, **options: Any) -> int:
        if self.name.endswith(name):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write_text(self, text, *rest, **options)

    monkeypatch.setattr(Path, "write_text", cramped)
    code, _, err = run(capsys, "prepare", "coco", src, out, "--size", 16, "--workers", 1)
    assert code == 2
    assert "No space left on device" in err.splitlines()[-1]
    assert str(out) in err
    assert unfinished(out) == []
    assert not (out / "manifest.json").exists()


def test_output_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    src = trees.coco(tmp_path / "src", 1)
    locked = Path("/proc/1/nothing") if os.geteuid() == 0 else tmp_path / "locked"  # root writes everywhere else
    if os.geteuid() != 0:
        locked.mkdir(mode=0o500)
    for out in (locked / "out", Path("/proc/self") if os.geteuid() == 0 else locked):
        code, _, err = run(capsys, "prepare", "coco", src, out, "--size", 16, "--workers", 1)
        assert code == 2
        assert err.count("\n") == 1
        assert str(out.parts[1]) in err


def test_output_that_is_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("mine")
    code, _, err = run(capsys, "prepare", "coco", trees.coco(tmp_path / "src", 1), tmp_path / "file")
    assert code == 2
    assert str(tmp_path / "file") in err
    assert (tmp_path / "file").read_text() == "mine"


# -- the command line ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["prepare"], "{coco,voc,waterbirds,celeba,folder,csv,cifar,mnist_on_cifar,digits}"),
        (["prepare", "imagenet", "a", "b"], "imagenet"),
        (["prepare", "coco", "a"], "OUT"),
        (["prepare", "coco", "/nowhere/at/all", "b"], "/nowhere/at/all: no such folder"),
        (["prepare", "coco", "a", "b", "--size", "0"], "must be an integer >= 1, got '0'"),
        (["prepare", "coco", "a", "b", "--workers", "-1"], "--workers"),
        (["prepare", "coco", "a", "b", "--crowd", "eat"], "eat"),
        (["prepare", "voc", "a", "b", "--crowd", "drop"], "--crowd"),
        (["prepare", "coco", "a", "b", "--format", "zip"], "zip"),
        (["prepare", "cifar", "a", "b", "--labels", "rough"], "rough"),
        (["prepare", "cifar", "a", "b", "--fit", "pad"], "--fit"),
        (["prepare", "waterbirds", "a", "b", "--bias", "Male"], "--bias"),
        (["prepare", "mnist_on_cifar", "a", "b", "--agreement", "nan"], "must be a share in [0, 1], got 'nan'"),
        (["prepare", "mnist_on_cifar", "a", "b", "--seed", "-1"], "--seed"),
        (["prepare", "mnist_on_cifar", "a", "b", "--train", "0"], "must be an integer >= 1, got '0'"),
        (["prepare", "digits", "a", "b"], "unrecognized arguments: b"),
        (["prepare", "digits"], "the following arguments are required: OUT"),
    ],
)
def test_bad_usage_is_one_line(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert message in err
    assert list(tmp_path.iterdir()) == []


def test_bad_arguments() -> None:
    for arguments, message in (
        ({"kind": "imagenet"}, "kind must be one of 'coco', 'voc', .*'mnist_on_cifar', 'digits', got 'imagenet'"),
        ({"kind": "digits"}, "src must be None for digits, got "),
        ({"fit": "crop"}, "fit must be one of 'squash', 'pad', got 'crop'"),
        ({"size": 0}, "size must be an integer >= 1, got 0"),
        ({"workers": 0}, "workers must be an integer >= 1, got 0"),
        ({"format": "zip"}, "format must be one of"),
    ):
        with pytest.raises(ValueError, match=message):
            prepare(**{"kind": "coco", "src": "a", "out": "b", **arguments})  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"size must be an integer, got 3.5"):
        prepare("coco", "a", "b", size=3.5)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", list(READERS))
def test_help_names_the_size_that_is_taken(capsys: pytest.CaptureFixture[str], kind: str) -> None:
    with pytest.raises(SystemExit):
        cli.main(["prepare", kind, "--help"])
    assert f"side of the stored images; default: {READERS[kind].size}" in capsys.readouterr().out


def test_missing_litdata_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "litdata", None)
    src = trees.coco(tmp_path / "src", 1)
    code, _, err = run(capsys, "prepare", "coco", src, tmp_path / "out", "--format", "litdata")
    assert code == 2
    assert "litdata, which is not installed: pip install 'debiaskd[data]'" in err


def test_killed_worker_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def __init__(self, *rest: Any) -> None:
            pass

        def submit(self, *rest: Any) -> Future[Any]:
            future: Future[Any] = Future()
            future.set_exception(BrokenProcessPool())
            return future

        def shutdown(self, **rest: Any) -> None:
            pass

    monkeypatch.setattr(concurrent.futures, "ProcessPoolExecutor", Broken)
    with pytest.raises(DataError, match="a process that decodes was killed"):
        prepare("coco", trees.coco(tmp_path / "src", 4), tmp_path / "out", size=16, shard_size=2, workers=2)


def test_error_of_a_worker_is_raised_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With threads in place of processes, which would take seconds to start."""

    def pool(workers: int, context: Any, start: Any, arguments: Any) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(workers, initializer=start, initargs=arguments)

    monkeypatch.setattr(concurrent.futures, "ProcessPoolExecutor", pool)
    monkeypatch.setattr(making, "start_worker", lambda stop: setattr(making, "_stop", stop))
    with pytest.raises(DataError, match=r"truncated or non-image file: 0001\.png"):
        prepare("coco", spoiled(tmp_path / "src"), tmp_path / "out", size=4, shard_size=3, workers=2, strict=True)
    assert unfinished(tmp_path / "out") == []
    assert making._stop.is_set()
