"""Every number and image in README.md and docs/ comes from here.

    python docs/figures.py quickstart [OUT]   run the quickstart in OUT, where finished runs are used again, or in a
                                              temporary folder; keep its results and image in docs/results/
    python docs/figures.py                rewrite the figures in the pages from docs/results/ and bench/results/
    python docs/figures.py --check        exit with 1 where a page differs from what the files say

A page holds blocks `<!-- figures:NAME -->` ... `<!-- /figures -->`; what lies between is replaced by `BLOCKS[NAME]()`.
"""

from __future__ import annotations

import base64
import io
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "experiments")]

import comparisons  # noqa: E402

from bench import metrics as bench_metrics  # noqa: E402
from bench import peers as bench_peers  # noqa: E402
from bench import report as bench_report  # noqa: E402
from bench.__main__ import OPS  # noqa: E402
from debiaskd.reports import quickstart as report  # noqa: E402

RESULTS = ROOT / "docs" / "results"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"<!-- figures:(\S+) -->\n.*?<!-- /figures -->", re.DOTALL)
SHOWN = ("worst_group_accuracy", "average_accuracy", "energy_in_box", "parameters")


def quickstart_block() -> str:
    document = json.loads((RESULTS / "quickstart.json").read_text())
    summaries = report.summarize(document["rows"])
    columns = [column for column in report.COLUMNS if column[0] in SHOWN]
    lines = ["| method | " + " | ".join(heading for _, heading, _ in columns) + " |"]
    lines.append("| --- |" + " ---: |" * len(columns))
    for summary in summaries:
        cells = [summary.figures[key].text(digits) for key, _, digits in columns]
        lines.append(f"| {summary.method} | " + " | ".join(cells) + " |")
    where = document["environment"]
    seeds = len(document["settings"]["seeds"])
    lines += [
        "",
        f"{report.headline(summaries)} Means ± standard deviation over {seeds} seeds, test split; torch "
        f"{where['torch']}, {_processes(where)}{_duration(where)} "
        "([results.json](docs/results/quickstart.json)).",
        "",
        "![Accuracy by group, and where each method looks](docs/results/quickstart.png)",
    ]
    return "\n".join(lines)


def _processes(where: dict[str, Any]) -> str:
    if where.get("workers", 1) > 1:
        return f"{where['workers']} processes of one thread"
    return f"{where['threads']} thread{'s' * (where['threads'] > 1)}"


def _duration(where: dict[str, Any]) -> str:
    """How long the quickstart took on an idle machine; else nothing that could be taken for that."""
    if where.get("reused_runs") or max(where.get("load_average", [0.0])) > where.get("workers", where["threads"]) + 0.5:
        return ", trained beside other jobs, so that its seconds are not those of an idle machine"
    return f", {where['seconds']:.0f} seconds in total"


def bench_results() -> list[dict[str, Any]]:
    """All benchmark files, the oldest first."""
    files = sorted((ROOT / "bench" / "results").glob("*.json"), key=lambda path: path.stem.split("-", 1)[1])
    documents = [json.loads(path.read_text()) for path in files]
    return [document for document in documents if "cases" in document]


def whole_bench() -> dict[str, Any]:
    """The newest file of every op on a CPU, with freed memory kept."""
    places = ((found, found["environment"]) for found in bench_results())
    return [found for found, where in places if where["device"] == "cpu" and where["freed_memory"] == "kept"][-1]


def newest(kind: str) -> dict[str, Any]:
    """What the newest file KIND-DEVICE-DATE.json says."""
    files = sorted((ROOT / "bench" / "results").glob(f"{kind}-*.json"), key=lambda path: path.stem[-10:])
    found: dict[str, Any] = json.loads(files[-1].read_text())
    return found


def guidance_block() -> str:
    document = newest("guidance")
    results = document["results"]
    lines = ["| step | " + " | ".join(f"{r['model']}: time | kept" for r in results) + " |"]
    lines.append("| --- |" + " ---: | ---: |" * len(results))
    for rows in zip(*(result["rows"] for result in results)):
        lines.append(f"| {rows[0]['step']} | " + " | ".join(f"{r['time']:.2f} | {r['kept']:.2f}" for r in rows) + " |")
    where = document["environment"]
    sizes = " and ".join(f"{r['batch']}×3×{r['size']}×{r['size']} ({r['model']})" for r in results)
    lines += [
        "",
        f"Training steps as ratios to the unguided one: medians of {results[0]['rounds']} rounds each, {sizes}, "
        f"{where['cpu'] if where['device'] == 'cpu' else where['device']}, {where['threads']} threads, torch "
        f"{where['torch']}, {where['date']}; `python -m bench.guidance`.",
    ]
    return "\n".join(lines)


