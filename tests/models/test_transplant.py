"""Transplanting: what the student becomes, what is trained, and the traps that public code fell into."""

from __future__ import annotations

import copy
import functools
import gc
import pickle
import weakref
from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from debiaskd.models.frozen_teacher import FrozenTeacher
from debiaskd.models.projector import PROJECTORS, make_projector
from debiaskd.models.transplant import Transplanted, match_spatial, transplant


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """These networks are so small that threads would wait for each other most of the time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Functional(nn.Module):
    """Pools, flattens and drops by functions, as much research code does."""

    def __init__(self, width: int, classes: int = 3) -> None:
        super().__init__()
        self.classifier = nn.Linear(width, classes)  # registered first: registration order is not call order
        self.stem = nn.Conv2d(3, width, 3, stride=2, padding=1)
        self.stage = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stage(F.relu(self.stem(x)))
        x = torch.flatten(F.adaptive_avg_pool2d(x, 1), 1)
        return self.classifier(F.dropout(x, 0.5, self.training))


def sequential(width: int, classes: int = 3) -> nn.Module:
    body = nn.Sequential(nn.Conv2d(3, width, 3, stride=4), nn.BatchNorm2d(width), nn.ReLU())
    return nn.Sequential(body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes))


@functools.cache
def timm_model(name: str, **options: object) -> nn.Module:
    timm = pytest.importorskip("timm", reason="timm models need timm")
    return timm.create_model(name, pretrained=False, num_classes=3, **options)


@functools.cache
def torchvision_resnet() -> nn.Module:
    models = pytest.importorskip("torchvision.models", reason="torchvision models need torchvision")
    return models.resnet18(num_classes=3)


def pair(name: str) -> tuple[nn.Module, nn.Module, dict]:
    """A teacher, a student and the arguments that they need; images are 64 px wide."""
    if name == "sequential":
        return sequential(12), sequential(8), {"layer": "0", "head": "3"}
    if name == "functional":
        return sequential(12), Functional(8, classes=7), {"layer": ("0", "stage"), "head": ("3", "classifier")}
    if name == "torchvision":
        return torchvision_resnet(), torchvision_resnet(), {"layer": "layer4", "head": "fc"}
    if name == "mixed":
        return torchvision_resnet(), timm_model("mobilenetv3_small_050"), {"layer": ("layer4", None), "head": "fc"}
    teacher, student = name.split("<-")
    return timm_zoo(teacher), timm_zoo(student), {}


def timm_zoo(name: str) -> nn.Module:
    if name.startswith("vit"):
        small = {"img_size": 64, "embed_dim": 32, "depth": 2, "num_heads": 2}
        pooling = "avg" if name == "vit_avg" else "token"
        return timm_model("vit_tiny_patch16_224", global_pool=pooling, **small)
    if name == "convnext_atto":
        return timm_model(name, depths=(1, 1, 1, 1), dims=(8, 16, 24, 32))
    return timm_model(name, **({"channels": (8, 16, 24, 32)} if name == "resnet10t" else {}))


TIMM = ["resnet10t<-mobilenetv3_small_050", "mobilenetv3_small_050<-resnet10t", "convnext_atto<-resnet10t"]
TOKENS = ["vit_avg<-resnet10t", "resnet10t<-vit", "vit<-resnet10t"]
PAIRS = ["sequential", "functional", "torchvision", "mixed", *TIMM, *TOKENS]


@functools.cache
def built(name: str) -> tuple[nn.Module, nn.Module, dict, Transplanted]:
    teacher, student, options = pair(name)
    return teacher, student, options, transplant(teacher, student, **options)


def teachers(options: dict) -> dict:
    return {key: value if isinstance(value, str) else value[0] for key, value in options.items()}


def images(size: int = 64, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(3))


def snapshot(model: nn.Module) -> tuple:
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    return state, modes, [(parameter.requires_grad, parameter.grad is None) for parameter in model.parameters()]


def assert_untouched(model: nn.Module, before: tuple) -> None:
    state, modes, parameters = snapshot(model)
    assert (modes, parameters) == before[1:]
    torch.testing.assert_close(state, before[0], rtol=0, atol=0)


@pytest.mark.parametrize("name", PAIRS)
def test_the_head_turns_the_teachers_maps_into_its_logits(name: str) -> None:
    teacher, _, options, model = built(name)
    names = teachers(options)
    feature, logits = FrozenTeacher(teacher, **names)(images())
    reference = copy.deepcopy(teacher).eval()
    torch.testing.assert_close(logits, reference(images()), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model.forward_head(feature), logits)
    torch.testing.assert_close(model.get_classifier()(model.forward_head(feature, pre_logits=True)), logits)


@pytest.mark.parametrize("name", PAIRS)
def test_one_training_step_moves_body_and_projector_alone(name: str) -> None:
    teacher, student, options, _ = built(name)
    before = snapshot(teacher), snapshot(student)
    model = transplant(teacher, student, **options).train().requires_grad_(True)
    trained = {*map(id, model.body.parameters()), *map(id, model.projector.parameters())}
    assert {id(parameter) for parameter in model.parameters()} == trained
    head = copy.deepcopy(model.head.state_dict())
    start = {key: parameter.detach().clone() for key, parameter in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.5)
    (model.forward_features(images(batch=4)).square().mean() + model(images(batch=4)).square().mean()).backward()
    assert [key for key, parameter in model.named_parameters() if parameter.grad is None] == []
    optimizer.step()
    stuck = [key for key, parameter in model.named_parameters() if torch.equal(parameter, start[key])]
    assert all(not start[key].any() for key in stuck), stuck  # a zero may get a zero gradient
    torch.testing.assert_close(model.head.state_dict(), head, rtol=0, atol=0)
    assert_untouched(teacher, before[0])
    assert_untouched(student, before[1])


@pytest.mark.parametrize("name", PAIRS)
def test_state_reloads_into_a_fresh_build_and_holds_no_teacher(name: str) -> None:
    teacher, student, options, model = built(name)
    model = copy.deepcopy(model).eval()
    fresh = transplant(scrambled(teacher), scrambled(student), **options).eval()
    assert not torch.equal(fresh(images()), model(images()))
    fresh.load_state_dict(model.state_dict(), strict=True)
    torch.testing.assert_close(fresh(images()), model(images()), rtol=0, atol=0)
    assert {key.split(".")[0] for key in model.state_dict()} == {"body", "projector", "head"}
    # Neither model's own body is there twice, nor the student's classifier.
    kept = {key.removeprefix("body.model.") for key in model.body.state_dict(prefix="body.")}
    assert kept < set(student.state_dict())
    assert len(model.head.state_dict()) < max(len(teacher.state_dict()) // 2, 4)


def scrambled(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.rand_like(parameter))
    return model


@pytest.mark.parametrize("name", PAIRS)
def test_copies_pickles_and_functional_calls(name: str) -> None:
    model = copy.deepcopy(built(name)[3]).eval()
    expected = model(images())
    torch.testing.assert_close(pickle.loads(pickle.dumps(model))(images()), expected)
    torch.testing.assert_close(torch.func.functional_call(model, model.state_dict(), (images(),)), expected)


EXPORTED = [
    ("functional", True),
    ("torchvision", False),
    ("convnext_atto<-resnet10t", False),
    ("vit<-resnet10t", False),
    ("resnet10t<-vit", False),
]


@pytest.mark.compiles
@pytest.mark.parametrize("name, strict", EXPORTED)
@pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects")
def test_export_with_a_batch_of_any_size(name: str, strict: bool) -> None:
    model = copy.deepcopy(built(name)[3]).eval()
    batch = {0: torch.export.Dim("batch", min=2, max=64)}
    program = torch.export.export(model, (images(),), strict=strict, dynamic_shapes=(batch,))
    torch.testing.assert_close(program.module()(images(batch=5)), model(images(batch=5)), rtol=1e-4, atol=1e-4)
    assert set(program.state_dict) == set(model.state_dict())


@pytest.mark.compiles
@pytest.mark.parametrize("name", ["functional", "convnext_atto<-resnet10t"])
def test_compiles_as_one_graph(name: str) -> None:
    torch._dynamo.reset()
    model = copy.deepcopy(built(name)[3]).train()
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    torch.manual_seed(0)
    expected = model(images(batch=4))
    torch.manual_seed(0)
    actual = compiled(images(batch=4))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    actual.sum().backward()
    assert all(parameter.grad is not None for parameter in compiled.parameters())


def test_the_teacher_is_free_to_go() -> None:
    teacher, student = sequential(12), Functional(8)
    model = transplant(teacher, student, layer=("0", "stage"), head="3")
    gone = [weakref.ref(teacher), weakref.ref(teacher[0]), weakref.ref(teacher[3].weight), weakref.ref(student)]
    del teacher, student
    gc.collect()
    assert [reference() for reference in gone] == [None] * 4
    assert model(images()).shape == (2, 3)


def test_a_frozen_teacher_stays_in_eval_mode_and_its_batch_norm_never_moves() -> None:
    teacher = Functional(8).train()
    before = snapshot(teacher)
    task = nn.ModuleDict(
        {"teacher": FrozenTeacher(teacher, layer="stage", head="classifier"), "student": sequential(4)}
    )
    state = copy.deepcopy(task["teacher"].state_dict())
    task.train().requires_grad_(True)
    for _ in range(2):
        feature, logits = task["teacher"]((images() + 5).requires_grad_())
    assert not feature.requires_grad and not logits.requires_grad
    assert not task["teacher"].forward_features(images().requires_grad_()).requires_grad
    assert not any(module.training for module in task["teacher"].modules())
    assert [key for key, _ in task.named_parameters() if key.startswith("teacher")] == []
    torch.testing.assert_close(task["teacher"].state_dict(), state, rtol=0, atol=0)
    assert_untouched(teacher, before)


@pytest.mark.parametrize("name", ["functional", "mixed", "convnext_atto<-resnet10t", "vit_avg<-resnet10t"])
def test_a_frozen_teacher_can_be_transplanted(name: str) -> None:
    teacher, student, options, model = built(name)
    names = teachers(options)
    again = transplant(FrozenTeacher(teacher, **names), student, **options).eval()
    again.load_state_dict(model.state_dict())
    torch.testing.assert_close(again(images()), copy.deepcopy(model).eval()(images()), rtol=0, atol=0)


def test_a_carried_head_stays_in_eval_mode() -> None:
    teacher = timm_model("mobilenetv4_conv_small", drop_rate=0.5)  # batch norm and dropout behind the pooling
    model = transplant(teacher, sequential(8), layer=(None, "0")).train()
    head = copy.deepcopy(model.head.state_dict())
    feature = model.forward_features(images(batch=4))
    torch.testing.assert_close(model.forward_head(feature), model.forward_head(feature), rtol=0, atol=0)
    torch.testing.assert_close(model.head.state_dict(), head, rtol=0, atol=0)
    assert model.training and model.body.training and not model.head.training


def test_projectors() -> None:
    x = torch.randn(2, 6, 5, 5)
    for kind in PROJECTORS:
        outputs = 6 if kind == "identity" else 10
        assert make_projector(kind, 6, outputs)(x).shape == (2, outputs, 5, 5)
    assert make_projector("depthwise", 6, 10).conv2.weight.shape == (5, 1, 3, 3)
    assert make_projector("dense", 6, 10).conv2.weight.shape == (5, 5, 3, 3)
    assert [type(m).__name__ for m in make_projector("depthwise", 6, 10)] == [
        *["Conv2d", "BatchNorm2d", "ReLU"] * 2,
        *["Conv2d", "BatchNorm2d", "LastReLU"],
    ]
    assert isinstance(make_projector("linear", 6, 10), nn.Conv2d)


def test_the_projector_can_reach_negative_maps() -> None:
    # Behind ReLU the last ReLU helps; behind a bare convolution it would cut half of the target off.
    bare = nn.Sequential(nn.Conv2d(3, 6, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3))
    with_relu = transplant(sequential(6), sequential(4), layer="0", head="3")
    without = transplant(bare, sequential(4), layer="0", head=("3", None))
    assert with_relu.forward_features(images()).min() >= 0
    assert without.forward_features(images()).min() < 0
    # A checkpoint brings its own choice along, whatever teacher the model was rebuilt around.
    with_relu.load_state_dict(without.state_dict())
    torch.testing.assert_close(with_relu.eval()(images()), without.eval()(images()))


def test_mode_dtype_and_random_state_follow_the_student() -> None:
    teacher, student = sequential(4), sequential(4).double().eval()
    state = torch.get_rng_state()
    model = transplant(teacher, student, projector="identity", layer="0", head="3")
    assert torch.equal(torch.get_rng_state(), state)
    assert model(images().double()).dtype == torch.float64
    assert not any(module.training for module in model.modules())
    assert (model.num_features, model.num_classes) == (4, 3)
    student.train()[0][1].eval()  # a user's own choice
    model = transplant(teacher, student, projector="linear", layer="0", head="3")
    assert model.training and model.projector.training and not model.head.training
    assert [module.training for module in model.body.get_submodule("model.0").modules()] == [True, True, False, True]


@pytest.mark.parametrize(
    "student, teacher, size",
    [((14, 14), (7, 7), (7, 7)), ((4, 4), (7, 7), (4, 4)), ((8, 3), (4, 6), (4, 3)), ((5, 5), (5, 5), (5, 5))],
)
def test_match_spatial_pools_the_larger(student: tuple, teacher: tuple, size: tuple) -> None:
    a, b = torch.randn(2, 3, *student), torch.randn(2, 5, *teacher)
    pooled = match_spatial(a, b)
    for before, after in zip((a, b), pooled):
        torch.testing.assert_close(after, F.adaptive_avg_pool2d(before, size))
    assert pooled[0] is a or student != size
