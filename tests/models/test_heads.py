"""Any head teaches: what the last layers of a teacher read, at map level and at token level, and what its head is."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from debiaskd.losses import feature_match_loss
from debiaskd.models import SmallNet
from debiaskd.models.frozen_teacher import FrozenTeacher
from debiaskd.models.heads import CarriedHead, LayersHead, LinearHead, MapHead
from debiaskd.models.transplant import match_spatial, transplant

pytestmark = pytest.mark.usefixtures("one_thread")
IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(5))


class Tokens(nn.Module):
    """timm's three methods; its logits come from prefix tokens, from maps, or from both, by `ending`."""

    def __init__(self, ending: str, width: int = 6, classes: int = 3) -> None:
        super().__init__()
        self.ending, self.num_features, self.num_prefix_tokens = ending, width, 2
        self.embed = nn.Conv2d(3, width, 8, stride=8)
        self.prefix = nn.Parameter(torch.randn(1, 2, width))
        self.mix = nn.Linear(width, width)
        self.head = nn.Linear(width, classes)
        self.head_dist = nn.Linear(width, classes)
        self.norm = nn.BatchNorm1d(width)
        self.conv = nn.Conv2d(width, classes, 1)
        self.share = nn.Parameter(torch.tensor([0.3, 0.9]))

    def forward_features(self, x: torch.Tensor) -> Any:
        patches = self.embed(x).flatten(2).transpose(1, 2)
        prefix = self.prefix + torch.tanh(self.mix(patches)).mean(1, keepdim=True)
        tokens = torch.cat([prefix, patches], 1)
        return [tokens, patches] if self.ending == "list" else tokens

    def forward_head(self, x: Any, pre_logits: bool = False) -> torch.Tensor:
        x = x[0] if self.ending == "list" else x
        pooled = x[:, 2:].mean(1)
        if self.ending in ("class token", "list"):
            return x[:, 0] if pre_logits else self.head(x[:, 0])
        if self.ending == "two tokens":
            return x[:, :2] if pre_logits else (self.head(x[:, 0]) + self.head_dist(x[:, 1])) / 2
        if self.ending == "weighted":
            first, second = self.head(x[:, 0]), self.head_dist(x[:, 1])
            return x[:, :2].flatten(1) if pre_logits else self.share[0] * first + self.share[1] * second
        if self.ending == "two heads":
            return pooled if pre_logits else (self.head(pooled) + self.head_dist(pooled)) / 2
        if self.ending == "identity norm":
            return self.norm(pooled) if pre_logits else self.head(self.norm(pooled))
        assert self.ending == "convolution"
        return pooled[..., None, None] if pre_logits else self.conv(pooled[..., None, None]).flatten(1)

    def get_classifier(self) -> Any:
        if self.ending in ("two tokens", "two heads", "weighted"):
            return self.head, self.head_dist
        return self.conv if self.ending == "convolution" else self.head

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(x))


