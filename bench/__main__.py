"""`python -m bench [OP ...]`: times every provider of the named ops (all by default) and writes what it found."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import torch

from debiaskd.utils.files import write_json

from . import backdoor, channel_dot, class_relation, environment, feature_match, localization, map_cosine, report
from .harness import Case, WrongProviderError, failures, run
from .timing import Settings

OPS = {
    "feature_match": feature_match,
    "localization": localization,
    "map_cosine": map_cosine,
    "channel_dot": channel_dot,
    "class_relation": class_relation,
    "backdoor": backdoor,
}
#: Bytes of a map past every cache of today's GPUs.
LARGE = 1 << 28


class Parser(argparse.ArgumentParser):
    """Errors in one line instead of a page of usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def parser() -> Parser:
    made = Parser(prog="python -m bench", description=__doc__)
    made.add_argument(
        "ops",
        nargs="*",
        metavar="OP",
        help=f"among {', '.join(OPS)}; all by default. Or: peers, whole epochs against other libraries (peers --help)",
    )
    made.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    made.add_argument("--threads", type=int, default=2, help="of the CPU (default 2)")
    made.add_argument("--seconds", type=float, default=6.0, help="of timing for each case (default 6)")
    made.add_argument("--providers", nargs="+", default=(), metavar="NAME", help="only these, such as eager cpp")
    made.add_argument("--cases", default="", metavar="TEXT", help="only cases whose name contains this")
    made.add_argument(
        "--system-malloc", action="store_true", help="leave it to the C library what becomes of freed memory"
    )
    made.add_argument("--out", type=Path, help="where the JSON and the images go; nothing is written without it")
    made.add_argument(
        "--append",
        action="store_true",
        help="add to the JSON that is there, leave out providers that fail, and draw no images",
    )
    made.add_argument("--pictures", type=Path, metavar="JSON", help="draw the images of a file of results, no more")
    made.add_argument("--brief", action="store_true", help="only each op's main case and those of 256 MiB and more")
    made.add_argument("--check", action="store_true", help="one call of each provider against the reference, no times")
    made.add_argument("--quick", action="store_true", help="tiny inputs, a few rounds: whether it runs, not how fast")
    return made


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["peers"]:
        from . import peers

        return peers.main(arguments[1:])
    made = parser()
    options = made.parse_args(arguments)
    unknown = [op for op in options.ops if op not in OPS]
    if unknown:
        made.error(f"no benchmark {unknown[0]!r}; there are {', '.join(OPS)}")
    if options.threads < 1 or options.seconds < 0:
        made.error("--threads must be at least 1 and --seconds at least 0")
    if options.pictures is not None:
        return draw(options.pictures)
    if options.device == "cuda" and not torch.cuda.is_available():
        made.error("--device cuda: PyTorch finds no CUDA device here")
    if options.check:
        return check(options)
    try:
        results, path = measure(options)
    except WrongProviderError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    if path is not None:
        print(f"\n{path}")
        if not options.append:
            draw(path)
    failed = [f"{case['op']}, {case['case']}: {name}" for case in results["cases"] for name in case["failed"]]
    if failed:
        print(f"bench: failed: {'; '.join(failed)}", file=sys.stderr)
    return int(bool(failed))


def chosen(options: argparse.Namespace) -> Iterator[Case]:
    for op in options.ops or OPS:
        for case in OPS[op].cases(options.device, options.quick):
            large = case.leaf.numel() * case.leaf.element_size() >= LARGE
            wanted = large or options.quick or case.name == OPS[op].MAIN
            if options.cases in case.name and (wanted or not options.brief):
                yield case


def check(options: argparse.Namespace) -> int:
    """Runs each provider's forward and backward once, compares it with the reference, and times nothing."""
    failed = 0
    for case in chosen(options):
        providers, _ = case.providers(options.device)
        named = {name: loss for name, loss in providers.items() if name in (options.providers or providers)}
        wrong = failures(case, named)
        for name in named:
            print(f"{case.op}, {case.name}: {name} {wrong.get(name, 'agrees')}", flush=True)
        failed += len(wrong)
    return int(failed > 0)


def measure(options: argparse.Namespace) -> tuple[dict[str, Any], Path | None]:
    """Every chosen case's results; and the file, which is written after each case."""
    kept = not options.system_malloc and environment.keep_freed_memory()
    torch.set_num_threads(options.threads)
    settings = Settings(device=options.device, seconds=options.seconds, only=tuple(options.providers))
    settings.keep_going = options.append
    if not kept:
        settings.warming, settings.timed = 3, 5  # what one provider frees decides how the next one's memory is found
    if options.quick:
        settings.seconds, settings.fewest_rounds, settings.most_rounds = 0.0, 2, 2
    where = environment.describe(options.device, kept)
    path = None if options.out is None else options.out / f"{stem(where, options.device)}.json"
    earlier = json.loads(path.read_text()) if path is not None and options.append and path.exists() else {"cases": []}
    cases = []
    for case in chosen(options):
        cases.append(run(case, settings))
        print(report.table(cases[-1]), flush=True)
        if path is not None:
            measured = {(one["op"], one["case"]) for one in cases}
            others = [one for one in earlier["cases"] if (one["op"], one["case"]) not in measured]
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, {"schema": 1, "environment": where, "cases": others + cases})
    named = {(case["op"], case["case"]): case for case in cases}
    for op in OPS:
        for goal in OPS[op].GOALS:
            if (op, goal.case) in named and goal.provider not in named[op, goal.case]["missing"]:
                print(f"goal: {op}, {goal.sentence(named[op, goal.case])}")
    return {"schema": 1, "environment": where, "cases": cases}, path


def stem(where: dict[str, Any], device: str) -> str:
    name = "cpu" if device == "cpu" else "".join(c if c.isalnum() else "-" for c in where["device"].lower())
    return f"{name}-{where['date']}" + ("" if where["freed_memory"] == "kept" else "-system-malloc")


def draw(path: Path) -> int:
    """One image an op, beside the file of results."""
    results = json.loads(path.read_text())
    for op in dict.fromkeys(case["op"] for case in results["cases"]):
        picture = path.with_name(f"{path.stem}-{op}.png")
        try:
            report.plot(picture, op, [case for case in results["cases"] if case["op"] == op])
        except ImportError as error:
            print(f"no image: {error}", file=sys.stderr)
            return 1
        print(picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
