"""`debiaskd report`: the page says what the runs' files say, and stands alone."""

from __future__ import annotations

import csv
import dataclasses
import json
import re
import shutil
import statistics
from pathlib import Path

import pytest
import torch

pytest.importorskip("lightning_fabric")
pytest.importorskip("jsonargparse")
pytest.importorskip("torchdata")
pytest.importorskip("safetensors")

import data_trees as trees
import report_runs
import training_runs as runs
from cli_runs import command
from pages import Loads

from debiaskd.cli import entry as cli
from debiaskd.data import prepare
from debiaskd.evaluation.evaluate import LoadedStage, StageEvaluation, evaluate_run, evaluation_split
from debiaskd.ops.ignore import of_class
from debiaskd.reports import comparison
from debiaskd.reports.measured import choose, looks, measure
from debiaskd.reports.sections import Section
from debiaskd.terms import make_guide
from debiaskd.training.validation import attribution_options

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.xdist_group("reports")]

NAMES = ("erm-0", "erm-1", "guided")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """erm-0, erm-1 and guided on the same images; small on others; page.html of the first three."""
    root = report_runs.make(tmp_path_factory.mktemp("reports"), [*NAMES, "small"])
    assert cli.main(["report", *(str(root / name) for name in NAMES), "--out", str(root / "page.html")]) == 0
    return root


@pytest.fixture(scope="module")
def page(root: Path) -> str:
    return (root / "page.html").read_text(encoding="utf-8")


@pytest.fixture
def run(root: Path, tmp_path: Path) -> Path:
    """A copy that may be written into."""
    return Path(shutil.copytree(root / "erm-0", tmp_path / "run"))


def figures(run: Path) -> dict[str, float | None]:
    found: dict[str, float | None] = evaluate_run(run, "student", None, None)[0]["figures"]
    return found


def table(html: str, first: str) -> dict[str, dict[str, str]]:
    """The rows of the table whose first heading it is: by their first cell, then by heading."""
    whole = next(part for part in re.findall(r"<table.*?</table>", html, re.S) if f"<th>{first}</th>" in part)
    headings = re.findall(r"<th>(.*?)</th>", whole)
    found = {}
    for row in re.findall(r"<tr.*?</tr>", whole, re.S):
        cells = [re.sub(r"<.*?>", "", cell) for cell in re.findall(r"<td.*?</td>", row, re.S)]
        if len(cells) == len(headings):
            found[cells[0]] = dict(zip(headings, cells))
    return found


def section(html: str, heading: str) -> str:
    return html.partition(f"<h2>{heading}</h2>")[2].partition("</section>")[0]


def rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


# -- what the page says -----------------------------------------------------------------------------------------------


def test_the_table_has_the_figures_of_evaluate(root: Path, page: str) -> None:
    both, guided = [figures(root / name) for name in NAMES[:2]], figures(root / "guided")
    found = table(page, "run")
    assert list(found) == ["erm", "guided"], "two seeds are one row"
    for key, heading in (("accuracy", "accuracy %"), ("worst_group_accuracy", "worst group %"), ("epg", "EPG %")):
        values = [100 * (one[key] or 0.0) for one in both]
        expected = f"{statistics.fmean(values):.1f} ± {statistics.stdev(values):.1f}"
        assert found["erm"][heading] == expected and expected != "0.0 ± 0.0"
        assert found["guided"][heading] == f"{100 * (guided[key] or 0.0):.1f}"
    assert (
        found["guided"]["parameters"] == f"{sum(p.numel() for p in LoadedStage(root / 'guided').model.parameters()):,}"
    )
    every = table(page.partition("Every run")[2], "seed")
    assert [(name, row["seed"]) for name, row in every.items()] == [("erm-0", "0"), ("erm-1", "1"), ("guided", "0")]
    assert every["erm-1"]["IoU %"] == f"{100 * (both[1]['iou'] or 0.0):.1f}"
    facts = json.loads((root / "guided" / "student" / "stage.json").read_text())["facts"]
    assert (every["guided"]["epoch"], every["guided"]["kept by"]) == (f"{facts['epoch'] + 1} of 2", "pareto")