def own_maps_block() -> str:
    document = newest("own-maps")
    lines = ["| layer | batch | statistics held constant | PyTorch's batch norm |", "| --- | ---: | ---: | ---: |"]
    for row in document["rows"]:
        lines.append(
            f"| {row['layer']} | {row['batch']} | {100 * row['constant']:.1f} % | {100 * row['mixed']:.1f} % |"
        )
    where, size = document["environment"], document["size"]
    lines += [
        "",
        "Relative distance of a batch's maps from each image's own maps (one backward pass per image): "
        f"{document['model']} with random weights in training mode, {size}×{size}, torch {where['torch']}, "
        f"{where['date']}; `python -m bench.own_maps`.",
    ]
    return "\n".join(lines)


def _typed(document: dict[str, Any]) -> list[str]:
    """Commands and what they print, and where that was."""
    lines = ["```"]
    for said in document["said"]:
        lines += [f"$ {said['command']}", *said["output"].rstrip().split("\n")]
    where = document["environment"]
    threads = f"{where['threads']} thread{'s' * (where['threads'] > 1)}"
    return [*lines, "```", "", f"CPU, {threads}, torch {where['torch']}."]


def distill_block() -> str:
    return "\n".join(_typed(json.loads((RESULTS / "distill.json").read_text())))


def voc_block() -> str:
    document = json.loads((RESULTS / "voc2012_sample.json").read_text())
    lines = _typed(document)
    for name in document["pictures"]:
        lines += [
            "",
            f"![{Path(name).stem}: attribution of the student before and after guidance](results/voc2012_{name})",
        ]
    lines += ["", "![F1, EPG and IoU of every guided epoch on validation](results/voc2012_pareto.png)"]
    return "\n".join(lines)


def training_block() -> str:
    document = newest("training")
    words = {
        "bare": "teacher forward; student forward, backward; optimizer",
        "terms": "plus feature matching, guidance at the final layer, and CID's four terms",
        "cached": "plus these terms, teacher outputs read from the disk",
    }
    lines = ["| step | × bare | fastest and slowest |", "| --- | ---: | ---: |"]
    for name, ratio in document["ratios"].items():
        low, high = document["spread"][name]
        lines.append(f"| {words[name]} | {ratio:.2f} | {low:.2f} – {high:.2f} |")
    size = f"{document['batch']}×3×{document['size']}×{document['size']}"
    place = _place(document["environment"], None)
    lines += ["", f"ResNet-50 to ResNet-18, {size}, medians of {document['turns']} rounds. {place}"]
    lines += ["", "| time of the step with all terms | share |", "| --- | ---: |"]
    lines += [f"| `{row['operator']}` | {100 * row['share']:.1f} % |" for row in document["profile"]]
    return "\n".join(lines)


def performance_block() -> str:
    goals = {op: module.GOALS for op, module in OPS.items()}
    return "\n\n".join(bench_report.markdown(result, goals) for result in bench_results())


def op_block(op: str) -> str:
    """The rows of one op from the newest file."""
    result = whole_bench()
    where = result["environment"]
    cases = [case for case in result["cases"] if case["op"] == op]
    place = where["cpu"] if where["device"] == "cpu" else where["device"]
    rows = "\n".join(bench_report.markdown_rows(cases))
    return (
        f"Forward and backward; {place}, {where['threads']} threads, torch {where['torch']}, {where['date']}.\n\n"
        + rows
    )


