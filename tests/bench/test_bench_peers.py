"""That `debiaskd bench peers` trains by every provider and counts what it says; not how fast."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("timm", reason="needs the train extra")
pytest.importorskip("torchdata", reason="needs the train extra")
pytest.importorskip("lightning_fabric", reason="needs the train extra")
pytest.importorskip("jsonargparse", reason="needs the train extra")
pytest.importorskip("torchdistill", reason="needs the bench extra")

from debiaskd.bench import __main__ as bench
from debiaskd.bench import peers
from debiaskd.bench.peer_recipes import PROVIDERS

TINY = ("--images", "5", "--batch", "2", "--size", "32", "--epochs", "2", "--rounds", "1", "--threads", "1")


def test_every_provider_trains_whole_epochs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(peers, "PAIRS", (("resnet10t", "resnet10t", 96, 480),))
    assert bench.main(["peers", "--pairs", "1", *TINY, "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("peers-cpu-*.json")
    document = json.loads(path.read_text())
    (pair,) = document["pairs"]
    assert pair["images"] == 4, "no more than fill the batches"
    assert set(pair["runs"]) == set(PROVIDERS)
    assert all(len(seconds) == 2 and min(seconds) > 0 for (seconds,) in pair["runs"].values())
    assert peers.table(document) in capsys.readouterr().out


def test_ratios_are_of_medians_of_first_and_of_later_epochs() -> None:
    runs = {"plain": [[2.0, 1.0], [4.0, 3.0], [6.0, 5.0]], "debiaskd": [[8.0, 1.0], [8.0, 2.0], [8.0, 1.0]]}
    pair = {"teacher": "a", "student": "b", "size": 8, "images": 12, "runs": runs}
    pair["prepare"] = {"debiaskd": [1.0, 2.0, 3.0], "torchvision": [4.0, 5.0, 1.0]}
    assert peers.rates(pair, "plain") == (3, 4)
    rows = peers.table({"pairs": [pair]}).splitlines()[2:]
    assert [row.split("|")[4:6] for row in rows] == [[" 0.50× ", " 3.00× "], [" 2.00× ", " "]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--rounds", "0"), "--rounds must be an integer >= 1, got 0"),
        (("--only", "nothing"), "invalid choice: 'nothing'"),
    ],
)
def test_bad_arguments(arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        peers.main(arguments)
    assert message in capsys.readouterr().err
