"""The benchmarks run from end to end, and time nothing that is wrong. How fast it all is, no test says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bench import harness, report, timing
from bench.__main__ import OPS, main
from bench.localization import random_boxes

FIGURES = {"step", "forward", "clock", "peak_bytes", "error"}

pytestmark = pytest.mark.xdist_group("bench")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, Path]:
    out = tmp_path_factory.mktemp("bench")
    threads = torch.get_num_threads()
    providers = ["eager", "cpp", "loop", "mask ready"]  # all but compile, which takes its time
    assert main(["--quick", "--system-malloc", "--threads", "1", "--out", str(out), "--providers", *providers]) == 0
    torch.set_num_threads(threads)
    (path,) = out.glob("*.json")
    return json.loads(path.read_text()), out


def test_results_have_the_schema_that_the_reports_read(results: tuple[dict, Path]) -> None:
    document, _ = results
    assert document["schema"] == 1
    assert {"date", "device", "cpu", "threads", "torch", "build", "freed_memory"} <= document["environment"].keys()
    assert {case["op"] for case in document["cases"]} == set(OPS)
    for case in document["cases"]:
        assert {"eager", *report.COPIES} <= case["providers"].keys()
        for name, found in case["providers"].items():
            assert found.keys() == FIGURES
            assert 0 < found["step"]["p10"] <= found["step"]["median"] <= found["step"]["p90"]
            assert (found["forward"] is None) == (name in report.COPIES)


def test_memory_is_the_allocators(results: tuple[dict, Path]) -> None:
    for case in results[0]["cases"]:
        assert case["providers"]["clone"]["peak_bytes"] == case["map_bytes"]
        assert case["providers"]["copy"]["peak_bytes"] == 0


def test_every_report_can_be_made(results: tuple[dict, Path]) -> None:
    document, out = results
    assert len(list(out.glob("*.png"))) == len(OPS)
    text = report.markdown(document, {op: module.GOALS for op, module in OPS.items()})
    for case in document["cases"]:
        assert case["case"] in text
        assert case["case"] in report.table(case)


def test_goals_name_cases_that_exist() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for module in OPS.values():
        named = {case.name for case in module.cases(device)}
        assert {goal.case for goal in module.GOALS if device == "cuda" or goal.provider == "cpp"} <= named


def test_a_goal_is_a_ratio_of_medians() -> None:
    times = {"eager": 30.0, "cpp": 2.0, "clone": 1.0}
    case = {"providers": {name: {"step": {"median": value}} for name, value in times.items()}}
    assert "15 measured, met" in report.Goal("main", "cpp", "eager", 15.0).sentence(case)
    assert "15 measured, missed" in report.Goal("main", "cpp", "eager", 16.0).sentence(case)
    assert "2 measured, met" in report.Goal("main", "cpp", "clone", 1 / 2).sentence(case)
    assert "not measured" in report.Goal("main", "cpp", "compile", 2.0).sentence(case)


def quick_case() -> harness.Case:
    case = next(iter(OPS["feature_match"].cases("cpu", quick=True)))
    case.compiled = False
    return case


@pytest.mark.parametrize(
    ("wrong", "what"),
    [
        (lambda right: lambda x: right(x) * 1.01, "gradient|loss"),
        (lambda right: lambda x: right(x) + 0.1, "loss"),
        (lambda right: lambda x: right(x * 2) - right(x * 2).detach() + right(x).detach(), "gradient"),
        (lambda right: lambda x: right(x) * float("nan"), "loss|gradient"),
    ],
)
def test_a_wrong_provider_is_not_timed(wrong, what, monkeypatch: pytest.MonkeyPatch) -> None:
    case = quick_case()
    case.references["wrong"] = wrong(case.eager)
    monkeypatch.setattr(harness, "interleave", lambda *_: pytest.fail("something was timed"))
    with pytest.raises(harness.WrongProviderError, match=f"the ({what}) of wrong is off"):
        harness.run(case, timing.Settings())


def test_what_runs_takes_turns() -> None:
    order: list[str] = []
    calls = {name: (lambda name=name: order.append(name)) for name in "abc"}
    settings = timing.Settings(seconds=0.0, fewest_rounds=5, most_rounds=5)
    times, clocks = timing.interleave(calls, settings)
    assert [len(t) for t in times.values()] == [5, 5, 5]
    assert clocks == dict.fromkeys("abc", "host")
    runs = "".join(name for i, name in enumerate(order) if i == 0 or order[i - 1] != name)
    assert "a" in runs[6:] and "c" in runs[6:]  # past the warm-up, each comes again and again


def test_boxes_lie_inside_of_the_picture() -> None:
    boxes = random_boxes(5, 60, (17, 40))
    assert len(boxes) == 5 and boxes.coords.shape == (300, 4)
    assert boxes.coords.min() >= 0 and bool((boxes.coords[:, 2] <= 40).all()) and bool((boxes.coords[:, 3] <= 17).all())


@pytest.mark.parametrize("arguments", [["nothing"], ["--threads", "0"], ["--device", "tpu"], ["--seconds", "-1"]])
def test_bad_arguments_exit_with_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2


def test_cases_are_added_to_a_file_and_drawn_later(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    options = ["--quick", "--threads", "1", "--append", "--out", str(tmp_path), "--providers", "eager"]
    for op in ("channel_dot", "feature_match", "feature_match"):  # measured again, a case takes the place of itself
        assert main([op, *options]) == 0
    torch.set_num_threads(threads)
    (path,) = tmp_path.iterdir()
    assert [case["op"] for case in json.loads(path.read_text())["cases"]] == ["channel_dot"] * 2 + ["feature_match"] * 2
    assert main(["--pictures", str(path)]) == 0
    assert len(list(tmp_path.glob("*.png"))) == 2


def test_a_provider_that_fails_is_left_out_of_what_is_added(tmp_path, monkeypatch, capsys) -> None:
    case = quick_case()

    def cases(device: str, quick: bool = False):
        case.references = {"wrong": lambda x: case.eager(x) * 2, "broken": lambda x: x.reshape(7)}
        yield case

    monkeypatch.setattr(OPS["feature_match"], "cases", cases)
    options = ["--quick", "--threads", str(torch.get_num_threads()), "--providers", "eager", "wrong", "broken"]
    assert main(["feature_match", *options, "--check"]) == 1
    assert "wrong WrongProviderError" in capsys.readouterr().out
    assert main(["feature_match", *options, "--append", "--out", str(tmp_path)]) == 1
    (path,) = tmp_path.iterdir()
    (found,) = json.loads(path.read_text())["cases"]
    assert found["failed"] == ["broken", "wrong"]
    assert "eager" in found["providers"] and "wrong" not in found["providers"]
