"""Check that the options of a recipe fit together, before anything is loaded; errors name the key."""

from __future__ import annotations

from collections.abc import Iterator

from debiaskd.models.input import inverse_added
from debiaskd.recipe.bias_options import REFITS, RefitOptions
from debiaskd.recipe.data_options import data_problems
from debiaskd.recipe.mixing_checks import mixing_problems
from debiaskd.recipe.options import Input, Network, Recipe, Teacher
from debiaskd.recipe.schedule_options import Schedule
from debiaskd.recipe.term_checks import number, terms_problems

OF_TEACHER = ("match", "kd", "sample", "relation", "backdoor", "explain")
BY_WEIGHT = ("supervised", "match", "kd", "sample", "backdoor", "explain")


class RecipeError(ValueError):
    """A recipe that cannot be followed."""


def check(recipe: Recipe) -> Recipe:
    """The recipe, if it can be followed.

    Raises:
        RecipeError: names the key, what was expected, what came.
    """
    for problem in _problems(recipe):
        raise RecipeError(problem)
    return recipe


def _problems(recipe: Recipe) -> Iterator[str]:
    yield from _ranges(recipe)
    for name, schedule in recipe.schedules().items():
        yield from _schedule(name, schedule)
        if schedule.patience is not None and recipe.selection.rule == "last":
            yield f"{name}.patience: selection.rule last compares no metric; got {schedule.patience}"
    yield from terms_problems(recipe)
    yield from _teacher(recipe)
    yield from _weights(recipe)
    yield from _discovery(recipe)
    yield from _refits(recipe)
    yield from mixing_problems(recipe)
    if recipe.selection.attributions is False and recipe.selection.rule == "pareto":
        yield "selection.attributions: rule pareto compares EPG and IoU, which are made of them; got False"
    yield from _network("student", recipe.student)
    if recipe.student.made_head:
        yield f"student.head: must name a layer, got {recipe.student.head}, which is for teachers"
    if recipe.teacher is not None and recipe.teacher.probe == "weights" and recipe.weights is None:
        yield "teacher.probe: weights needs the recipe's weights, and there are none"
    fitted = recipe.teacher is not None and recipe.teacher.method == "dfr" and recipe.teacher.validation_share is None
    if recipe.selection.reuse and not fitted:
        yield "selection.reuse: only where teacher.method is dfr and all of validation fits its last layer"
    if recipe.compute.checkpoint_every is not None and not recipe.compute.checkpoints:
        yield f"compute.checkpoint_every: compute.checkpoints is false, got {recipe.compute.checkpoint_every}"
    if len(set(loggers := recipe.compute.loggers or [])) < len(loggers):
        yield f"compute.loggers: must be different names, got {loggers}"
    for name in ("guide", "explain"):
        if recipe.compute.compile and getattr(recipe.terms, name) is not None:
            yield f"compute.compile: PyTorch cannot differentiate a compiled student twice, as terms.{name} has to"
    if (made := recipe.transplant) is not None and made.init == "least_squares":
        if made.projector != "linear":
            yield f"transplant.init: least_squares needs projector linear, got {made.projector}"
        if recipe.terms.match is None:
            yield "transplant.init: least_squares fits the maps that terms.match compares, and there is none"
    if recipe.pretraining is not None and recipe.transplant is not None:
        yield "pretraining: a transplanted student has no classifier of its own to be trained on labels first"


def _ranges(recipe: Recipe) -> Iterator[str]:
    data, compute = recipe.data, recipe.compute
    yield from data_problems(data)
    least = {
        "data.size": data.size,
        "compute.devices": compute.devices,
        "compute.nodes": compute.nodes,
        "compute.log_every": compute.log_every,
        "compute.checkpoint_every": compute.checkpoint_every,
        "selection.every": recipe.selection.every,
    }
    for name, value in least.items():
        if value is not None and value < 1:
            yield f"{name}: must be >= 1, got {value}"
    for name, seed in {"seed": recipe.seed, "data.seed": data.seed}.items():
        if not 0 <= seed < 2**63:
            yield f"{name}: must be >= 0 and < 2**63, got {seed}"
    for name, least_zero in {"data.dilate": data.dilate, "compute.workers": compute.workers}.items():
        yield from number(name, least_zero, zero=True)