def test_recipes_are_told_by_what_they_differ_in(root: Path, page: str) -> None:
    told = re.findall(r'<td class="told".*?>(.*?)</td>', page)
    assert told == ["seeds 0, 1", "seed 0 · guide: weight 0.2 · selection.rule: pareto"]
    assert table(page.partition("side by side")[2], "guided")["terms.guide"] == {
        "": "terms.guide",
        "erm": "–",
        "guided": "weight 0.2",
    }
    assert "birds16, test: 16 images" in page and "of birds16, 16 images" in page


def test_bars_are_the_groups_accuracies(root: Path, page: str) -> None:
    bars = dict(re.findall(r"<g><title>guided, (.*?): ([\d.]+) %</title>", page))
    groups = ["landbird on land", "landbird on water", "waterbird on land", "waterbird on water"]
    known = figures(root / "guided")
    expected = {g: known[f"group_{i}_accuracy"] for i, g in enumerate(groups)}
    assert bars == {g: f"{100 * value:.1f}" for g, value in expected.items() if value is not None} and len(bars) >= 2
    height = r'guided, {}: .*?</title>\s*<rect [^>]*height="([\d.]+)"'
    for group, value in bars.items():
        assert float(re.findall(height.format(group), page)[0]) == pytest.approx(2.5 * float(value), abs=0.13)
    assert len(re.findall(r'class="whisker"', page)) == len(bars), "of the two seeds alone"


def test_pareto_plots_have_what_was_kept(root: Path, page: str) -> None:
    fronts = section(page, "What was kept, on validation")
    facts = [json.loads((root / name / "student" / "stage.json").read_text())["facts"] for name in NAMES]
    plots = re.findall(r"<svg.*?</svg>", fronts, re.S)
    assert len(plots) == 3
    for plot in plots:
        assert len(re.findall("<circle", plot)) == sum(len(one["front"]) for one in facts)
        assert len(re.findall('r="6"', plot)) == 3, "the epoch that each run ended with"
    validated = rows(root / "guided" / "student" / "epochs.csv")[facts[2]["epoch"]]
    told = ", ".join(f"{name} {100 * float(validated[name.lower()]):.1f} %" for name in ("accuracy", "EPG", "IoU"))
    assert f"<title>guided, epoch {facts[2]['epoch'] + 1}: {told}</title>" in plots[0]


def test_the_grid_has_a_picture_of_each_run(root: Path, page: str) -> None:
    grid = section(page, "Where each run looks")
    shown = re.findall(r'verdict">test:(\d+)<', grid)
    assert len(shown) == 8 and len(set(shown)) == 8
    assert len(re.findall('<image href="data:image/png;base64,', grid)) == 8 * (1 + len(NAMES))
    assert len(re.findall('class="box"', grid)) == 8 * (1 + len(NAMES)), "every bird has one box"
    cells = re.findall(
        r"attribution of (\S+?)\".*?verdict\">([\d.]+) % in box<br><span class=\"(\w+)\">. (\w+)<", grid, re.S
    )
    assert [cell[0] for cell in cells] == list(NAMES) * 8
    for name in NAMES:
        mine = [cell for cell in cells if cell[0] == name]
        for number, (_, energy, verdict, predicted) in zip(shown, mine):
            expected, guess, target = judged(root / name, int(number))
            assert float(energy) == pytest.approx(100 * expected, abs=0.11)
            assert predicted == ("landbird", "waterbird")[guess] and verdict == ("wrong", "right")[guess == target]


def judged(run: Path, number: int) -> tuple[float, int, int]:
    """(energy in the box with a mask that is painted, predicted class, class) of a test image."""
    loaded = LoadedStage(run)
    pictures = loaded.loader(evaluation_split(loaded, None))
    batch = pictures.transform(pictures.split.whole.__getitems__([number]))
    maps = make_guide(attribution_options(loaded.recipe, "student"), loaded.model).attribute(batch.images, batch.target)
    large = torch.nn.functional.interpolate(maps[None], loaded.size, mode="bilinear")[0, 0].clamp(min=0)
    mask = of_class(batch.boxes, batch.target).mask(loaded.size)[0]
    energy = float((large * mask).sum() / large.sum()) if large.any() else 0.0
    return energy, int(loaded.model(batch.images).argmax()), int(batch.target)


