"""The last layer of a network that can be refitted."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from debiaskd.recipe import Network, RecipeError
from debiaskd.training.fit import Trainer


def last_layer(trainer: Trainer, options: Network, model: nn.Module, what: str) -> nn.Linear | nn.Conv2d:
    """The last layer of a model, where it is one linear layer whose output is the logits.

    Args:
        trainer: of the recipe.
        options: the network of the recipe.
        model: that network, perhaps with a transplanted head.
        what: asks for it, as messages begin.

    Raises:
        RecipeError: the network ends in something else than one linear layer of pooled features.
    """
    at = trainer.feature_layers(model, options, ("pooled",))
    found = [model.get_submodule(name) for name in at.readers]
    layer = found[0] if len(found) == 1 else None
    linear = type(layer) is nn.Linear and layer.in_features == at.pooled_width
    linear |= type(layer) is nn.Conv2d and layer.groups == 1 and layer.weight[0].numel() == at.pooled_width
    if isinstance(layer, (nn.Linear, nn.Conv2d)) and linear and _gives_logits(model, layer, trainer.example(options)):
        return layer
    kinds = ", ".join(f"{name} ({type(module).__name__})" for name, module in zip(at.readers, found))
    raise RecipeError(
        f"{what} refits one linear layer, or 1×1 convolution, of pooled features, whose output must be "
        f"the logits; {options.name} computes them otherwise from {kinds}"
    )


def _gives_logits(model: nn.Module, layer: nn.Module, example: Tensor) -> bool:
    """Whether a layer's output is the model's, and nothing is added to it or averaged with it."""
    caught: list[Tensor] = []
    handle = layer.register_forward_hook(lambda module, arguments, output: caught.append(output.flatten(1)))
    mode = model.training
    try:
        with torch.no_grad():
            logits = model.eval()(example.to(next(model.parameters()).device))
    finally:
        handle.remove()
        model.train(mode)
    return len(caught) == 1 and caught[0].shape == logits.shape and torch.allclose(caught[0], logits)