def speed_block() -> str:
    """One line for each op, its first case."""
    result = whole_bench()
    where = result["environment"]
    lines = ["| forward and backward on a CPU | input | × eager | × `torch.compile` | time / one copy |"]
    lines.append("| --- | --- | ---: | ---: | ---: |")
    for op in OPS:
        case = next((case for case in result["cases"] if case["op"] == op), None)
        if case is None:  # an op that came after the newest whole run
            continue
        ours = next(name for name in bench_report.OURS if name in case["providers"])
        ratios = [bench_report.number(bench_report.ratio(case, name, ours)) for name in ("eager", "compile")]
        copy = bench_report.number(bench_report.ratio(case, ours, "clone"))
        lines.append(f"| `{op}`, {ours} | {case['case']} | {ratios[0]} | {ratios[1]} | {copy} |")
    lines += ["", f"Medians of one run, {where['cpu']}, {where['threads']} threads. [How](performance.md)"]
    return "\n".join(lines)


def growth_block() -> str:
    """Time by boxes per image, in copies of the map of the same case, 3 boxes = 1."""
    named = {case["case"]: case for case in whole_bench()["cases"] if case["op"] == "localization"}
    counts = [c for c in (0, 1, 3, 10, 30, 60) if _boxes(c) in named]
    copies = {count: bench_report.ratio(named[_boxes(count)], "cpp", "clone") for count in counts}
    header = "| boxes per image | " + " | ".join(str(count) for count in counts) + " |"
    cells = [f"{copies[count] / copies[3]:.2f}" for count in counts]  # type: ignore[operator]
    return f"{header}\n| --- |{' ---: |' * len(counts)}\n| time, 3 boxes = 1 | " + " | ".join(cells) + " |"


def _boxes(count: int) -> str:
    return f"energy 64×224×224, {count} box{'' if count == 1 else 'es'}"


def call_block() -> str:
    lines = ["| op | input | eager / cheapest | cpp / cheapest |", "| --- | --- | ---: | ---: |"]
    for case in whole_bench()["cases"]:
        if "cheapest" in case["providers"]:
            ratios = [bench_report.number(bench_report.ratio(case, name, "cheapest")) for name in ("eager", "cpp")]
            lines.append(f"| {case['op']} | {case['case']} | {' | '.join(ratios)} |")
    return "\n".join(lines)


def data_block() -> str:
    """Reading and preparing, as ratios to decoding the JPEG files."""
    result = newest("data")
    where, packed, jpeg = result["environment"], result["packed"], result["jpeg"]["images_per_second"]
    memory, processes = "pinned" if result["pinned"] else "ordinary", f"{result['workers']} processes"
    rows = [
        ("`PackedDataset`, read by the training process, first epoch", packed["first_epoch"]),
        ("`PackedDataset`, later epochs", packed["images_per_second"]),
        ("`StreamedDataset` (LitData), read by the training process", result["litdata"]["images_per_second"]),
        (f"`StreamedDataset` with {processes}", result["litdata"]["with_workers"]),
        (
            "`ChunkedDataset` (used by recipes), read by the training process",
            result["litdata"]["by_number"],
        ),
        (f"`Augment` on {where['device']}: random resized crop, flip, normalisation", result["augment"]["contiguous"]),
    ]
    first, last = result["prepare"][0], result["prepare"][-1]
    return "\n".join(
        [
            f"| images per second: shuffled, {result['size']} px, batches of {result['batch']}, {memory} memory | × |",
            "| --- | ---: |",
            f"| JPEG files (500×375, {result['jpeg_bytes'] / 1000:.0f} kB) decoded and resized by {processes} | 1 |",
            *(f"| {name} | {rate / jpeg:.1f} |" for name, rate in rows),
            "",
            f"Peak memory preparing {first['images']:,} and {last['images']:,} images: {first['peak_mb']:.0f} and "
            f"{last['peak_mb']:.0f} MB; of each worker: {first['worker_peak_mb']:.0f} and "
            f"{last['worker_peak_mb']:.0f} MB.",
            "",
            f"{_place(where, where['share_of_others'])}; files in the page cache.",
        ]
    )


def metrics_block() -> str:
    document = newest("metrics")
    others = max(found.get("cpu_share_of_others") or 0 for found in document["metrics"])
    return f"{bench_metrics.table(document['metrics'])}\n\nMedians; {_place(document['environment'], others)}."


