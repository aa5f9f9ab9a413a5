"""That the measuring of data runs and counts what it says; not how fast."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("PIL", reason="images are generated with pillow")
pytest.importorskip("torchdata", reason="needs the data extra")
pytest.importorskip("litdata", reason="needs the data extra")

from debiaskd.bench import data

from debiaskd.data import prepare


def test_reading_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "DIFFERENT", 3)
    monkeypatch.setattr(data, "SIZE", 16)
    src = data.generate(tmp_path / "src", 8)
    assert prepare("folder", src, tmp_path / "out", size=16).manifest["splits"]["train"]["boxes"] == 8
    packed = data.read_packed(tmp_path / "out", epochs=2)
    assert packed["images_per_second"] > 0
    assert len(packed["epochs"]) == 2
    assert data.read_files(src, epochs=1)["images_per_second"] > 0
    monkeypatch.setattr(data, "WORKERS", 1)
    streamed = data.read_streamed(src, tmp_path / "streamed", epochs=1)
    assert set(streamed) == {"images_per_second", "with_workers", "by_number"} and min(streamed.values()) > 0
    assert set(data.augment(tmp_path / "out", "cpu")) == {"channels_last", "contiguous"}
    with pytest.raises(RuntimeError, match="read 1 images of 2"):
        data.epoch([[0]], 2)
