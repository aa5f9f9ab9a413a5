"""Loss terms that recipes compose. One class a term; each takes a step's `State` and gives a scalar.

To add one: a dataclass of options and a `Term` here, a line in `TermsOptions` and in `TERMS`.
"""

from __future__ import annotations

from debiaskd.terms.backdoor import Backdoor, BackdoorOptions
from debiaskd.terms.distil import Kd, KdOptions, Relation, RelationOptions, Sample, SampleOptions
from debiaskd.terms.explain import ExplainOptions, ExplainTerm, make_explainer
from debiaskd.terms.guidance import GuideOptions, GuideTerm, make_guide
from debiaskd.terms.match import Match, MatchOptions
from debiaskd.terms.robust import GroupDro, GroupDroOptions
from debiaskd.terms.state import Draws, Outputs, Ranks, Setting, State, StepInputs, StepTotals, Term, TermOptions
from debiaskd.terms.supervised import Supervised, SupervisedOptions

#: By name, all that are built from their options and the setting alone. `guide` and `explain` also need the student.
TERMS: dict[str, type[Term]] = {
    "supervised": Supervised,
    "match": Match,
    "kd": Kd,
    "sample": Sample,
    "relation": Relation,
    "backdoor": Backdoor,
    "group_dro": GroupDro,
    "guide": GuideTerm,
    "explain": ExplainTerm,
}

__all__ = [
    "TERMS",
    "Backdoor",
    "BackdoorOptions",
    "Draws",
    "ExplainOptions",
    "ExplainTerm",
    "GroupDro",
    "GroupDroOptions",
    "GuideOptions",
    "GuideTerm",
    "Kd",
    "KdOptions",
    "Match",
    "MatchOptions",
    "Outputs",
    "Ranks",
    "Relation",
    "RelationOptions",
    "Sample",
    "SampleOptions",
    "Setting",
    "State",
    "StepInputs",
    "StepTotals",
    "Supervised",
    "SupervisedOptions",
    "Term",
    "TermOptions",
    "make_explainer",
    "make_guide",
]
