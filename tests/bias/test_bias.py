"""Environments, discovered groups and refitted layers: closed forms against searches, sklearn and planted groups."""

import csv
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from debiaskd import bias
from debiaskd.bias import environments

SHIFTED = torch.tensor([20.0, 0.0, 0.0, 0.0])


def random_logits(samples: int, classes: int, seed: int, scale: float = 3.0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(samples, classes, generator=generator)
    return logits, torch.randint(classes, (samples,), generator=generator)


# ---- environments ----


@pytest.mark.parametrize("classes", (2, 5))
def test_no_soft_assignment_has_a_larger_penalty(classes: int) -> None:
    logits, labels = random_logits(40, classes, seed=classes)
    best = bias.environment_penalty(logits, labels, bias.infer_environments(logits, labels))
    # As published: Adam on the logits of the assignment, from a random one.
    gradients = environments.scale_gradients(logits, labels)
    free = torch.randn(40, generator=torch.Generator().manual_seed(0)).double().requires_grad_()
    solver = torch.optim.Adam([free], lr=0.1)
    for _ in range(300):
        first, second = ((q * gradients).mean() for q in (free.sigmoid(), 1 - free.sigmoid()))
        solver.zero_grad()
        (-first.square() - second.square()).backward()
        solver.step()
    found = bias.environment_penalty(logits, labels, free.detach().sigmoid())
    assert 0.9 * best < found <= best * (1 + 1e-6)


def test_penalty_is_that_of_autograd() -> None:
    logits, labels = random_logits(12, 3, seed=1)
    share = torch.rand(12, generator=torch.Generator().manual_seed(2))
    scale = torch.ones((), requires_grad=True)
    loss = F.cross_entropy(scale * logits, labels, reduction="none")
    parts = [torch.autograd.grad((loss * q).mean(), scale, retain_graph=True)[0] for q in (share, 1 - share)]
    expected = sum(float(g) ** 2 for g in parts)
    assert bias.environment_penalty(logits, labels, share) == pytest.approx(expected, rel=1e-5)


def test_environments_part_what_contradicts_the_shortcut() -> None:
    # A model that looks at the shortcut alone: sure, and wrong where the shortcut is.
    labels, contradicts = torch.tensor([0, 0, 0, 1, 1, 1]), torch.tensor([0, 0, 1, 0, 1, 0])
    shortcut = labels ^ contradicts
    logits = 4 * F.one_hot(shortcut, 2).float()
    assert bias.infer_environments(logits, labels).tolist() == contradicts.tolist()
    assert bias.infer_environments(logits + 100, labels).tolist() == contradicts.tolist(), "a shift of all logits"


# ---- refits ----


def test_afr_weights_are_the_formula() -> None:
    logits, labels = random_logits(30, 3, seed=4)
    p = logits.double().softmax(1)[torch.arange(30), labels]
    beta = 1 / torch.bincount(labels, minlength=3).double()[labels]
    expected = beta * torch.exp(-5 * p)
    torch.testing.assert_close(bias.afr_weights(logits, labels, 5.0), expected / expected.sum())
    torch.testing.assert_close(bias.afr_weights(logits, labels, 0.0), bias.class_weights(labels))


def test_class_weights_with_a_class_that_does_not_occur() -> None:
    weights = bias.class_weights(torch.tensor([0, 0, 3]))
    assert weights.tolist() == pytest.approx([0.25, 0.25, 0.5])


@pytest.mark.parametrize("pull", (0.1, 0.003))
def test_fit_is_the_optimum(pull: float) -> None:
    generator = torch.Generator().manual_seed(0)
    feature = torch.randn(60, 4, generator=generator)
    labels = torch.randint(3, (60,), generator=generator)
    start = torch.randn(3, 4, generator=generator), torch.randn(3, generator=generator)
    share = torch.rand(60, generator=generator)
    weight, offset = bias.fit_last_layer(feature, labels, *start, sample_weight=share, pull=pull)
    assert offset is not None and weight.dtype == torch.float32
    leaves = [weight.double().requires_grad_(), offset.double().requires_grad_()]
    logits = F.linear(feature.double(), *leaves)
    loss = (share.double() / share.double().sum() * F.cross_entropy(logits, labels, reduction="none")).sum()
    loss = loss + pull * sum((leaf - s).square().sum() for leaf, s in zip(leaves, start))
    for gradient in torch.autograd.grad(loss, leaves):
        assert float(gradient.abs().max()) < 1e-6


def test_fit_agrees_with_logistic_regression() -> None:
    from sklearn.linear_model import LogisticRegression

    generator = torch.Generator().manual_seed(3)
    feature = torch.randn(80, 3, generator=generator, dtype=torch.float64)
    labels = (feature[:, 0] + torch.randn(80, generator=generator, dtype=torch.float64) > 0).long()
    reference = LogisticRegression(C=1.0, fit_intercept=False, tol=1e-10, max_iter=1000).fit(feature, labels)
    # 1/2 ‖w‖² + C Σ CE of the difference of two rows is, over 2·N·C samples, half of it on each row.
    weight, offset = bias.fit_last_layer(feature, labels, torch.zeros(2, 3, dtype=torch.float64), None, pull=1 / 80)
    assert offset is None
    torch.testing.assert_close(weight[1] - weight[0], torch.from_numpy(reference.coef_[0]), rtol=1e-4, atol=1e-5)


def test_refit_undoes_a_shortcut() -> None:
    """AFR's claim at its smallest: weights by mistakes move a layer that looks at the shortcut to the cause."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(2, (2000,), generator=generator)
    agrees = torch.rand(2000, generator=generator) < 0.95
    cause = (2.0 * labels - 1) + torch.randn(2000, generator=generator)
    shortcut = torch.where(agrees, 2.0 * labels - 1, 1 - 2.0 * labels) + 0.1 * torch.randn(2000, generator=generator)
    feature = torch.stack([cause, shortcut], 1)
    plain = bias.fit_last_layer(feature, labels, torch.zeros(2, 2), torch.zeros(2), pull=1e-3)

    def worst(layer: tuple[torch.Tensor, torch.Tensor | None]) -> float:
        right = F.linear(feature, *layer).argmax(1) == labels
        return min(float(right[(labels == y) & (agrees == a)].double().mean()) for y in (0, 1) for a in (True, False))

    def refitted(gamma: float) -> float:
        share = bias.afr_weights(F.linear(feature, *plain), labels, gamma)
        return worst(bias.fit_last_layer(feature, labels, *plain, sample_weight=share, pull=1e-3))

    assert worst(plain) < 0.3 and max(refitted(gamma) for gamma in (2.0, 3.0, 4.0)) > 0.6
    assert refitted(10.0) < 0.1, "mistakes alone turn the shortcut round: γ is to be chosen"


def test_disagreement_takes_each_class_alike() -> None:
    final = torch.tensor([[3.0, 0.0]] * 6)
    early = final.clone()
    early[[1, 4]] = torch.tensor([0.0, 3.0])
    labels = torch.tensor([0, 0, 0, 1, 1, 1])
    assert bias.disagreement(early, final, labels, 2).tolist() == [1, 4]
    assert bias.disagreement(early, final, labels, 2, by="mistakes").tolist() == [1, 3]
    assert len(bias.disagreement(early, final, labels, 100)) == 6


def test_loss_extremes_of_each_class() -> None:
    loss = torch.tensor([0.1, 0.2, 0.3, 0.4, 5.0, 1.0, 2.0])
    labels = torch.tensor([0, 0, 0, 0, 0, 1, 1])
    assert bias.loss_extremes(loss, labels, 1).tolist() == [0, 4, 5, 6]
    assert bias.loss_extremes(loss, labels, 2).tolist() == [0, 1, 3, 4, 5, 6], "the smaller class gives what it has"


# ---- discovery ----


def planted(sizes: dict[tuple[int, int], int], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(features, classes, planted groups): groups of a class lie twenty deviations apart."""
    generator = torch.Generator().manual_seed(seed)
    rows, labels, groups = [], [], []
    for (label, group), size in sizes.items():
        rows.append(torch.randn(size, 4, generator=generator) + group * SHIFTED + 3 * label)
        labels += [label] * size
        groups += [group] * size
    order = torch.randperm(len(labels), generator=generator)
    return torch.cat(rows)[order], torch.tensor(labels)[order], torch.tensor(groups)[order]


def test_planted_groups_are_found() -> None:
    feature, labels, groups = planted({(0, 0): 300, (0, 1): 40, (1, 0): 30, (1, 1): 250})
    found = bias.find_groups(feature, labels)
    assert found.sizes() == {(0, 0): 300, (0, 1): 40, (1, 0): 250, (1, 1): 30}
    score = found.score(groups)
    assert score["adjusted_rand_index"] == pytest.approx(1)
    assert score["smallest_group_recall"] == 1 and score["smallest_group"] == 30
    assert float(found.confidence.min()) >= 0 and float(found.confidence.mean()) > 0.6
    assert found.groups.unique().tolist() == [0, 1, 2, 3]
    again = bias.find_groups(feature, labels)
    assert torch.equal(again.clusters, found.clusters) and torch.equal(again.confidence, found.confidence)


def test_early_loss_finds_what_features_do_not_show() -> None:
    generator = torch.Generator().manual_seed(0)
    feature = torch.randn(400, 8, generator=generator)
    rare = torch.zeros(400, dtype=torch.int64)
    rare[:60] = 1
    loss = torch.where(rare == 1, 4.0, 0.05) * torch.rand(400, generator=generator).add(0.5)
    labels = torch.zeros(400, dtype=torch.int64)
    found = bias.find_groups(feature, labels, loss)
    assert found.score(rare)["adjusted_rand_index"] > 0.9
    assert bias.find_groups(feature, labels).sizes() == {(0, 0): 400}, "nothing to see without it"


def test_clusters_too_small_are_merged() -> None:
    feature, labels, _ = planted({(0, 0): 300, (0, 1): 10})
    assert bias.find_groups(feature, labels).sizes() == {(0, 0): 310}
    assert bias.find_groups(feature, labels, smallest=5).sizes() == {(0, 0): 300, (0, 1): 10}


@given(samples=st.integers(1, 30), seed=st.integers(0, 100), equal=st.booleans())
def test_any_small_input_has_groups(samples: int, seed: int, equal: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    feature = torch.ones(samples, 3) if equal else torch.randn(samples, 3, generator=generator)
    labels = torch.randint(3, (samples,), generator=generator)
    found = bias.find_groups(feature, labels, smallest=2, most=3)
    assert len(found) == samples and bool(((found.confidence >= 0) & (found.confidence <= 1)).all())
    assert all(size >= 2 or int((labels == label).sum()) < 2 for (label, _), size in found.sizes().items())


def test_csv_is_what_prepare_reads(tmp_path: Path) -> None:
    found = bias.FoundGroups(torch.tensor([0, 1]), torch.tensor([0, 1]), torch.tensor([1.0, 0.25]))
    found.to_csv(tmp_path / "bias.csv", ["a.png", "b.png"], ["gull", "tern"])
    rows = list(csv.DictReader((tmp_path / "bias.csv").read_text().splitlines()))
    assert rows[0] == {"path": "a.png", "bias": "found-0", "class": "gull", "confidence": "1.0000"}
    assert rows[1] == {"path": "b.png", "bias": "found-1", "class": "tern", "confidence": "0.2500"}
    with pytest.raises(ValueError, match="names must be of N=2 images, got 1"):
        found.to_csv(tmp_path / "bias.csv", ["a.png"])


def test_score_needs_groups_to_compare_with() -> None:
    found = bias.FoundGroups(torch.tensor([0, 1]), torch.tensor([0, 0]), torch.ones(2))
    with pytest.raises(ValueError, match="known must have two groups in some class"):
        found.score(torch.tensor([0, 1]))


# ---- bad input ----

LOGITS, LABELS = torch.zeros(3, 2), torch.zeros(3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bias.infer_environments(LOGITS, LABELS[:2]), r"labels must have shape \[N\]=\[3\], got \[2\]"),
        (lambda: bias.infer_environments(LOGITS, LABELS + 2), r"labels must lie in \[0, 2\), got values in \[2, 2\]"),
        (lambda: bias.infer_environments(LOGITS, LABELS.int()), "labels must be int64"),
        (lambda: bias.infer_environments(LOGITS / 0, LABELS), "logits must be finite"),
        (lambda: bias.afr_weights(LOGITS, LABELS, -1.0), "gamma must be a finite number >= 0"),
        (lambda: bias.disagreement(LOGITS, LOGITS, LABELS, 2, by="x"), "by must be one of 'kl', 'mistakes'"),
        (lambda: bias.disagreement(LOGITS, LOGITS, LABELS, 0), "count must be >= 1, got 0"),
        (lambda: bias.loss_extremes(torch.zeros(3), LABELS, 0), "count must be >= 1, got 0"),
        (lambda: bias.find_groups(torch.full((3, 2), math.nan), LABELS), "feature must be finite"),
        (lambda: bias.find_groups(LOGITS, LABELS, most=0), "most must be >= 1, got 0"),
        (lambda: bias.find_groups(LOGITS, LABELS, loss_share=1.0), r"loss_share must lie in \[0, 1\), got 1.0"),
        (
            lambda: bias.fit_last_layer(LOGITS, LABELS, torch.zeros(2, 5), None),
            r"weight must have shape \[K,D\]=\[2, 2\], got \[2, 5\]",
        ),
        (
            lambda: bias.fit_last_layer(LOGITS, LABELS, torch.zeros(2, 2), None, sample_weight=torch.zeros(3)),
            "sample_weight must be finite and >= 0, and > 0 somewhere",
        ),
    ],
)
def test_bad_input_is_named(call, message) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        call()
