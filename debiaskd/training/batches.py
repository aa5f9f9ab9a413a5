"""Load batches of a recipe's data onto the device; the batches do not depend on the number of processes."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import Dataset

from debiaskd.bias import are_found
from debiaskd.data import Augment, Batch, ChunkedDataset, DataError, EpochSampler, PackedDataset, loader
from debiaskd.data.group_files import read_groups
from debiaskd.data.packed import manifest
from debiaskd.models.input import InputContract, Preprocess, default_contract, with_inverse
from debiaskd.recipe import Data, RecipeError
from debiaskd.terms import Ranks
from debiaskd.training import split_parts as parts

#: Keys of the data that say what is random in training images, named as arguments of `Augment`.
RANDOM = ("flip", "crop_scale", "color_jitter", "rand_augment", "mixup", "cutmix")


class Random(Protocol):
    """Draw uniform random numbers, one row per image."""

    def rand(self, shape: tuple[int, ...], device: torch.device | None = None) -> Tensor: ...


class SplitSubset(Dataset[Any]):
    """A subset of a data set; its samples keep their numbers in the whole data set."""

    def __init__(self, whole: PackedDataset, numbers: Tensor) -> None:
        self.whole, self.numbers = whole, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> Any:
        return self.whole[int(self.numbers[index])]

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        return self.whole.__getitems__(self.numbers[torch.as_tensor(indices)])


class Split:
    """A split, or a part of one.

    Attributes:
        whole: the prepared split.
        dataset: what is read; a `SplitSubset` of it, or the whole.
        numbers: int64 [N], the images' numbers in `whole`, rising.
        target, groups, boxes: of these N images; `groups` None where there are none.
        environments: int64 [N], groups that were found, by which selection may go; None: none are known yet.
        environment_names: of them; empty where none are known or expected.
    """

    def __init__(self, data: Data, key: str, *, training: bool = False) -> None:
        text = getattr(data, key)
        part = parts.parse(text, f"data.{key}")
        options: dict[str, Any] = {"masks": data.masks}
        if training:
            options |= {"annotated_fraction": data.annotated_fraction, "dilate": data.dilate, "jitter": data.jitter}
        whole = _opened(data, part.name, **options)
        if data.groups is not None and key in ("train", "validation"):
            _regroup(whole, data.groups, key)
        self.name, self.whole = text, whole
        self.numbers = parts.numbers(part, len(whole), data.seed, f"data.{key}")
        self.dataset: Any = whole if len(self.numbers) == len(whole) else SplitSubset(whole, self.numbers)
        self.target = whole.target[self.numbers]
        self.groups = None if whole.group_ids is None else whole.group_ids[self.numbers]
        self.boxes = whole.boxes[self.numbers]
        self.num_classes = len(whole.classes)
        self.environments: Tensor | None = None
        self.environment_names: tuple[str, ...] = ()
        if self.groups is not None and are_found(whole.groups):
            self.environments, self.environment_names = self.groups, whole.groups

    def __len__(self) -> int:
        return len(self.numbers)

    def expect(self, names: Sequence[str], *, as_groups: bool) -> None:
        """Groups of these names will be found before anything is trained that needs them: see `found`."""
        self.environment_names = tuple(names)
        if as_groups:
            # Until then of each class its first, so that all that needs groups can be put together.
            self._groups(self.target * (len(names) // self.num_classes), names)

    def found(self, groups: Tensor, *, as_groups: bool) -> None:
        """The groups that were found, int64 [N] in the order of `expect`'s names.

        Args:
            groups: one for each of these images.
            as_groups: they also take the place of the groups that the data was prepared with.
        """
        self.environments = groups
        if as_groups:
            self._groups(groups, self.environment_names)

    def _groups(self, groups: Tensor, names: Sequence[str]) -> None:
        whole = torch.zeros(len(self.whole), dtype=torch.int64)
        whole[self.numbers] = groups
        self.whole.regroup(whole, names)
        self.groups = groups

    def part(self, rows: Tensor) -> Split:
        """Some of these N images: int64 [M], in 0…N-1, rising."""
        found = copy.copy(self)
        found.numbers = self.numbers[rows]
        found.dataset = SplitSubset(self.whole, found.numbers)
        found.target, found.boxes = self.target[rows], self.boxes[rows]
        found.groups = None if self.groups is None else self.groups[rows]
        found.environments = None if self.environments is None else self.environments[rows]
        return found


def _regroup(whole: PackedDataset, groups: str, key: str) -> None:
    """Groups of a CSV file, or none, in place of those that the data was prepared with."""
    if groups in ("none", "found"):
        whole.regroup(None, ())
        return
    if whole.multi_label:
        raise RecipeError("data.groups: needs one class an image, here it may be several")
    try:
        whole.regroup(*read_groups(whole, Path(groups)))
    except DataError as error:
        raise RecipeError(f"data.groups: {error}") from None
    if whole.group_ids is None and key == "train":
        raise RecipeError(f"data.groups: {groups} names no image of {whole.split}")


def _opened(data: Data, name: str, **options: Any) -> PackedDataset:
    """By number in either format, so that all that is drawn and looked up is the same in both."""
    if options["masks"] and not manifest.has_masks(manifest.read(Path(data.path))):
        raise RecipeError(f"data.masks: {data.path} was prepared without masks (`debiaskd prepare … --masks`)")
    if manifest.read(Path(data.path))["options"]["format"] == "litdata":
        url = None if data.url is None else f"{data.url.rstrip('/')}/{name}"
        return ChunkedDataset(data.path, name, url=url, seed=data.seed, **options)
    if data.url is not None:
        raise RecipeError(f"data.url: only for data prepared with `--format litdata`, and {data.path} is not")
    return PackedDataset(data.path, name, seed=data.seed, **options)


class InputTransform:
    """Transform stored pixels into a network's input, on the device.

    Args:
        contract: of what it reads.
        device: where it is.
        teacher: contract of the network that teaches it; None: there is none.
        with_teacher_input: whether the teacher's input is made as well, as `Batch.teacher_images`.
        stored: (height, width) of the stored images; None: of several sizes.
        flip, crop_scale, random: what is random, as `Augment` has it; nothing is where they are left out.

    Both networks read the same augmented image: a random crop is made at the larger of the two sizes, and each
    network resizes and normalises its own input from it. Where nothing is cropped, each resizes the stored image.
    Boxes are in pixels of this network's input. Where both contracts are the same, the image is normalised once.
    """

    def __init__(
        self,
        contract: InputContract,
        device: torch.device,
        *,
        teacher: InputContract | None = None,
        with_teacher_input: bool = False,
        stored: tuple[int, int] | None = None,
        flip: bool = False,
        crop_scale: tuple[float, float] | None = None,
        **random: Any,
    ) -> None:
        self.contract, self.device = contract, device
        self.own = self.teacher = None
        same_crop = crop_scale is None or teacher is None or teacher.size == contract.size
        resized = crop_scale is None and contract.size != stored
        two = with_teacher_input and teacher is not None and not teacher.same_as(contract, resized=resized)
        drawn: dict[str, Any] = {"flip": flip, "crop_scale": crop_scale, **random}
        if same_crop and not two:
            normal: dict[str, Any] = {"mean": contract.mean, "std": contract.std}
            self.augment = Augment(contract.size, interpolation=contract.interpolation, **drawn, **normal)
            return
        assert teacher is not None
        size = None if crop_scale is None else max(contract.size, teacher.size, key=lambda s: s[0] * s[1])
        self.augment = Augment(size, mean=None, std=None, box_size=contract.size, **drawn)
        self.own = Preprocess(contract).to(device)
        self.teacher = Preprocess(teacher).to(device) if with_teacher_input else None

    def __call__(self, batch: Batch, draws: Random | None = None) -> Batch:
        """Move a batch to the device and transform it into the network's input."""
        batch = self.augment(batch.to(self.device, non_blocking=True), None if draws is None else draws.rand)
        if self.own is None:
            if self.contract.channels == 6:
                return replace(batch, images=_channels_last(with_inverse(batch.images)))
            return batch
        pixels = batch.images
        with_teacher_input = None if self.teacher is None else _channels_last(self.teacher(pixels))
        return replace(batch, images=_channels_last(self.own(pixels)), teacher_images=with_teacher_input)


