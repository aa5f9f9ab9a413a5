"""Registers the functions of this package as `torch.ops.debiaskd_triton.<name>`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from . import backdoor, channel_dot, channel_scale, class_relation, feature_match, localization, map_cosine

LIBRARY = torch.library.Library("debiaskd_triton", "DEF")


def register(function: Callable[..., Any], mutates: Sequence[str] = ()) -> None:
    """Under the function's own name, with the schema of its annotations. `mutates` names what is written in place."""
    schema = torch.library.infer_schema(function, mutates_args=mutates)
    LIBRARY.define(f"{function.__name__}{schema}")
    LIBRARY.impl(function.__name__, function, "CompositeExplicitAutograd")


register(feature_match.feature_match)
register(feature_match.feature_match_backward)
register(feature_match.feature_match_scale_, mutates=("gradient",))
register(localization.localization)
register(localization.localization_backward)
register(map_cosine.map_cosine)
register(map_cosine.map_cosine_backward)
register(channel_dot.channel_dot)
register(channel_scale.channel_scale)
register(class_relation.class_relation)
register(backdoor.backdoor)
register(backdoor.backdoor_backward)
