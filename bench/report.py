"""From results to what people read: a table in the terminal, one in the documentation, an image."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

COPIES = ("clone", "copy")
OURS = ("triton", "cuda", "cpp")
Case = dict[str, Any]


@dataclass(frozen=True)
class Goal:
    """`provider` is to be at least `ratio` times as fast as `against`, forward and backward."""

    case: str
    provider: str
    against: str
    ratio: float

    def measured(self, case: Case) -> float | None:
        return ratio(case, self.against, self.provider)

    def sentence(self, case: Case) -> str:
        value = self.measured(case)
        if value is None:
            return f"{self.case}: {self.provider} or {self.against} was not measured"
        verdict = "met" if value >= self.ratio else "missed"
        if self.ratio < 1:
            wish = f"{self.provider} takes at most {1 / self.ratio:.3g} times as long as {self.against}"
            return f"{self.case}: {wish}: {1 / value:.3g} measured, {verdict}"
        wish = f"{self.provider} is at least {self.ratio:.3g} times as fast as {self.against}"
        return f"{self.case}: {wish}: {value:.3g} measured, {verdict}"


def median(case: Case, provider: str, phase: str = "step") -> float | None:
    timed = case["providers"].get(provider, {}).get(phase)
    return None if timed is None else float(timed["median"])


def ratio(case: Case, slower: str, faster: str, phase: str = "step") -> float | None:
    """How many times as long `slower` takes."""
    above, below = median(case, slower, phase), median(case, faster, phase)
    return None if above is None or below is None else above / below


def bandwidth_share(case: Case, provider: str) -> float | None:
    """Bytes that must move, over the time that was taken: as a share of what a copy into ready memory reaches."""
    took, copied = median(case, provider), median(case, "copy")
    if took is None or copied is None:
        return None
    must = case["forward_bytes"] + case["backward_bytes"]
    return (must / took) / (2 * case["map_bytes"] / copied)


def memory_in_maps(case: Case, provider: str) -> float | None:
    held = case["providers"].get(provider)
    return None if held is None else held["peak_bytes"] / case["map_bytes"]


# ---- terminal -------------------------------------------------------------------------------------------------------


def table(case: Case) -> str:
    """One case, one line a provider."""
    must = (case["forward_bytes"] + case["backward_bytes"]) / case["map_bytes"]
    others = case["cpu_share_of_others"]
    noise = "" if others is None or others < 0.05 else f"; {others:.0%} of the machine went to other processes"
    lines = [
        f"\n{case['op']}: {case['case']} ({case['rounds']} rounds; must move {must:.3g} maps{noise})",
        f"  {'provider':<11}{'fwd+bwd':>10}{'10-90 %':>19}{'×eager':>8}{'×compile':>10}{'/clone':>8}{'band':>7}"
        f"{'fwd':>10}{'×eager':>8}{'maps held':>11}",
    ]
    for name, found in case["providers"].items():
        step = found["step"]
        forward = found["forward"]
        lines.append(
            f"  {name:<11}{duration(step['median']):>10}{duration(step['p10']) + '-' + duration(step['p90']):>19}"
            f"{number(ratio(case, 'eager', name)):>8}{number(ratio(case, 'compile', name)):>10}"
            f"{number(ratio(case, name, 'clone')):>8}{percent(bandwidth_share(case, name), name):>7}"
            f"{duration(forward['median']) if forward else '':>10}"
            f"{number(ratio(case, 'eager', name, 'forward')):>8}{number(memory_in_maps(case, name)):>11}"
        )
    lines.extend(f"  {name}: not here, {reason}" for name, reason in case["missing"].items())
    return "\n".join(lines)


def duration(seconds: float) -> str:
    unit, scale = ("s", 1.0) if seconds >= 1 else ("ms", 1e-3) if seconds >= 1e-3 else ("µs", 1e-6)
    return f"{seconds / scale:.3g}{unit}"


def number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def percent(value: float | None, provider: str = "") -> str:
    return "" if value is None or provider in COPIES else f"{value:.0%}"


# ---- documentation --------------------------------------------------------------------------------------------------


def markdown(result: dict[str, Any], goals: dict[str, tuple[Goal, ...]]) -> str:
    where = result["environment"]
    place = where["cpu"] if where["device"] == "cpu" else where["device"]
    parts = [
        f"### {place}, {where['threads']} threads, {where['date']}\n\n"
        f"torch {where['torch']}, {where['instructions']}; {compiler(where)}; freed memory: {where['freed_memory']}."
    ]
    for op in dict.fromkeys(case["op"] for case in result["cases"]):
        rows = [case for case in result["cases"] if case["op"] == op]
        parts.append(f"#### {op}\n\n" + "\n".join(markdown_rows(rows)))
        named = {case["case"]: case for case in rows}
        here = (g for g in goals.get(op, ()) if g.case in named and g.provider not in named[g.case]["missing"])
        sentences = [f"- {goal.sentence(named[goal.case])}" for goal in here]
        if sentences:
            parts.append("Goals:\n\n" + "\n".join(sentences))
    return "\n\n".join(parts)


def compiler(where: dict[str, Any]) -> str:
    return str(where["build"].get("cpu", {}).get("compiler", "no native CPU ops"))


def markdown_rows(cases: list[Case]) -> list[str]:
    known = (*OURS, *COPIES, "eager", "compile")
    extra = list(dict.fromkeys(n for case in cases for n in case["providers"] if n not in known))
    against = ["eager", "compile", *extra]
    header = ["input", "provider", *(f"× {name}" for name in against), "× eager, forward", "time / clone"]
    header += ["copy bandwidth", "maps held: eager", "compile", "ours"]
    lines = ["| " + " | ".join(header) + " |", "| --- | --- |" + " ---: |" * (len(header) - 2)]
    for case in cases:
        for ours in (name for name in OURS if name in case["providers"]):
            cells = [case["case"], ours, *(number(ratio(case, name, ours)) for name in against)]
            cells += [number(ratio(case, "eager", ours, "forward")), number(ratio(case, ours, "clone"))]
            cells += [percent(bandwidth_share(case, ours))]
            cells += [number(memory_in_maps(case, name)) for name in ("eager", "compile", ours)]
            lines.append("| " + " | ".join(cells) + " |")
    return lines


# ---- image --------------------------------------------------------------------------------------------------------


def plot(path: Path, op: str, cases: list[Case]) -> None:
    """Bars: how many copies of the map each provider takes, case by case.

    Raises:
        ImportError: saying what to install, where matplotlib is not.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("the image needs matplotlib: pip install 'debiaskd[train]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = [n for n in dict.fromkeys(n for case in cases for n in case["providers"]) if n != "copy"]
    figure, axes = pyplot.subplots(figsize=(9, 1 + 0.16 * len(cases) * (len(names) + 1)), layout="constrained")
    height = 1 / (len(names) + 1)
    for place, name in enumerate(names):
        found = [(row, ratio(case, name, "clone")) for row, case in enumerate(cases)]
        rows = [(row + place * height, value) for row, value in found if value is not None]
        bars = axes.barh([r for r, _ in rows], [v for _, v in rows], height=height, label=name)
        axes.bar_label(bars, fmt="%.3g", fontsize=6, padding=2)
    axes.set_yticks([row + 0.4 for row in range(len(cases))], [case["case"] for case in cases])
    axes.invert_yaxis()
    axes.margins(y=0.01)
    axes.set_xscale("log")
    axes.set_xlabel("time of forward and backward / time of one copy of the map")
    axes.set_title(f"{op}: shorter is better")
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