def _teacher(recipe: Recipe) -> Iterator[str]:
    asking = [name for name in OF_TEACHER if getattr(recipe.terms, name) is not None]
    asking += [
        name for name, term in recipe.terms.own.items() if any(need.startswith("teacher.") for need in term.needs)
    ]
    teacher = recipe.teacher
    if teacher is None:
        if asking or recipe.transplant is not None:
            what = f"terms.{asking[0]}" if asking else "transplant"
            yield f"teacher: is needed by {what}"
        return
    if not asking and recipe.transplant is None:
        yield f"teacher: nothing uses it; none of the terms {', '.join(OF_TEACHER)}, and no transplant"
    if recipe.terms.match is not None and recipe.transplant is None:
        yield "terms.match: needs transplant, whose projector gives the maps to match"
    yield from _network("teacher", teacher)
    yield from _method(teacher)


def _method(teacher: Teacher) -> Iterator[str]:
    method = teacher.method
    if method == "checkpoint":
        if teacher.weights is None and not teacher.pretrained:
            yield "teacher: method checkpoint needs weights or pretrained"
        if teacher.schedule is not None:
            yield "teacher.schedule: method checkpoint trains nothing"
    elif teacher.schedule is None:
        yield f"teacher.schedule: is needed by method {method}"
    users = {"up": "jtt", "identification_epochs": "jtt", "step_size": "group_dro", "validation_share": "dfr"}
    for key, user in users.items():
        if getattr(teacher, key) is not None and method != user:
            yield f"teacher.{key}: only for method {user}, got {method}"
    if teacher.views is not None and (teacher.cache is None or teacher.views < 1):
        yield f"teacher.views: must be >= 1, and is for teacher.cache alone; got {teacher.views}"
    if method == "jtt" and teacher.up is None:
        yield "teacher.up: is needed by method jtt"
    if teacher.made_head and method != "checkpoint":
        yield f"teacher.head: {teacher.head} is for method checkpoint, got {method}, which trains a last layer"
    if teacher.probe is not None and teacher.head != "probe":
        yield f"teacher.probe: only with teacher.head probe, got head {teacher.head or 'left out'}"
    yield from number("teacher.up", teacher.up)
    yield from number("teacher.step_size", teacher.step_size)
    if teacher.validation_share is not None and not 0 < teacher.validation_share < 1:
        yield f"teacher.validation_share: must lie in (0, 1), got {teacher.validation_share}"
    if teacher.identification_epochs is not None and teacher.identification_epochs < 1:
        yield f"teacher.identification_epochs: must be >= 1, got {teacher.identification_epochs}"


def _weights(recipe: Recipe) -> Iterator[str]:
    weights = recipe.weights
    used = [name for name, options in recipe.terms.given().items() if getattr(options, "weighted", False)]
    if weights is None:
        for name in used:
            if name != "match":  # which is SimKD without weights
                yield f"terms.{name}.weighted: there are no weights"
        return
    if not used:
        yield f"weights: no term uses them; of terms {', '.join(BY_WEIGHT)} can, with weighted: true"
    if weights.method == "groups":
        for key in ("up", "convention", "epochs"):
            if getattr(weights, key) is not None:
                yield f"weights.{key}: only for method errors, got groups"
    yield from number("weights.up", weights.up)
    if weights.convention == "copies" and weights.up is not None and weights.up % 1:
        yield f"weights.up: must be a whole number of copies, got {weights.up}"
    if weights.epochs is not None and weights.epochs < 1:
        yield f"weights.epochs: must be >= 1, got {weights.epochs}"


def _discovery(recipe: Recipe) -> Iterator[str]:
    options = recipe.discovery
    if options is None:
        if recipe.data.groups == "found":
            yield "data.groups: found needs discovery, which finds them; `discovery: {}` has the defaults"
        return
    if recipe.data.groups not in (None, "none", "found"):
        yield f"data.groups: {recipe.data.groups} names groups that are known already, and discovery would find others"
    for key in ("epochs", "most", "smallest", "early"):
        value, least = getattr(options, key), 2 if key == "most" else 1
        if value is not None and value < least:
            yield f"discovery.{key}: must be >= {least}, got {value}"
        if value is not None and key != "epochs" and options.method != "clusters":
            yield f"discovery.{key}: only for method clusters, got {options.method}"


def _refits(recipe: Recipe) -> Iterator[str]:
    teacher, student = recipe.teacher, recipe.refit
    if teacher is not None and teacher.refit is not None:
        if teacher.method not in REFITS:
            yield f"teacher.refit: only for methods {', '.join(REFITS)}, got {teacher.method}"
        yield from _refit("teacher.refit", teacher.refit, teacher.method)
        held = None if student is None or student.method == "evals" else student.holdout
        if student is not None and student.method != "evals" and teacher.refit.holdout not in (None, held):
            yield f"teacher.refit.holdout: the student's refit holds out the same, {held}, got {teacher.refit.holdout}"
    if student is not None:
        yield from _refit("refit", student, student.method)
        if recipe.terms.backdoor is not None:
            yield "refit: not with terms.backdoor, whose student has two last layers"