class Ending(nn.Module):
    """A forward and nothing else; the last map is `stage`, what follows is `ending`."""

    def __init__(self, ending: str, width: int = 6) -> None:
        super().__init__()
        self.ending = ending
        self.stage = nn.Sequential(nn.Conv2d(3, width, 8, stride=8), nn.ReLU())
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.mlp = nn.Sequential(nn.Linear(width, 9), nn.Hardswish(), nn.Dropout(0.5), nn.Linear(9, 3))
        self.normed = nn.Sequential(nn.GroupNorm(1, width), nn.Flatten(), nn.Linear(width, 3))
        self.convolved = nn.Sequential(nn.Dropout(0.5), nn.Conv2d(width, 3, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
        self.wide = nn.Linear(width * 16, 9)
        self.last = nn.Linear(9, 3)
        self.fc = nn.Linear(width, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stage(x)
        if self.ending == "mlp":
            return self.mlp(self.pool(x).flatten(1))
        if self.ending == "norm":
            return self.normed(self.pool(x))
        if self.ending == "convolution":
            return self.convolved(x).flatten(1)
        if self.ending == "hidden":
            return self.last(self.wide(F.adaptive_avg_pool2d(x, 4).flatten(1)).relu())
        assert self.ending == "maximum"
        return self.fc(F.relu(x).amax((2, 3)))


PROTOCOL = {
    "class token": ("token", LinearHead, 6),
    "list": ("token", LinearHead, 6),
    "two tokens": ("token", LayersHead, 12),
    "weighted": ("token", LayersHead, 12),
    "two heads": ("map", CarriedHead, 6),
    "identity norm": ("map", CarriedHead, 6),
    "convolution": ("map", CarriedHead, 6),
}
NAMED = {
    "mlp": ("map", LayersHead, 6),
    "norm": ("map", LayersHead, 6),
    "convolution": ("map", MapHead, 6),
    "hidden": ("token", LinearHead, 9),
    "maximum": ("token", LinearHead, 6),
}
CASES = [*((Tokens, *item) for item in PROTOCOL.items()), *((Ending, *item) for item in NAMED.items())]


def made(kind: type, ending: str) -> tuple[nn.Module, dict[str, str]]:
    torch.manual_seed(0)
    model = kind(ending).eval()
    return model, {"layer": "stage"} if kind is Ending else {}


@pytest.mark.parametrize("kind, ending, expected", CASES)
def test_every_head_is_carried_whole(kind: type, ending: str, expected: tuple[str, type, int]) -> None:
    model, names = made(kind, ending)
    level, _, width = expected
    teacher = FrozenTeacher(model, example=IMAGES, **names)
    assert (teacher.level, type(teacher.head), teacher.num_features) == expected
    assert teacher.num_classes == 3 and list(teacher.parameters()) == []
    feature, logits = teacher(IMAGES)
    torch.testing.assert_close(logits, model(IMAGES).detach())
    assert feature.shape == ((3, width) if level == "token" else (3, width, 4, 4))
    pooled = teacher.forward_head(feature, pre_logits=True)
    assert pooled.shape == (3, teacher.head.in_features)


@pytest.mark.parametrize("kind, ending, expected", CASES)
def test_the_student_learns_what_the_head_reads(kind: type, ending: str, expected: tuple[str, type, int]) -> None:
    model, names = made(kind, ending)
    student = transplant(
        model, SmallNet((4, 5), (2, 2), 7), example=IMAGES, **{k: (v, None) for k, v in names.items()}
    ).train()
    before = copy.deepcopy(student.head.state_dict())
    teacher = FrozenTeacher(model, example=IMAGES, **names)
    feature = student.forward_features(IMAGES)
    assert feature.shape == (3, expected[2], 8, 8) and student(IMAGES).shape == (3, 3)
    loss = feature_match_loss(*match_spatial(feature, teacher.forward_features(IMAGES)), torch.tensor([1.0, 2, 0]))
    loss.backward()
    assert all(parameter.grad is not None for parameter in student.parameters())
    torch.testing.assert_close(student.head.state_dict(), before)
    again = transplant(teacher, SmallNet((4, 5), (2, 2), 7), example=IMAGES)
    again.load_state_dict(student.state_dict())
    torch.testing.assert_close(again.eval()(IMAGES), student.eval()(IMAGES))


def test_a_student_that_matches_the_vector_gives_the_teachers_logits() -> None:
    model, _ = made(Tokens, "two tokens")
    teacher = FrozenTeacher(model, example=IMAGES)
    z, logits = teacher(IMAGES)
    constant = z[:, :, None, None].expand(-1, -1, 5, 5)  # a map whose mean is the vector
    student = transplant(teacher, SmallNet((4, 5), (2, 2), 7), example=IMAGES)
    torch.testing.assert_close(student.forward_head(constant), logits)
    a, b = match_spatial(constant, z)
    torch.testing.assert_close(a, b)


@pytest.mark.parametrize("ending, head", [("identity norm", CarriedHead), ("class token", LinearHead)])
def test_what_is_carried_does_not_depend_on_values(ending: str, head: type) -> None:
    # A batch norm that is the identity, and a last layer of zeros, confirm whatever is tried.
    model, _ = made(Tokens, ending)
    trained = copy.deepcopy(model)
    with torch.no_grad():
        for layer in (model.head, model.head_dist):
            layer.weight.zero_()
            layer.bias.zero_()
        trained.norm.running_mean += 0.5
        trained.norm.weight *= 2
    found = FrozenTeacher(model, example=IMAGES), FrozenTeacher(trained, example=IMAGES)
    assert [type(one.head) for one in found] == [head, head]
    found[0].load_state_dict(found[1].state_dict())
    torch.testing.assert_close(found[0](IMAGES)[1], trained(IMAGES).detach())


def test_the_channels_are_the_networks_own() -> None:
    class Transformed(SmallNet):  # as csatv2 and tresnet: the first convolution stands behind a transform of the pixels
        def __init__(self) -> None:
            super().__init__((4,), (2,), 3)
            self.pretrained_cfg = {"input_size": (3, 64, 64)}
            self.body.conv1 = nn.Conv2d(48, 4, 3)

        def forward_features(self, images: torch.Tensor) -> torch.Tensor:
            return self.body(F.pixel_unshuffle(images, 4))

    assert FrozenTeacher(Transformed())(IMAGES)[1].shape == (3, 3)
    assert transplant(Transformed(), Transformed())(IMAGES).shape == (3, 3)


def test_a_class_token_that_is_not_counted_is_left_out_of_the_map() -> None:
    class Uncounted(Tokens):
        def __init__(self) -> None:
            super().__init__("class token")
            self.num_prefix_tokens = 0

    student = transplant(SmallNet((4, 5), (2, 2), 3), Uncounted(), example=IMAGES)
    assert student.body(IMAGES).shape == (3, 6, 4, 4)


@pytest.mark.parametrize("ending, layer", [("list", "mix"), ("class token", None)])
def test_a_student_needs_a_map_alone(ending: str, layer: str | None) -> None:
    # Lists of features have no one layout: the last map that a module gives is taken.
    student = transplant(SmallNet((4,), (2,), 3), made(Tokens, ending)[0], example=IMAGES).train()
    assert student.body.layer == layer
    student(IMAGES).sum().backward()
    assert all(parameter.grad is not None for parameter in student.parameters())


def test_parameters_behind_the_map_are_not_trained() -> None:
    class Behind(nn.Module):  # code that reads a matrix, and that no module does
        def __init__(self) -> None:
            super().__init__()
            self.stage = nn.Conv2d(3, 5, 8, stride=8)
            self.matrix = nn.Parameter(torch.randn(3, 5))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.stage(x).amax((2, 3)) @ self.matrix.T

    student = transplant(SmallNet((4,), (2,), 3), Behind(), layer=(None, "stage"))
    student(IMAGES).sum().backward()
    assert {n for n, _ in student.body.named_parameters()} == {"model.stage.weight", "model.stage.bias"}


@pytest.mark.parametrize("ending", NAMED)
def test_layers_are_found_where_nothing_names_them(ending: str) -> None:
    model, names = made(Ending, ending)
    teacher = FrozenTeacher(model)
    assert (teacher.level, type(teacher.head), teacher.num_features) == NAMED[ending]
    torch.testing.assert_close(teacher(IMAGES)[0], FrozenTeacher(model, **names)(IMAGES)[0])
    assert transplant(teacher, model).body.layer == "stage"


def test_a_model_without_a_head_is_refused() -> None:
    model, _ = made(Tokens, "class token")
    model.head = nn.Identity()
    with pytest.raises(TypeError, match="layer that gives logits, got Identity"):
        FrozenTeacher(model, example=IMAGES)
