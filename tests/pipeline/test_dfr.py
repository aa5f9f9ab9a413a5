"""DFR's last layer against scikit-learn's liblinear, and what it is fitted to."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

pytest.importorskip("sklearn")

from sklearn import linear_model as linear
from sklearn.exceptions import ConvergenceWarning
from sklearn.multiclass import OneVsRestClassifier

from debiaskd.pipeline import dfr

pytestmark = pytest.mark.usefixtures("one_thread")


def problem(counts: tuple[int, ...], width: int = 6, classes: int = 2) -> tuple[torch.Tensor, ...]:
    """Features [N,D] about 3, of which two tell the class, and labels and groups; groups take turns in the classes."""
    generator = torch.Generator().manual_seed(1)
    groups = torch.cat([torch.full((count,), group) for group, count in enumerate(counts)])
    target = groups % classes
    feature = torch.randn(len(groups), width, generator=generator).double() + 3
    for k in range(classes):
        feature[:, k] += 1.5 * (target == k)
    return 2 * feature, target, groups


def liblinear(strength: float, **more: Any) -> Any:
    return linear.LogisticRegression(C=strength, solver="liblinear", max_iter=5000, tol=1e-8, **dfr._penalty(), **more)


def test_the_layer_is_liblinears_on_features_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dfr, "STRENGTHS", (0.3,))
    feature, target, groups = problem((20, 20, 20, 20))  # alike, so that each draw is all of them
    found = dfr.refit(feature, target, groups, dfr.Scale.of(feature))
    standard = (feature - feature.mean(0)) / feature.std(0, correction=0)
    solver = liblinear(0.3).fit(standard.numpy(), target.numpy())
    logits = feature @ found.weight.T + found.bias
    expected = torch.from_numpy(solver.decision_function(standard.numpy()))
    torch.testing.assert_close(logits[:, 1] - logits[:, 0], expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(
        logits.softmax(1), torch.from_numpy(solver.predict_proba(standard.numpy())), rtol=0, atol=1e-3
    )
    assert found.draw == 80 and found.strength == 0.3


@pytest.mark.parametrize("strength", [1.0, 0.1])
def test_the_fit_is_the_optimum_with_the_intercept_regularised(strength: float) -> None:
    feature, target, _ = problem((30, 30))
    feature = dfr.Scale.of(feature)(feature)
    weight, bias, ended = dfr.fit(feature, target, strength)
    w = torch.cat([weight[1] - weight[0], (bias[1] - bias[0])[None]])
    inputs, sign = torch.cat([feature, torch.ones(60, 1).double()], 1), 2.0 * target - 1
    gradient = strength * (-sign * torch.sigmoid(-sign * (inputs @ w))) @ inputs
    assert not ended and (w == 0).any() and (w != 0).any()
    torch.testing.assert_close(gradient[w != 0], -w[w != 0].sign(), rtol=0, atol=2e-3)
    assert (gradient[w == 0].abs() <= 1 + 2e-3).all()


def test_of_three_classes_each_is_fitted_against_the_rest() -> None:
    feature, target, _ = problem((15, 20, 25), classes=3)
    feature = dfr.Scale.of(feature)(feature)
    weight, bias, _ = dfr.fit(feature, target, 0.5)
    solver = OneVsRestClassifier(liblinear(0.5)).fit(feature.numpy(), target.numpy())
    expected = torch.from_numpy(solver.decision_function(feature.numpy()))
    torch.testing.assert_close(feature @ weight.T + bias, expected, rtol=1e-3, atol=1e-3)


def test_a_layer_without_bias_scales_and_does_not_centre(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dfr, "STRENGTHS", (0.3,))
    feature, target, groups = problem((20, 20, 20, 20))
    found = dfr.refit(feature, target, groups, dfr.Scale.of(feature, centred=False), intercept=False)
    assert not found.bias.any()
    scaled = feature / feature.square().mean(0).sqrt()
    solver = liblinear(0.3, fit_intercept=False).fit(scaled.numpy(), target.numpy())
    logits = feature @ found.weight.T
    expected = torch.from_numpy(solver.decision_function(scaled.numpy()))
    torch.testing.assert_close(logits[:, 1] - logits[:, 0], expected, rtol=1e-3, atol=1e-3)


def test_the_strength_is_tuned_on_halves_and_the_layer_fitted_to_draws_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    feature, target, groups = problem((40, 6, 9, 21))
    feature[:, -1] = torch.arange(len(groups))  # which image it is
    seen: list[tuple[torch.Tensor, float, Any]] = []
    inner = dfr.fit

    def noted(features: torch.Tensor, targets: torch.Tensor, strength: float, **more: Any) -> Any:
        seen.append((features, strength, inner(features, targets, strength, **more)))
        return seen[-1][2]

    monkeypatch.setattr(dfr, "fit", noted)
    identity = dfr.Scale(torch.zeros(6).double(), torch.ones(6).double())
    monkeypatch.setattr(dfr.Scale, "of", lambda *arguments, **more: identity)
    found = dfr.refit(feature, target, groups, identity, seed=3)
    tuning, final = seen[: len(dfr.STRENGTHS)], seen[len(dfr.STRENGTHS) :]
    assert [strength for _, strength, _ in tuning] == list(dfr.STRENGTHS)
    assert [strength for _, strength, _ in final] == [found.strength] * dfr.DRAWS
    (rows,) = {tuple(features[:, -1].long().tolist()) for features, _, _ in tuning}
    assert groups[list(rows)].bincount().tolist() == [3, 3, 3, 3]  # of half of the smallest group
    assert [groups[f[:, -1].long()].bincount().tolist() for f, _, _ in final] == [[6, 6, 6, 6]] * dfr.DRAWS
    assert len({tuple(f[:, -1].tolist()) for f, _, _ in final}) == dfr.DRAWS
    first, other = dfr.halves(groups, torch.Generator().manual_seed(3))
    assert set(rows) <= set(first.tolist())
    drawn = set(torch.cat([f[:, -1] for f, _, _ in final]).tolist())
    assert len(drawn & set(first.tolist())) > 25 and len(drawn & set(other.tolist())) > 25, "of both halves"
    for _, strength, (weight, bias, _) in tuning:
        accuracy = dfr.worst(weight, bias, feature[other], target[other], groups[other])
        assert found.tuned[strength] == accuracy
    assert found.tuned[found.strength] == max(found.tuned.values()) > min(found.tuned.values())
    torch.testing.assert_close(found.weight, torch.stack([made[0] for _, _, made in final]).mean(0))
    torch.testing.assert_close(found.bias, torch.stack([made[1] for _, _, made in final]).mean(0))


@pytest.mark.parametrize("seed", range(4))
def test_halves_hold_every_group(seed: int) -> None:
    groups = torch.tensor([0] * 2 + [1] * 7 + [4] * 3)[torch.randperm(12)]
    first, other = dfr.halves(groups, torch.Generator().manual_seed(seed))
    assert sorted(torch.cat([first, other]).tolist()) == list(range(12))
    assert groups[first].bincount().tolist() == [1, 4, 0, 0, 2] and groups[other].bincount().tolist() == [1, 3, 0, 0, 1]


@pytest.mark.parametrize(
    ("groups", "target", "classes", "message"),
    [
        ([0, 0, 1, 1], [0, 0, 1, 1], 2, None),
        ([0, 0, 5, 5], [0, 0, 1, 1], 2, None),
        ([0, 0, 1, 1], [0, 0, 1, 1], 3, "needs images of every class, and there are none of class 2"),
        ([0, 0, 1, 1, 2], [0, 0, 1, 1, 1], 2, "needs 2 images of every group at least, and group 2 has 1"),
        ([0, 0], [0, 0], 1, "needs two classes at least"),
        ([], [], 2, "needs images of every class, and there are none of class 0"),
    ],
)
def test_too_few_pictures_are_told(groups: list[int], target: list[int], classes: int, message: str | None) -> None:
    numbers = torch.tensor(target, dtype=torch.int64), torch.tensor(groups, dtype=torch.int64)
    assert dfr.too_small(*numbers, classes) == message
    if message is not None and classes == int(numbers[0].max() if target else 0) + 1:
        with pytest.raises(ValueError, match=message):
            dfr.refit(torch.randn(len(groups), 2).double(), *numbers, dfr.Scale.of(torch.randn(4, 2).double()))


def test_the_scale_of_parts_is_that_of_the_whole() -> None:
    feature = torch.randn(50, 4).double() * 3 + 7
    feature[:, 2] = 0.1  # which never changes
    for centred in (True, False):
        sums = (torch.tensor(50.0).double(), feature[:20].sum(0) + feature[20:].sum(0), feature.square().sum(0))
        scale, expected = dfr.Scale.from_sums(*sums, centred=centred), dfr.Scale.of(feature, centred=centred)
        torch.testing.assert_close((scale.mean, scale.deviation), (expected.mean, expected.deviation))
    assert dfr.Scale.of(feature).deviation[2] == 1 and dfr.Scale.of(feature, centred=False).deviation[
        2
    ] == pytest.approx(0.1)
    torch.testing.assert_close(dfr.Scale.of(feature)(feature)[:, 0].std(correction=0), torch.tensor(1.0).double())


def test_fits_that_end_early_are_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    class Impatient(linear.LogisticRegression):  # type: ignore[misc]
        def fit(self, feature: Any, target: Any) -> Any:
            warnings.warn("not enough", ConvergenceWarning, stacklevel=2)
            return super().fit(feature, target)

    monkeypatch.setattr(linear, "LogisticRegression", Impatient)
    monkeypatch.setattr(dfr, "DRAWS", 3)
    feature, target, groups = problem((6, 6))
    with pytest.warns(dfr.FitWarning, match="^10 of 10 fits of the last layer ended before they converged$") as caught:
        dfr.refit(feature, target, groups, dfr.Scale.of(feature))
    assert len(caught) == 1


def test_l1_is_asked_for_as_the_installed_version_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    feature, target, _ = problem((6, 6))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of what will not work any more
        dfr.fit(feature, target, 1.0)
    for penalty, expected in (("l2", {"penalty": "l1"}), ("deprecated", {"l1_ratio": 1.0}), (None, {"l1_ratio": 1.0})):
        source = "def made(" + ("" if penalty is None else f"penalty={penalty!r}, ") + "C=1.0): pass"
        scope: dict[str, Any] = {}
        exec(source, scope)
        monkeypatch.setattr(linear, "LogisticRegression", scope["made"])
        assert dfr._penalty() == expected
