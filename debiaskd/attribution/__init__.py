"""Differentiable attribution maps, and model guidance by boxes."""

from debiaskd.attribution.maps import (
    draw_target,
    explanation_mode,
    final_layer_map,
    grad_cam,
    input_x_gradient,
    integrated_gradients,
)

__all__ = [
    "draw_target",
    "explanation_mode",
    "final_layer_map",
    "grad_cam",
    "input_x_gradient",
    "integrated_gradients",
]
