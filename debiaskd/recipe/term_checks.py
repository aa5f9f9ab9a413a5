"""Check the options of a recipe's terms, and those of other sections that belong to a term."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import fields

from debiaskd.models.depths import DEPTHS
from debiaskd.recipe.options import Recipe
from debiaskd.terms import TermOptions


def number(name: str, value: float | None, *, zero: bool = False) -> Iterator[str]:
    """Finite, and > 0 or, with `zero`, >= 0. None is for options that were left out."""
    if value is not None and not (math.isfinite(value) and (value > 0 or (zero and value == 0))):
        yield f"{name}: must be a number {'>=' if zero else '>'} 0, got {value}"


def terms_problems(recipe: Recipe) -> Iterator[str]:
    terms = recipe.terms.given()
    if not terms:
        names = [field.name for field in fields(recipe.terms) if field.init]
        yield f"terms: at least one is needed, of {', '.join(names)}"
    for name, options in terms.items():
        yield from _term(f"terms.{name}", options)
        if options.start >= recipe.schedule.epochs:
            yield f"terms.{name}.start: never comes, there are {recipe.schedule.epochs} epochs; got {options.start}"
    # Contexts are built in an epoch of which other terms are the loss.
    counting = [options.start for name, options in terms.items() if name != "backdoor"]
    if terms and (not counting or min(counting) > 0):
        yield "terms: none counts in epoch 0; one other than backdoor must have start 0"
    backdoor, guide, explain = recipe.terms.backdoor, recipe.terms.guide, recipe.terms.explain
    if backdoor is not None and backdoor.start < 1:
        yield "terms.backdoor.start: must be >= 1, the epoch before it builds the contexts; got 0"
    if backdoor is not None and not 0 <= backdoor.mix < 1:
        yield f"terms.backdoor.mix: must lie in [0, 1), got {backdoor.mix}"
    if explain is not None and explain.attribution == "bcos_weights":
        for key in ("layer", "teacher_layer"):
            if getattr(explain, key) not in (None, "Input"):
                yield f"terms.explain.{key}: must be Input for bcos_weights, got {getattr(explain, key)}"
    if explain is not None and explain.layer not in (None, *DEPTHS) and explain.teacher_layer is None:
        yield f"terms.explain.teacher_layer: is needed, because layer names one of the student, {explain.layer}"
    if guide is None:
        if recipe.data.annotated_fraction != 1 or recipe.data.dilate or recipe.data.jitter:
            yield "data.annotated_fraction, data.dilate, data.jitter: only terms.guide uses boxes, and there is none"
        return
    if guide.steps is not None and guide.attribution != "integrated_gradients":
        yield f"terms.guide.steps: only for integrated_gradients, got attribution {guide.attribution or 'left out'}"
    if guide.steps is not None and guide.steps < 1:
        yield f"terms.guide.steps: must be >= 1, got {guide.steps}"


def _term(name: str, options: TermOptions) -> Iterator[str]:
    yield from number(f"{name}.weight", options.weight)
    yield from number(f"{name}.start", options.start, zero=True)
    yield from number(f"{name}.ramp", options.ramp, zero=True)
    yield from number(f"{name}.temperature", getattr(options, "temperature", None))
    smoothing = getattr(options, "label_smoothing", 0)
    if not 0 <= smoothing < 1:
        yield f"{name}.label_smoothing: must lie in [0, 1), got {smoothing}"
