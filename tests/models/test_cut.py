"""Cutting models at their feature map: layouts, layers by name, and every refusal with its message."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from debiaskd.models.frozen_teacher import FrozenTeacher
from debiaskd.models.transplant import match_spatial, transplant

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(5))


class Chain(nn.Module):
    """stem → stage → `between` → global pooling → fc, all by functions; `auxiliary` runs in training alone."""

    def __init__(self, width: int = 6, between: str = "nothing", checkpointed: bool = False) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, stride=4), nn.BatchNorm2d(width))
        self.stage = nn.Conv2d(width, width, 3, padding=1)
        self.unused = nn.ModuleList([nn.Linear(2, 2)])
        self.auxiliary = nn.Linear(width, 2)
        self.scale = nn.Parameter(torch.ones(width))
        self.between, self.checkpointed = between, checkpointed
        self.fc = nn.Linear(width, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = checkpoint(self.stage, x, use_reentrant=False) if self.checkpointed else self.stage(x)
        if self.training:
            self.auxiliary(x.mean((2, 3)))
        if self.between == "twice":
            x = self.stage(x)
        if self.between == "relu":
            x = F.relu(x)
        if self.between == "inplace relu":
            x = F.relu(x, inplace=True)
        if self.between == "maximum":
            return self.fc(x.amax((2, 3)))
        if self.between == "flatten":
            return x.flatten(1)
        if self.between == "dictionary":
            return {"logits": self.fc(x.mean((2, 3)))}
        return self.fc(x.mean((2, 3)))


class Protocol(nn.Module):
    """timm's three methods over a layout of choice; the head has a norm of its own."""

    def __init__(self, axes: str, classifier: nn.Module | None = None, reads_prefix: bool = False) -> None:
        super().__init__()
        self.num_features, self.num_prefix_tokens = 6, 2
        self.axes, self.reads_prefix = axes, reads_prefix
        self.embed = nn.Conv2d(3, 6, 4, stride=4)
        self.prefix = nn.Parameter(torch.randn(1, 2, 6))
        self.norm = nn.LayerNorm(6)
        self.fc = nn.Linear(6, 3) if classifier is None else classifier

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        if self.axes == "NHWC":
            return x.permute(0, 2, 3, 1)
        return torch.cat([self.prefix.expand(len(x), -1, -1), x.flatten(2).transpose(1, 2)], 1)

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        tokens = x.flatten(1, -2)
        prefix = 0 if self.axes == "NHWC" else 2
        x = self.norm(tokens[:, 0] if self.reads_prefix else tokens[:, prefix:].mean(1))
        return x if pre_logits else self.fc(x)

    def get_classifier(self) -> nn.Module:
        return self.fc

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(x))


@pytest.mark.parametrize("axes", ["NHWC", "NLC"])
@pytest.mark.parametrize("size", [(32, 32), (24, 40), (20, 24)])  # the last makes maps of 5×6, and there are 6 channels
def test_channels_last_and_tokens_become_maps(axes: str, size: tuple[int, int]) -> None:
    x = torch.randn(2, 3, *size)
    teacher = Protocol(axes)
    feature, logits = FrozenTeacher(teacher, example=x)(x)
    torch.testing.assert_close(feature, teacher.embed(x).detach())
    torch.testing.assert_close(logits, teacher(x).detach())
    model = transplant(teacher, Protocol("NLC" if axes == "NHWC" else "NHWC"), example=x)
    assert model(x).shape == (2, 3)
    assert set(model.head.state_dict()) == {"model.norm.weight", "model.norm.bias", "model.fc.weight", "model.fc.bias"}


@pytest.mark.parametrize("between", ["nothing", "inplace relu"])
def test_what_the_body_does_not_need_is_gone(between: str) -> None:
    model = transplant(Chain(), Chain(4, between), layer="stage", head="fc").train()
    assert {key.split(".")[1] for key, _ in model.body.named_parameters()} == {"stem", "stage"}
    model(IMAGES).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_code_that_changes_the_map_in_place_is_part_of_it() -> None:
    teacher = Chain(between="inplace relu").eval()
    feature, logits = FrozenTeacher(teacher, layer="stage", head="fc")(IMAGES)
    assert feature.min() == 0
    torch.testing.assert_close(logits, teacher(IMAGES).detach())


def test_threads_do_not_catch_each_others_maps() -> None:
    model = transplant(Chain(), Chain(4), layer="stage", head="fc").eval()
    inputs = [torch.full((1, 3, 32, 32), float(i)) for i in range(4)]
    expected = [model(x) for x in inputs]
    wrong: list[int] = []

    def work(i: int) -> None:
        for _ in range(30):
            if not torch.allclose(model(inputs[i]), expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_activation_checkpointing_gives_the_same_gradients() -> None:
    student = Chain(4)
    plain = transplant(Chain(), student, projector="linear", layer="stage", head="fc")
    model = transplant(Chain(), Chain(4, checkpointed=True), projector="linear", layer="stage", head="fc")
    model.load_state_dict(plain.state_dict())
    for module in (plain, model):
        module.forward_features(IMAGES).square().sum().backward()
    for one, two in zip(plain.parameters(), model.parameters()):
        torch.testing.assert_close(one.grad, two.grad)


def test_an_example_helps_where_no_usual_size_runs() -> None:
    def fixed() -> nn.Module:
        stem = nn.Sequential(nn.Unflatten(1, (1, 10, 10)), nn.Conv2d(1, 6, 3))
        return nn.Sequential(stem, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3))

    with pytest.raises(ValueError, match="example must be an input that the teacher runs on, got none"):
        transplant(fixed(), fixed(), layer="0", head="3")
    model = transplant(fixed(), fixed(), layer="0", head="3", example=torch.randn(5, 100))
    assert model(torch.randn(4, 100)).shape == (4, 3)


