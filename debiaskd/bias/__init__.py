"""Debiasing without annotation of the bias: environments, discovery of groups, and refitted last layers."""

from debiaskd.bias.discovery import find_groups
from debiaskd.bias.environments import environment_penalty, find_environments, infer_environments
from debiaskd.bias.groups import FoundGroups, are_found, found_names
from debiaskd.bias.refit import afr_weights, class_weights, disagreement, fit_last_layer, loss_extremes

__all__ = [
    "FoundGroups",
    "afr_weights",
    "are_found",
    "class_weights",
    "disagreement",
    "environment_penalty",
    "find_environments",
    "find_groups",
    "fit_last_layer",
    "found_names",
    "infer_environments",
    "loss_extremes",
]
