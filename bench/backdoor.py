"""Backdoor adjustment, as a head is trained with it: feature, weight and bias get gradients, from a cross-entropy.

What must move is little next to the matrix products: this op is bound by flops, its share of the copy bandwidth says
nothing. The leaf is feature, weight and bias in one vector, so that all their gradients are part of what is timed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from debiaskd.ops.backdoor import backdoor_logits, eager

from .harness import Case
from .report import Goal

MAIN = "exact 128×500, 128 features"
GOALS = (Goal(MAIN, "cpp", "naive", 10.0),)
Head = Callable[[Tensor, Tensor, Tensor], Tensor]


def cases(device: str, quick: bool = False) -> Iterator[Case]:
    if quick:
        yield case("exact 4×3, 5 features", 4, 3, 5, device)
        yield case("nwgm 4×3, 5 features", 4, 3, 5, device, mode="nwgm")
        return
    yield case(MAIN, 128, 500, 128, device)
    yield case("exact 64×100, 128 features", 64, 100, 128, device)
    yield case("exact 256×1000, 512 features", 256, 1000, 512, device, with_naive=False)
    yield case(f"{MAIN} 1000 times larger", 128, 500, 128, device, scale=1000)
    yield case("nwgm 128×500, 128 features", 128, 500, 128, device, mode="nwgm")
    yield case("nwgm 128×1000, 2048 features", 128, 1000, 2048, device, mode="nwgm")
    yield case("nwgm 128×10, 2048 features", 128, 10, 2048, device, mode="nwgm")
    yield case("nwgm 1×2, 2 features", 1, 2, 2, device, mode="nwgm")


def case(
    name: str,
    samples: int,
    classes: int,
    length: int,
    device: str,
    *,
    mode: str = "exact",
    scale: float = 1.0,
    with_naive: bool = True,
) -> Case:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    logits, context = 3 * normal(samples, classes), scale * normal(classes, length)
    labels = torch.randint(classes, (samples,), generator=generator).to(device)
    parts = [scale * normal(samples, length), normal(classes, 2 * length) / length**0.5, normal(classes)]
    leaf = torch.cat([part.flatten() for part in parts]).requires_grad_()

    def loss(head: Head) -> Callable[[Tensor], Tensor]:
        def of(packed: Tensor) -> Tensor:
            pieces = packed.split([part.numel() for part in parts])
            return F.cross_entropy(head(*(x.view(part.shape) for x, part in zip(pieces, parts))), labels)

        return of

    def two_heads(feature: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        of_feature, of_context = weight.split([length, length], 1)
        log_prior = (logits.to(feature) / 4).log_softmax(1)
        return F.linear(feature, of_feature, bias), F.linear(context.to(feature), of_context), log_prior

    def naive(feature: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        a, b, log_prior = two_heads(feature, weight, bias)
        return (log_prior[:, :, None] + (a[:, None] + b).log_softmax(2)).logsumexp(1)

    def concatenating(feature: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        mean = (logits.to(feature) / 4).softmax(1) @ context.to(feature)
        return F.linear(torch.cat([feature, mean], 1), weight, bias)

    exact = mode == "exact"
    plain = loss(lambda *x: eager(*two_heads(*x))) if exact else loss(concatenating)
    references = {}
    if exact and with_naive:  # the tiles of eager are many graphs; what one would compile is the naive form
        references = {"naive": loss(naive), "compile": torch.compile(loss(naive), fullgraph=True, dynamic=False)}
    matrices = samples * classes * 2 + (classes * classes if exact else 0)
    return Case(
        op="backdoor",
        name=name,
        leaf=leaf,
        eager=plain,
        public=loss(lambda s, w, b: backdoor_logits(s, logits, context, w, b, mode=mode)),
        reference=plain,
        forward_bytes=4 * (leaf.numel() + context.numel() + matrices),
        backward_bytes=4 * (2 * leaf.numel() + context.numel() + matrices),
        references=references,
        compiled=not exact,
    )