def peers_block() -> str:
    """Whole epochs against other libraries; a sentence as long as nothing has been measured."""
    if not list((ROOT / "bench" / "results").glob("peers-*.json")):
        return "Not measured yet."
    document = newest("peers")
    where, settings = document["environment"], document["settings"]
    return (
        f"{bench_peers.table(document)}\n\nMedians over {settings['rounds']} trainings of {settings['epochs']} epochs, "
        f"batches of {settings['batch']}; {_place(where, where['share_of_others'])}."
    )


def _place(where: dict[str, Any], others: float | None) -> str:
    busy = f", {others:.0%} of the processor's time taken by others" if others and others >= 0.05 else ""
    return f"{where['cpu']}, {where['threads']} threads{busy}, torch {where['torch']}, {where['date']}"


BLOCKS: dict[str, Callable[[], str]] = {
    "quickstart": quickstart_block,
    "growth": growth_block,
    "call": call_block,
    "speed": speed_block,
    "performance": performance_block,
    "guidance": guidance_block,
    "own_maps": own_maps_block,
    "data": data_block,
    "metrics": metrics_block,
    "peers": peers_block,
    "voc": voc_block,
    "distill": distill_block,
    "training": training_block,
    **comparisons.blocks(),
    **{op: (lambda op=op: op_block(op)) for op in OPS},
}


def rewritten(text: str) -> str:
    return BLOCK.sub(lambda m: f"<!-- figures:{m[1]} -->\n{BLOCKS[m[1]]()}\n<!-- /figures -->", text)


def picture(results: Any, path: Path) -> None:
    """Bars: accuracy by group with its spread. Below: the example images with each method's attribution."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    summaries = report.summarize(results.rows)
    examples = next(iter(results.runs.values())).examples
    figure = pyplot.figure(figsize=(9, 9), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(1, 1.7))
    axes = top.subplots()
    groups = list(summaries[0].groups)
    for place, group in enumerate(groups):
        means = [s.groups[group].mean for s in summaries]
        spreads = [s.groups[group].spread or 0 for s in summaries]
        where = [row + (place - (len(groups) - 1) / 2) * 0.2 for row in range(len(summaries))]
        axes.bar(where, means, 0.19, yerr=spreads, label=group, error_kw={"linewidth": 0.8})
    axes.set_xticks(range(len(summaries)), [s.method for s in summaries])
    axes.set_ylim(0, 105)
    axes.set_ylabel("test accuracy, %")
    axes.legend(fontsize=8, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1))
    rows = [("picture", [example.uri for example in examples])]
    rows += [(method, [look.uri for look in run.looks]) for method, run in results.runs.items()]
    grid = bottom.subplots(len(rows), len(examples))
    for line, (name, uris) in zip(grid, rows):
        line[0].set_ylabel(name, rotation=0, ha="right", va="center")
        for cell, uri, example in zip(line, uris, examples):
            cell.imshow(pyplot.imread(io.BytesIO(base64.b64decode(uri.partition(",")[2]))))
            for x0, y0, x1, y1 in example.boxes:
                cell.add_patch(pyplot.Rectangle((x0 - 0.5, y0 - 0.5), x1 - x0, y1 - y0, fill=False, color="cyan"))
            cell.set_xticks([])
            cell.set_yticks([])
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def run_quickstart(out: str | None = None) -> None:
    from debiaskd.cli import quickstart

    RESULTS.mkdir(exist_ok=True)
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as temporary:
        show = lambda task, done: print(f"{done:4.0%} {task}", flush=True)  # noqa: E731
        results = quickstart.run(out or temporary, progress=show)
    document = results.document()
    document["environment"]["load_average"] = [round(load, 1), *(round(value, 1) for value in os.getloadavg())]
    (RESULTS / "quickstart.json").write_text(json.dumps(document, indent=1) + "\n")
    picture(results, RESULTS / "quickstart.png")


def main(arguments: list[str]) -> int:
    if arguments[:1] == ["quickstart"] and len(arguments) <= 2:
        run_quickstart(*arguments[1:])
    elif arguments not in ([], ["--check"]):
        print(__doc__, file=sys.stderr)
        return 2
    stale = [page for page in PAGES if page.read_text() != rewritten(page.read_text())]
    for page in stale:
        print(page.relative_to(ROOT))
        if arguments != ["--check"]:
            page.write_text(rewritten(page.read_text()))
    return 1 if stale and arguments == ["--check"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
