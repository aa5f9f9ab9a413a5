"""debiaskd: compress vision models without inheriting their shortcuts.

    import debiaskd as dk

Fast losses for the loop you have (`feature_match_loss`, `localization_loss`), on whichever backend runs them fastest
(`backend`, `debiaskd doctor`), and what stands around them: boxes, transplanting, reweighting.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from debiaskd.api import Run, load, pack, train
from debiaskd.attribution.explainer import Explained, Explainer
from debiaskd.attribution.guide import Guide, Guided
from debiaskd.boxes import Boxes, collate
from debiaskd.losses import (
    BackdoorLogits,
    ChannelDot,
    ClassContext,
    ClassRelationLoss,
    EnergyLoss,
    FeatureMatchLoss,
    KdLoss,
    LocalizationLoss,
    MapCosineLoss,
)
from debiaskd.models.frozen_teacher import FrozenTeacher
from debiaskd.models.own import register_model
from debiaskd.models.projector_fit import fit_projector
from debiaskd.models.transplant import Transplanted, match_spatial, transplant
from debiaskd.ops.backdoor import backdoor_logits
from debiaskd.ops.backend import BackendError, backend
from debiaskd.ops.channel_dot import channel_dot
from debiaskd.ops.class_context import class_context
from debiaskd.ops.class_relation import class_relation_loss
from debiaskd.ops.feature_match import feature_match_loss
from debiaskd.ops.kd import kd_loss
from debiaskd.ops.localization import energy_loss, localization_loss, normalize_attribution
from debiaskd.ops.map_cosine import map_cosine_loss
from debiaskd.recipe import Recipe
from debiaskd.reweight import ErrorSetWarning, error_weights, group_weights, predict_correct
from debiaskd.terms import State, Term, TermOptions
from debiaskd.terms.state import Setting
from debiaskd.version import __version__

if TYPE_CHECKING:
    from debiaskd.reports.found_groups import Groups, discover
    from debiaskd.reports.sweeps import Tuned, tune

__all__ = [
    "BackdoorLogits",
    "BackendError",
    "Boxes",
    "ChannelDot",
    "ClassContext",
    "ClassRelationLoss",
    "EnergyLoss",
    "ErrorSetWarning",
    "Explained",
    "Explainer",
    "FeatureMatchLoss",
    "FrozenTeacher",
    "Groups",
    "Guide",
    "Guided",
    "KdLoss",
    "LocalizationLoss",
    "MapCosineLoss",
    "Recipe",
    "Run",
    "Setting",
    "State",
    "Term",
    "TermOptions",
    "Transplanted",
    "Tuned",
    "__version__",
    "backdoor_logits",
    "backend",
    "channel_dot",
    "class_context",
    "class_relation_loss",
    "collate",
    "discover",
    "energy_loss",
    "error_weights",
    "feature_match_loss",
    "fit_projector",
    "group_weights",
    "kd_loss",
    "load",
    "localization_loss",
    "map_cosine_loss",
    "match_spatial",
    "normalize_attribution",
    "pack",
    "predict_correct",
    "register_model",
    "train",
    "transplant",
    "tune",
]


#: Names that need the train extra, which the losses do not.
_LATER = dict.fromkeys(("Groups", "discover"), "found_groups") | dict.fromkeys(("Tuned", "tune"), "sweeps")


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"debiaskd.reports.{_LATER[name]}"), name)