def _channels_last(images: Tensor) -> Tensor:
    return images.contiguous(memory_format=torch.channels_last)


class SplitLoader:
    """Load batches of a split and augment them on the device.

    Args:
        split, data: see there.
        training: shuffled and augmented, or in order and only normalised.
        batch: images of this process a step.
        contract: what the network reads; None: the default of three channels, at the data's size.
        teacher, with_teacher_input: see `InputTransform`.
        sampling: float [N], probabilities up to a factor that an epoch's N images are drawn with; None: each once.
    """

    def __init__(
        self,
        split: Split,
        data: Data,
        *,
        training: bool,
        batch: int,
        ranks: Ranks,
        device: torch.device,
        seed: int = 0,
        workers: int = 0,
        contract: InputContract | None = None,
        teacher: InputContract | None = None,
        with_teacher_input: bool = False,
        sampling: Tensor | None = None,
    ) -> None:
        self.split, self.device = split, device
        size = data.size or split.whole.size[0]
        contract = contract or default_contract("", (size, size))
        self.size = contract.size
        self.transform = InputTransform(
            contract,
            device,
            teacher=teacher,
            with_teacher_input=with_teacher_input,
            stored=split.whole.size,
            **({name: getattr(data, name) for name in RANDOM} if training else {}),
        )
        self.dataloader = loader(
            split.dataset,
            batch,
            shuffle=training,
            seed=seed,
            rank=ranks.rank,
            world_size=ranks.world_size,
            workers=workers,
            drop_last=training,
            pin_memory=device.type == "cuda",
            weights=sampling,
        )
        self.sampler: EpochSampler = self.dataloader.sampler

    def __len__(self) -> int:
        return len(self.dataloader)


def open_split(data: Data, key: str, *, training: bool = False, option: str | None = None) -> Split:
    """Open a split of the recipe's data.

    Args:
        data, key: the recipe's, "train", "validation" or "test".
        training: whether it is trained on.
        option: of the command line that named the split, for the error; None: the recipe did.

    Raises:
        RecipeError: there is no such split; names the key or the option.
    """
    try:
        return Split(data, key, training=training)
    except DataError as error:
        raise RecipeError(f"{option or f'data.{key}'}: {error}") from None


def grouped(batches: Iterator[Batch], count: int) -> Iterator[list[Batch]]:
    """Lists of `count` batches, the passes of a step; what is left over is no whole one."""
    group: list[Batch] = []
    for batch in batches:
        group.append(batch)
        if len(group) == count:
            yield group
            group = []