def test_curves_have_a_point_for_every_row_of_the_logs(root: Path, page: str) -> None:
    training = section(page, "Training")
    for title, file, column, drawn in (
        ("loss", "log", "loss", NAMES),
        ("loss: guide", "log", "guide", NAMES[2:]),
        ("accuracy %", "epochs", "accuracy", NAMES),
    ):
        chart = training.partition(f'aria-label="{title}"')[2].partition("</svg>")[0]
        lines = re.findall(r'<polyline points="(.*?)"><title>(.*?)</title>', chart)
        assert [name for _, name in lines] == list(drawn)
        values = [[float(row[column]) for row in rows(root / name / "student" / f"{file}.csv")] for name in drawn]
        places = [[float(place.split(",")[1]) for place in points.split()] for points, _ in lines]
        assert [len(line) for line in places] == [len(line) for line in values]
        high = max(value for line in values for value in line)
        top = min(place for line in places for place in line)
        for line, drawn_line in zip(values, places):  # the higher the value, the smaller the place
            assert (max(line) == high) == (min(drawn_line) == top)
    assert "learning_rate" not in training


def test_the_page_stands_alone_and_is_the_same_again(root: Path, page: str, tmp_path: Path) -> None:
    loads = Loads()
    loads.feed(page)
    assert loads.images and all(uri.startswith("data:image/png;base64,") for uri in loads.found)
    assert not re.search(r"https?:|//[a-z]|@import|url\(|<script", re.sub(r"base64,[^\"]*", "", page))
    assert "prefers-color-scheme: dark" in page
    assert str(root) not in page, "where the runs lie is nobody's business"
    comparison.write_report([root / name for name in NAMES], tmp_path / "new" / "again.html")
    assert (tmp_path / "new" / "again.html").read_bytes() == (root / "page.html").read_bytes()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["again.html"]


def test_other_pictures_are_another_section(capsys: pytest.CaptureFixture[str], root: Path, tmp_path: Path) -> None:
    out = tmp_path / "p.html"
    code, told, err = command(capsys, "report", root / "erm-0", root / "small", root / "erm-1", "--out", out)
    assert code == 0 and "measuring small" in err
    assert told.splitlines() == ["2 runs on birds16, test: 16 images", "1 run on birds8, test: 16 images", str(out)]
    html = out.read_text()
    assert re.findall('<h2 class="set">(.*?)</h2>', html) == [
        "birds16, test: 16 images",
        "birds8, test: 16 images",
    ]
    assert "3 runs on 2 sets of images" in html
    # On the same images they stand side by side, and differ in what they were trained on.
    options = ["--data", root / "birds16", "--split", "train[:25%]", "--out", out]
    code, told, _ = command(capsys, "report", root / "erm-0", root / "small", *options)
    assert code == 0 and told.startswith("2 runs on birds16, train[:25%]: 12 images\n")
    html = out.read_text()
    assert re.search(r"data\.path: birds16 \w{8}<.*data\.path: birds8 \w{8}<", html, re.S)
    assert "The runs were validated on different images" in html
    assert table(html, "run")["small"]["accuracy %"] == percent(
        evaluate_run(root / "small", "student", "train[:25%]", str(root / "birds16"))[0]["figures"]["accuracy"]
    )


def percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"


def test_pictures_of_several_classes_looked_at_in_several_ways(tmp_path: Path) -> None:
    def shows(i: int) -> str:
        cat = trees.voc_object("cat", (18, 10, 39, 29)) if i % 4 == 0 else ""
        return trees.voc_object(("dog", "bird", "cow")[i % 3], (3, 3, 20, 20)) + cat

    trees.voc(tmp_path / "voc", [shows(i) for i in range(24)])
    prepare("voc", tmp_path / "voc", tmp_path / "voc16", size=16, workers=1)
    data = {"train": "train[:50%]", "validation": "train[50%:]", "test": "train"}
    for name, layer in (("input", "Input"), ("final", "Final")):
        document = {**report_runs.GUIDED, "data": data, "terms": {"supervised": {}, "guide": {"layer": layer}}}
        runs.train(runs.write(tmp_path / "r.yaml", tmp_path / "voc16", document), tmp_path / name)
    told = comparison.write_report([tmp_path / "input", tmp_path / "final"], tmp_path / "p.html")
    html = (tmp_path / "p.html").read_text()
    assert told == ["2 runs on voc16, train: 24 images"]
    assert "do not compare: input × gradient at Input (input); input × gradient at Final (final)." in html
    cells = [re.findall(r"<td.*?</td>", row) for row in re.findall(r'<tr class="named">.*?</tr>', html, re.S)]
    best = {k for row in cells for k, cell in enumerate(row) if 'class="best"' in cell}
    assert best == {1, 2}, "F1 and mAP, and neither EPG nor IoU"
    for name in ("input", "final"):
        assert table(html, "run")[name]["F1 %"] == percent(figures(tmp_path / name)["f1"])
    assert "Accuracy by group" not in html
    grid = section(html, "Where each run looks")
    shown = re.findall(r'verdict">train:(\d+)<br>(\w+)<', grid)
    assert [title for _, title in shown] == sorted(["bird", "cat", "cow", "dog"] * 2)
    assert len({number for number, _ in shown}) == 8
    for number, title in shown:  # the class is one that the image shows
        assert title in shows(int(number))
    assert len(re.findall(r"[✓✗] p = 0\.\d\d", grid)) == 16