def test_one_channel_models_need_no_example() -> None:
    def gray() -> nn.Module:
        return nn.Sequential(nn.Conv2d(1, 6, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3))

    assert transplant(gray(), gray(), layer="0", head="3")(torch.randn(4, 1, 8, 8)).shape == (4, 3)


NAMED = {"layer": "stage", "head": "fc"}
REFUSED = [
    ((lambda x: x, Chain()), NAMED, TypeError, "teacher must be a torch.nn.Module, got function"),
    ((Chain(), "resnet18"), NAMED, TypeError, "student must be a torch.nn.Module, got str"),
    ((Chain(), Chain()), {**NAMED, "projector": "conv"}, ValueError, "projector must be one of 'depthwise'.*'conv'"),
    ((Chain(), Chain(4)), {**NAMED, "projector": "identity"}, ValueError, "equal widths, got a teacher of 6.*of 4"),
    ((nn.Flatten(), Chain()), {}, ValueError, "teacher must end in layers whose outputs"),
    ((Chain(), Chain()), {**NAMED, "layer": "stege"}, ValueError, r"of the teacher, got 'stege'.*\['stage'"),
    ((Chain(), Chain()), {**NAMED, "layer": ("stage", "stege")}, ValueError, "of the student, got 'stege'.*pass "),
    ((Chain(), Chain()), {**NAMED, "layer": ""}, ValueError, "layer must name a module of the teacher, got ''"),
    ((Chain(), Chain()), {**NAMED, "layer": 4}, TypeError, "layer must be a name, a .* pair of names, or None, got 4"),
    ((Chain(), Chain()), {**NAMED, "layer": ("a", "b", "c")}, TypeError, "layer must be a name, a"),
    ((Chain(), Chain()), {**NAMED, "head": "fcc"}, ValueError, "head must name a module of the teacher, got 'fcc'"),
    ((Chain(), Chain()), {**NAMED, "head": ("fc", "no")}, ValueError, "head must name a module of the student"),
    ((Chain(), Chain()), {**NAMED, "head": "stem"}, ValueError, "head must name a layer of the teacher .*'stem'"),
    ((Chain(), Chain()), {**NAMED, "layer": "fc"}, ValueError, r"feature map \[N,C,H,W\].* got \[1, 3\]"),
    ((Chain(), Chain()), {**NAMED, "layer": "unused"}, ValueError, "'unused' must run once in .* it ran 0 times"),
    ((Chain(between="twice"), Chain()), NAMED, ValueError, "'stage' must run once in .* it ran 2 times"),
    ((Chain(), Chain()), {**NAMED, "head": "auxiliary"}, ValueError, "whose outputs are its logits.*'auxiliary'"),
    ((Chain(between="flatten"), Chain()), NAMED, ValueError, "whose outputs are its logits .*'fc'"),
    ((Chain(between="flatten"), Chain()), {"layer": "stage"}, ValueError, "teacher must end in layers whose outputs"),
    ((Chain(between="dictionary"), Chain()), NAMED, ValueError, r"teacher must give logits \[N,K\], got dict"),
    ((Chain(), Chain()), {**NAMED, "example": IMAGES[:, :2]}, ValueError, r"example must be .* \[2, 2, 32, 32\]"),
    ((Chain(), Chain()), {**NAMED, "example": [1]}, TypeError, "example must be a torch.Tensor, got list"),
    ((Chain().to("meta"), Chain()), NAMED, ValueError, "must hold values, got parameters on the meta device"),
    ((Chain(), nn.Sequential(nn.LazyConv2d(4, 3))), {**NAMED, "layer": ("stage", "0")}, ValueError, "student.* lazy"),
    ((Protocol("NHWC", nn.Identity()), Chain()), {"layer": (None, "stage")}, TypeError, "got Identity.*get_classifier"),
]


@pytest.mark.parametrize("models, options, error, message", REFUSED)
def test_refusals_name_the_argument(models: tuple, options: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        transplant(*models, **options)


def test_a_diverged_teacher_is_refused() -> None:
    teacher = Chain()
    nn.init.constant_(teacher.stage.bias, float("nan"))
    with pytest.raises(ValueError, match="teacher must give a finite feature map"):
        FrozenTeacher(teacher, layer="stage", head="fc")


def test_match_spatial_refuses() -> None:
    x = torch.randn(2, 3, 4, 4)
    with pytest.raises(ValueError, match=r"teacher must have shape \[N,C,H,W\], got \[2, 3, 4\]"):
        match_spatial(x, x[..., 0])
    with pytest.raises(ValueError, match="teacher must have the batch size of student, 2, got 1"):
        match_spatial(x, x[:1])
    with pytest.raises(TypeError, match=r"student must be float32.*int64"):
        match_spatial(x.long(), x)
