"""Debiasing without annotation of the bias: environments, discovery of groups, and refitted last layers."""

from debiaskd.bias.discovery import find_groups
from debiaskd.bias.environments import environment_penalty, infer_environments
from debiaskd.bias.groups import FoundGroups
from debiaskd.bias.refit import afr_weights, class_weights, disagreement, fit_last_layer, loss_extremes

__all__ = [
    "FoundGroups",
    "afr_weights",
    "class_weights",
    "disagreement",
    "environment_penalty",
    "find_groups",
    "fit_last_layer",
    "infer_environments",
    "loss_extremes",
]
