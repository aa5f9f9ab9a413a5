"""`debiaskd report`: one line for each mistake, and runs of which something is gone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lightning_fabric")
pytest.importorskip("jsonargparse")
pytest.importorskip("torchdata")
pytest.importorskip("safetensors")

import report_runs
from cli_runs import command, failed

from debiaskd.reports import comparison

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.xdist_group("reports_bad")]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return report_runs.make(tmp_path_factory.mktemp("reports"), ["erm-0", "guided"])


@pytest.fixture
def run(root: Path, tmp_path: Path) -> Path:
    """A copy that may be written into."""
    return Path(shutil.copytree(root / "erm-0", tmp_path / "run"))


def test_runs_that_cannot_be_compared(capsys: pytest.CaptureFixture[str], root: Path, run: Path) -> None:
    out, erm = run.parent / "p.html", root / "erm-0"
    out.write_text("earlier")

    def refused(*arguments: object) -> str:
        return failed(*command(capsys, "report", *arguments, "--out", out)).removeprefix("debiaskd: ")

    assert refused(erm, run.parent / "none") == f"{run.parent / 'none'}: is no run's folder, it has no recipe.yaml\n"
    assert refused(erm, root / "guided", erm) == f"{erm}: is given twice\n"
    (run.parent / "link").symlink_to(erm)
    assert refused(erm, run.parent / "link") == f"{run.parent / 'link'}: is given twice, also as {erm}\n"
    assert "measuring run" in (found := command(capsys, "report", erm, run, "--out", out)[2])
    assert found.endswith("debiaskd: run: is the same run as erm-0\n")
    (run / "student" / "stage.json").unlink()
    assert refused(erm, run) == f"{run}: stage 'student' is not finished; finished: none\n"
    second = Path(shutil.copytree(run, run.parent / "second"))
    assert refused(run, erm, second) == f"{run}, {second}: are not finished\n"
    assert out.read_text() == "earlier"


def test_data_and_logs_that_do_not_fit(capsys: pytest.CaptureFixture[str], root: Path, run: Path) -> None:
    out = run.parent / "p.html"

    def refused(*arguments: object) -> str:
        code, told, err = command(capsys, "report", run, *arguments, "--out", out)
        assert (code, told) == (2, "") and not out.exists() and "Traceback" not in err
        return err.splitlines()[-1]

    assert "--split: " in refused("--split", "tests") and "tests" in refused("--split", "tests")
    assert "nowhere" in refused("--data", "nowhere")
    others = Path(shutil.copytree(root / "birds16", run.parent / "others"))
    manifest = json.loads((others / "manifest.json").read_text())
    (others / "manifest.json").write_text(json.dumps({**manifest, "classes": ["gull", "tern"]}))
    found = refused("--data", others)
    assert found == f"debiaskd: {run}: knows other classes than {others}: landbird, waterbird; not gull, tern"
    for text in ("step,loss\n1,much\n", "step,loss\n1\n", "step,loss\n\xff1,\0\n"):
        (run / "student" / "log.csv").write_text(text, encoding="latin-1")
        assert f"debiaskd: {run / 'student' / 'log.csv'}: damaged" in refused()


def test_pages_that_cannot_be_written(
    capsys: pytest.CaptureFixture[str], root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comparison, "measure", lambda *_: pytest.fail("measured, although the page has no place"))
    (tmp_path / "file").write_text("mine")
    for out, why in ((tmp_path, "Is a directory"), (tmp_path / "file" / "p.html", "Not a directory")):
        found = failed(*command(capsys, "report", root / "erm-0", "--out", out))
        assert found == f"debiaskd: {out}: {why}\n"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_run_that_may_only_be_read(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(path: Path, document: Any) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("debiaskd.utils.files.write_json", refused)
    (run / "evaluation-test.json").unlink(missing_ok=True)
    assert comparison.write_report([run], tmp_path / "p.html") == ["1 run on birds16, test: 16 images"]
    assert not (run / "evaluation-test.json").exists()


def test_names_are_text_and_the_page_has_a_usual_place(
    capsys: pytest.CaptureFixture[str], run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(run.parent)
    run.rename("a<i>'&")
    code, told, _ = command(capsys, "report", "a<i>'&")
    assert code == 0 and told.splitlines() == ["1 run on birds16, test: 16 images", "report.html"]
    html = Path("report.html").read_text()
    assert "a&lt;i&gt;&#39;&amp;" in html and "a<i>" not in html


def test_runs_without_their_logs_have_no_curves(run: Path, tmp_path: Path) -> None:
    for name in ("log", "epochs"):
        (run / "student" / f"{name}.csv").unlink()
    comparison.write_report([run], tmp_path / "p.html")
    html = (tmp_path / "p.html").read_text()
    assert "<h2>Training</h2>" not in html and "What was kept" not in html and "Where each run looks" in html
