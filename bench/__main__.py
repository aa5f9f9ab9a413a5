"""`python -m bench [OP ...]`: times every provider of the named ops (all by default) and writes what it found."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any, NoReturn

import torch

from . import backdoor, channel_dot, class_relation, environment, feature_match, localization, report
from .harness import Settings, WrongProviderError, run

OPS = {
    "feature_match": feature_match,
    "localization": localization,
    "channel_dot": channel_dot,
    "class_relation": class_relation,
    "backdoor": backdoor,
}


class Parser(argparse.ArgumentParser):
    """Errors in one line instead of a page of usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def parser() -> Parser:
    made = Parser(prog="python -m bench", description=__doc__)
    made.add_argument("ops", nargs="*", metavar="OP", help=f"among {', '.join(OPS)}; all by default")
    made.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    made.add_argument("--threads", type=int, default=2, help="of the CPU (default 2)")
    made.add_argument("--seconds", type=float, default=6.0, help="of timing for each case (default 6)")
    made.add_argument("--providers", nargs="+", default=(), metavar="NAME", help="only these, such as eager cpp")
    made.add_argument("--cases", default="", metavar="TEXT", help="only cases whose name contains this")
    made.add_argument(
        "--system-malloc", action="store_true", help="leave it to the C library what becomes of freed memory"
    )
    made.add_argument("--out", type=Path, help="where the JSON and the pictures go; nothing is written without it")
    made.add_argument("--quick", action="store_true", help="tiny inputs, a few rounds: whether it runs, not how fast")
    return made


def main(arguments: list[str] | None = None) -> int:
    made = parser()
    options = made.parse_args(arguments)
    unknown = [op for op in options.ops if op not in OPS]
    if unknown:
        made.error(f"no benchmark {unknown[0]!r}; there are {', '.join(OPS)}")
    if options.threads < 1 or options.seconds < 0:
        made.error("--threads must be at least 1 and --seconds at least 0")
    if options.device == "cuda" and not torch.cuda.is_available():
        made.error("--device cuda: PyTorch finds no CUDA device here")
    try:
        results = measure(options)
    except WrongProviderError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    if options.out is not None:
        write(results, options.out, options.device)
    return 0


def measure(options: argparse.Namespace) -> dict[str, Any]:
    kept = not options.system_malloc and environment.keep_freed_memory()
    torch.set_num_threads(options.threads)
    settings = Settings(device=options.device, seconds=options.seconds, only=tuple(options.providers))
    if not kept:
        settings.warming, settings.timed = 3, 5  # what one provider frees decides how the next one's memory is found
    if options.quick:
        settings.seconds, settings.fewest_rounds, settings.most_rounds = 0.0, 2, 2
    cases = []
    for op in options.ops or OPS:
        for case in OPS[op].cases(options.device, options.quick):
            if options.cases in case.name:
                cases.append(run(case, settings))
                print(report.table(cases[-1]), flush=True)
    named = {(case["op"], case["case"]): case for case in cases}
    for op in OPS:
        for goal in OPS[op].GOALS:
            if (op, goal.case) in named and goal.provider not in named[op, goal.case]["missing"]:
                print(f"goal: {op}, {goal.sentence(named[op, goal.case])}")
    return {"schema": 1, "environment": environment.describe(options.device, kept), "cases": cases}


def write(results: dict[str, Any], out: Path, device: str) -> None:
    out.mkdir(parents=True, exist_ok=True)
    where = results["environment"]
    name = "cpu" if device == "cpu" else "".join(c if c.isalnum() else "-" for c in where["device"].lower())
    stem = f"{name}-{where['date']}" + ("" if where["freed_memory"] == "kept" else "-system-malloc")
    path = out / f"{stem}.json"
    path.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    print(f"\n{path}")
    for op in dict.fromkeys(case["op"] for case in results["cases"]):
        picture = out / f"{stem}-{op}.png"
        try:
            report.plot(picture, op, [case for case in results["cases"] if case["op"] == op])
        except ImportError as error:
            print(f"no picture: {error}", file=sys.stderr)
            return
        print(picture)


if __name__ == "__main__":
    sys.exit(main())