def test_an_evaluation_of_the_same_is_used_again_and_of_another_not(run: Path, root: Path, tmp_path: Path) -> None:
    def accuracy(data: str | None = None, split: str | None = None) -> str:
        comparison.write_report([run], tmp_path / "p.html", data=data, split=split)
        return table((tmp_path / "p.html").read_text(), "run")["run"]["accuracy %"]

    def mark(file: Path) -> None:
        document = json.loads(file.read_text())
        document["figures"]["accuracy"] = 0.123
        file.write_text(json.dumps(document))

    file, measured = run / "evaluation-test.json", accuracy()
    document = json.loads(file.read_text())
    assert measured == percent(document["figures"]["accuracy"]) and document["split"] == "test"
    mark(file)
    assert accuracy() == "12.3"
    assert accuracy(str(root / "birds8")) != "12.3"
    accuracy(split="test[:50%]")
    mark(run / "evaluation-test-50.json")
    assert accuracy(split="test[:50%]") == "12.3" != accuracy(split="test[50%:]")
    assert accuracy() == "12.3"  # other images have files of their own
    # Another threshold of the IoU, as validation would have chosen it.
    stage = json.loads((run / "student" / "stage.json").read_text())
    stage["facts"]["figures"]["iou_threshold"] = 0.9
    (run / "student" / "stage.json").write_text(json.dumps(stage))
    assert accuracy() == measured
    assert json.loads(file.read_text())["figures"]["iou_threshold"] == 0.9
    file.write_text("{")
    assert accuracy() == measured
    mark(file)
    assert accuracy() == "12.3"
    model = "model.safetensors"
    shutil.copy(root / "erm-1" / "student" / model, run / "student")
    other = json.loads((root / "erm-1" / "student" / "stage.json").read_text())
    (run / "student" / "stage.json").write_text(json.dumps({**stage, "outputs": {model: other["outputs"][model]}}))
    assert accuracy() == percent(figures(root / "erm-1")["accuracy"])


def test_pictures_without_any_label_are_a_page_too(tmp_path: Path) -> None:
    trees.coco(tmp_path / "src", 4)
    shows = [{"image_id": 10, "bbox": [4, 3, 10, 6], "category_id": 7}]
    trees.coco(tmp_path / "src", 4, split="val2017", boxes=shows, seed=10)
    trees.coco(tmp_path / "src", 3, split="test2017", boxes=shows, seed=20)
    prepare("coco", tmp_path / "src", tmp_path / "data", size=12, workers=1)
    document = {**runs.PLAIN, "schedule": {"epochs": 1, "batch": 2}}
    names = {"train": "train2017", "validation": "val2017", "test": "test2017"}
    run = tmp_path / "run"
    runs.train(runs.write(tmp_path / "r.yaml", tmp_path / "data", {**document, "data": names}), run)
    loaded = LoadedStage(run)
    split = evaluation_split(loaded, None)
    for hidden in (split.whole.target, split.target):
        hidden.zero_()
    figures = StageEvaluation(loaded, split).measure()["figures"]
    assert figures["map"] is None and figures["map_classes"] == 0 and "epg" not in figures
    assert choose(split) == [] == looks(loaded, split, attribution_options(loaded.recipe, "student"), [])
    found = dataclasses.replace(measure(run, "run"), figures=dict.fromkeys(figures), examples=[], looks=[])
    html = comparison.page([Section([found])])
    assert "nothing that accuracy can be measured by" in html and "Where each run looks" not in html
    shown = comparison.page([Section([measure(run, "run")])])
    assert "Classes in the mAP: 1." in shown
