"""Terms of the user's own: classes by import path, their options typed by a dataclass."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any, get_type_hints

from debiaskd.terms.state import Setting, Term, TermOptions
from debiaskd.utils.imports import imported

#: The key of a term's section that names its class.
OF = "of"
#: What a term can need of a step.
NEEDS = frozenset(
    {
        "student.feature",
        "student.pooled",
        "teacher.feature",
        "teacher.pooled",
        "teacher.logits",
        "groups",
        "boxes",
    }
)


@dataclasses.dataclass
class OwnTerm:
    """A term of a recipe that names its class.

    Attributes:
        of: "package.module:Class".
        options: of the class's dataclass.
        kind: the class; None where its module was not asked for.
        raw: options of a class that was not asked for, beside those of every term.
    """

    of: str
    options: TermOptions
    kind: type[Term] | None = None
    raw: dict[str, Any] = dataclasses.field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """As a recipe has it."""
        return {OF: self.of, **dataclasses.asdict(self.options), **self.raw}

    @property
    def needs(self) -> frozenset[str]:
        """What it needs of a step; nothing is known of a class that was not asked for."""
        return NEEDS if self.kind is None else self.kind.needs


def term_class(of: str, error: type[Exception]) -> type[Term]:
    """The class that "package.module:Class" names.

    Raises:
        `error`: there is none, or it is no term.
    """
    kind = imported(of, error)
    if not isinstance(kind, type) or not issubclass(kind, Term):
        got = kind.__name__ if isinstance(kind, type) else type(kind).__name__
        raise error(f"{of}: must be a subclass of debiaskd.Term, got {got}")
    if kind.forward is Term.forward:
        raise error(f"{of}: must have a forward(state)")
    if kind.deployed is not Term.deployed:
        raise error(f"{of}: deployed changes the student, which could not be rebuilt without the class; leave it out")
    unknown = set(kind.needs) - NEEDS if isinstance(kind.needs, (set, frozenset)) else {kind.needs}
    if unknown:
        shown = ", ".join(sorted(map(repr, unknown)))
        raise error(f"{of}: needs must be a set of {', '.join(sorted(NEEDS))}, got {shown}")
    return kind


def options_class(kind: type[Term], error: type[Exception]) -> type[TermOptions]:
    """The dataclass of a term's options: the annotation of `options` in its `__init__`, `TermOptions` without one.

    Raises:
        `error`: it is no dataclass of term options.
    """
    found = TermOptions if kind.__init__ is Term.__init__ else get_type_hints(kind.__init__).get("options", TermOptions)
    if not (isinstance(found, type) and dataclasses.is_dataclass(found) and issubclass(found, TermOptions)):
        raise error(f"{kind.__qualname__}: options must be annotated with a dataclass that extends TermOptions")
    return found


def build_term(kind: type[Term], options: TermOptions, setting: Setting) -> Term:
    """A term of its options, and of the setting where its `__init__` takes one.

    Raises:
        TypeError: it takes something else.
    """
    make: Any = kind
    arguments = (options, setting) if len(inspect.signature(kind).parameters) > 1 else (options,)
    made = make(*arguments)
    if not hasattr(made, "options"):
        raise TypeError(f"{kind.__qualname__}.__init__ must call super().__init__(options)")
    assert isinstance(made, Term)
    return made


def unresolved(of: str, section: Mapping[str, Any]) -> OwnTerm:
    """The term of a finished run, whose class need not be there."""
    common = {field.name for field in dataclasses.fields(TermOptions)}
    options = TermOptions(**{key: value for key, value in section.items() if key in common})
    raw = {key: value for key, value in section.items() if key not in common and key != OF}
    return OwnTerm(of, options, None, raw)
