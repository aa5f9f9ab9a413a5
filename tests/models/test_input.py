"""Input contracts: where each part comes from, and what two networks read of the same augmented image."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("safetensors")

from safetensors.torch import save_file
from torch import Tensor, nn

from debiaskd.boxes import Boxes
from debiaskd.data import Augment, Batch
from debiaskd.models.input import IMAGENET_MEAN, IMAGENET_STD, InputContract, Preprocess, read_contract, resize, saved
from debiaskd.models.input_sources import accepts, resolve
from debiaskd.models.registry import NetworkError, build, prepare, save_weights

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
HALF = (0.5, 0.5, 0.5)


def found(name: str, prepared: int = 64, **options: Any) -> InputContract:
    return resolve(name, (prepared, prepared), **options)[0]


# -- sources ----------------------------------------------------------------------------------------------------------


def test_from_scratch_imagenets_mean_and_std_stay() -> None:
    pytest.importorskip("timm")
    for name in ("small/8", "resnet18", "tf_efficientnet_lite0"):
        contract, source = resolve(name, (64, 64))
        assert contract == InputContract((64, 64), IMAGENET_MEAN, IMAGENET_STD, "bilinear", 3)
        assert source == "ImageNet's mean and std by default"


def test_pretrained_weights_bring_their_own(tmp_path: Path) -> None:
    """With `pretrained`, and with a file of weights for the name: those that timm knows under the name."""
    pytest.importorskip("timm")
    save_file({"x": torch.zeros(1)}, tmp_path / "w.safetensors")
    for begun in ({"pretrained": True}, {"weights": tmp_path / "w.safetensors"}, {"weights": tmp_path / "w.pth"}):
        assert found("tf_efficientnet_lite0", **begun) == InputContract((64, 64), HALF, HALF, "bicubic"), begun
    tagged = found("vit_base_patch16_clip_224.openai", 224, pretrained=True)
    assert [round(value, 3) for value in tagged.mean] == [0.481, 0.458, 0.408]
    assert found("resnet18", pretrained=True).mean == IMAGENET_MEAN
    assert found("small/8", weights=tmp_path / "w.safetensors") == InputContract((64, 64))


@pytest.mark.parametrize(
    ("file", "document", "expected"),
    [
        (
            "config.json",  # timm's, on the hub
            {
                "architecture": "x",
                "pretrained_cfg": {"mean": [0.1, 0.2, 0.3], "std": [1, 1, 1], "interpolation": "nearest"},
            },
            InputContract((64, 64), (0.1, 0.2, 0.3), (1.0, 1.0, 1.0), "nearest"),
        ),
        (
            "preprocessor_config.json",  # transformers'
            {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "resample": 2},
            InputContract((64, 64), (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "bilinear"),
        ),
        (
            "preprocessor_config.json",
            {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "do_normalize": False},
            InputContract((64, 64), (0.0,) * 3, (1.0,) * 3, "bicubic"),
        ),
        ("config.json", {"hidden_size": 8, "mean": 3, "std": 4}, InputContract((64, 64), HALF, HALF, "bicubic")),
        ("config.json", ["what"], InputContract((64, 64), HALF, HALF, "bicubic")),
    ],
)
def test_the_configuration_beside_a_file(tmp_path: Path, file: str, document: Any, expected: InputContract) -> None:
    pytest.importorskip("timm")
    (tmp_path / file).write_text(json.dumps(document))
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    assert found("tf_efficientnet_lite0", weights=tmp_path / "model.safetensors") == expected


def test_torchvisions_weights() -> None:
    pytest.importorskip("torchvision")
    assert found("torchvision/resnet18", pretrained=True) == InputContract((64, 64))
    assert found("torchvision/efficientnet_b1", pretrained=True) == InputContract((64, 64))
    assert found("torchvision/swin_t", pretrained=True).interpolation == "bicubic"
    assert found("torchvision/vit_b_16").size == (224, 224)
    assert found("torchvision/vit_h_14", pretrained=True).size == (518, 518)


def test_b_cos_networks_read_pixels_and_inverses() -> None:
    contract = found("bcos/resnet18", pretrained=True)
    assert contract.channels == 6
    pixels = torch.rand(2, 3, 64, 64)
    assert torch.equal(Preprocess(contract)(pixels), torch.cat([pixels, 1 - pixels], 1))


def test_a_runs_weights_bring_the_contract_that_was_saved(tmp_path: Path) -> None:
    contract = InputContract((48, 48), HALF, HALF, "nearest")
    file = tmp_path / "model.safetensors"
    save_weights(nn.Linear(1, 1), file, {"size": 48, "input": contract.to_dict()})
    assert found("small/8", weights=file) == contract
    assert found("small/8", weights=file, data_size=32).size == (32, 32)  # the recipe comes first


def test_a_run_of_before_there_were_contracts_takes_the_default(tmp_path: Path) -> None:
    pytest.importorskip("timm")
    file = tmp_path / "model.safetensors"
    save_weights(nn.Linear(1, 1), file, {"size": 48, "stage": "student"})
    assert found("tf_efficientnet_lite0", weights=file) == InputContract((48, 48))
    assert saved(file, "bcos/resnet18") == found("bcos/resnet18", 48)


def test_reading_a_contract_from_files_that_have_none(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    with pytest.raises(FileNotFoundError):
        read_contract(file)
    save_weights(nn.Linear(1, 1), file, {"size": 48, "stage": "student"})
    with pytest.raises(
        ValueError, match=r"model\.safetensors: has no input contract; weights that debiaskd wrote before"
    ):
        read_contract(tmp_path)
    file.write_bytes(b"?" * 64)
    with pytest.raises(ValueError, match=r"model\.safetensors: no safetensors file \("):
        read_contract(file)


def test_the_recipe_comes_first_key_by_key(tmp_path: Path) -> None:
    pytest.importorskip("timm")
    asked = {"size": 80, "mean": [0.1, 0.2, 0.3], "std": None, "interpolation": None}
    contract, source = resolve("tf_efficientnet_lite0", (64, 64), asked=asked, data_size=32, pretrained=True)
    assert contract == InputContract((80, 80), (0.1, 0.2, 0.3), HALF, "bicubic") and source == "the recipe"


# -- sizes ------------------------------------------------------------------------------------------------------------


def test_the_size_is_that_of_the_data_unless_the_network_runs_on_no_other() -> None:
    pytest.importorskip("timm")
    assert found("resnet18", pretrained=True).size == (64, 64)
    assert found("resnet18", data_size=48, pretrained=True).size == (48, 48)
    assert found("vit_tiny_patch16_224", data_size=48).size == (224, 224)
    assert found("xcit_nano_12_p8_224").size == (64, 64)  # marked as fixed by timm, though it runs
    assert accepts("xcit_nano_12_p8_224", (64, 64)) and not accepts("vit_tiny_patch16_224", (64, 64))


def test_a_vit_is_built_for_the_size_that_is_asked_for() -> None:
    pytest.importorskip("timm")
    contract = found("vit_tiny_patch16_224", asked={"size": 32})
    model = build("vit_tiny_patch16_224", 2, size=contract.size).eval()
    assert model(contract.example()).shape == (1, 2)
    with pytest.raises(NetworkError, match=r"^VisionTransformer: does not run on 8×8 images"):
        prepare(build("vit_tiny_patch16_224", 2, size=(8, 8)), InputContract((8, 8)))


def test_weights_of_a_fixed_size_that_cannot_be_built_for_another() -> None:
    pytest.importorskip("torchvision")
    with pytest.raises(NetworkError, match=r"^torchvision/vit_b_16: cannot be built for images of 64×64 pixels$"):
        build("torchvision/vit_b_16", 2, pretrained=True, size=(64, 64))


# -- what is read -----------------------------------------------------------------------------------------------------


def photographs(count: int = 6, side: int = 40) -> Batch:
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, 3, 9, 9, generator=generator)
    images = (255 * resize(coarse, (side, side))).round().to(torch.uint8).contiguous(memory_format=torch.channels_last)
    boxes = Boxes.from_lists([[[4, 6, 30, 33]], [[0, 0, 40, 40]], [[17, 3, 20, 39]], [], None, [[1, 1, 9, 9]]][:count])
    return Batch(images, torch.arange(count) % 2, boxes, index=torch.arange(count))


class Drawn:
    """The same random numbers again."""

    def __init__(self, seed: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def rand(self, shape: tuple[int, ...], device: torch.device | None = None) -> Tensor:
        return torch.rand(shape, generator=self.generator)


def intake(*arguments: Any, **options: Any) -> Any:
    pytest.importorskip("torchdata")
    pytest.importorskip("jsonargparse")
    from debiaskd.training.batches import InputTransform

    return InputTransform(*arguments, **options)


STUDENT = InputContract((32, 32))
TEACHER = InputContract((64, 64), HALF, (0.25, 0.5, 0.2), "bicubic")
AUGMENTED = {"flip": True, "crop_scale": (0.3, 1.0)}


def test_preprocessing_of_bytes_and_of_pixels_in_0_to_1() -> None:
    images = photographs().images
    expected = (images.double() / 255 - torch.tensor(TEACHER.mean)[:, None, None]) / torch.tensor(TEACHER.std)[
        :, None, None
    ]
    here = Preprocess(InputContract((40, 40), TEACHER.mean, TEACHER.std))
    torch.testing.assert_close(here(images).double(), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(here(images.float() / 255), here(images))
    assert Preprocess(TEACHER)(images).shape == (6, 3, 64, 64)


def test_bicubic_does_not_leave_the_range_of_pixels() -> None:
    edge = torch.zeros(1, 3, 8, 8)
    edge[..., 4:] = 1
    for top in (1.0, 255.0):
        made = resize(top * edge, (24, 24), "bicubic", top=top)
        assert made.min() == 0 and made.max() == top


@pytest.mark.parametrize("mode", ("nearest", "bilinear", "bicubic"))
@pytest.mark.parametrize("side", (24, 56))
def test_resizing_is_pils(mode: str, side: int) -> None:
    image = pytest.importorskip("PIL.Image")
    import numpy as np

    images = photographs(1).images
    expected = image.fromarray(images[0].permute(1, 2, 0).numpy()).resize((side, side), getattr(image, mode.upper()))
    made = resize(images.float(), (side, side), mode, top=255)[0].permute(1, 2, 0)
    assert (made - torch.from_numpy(np.array(expected))).abs().max() <= 1.15  # PIL rounds, once for each direction


@pytest.mark.parametrize("augmented", ({}, {"flip": True}, AUGMENTED))
def test_teacher_and_student_read_the_same_crop_each_at_its_own_size(augmented: Any) -> None:
    batch = photographs()
    made = intake(STUDENT, CPU, teacher=TEACHER, with_teacher_input=True, stored=(40, 40), **augmented)(batch, Drawn())
    assert made.images.shape == (6, 3, 32, 32) and made.teacher_images.shape == (6, 3, 64, 64)
    # The crop in pixels of 0..1, at the larger size; where nothing is cropped, the stored image.
    base = 64 if "crop_scale" in augmented else 40
    pixels = Augment(base, mean=None, std=None, **{"flip": False, **augmented})(batch, Drawn().rand).images
    for read, contract in ((made.images, STUDENT), (made.teacher_images, TEACHER)):
        own = resize(pixels, contract.size, contract.interpolation) if contract.size != (base, base) else pixels
        mean, std = (torch.tensor(part)[:, None, None] for part in (contract.mean, contract.std))
        torch.testing.assert_close(read, (own - mean) / std)
        assert read.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("augmented", ({}, {"flip": True}, AUGMENTED))
def test_boxes_are_those_of_the_students_own_input(augmented: Any) -> None:
    batch = photographs()
    together = intake(STUDENT, CPU, teacher=TEACHER, with_teacher_input=True, stored=(40, 40), **augmented)(
        batch, Drawn()
    )
    alone = intake(STUDENT, CPU, **augmented)(batch, Drawn())
    assert torch.equal(together.boxes.coords, alone.boxes.coords)
    assert torch.equal(together.boxes.offsets, alone.boxes.offsets) and len(alone.boxes.coords) > 2
    assert alone.teacher_images is None


def test_what_the_student_reads_beside_a_cached_teacher_is_what_it_reads_beside_a_live_one() -> None:
    batch = photographs()
    for teacher in (TEACHER, InputContract((32, 32), HALF, HALF)):
        options = {"teacher": teacher, "stored": (40, 40), **AUGMENTED}
        live = intake(STUDENT, CPU, with_teacher_input=True, **options)(batch, Drawn())
        cached = intake(STUDENT, CPU, with_teacher_input=False, **options)(batch, Drawn())
        torch.testing.assert_close(cached.images, live.images, rtol=0, atol=1e-5)
        assert cached.teacher_images is None and live.teacher_images is not None


def test_a_contract_that_both_share_is_normalised_once() -> None:
    batch = photographs()
    for teacher, augmented in (
        (STUDENT, AUGMENTED),
        (STUDENT, {"flip": True}),
        (InputContract((32, 32), interpolation="bicubic"), AUGMENTED),  # which only matters where images are resized
    ):
        made = intake(STUDENT, CPU, teacher=teacher, with_teacher_input=True, stored=(40, 40), **augmented)(
            batch, Drawn()
        )
        assert made.teacher_images is None
        assert torch.equal(made.images, intake(STUDENT, CPU, **augmented)(batch, Drawn()).images)
    apart = intake(
        STUDENT, CPU, teacher=InputContract((32, 32), interpolation="bicubic"), with_teacher_input=True, stored=(40, 40)
    )
    assert apart(batch, Drawn()).teacher_images is not None


def test_a_b_cos_student_of_an_ordinary_teacher() -> None:
    student = found("bcos/resnet18", 32)
    made = intake(student, CPU, teacher=TEACHER, with_teacher_input=True, stored=(40, 40), **AUGMENTED)(
        photographs(), Drawn()
    )
    assert made.images.shape == (6, 6, 32, 32) and made.teacher_images.shape == (6, 3, 64, 64)
    torch.testing.assert_close(made.images[:, :3] + made.images[:, 3:], torch.ones(6, 3, 32, 32))
    alone = intake(student, CPU, **AUGMENTED)(photographs(), Drawn())
    assert alone.images.shape == made.images.shape and (alone.images.sum(1) - 3).abs().max() < 1e-5