def _refit(name: str, options: RefitOptions, method: str) -> Iterator[str]:
    users = {"holdout": REFITS[:3], "gamma": ("afr",), "count": ("self", "evals"), "early": ("self",)}
    for key, methods in users.items():
        if getattr(options, key) is not None and method in REFITS and method not in methods:
            yield f"{name}.{key}: only for {', '.join(methods)}, got {method}"
    if not 0 < options.share < 1:
        yield f"{name}.holdout: must lie in (0, 1), got {options.share}"
    yield from number(f"{name}.gamma", options.gamma, zero=True)
    yield from number(f"{name}.pull", options.pull)
    for key in ("count", "early"):
        value = getattr(options, key)
        if value is not None and value < 1:
            yield f"{name}.{key}: must be >= 1, got {value}"


def _network(name: str, network: Network) -> Iterator[str]:
    if network.pretrained and network.weights is not None:
        yield f"{name}.pretrained, {name}.weights: only one of them can be begun from"
    for key in ("num_classes", "pretrained", "in_chans"):
        if key in (network.options or {}):
            what = {"num_classes": "comes from the data", "pretrained": f"is {name}.pretrained"}.get(key, "is 3")
            yield f"{name}.options.{key}: {what}; leave it out"
    for key in ("img_size", "image_size"):
        size = (network.options or {}).get(key, 1)
        sides = size if isinstance(size, (list, tuple)) and len(size) == 2 else [size]
        if not all(type(side) is int and side >= 1 for side in sides):
            yield f"{name}.options.{key}: must be an integer >= 1, or two of them, got {size!r}"
    if network.input is not None:
        yield from _input(f"{name}.input", network.input, network.name)


def _input(name: str, asked: Input, network: str) -> Iterator[str]:
    if asked.size is not None and asked.size < 1:
        yield f"{name}.size: must be >= 1, got {asked.size}"
    for key, numbers in {"mean": asked.mean, "std": asked.std}.items():
        if numbers is None:
            continue
        if inverse_added(network):
            yield f"{name}.{key}: not for {network}: B-cos networks read pixels in 0..1 with their inverses"
        if len(numbers) != 3 or not all(0 <= number <= 1 for number in numbers):
            yield f"{name}.{key}: must be three numbers in [0, 1], of red, green and blue pixels in 0..1, got {numbers}"
    if asked.std is not None and 0 in asked.std:
        yield f"{name}.std: must be three numbers > 0, got {asked.std}"


def _schedule(name: str, schedule: Schedule) -> Iterator[str]:
    for key in ("epochs", "batch", "accumulate"):
        if getattr(schedule, key) < 1:
            yield f"{name}.{key}: must be >= 1, got {getattr(schedule, key)}"
    yield from number(f"{name}.learning_rate", schedule.learning_rate)
    yield from number(f"{name}.weight_decay", schedule.weight_decay, zero=True)
    yield from number(f"{name}.warmup", schedule.warmup, zero=True)
    yield from number(f"{name}.clip", schedule.clip)
    if schedule.warmup and schedule.shape == "one_cycle":
        yield f"{name}.warmup: shape one_cycle has a rise of its own, got {schedule.warmup}"
    if schedule.patience is not None and schedule.patience < 1:
        yield f"{name}.patience: must be >= 1, got {schedule.patience}"
    if (schedule.milestones is not None) != (schedule.shape == "steps"):
        yield f"{name}.milestones: for shape steps and only for it, got {schedule.milestones} with {schedule.shape}"
    if schedule.milestones is not None and (not schedule.milestones or min(schedule.milestones) < 1):
        yield f"{name}.milestones: must be epochs >= 1, got {schedule.milestones}"
    if schedule.batch % schedule.accumulate:
        yield f"{name}.batch: must be a multiple of accumulate={schedule.accumulate}, got {schedule.batch}"
    if schedule.ema is not None and not 0 < schedule.ema < 1:
        yield f"{name}.ema: must lie in (0, 1), got {schedule.ema}"
    if schedule.ema is None and schedule.ema_warmup is not None:
        yield f"{name}.ema_warmup: only for {name}.ema, which is left out; got {schedule.ema_warmup}"
