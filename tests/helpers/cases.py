"""What the tests of the ops share: ways to run them, tensors in every layout, oracles, and a measure of accuracy.

The oracles know nothing of the package: loops over single samples, in float64.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cuda_on_cpu
import native_build
import numpy as np
import pytest
import torch
from hypothesis import strategies as st

import debiaskd as dk
from debiaskd.ops import backend

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
KINDS = ("energy", "l1", "ppce", "rrr")
REDUCTIONS = ("none", "mean", "sum")
GOLDEN = Path(__file__).parents[1] / "golden"


def reference(name: str) -> dict[str, torch.Tensor]:
    """The arrays of one file of outputs of the papers' own code."""
    return {key: torch.from_numpy(value) for key, value in np.load(GOLDEN / name).items()}


def covering(**axes: Any) -> pytest.MarkDecorator:
    """Parametrize a test so that every pair of values of two axes occurs together, in far fewer cases than the product.

    Rows are chosen greedily: each begins with the first pair that is missing, and takes on each further axis the value
    that adds the most missing pairs.

    Args:
        **axes: values by argument name; a tuple of names joined by "__" is one axis with tuples of values.
    """
    names, values = list(axes), [list(axis) for axis in axes.values()]
    missing = {
        (a, i, b, j): None
        for a, b in itertools.combinations(range(len(names)), 2)
        for i in range(len(values[a]))
        for j in range(len(values[b]))
    }
    rows = []
    while missing:
        a, i, b, j = next(iter(missing))
        row = {a: i, b: j}
        for axis in range(len(names)):
            if axis not in row:
                row[axis] = max(
                    range(len(values[axis])),
                    key=lambda k: sum(_pair(axis, k, other, v) in missing for other, v in row.items()),
                )
        for (x, u), (y, v) in itertools.combinations(sorted(row.items()), 2):
            missing.pop((x, u, y, v), None)
        rows.append([values[axis][row[axis]] for axis in range(len(names))])
    arguments = [part for name in names for part in name.split("__")]
    flat = [[v for name, value in zip(names, row) for v in (value if "__" in name else (value,))] for row in rows]
    return pytest.mark.parametrize(
        arguments, flat, ids=["-".join(str(v).replace("torch.", "") for v in r) for r in flat]
    )


def _pair(a: int, i: int, b: int, j: int) -> tuple[int, int, int, int]:
    return (a, i, b, j) if a < b else (b, j, a, i)


# ---- ways to run an op ----


@dataclass(frozen=True)
class Way:
    """One way to run an op: a name, the device of its tensors, and a context within which the public function takes it.

    Another implementation joins every test by one more `Way` in `ways`.
    """

    name: str
    device: str
    active: Callable[[], AbstractContextManager[Any]]

    def put(self, tensor: torch.Tensor) -> torch.Tensor:
        """On this way's device, with strides and surrounding memory as they are."""
        if self.device == "cpu":
            return tensor
        memory = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage()).to(self.device)
        return memory.as_strided(tensor.size(), tensor.stride(), tensor.storage_offset())


def ways(op: str) -> list[Way]:
    devices = ["cpu", *(d for d in ("cuda", "xpu") if getattr(torch, d).is_available())]
    found = [
        Way(f"{name}-{device}" if device != "cpu" else name, device, lambda name=name: dk.backend(name))
        for device in devices
        for name in backend.IMPLEMENTATIONS[op]
        if backend.why_not(op, name, device) is None
    ]
    if "cuda" in backend.IMPLEMENTATIONS[op] and native_build.COMPILER:
        found.append(Way("cuda_on_cpu", "cpu", cuda_on_cpu.active))
    return found


def every_way(op: str) -> pytest.MarkDecorator:
    """The test runs once for each implementation of `op` that can run here, given as `way`."""
    return pytest.mark.parametrize("way", [way_param(way, way.name) for way in ways(op)])


def way_param(way: Way, name: str, *before: Any) -> Any:
    """A parameter set that ends with a way, marked so that `-m cuda_on_cpu` selects what runs there."""
    marks = [pytest.mark.cuda_on_cpu] if way.name == "cuda_on_cpu" else []
    return pytest.param(*before, way, id=name, marks=marks)


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Every new uninitialised tensor holds NaN, or the largest integer."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory
        yield
    finally:
        torch.use_deterministic_algorithms(False)


# ---- tensors ----

LAYOUTS = ("contiguous", "channels_last", "reversed", "stepped", "offset", "expanded", "expanded_batch")


def lay_out(values: torch.Tensor, layout: str) -> torch.Tensor:
    """The values with other strides; NaN lies where an op must not read. The expanded layouts repeat some values."""
    if layout == "channels_last" and values.dim() > 2:
        return values.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "reversed":
        axes = tuple(reversed(range(values.dim())))
        return values.permute(axes).contiguous().permute(axes)
    if layout == "expanded":
        return values[..., :1].clone().expand(values.shape)
    if layout == "expanded_batch":
        return values[:1].clone().expand(values.shape)
    if layout in ("stepped", "offset"):
        memory = torch.full([2 * n + 1 for n in values.shape], math.nan, dtype=values.dtype)
        step = 2 if layout == "stepped" else 1
        view = memory[tuple(slice(1, 1 + step * n, step) for n in values.shape)]
        return view.copy_(values)
    return values.clone(memory_format=torch.contiguous_format)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def uniform(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Inside (0, 1), away from both ends, where l1 and ppce have kinks."""
    numbers = torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (0.05 + 0.9 * numbers).to(dtype)


def attribution(kind: str, *shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Maps as the kind expects them."""
    return (uniform if kind in ("l1", "ppce") else normal)(*shape, seed=seed, dtype=dtype)


@st.composite
def box_lists(draw: Any, images: int, height: int, width: int, most: int = 5) -> list[list[list[int]] | None]:
    """Boxes of every sort for each image: none, overlapping, reaching outside, outside, on the edge, without area."""

    def interval(length: int) -> list[int]:
        ends = [draw(st.integers(-3, length + 3)) for _ in range(2)]
        return sorted(ends)

    def box() -> list[int]:
        (x0, x1), (y0, y1) = interval(width), interval(height)
        return [x0, y0, x1, y1]

    annotated = st.booleans() if draw(st.booleans()) else st.just(True)
    return [[box() for _ in range(draw(st.integers(0, most)))] if draw(annotated) else None for _ in range(images)]


#: The test runs once for each layout, with dtypes in turns: strides and dtypes are handled apart from each other.
each_layout_and_dtype = pytest.mark.parametrize(
    ("layout", "dtype"), [(layout, DTYPES[i % 4]) for i, layout in enumerate(LAYOUTS)], ids=str
)


# ---- oracles ----


def feature_match_oracle(
    student: torch.Tensor,
    teacher: torch.Tensor,
    weight: torch.Tensor | None = None,
    normalize: bool = False,
    reduction: str = "mean",
    upstream: Any = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and gradient, sample by sample, in NumPy."""
    s, t = (x.detach().cpu().double().numpy() for x in (student, teacher))
    weights = np.ones(len(s)) if weight is None else weight.cpu().double().numpy()
    upstream = np.broadcast_to(np.asarray(upstream, dtype=np.float64), len(s))
    share = 1.0
    if reduction == "mean":
        share = 1 / weights.sum() if weights.sum() > 0 else 0.0
    losses, gradient = np.zeros(len(s)), np.zeros_like(s)
    for i in range(len(s)):
        difference = s[i] - t[i]
        scale = (t[i] ** 2).sum() if normalize else difference.size
        factor = share * weights[i] / scale if scale > 0 else 0.0
        losses[i] = factor * (difference**2).sum()
        gradient[i] = upstream[i] * 2 * factor * difference
    loss = losses if reduction == "none" else losses.sum()
    return torch.as_tensor(loss), torch.as_tensor(gradient)


def localization_oracle(
    maps: torch.Tensor,
    boxes: list[list[list[int]] | None],
    kind: str = "energy",
    size: tuple[int, int] | None = None,
    normalize: bool = False,
    reduction: str = "mean",
    upstream: Any = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and gradient, map by map, pixel sets by indexing, interpolation as two explicit matrices."""
    maps = maps.detach().cpu().double().requires_grad_()
    losses = [
        m.sum() * 0 if b is None else _one_map(m, b, kind, size or tuple(m.shape), normalize)
        for m, b in zip(maps, boxes)
    ]
    if not losses:
        return torch.zeros((0,) if reduction == "none" else (), dtype=torch.float64), torch.zeros_like(maps)
    each = torch.stack(losses)
    count = sum(b is not None for b in boxes)
    loss = each if reduction == "none" else each.sum() / (max(count, 1) if reduction == "mean" else 1)
    (gradient,) = torch.autograd.grad((loss * torch.as_tensor(upstream)).sum(), maps)
    return loss.detach(), gradient


def _one_map(a: torch.Tensor, boxes: list[list[int]], kind: str, size: tuple[int, int], normalize: bool):
    if normalize and kind != "energy":
        if kind != "rrr":
            a = torch.where(a > 0, a, 0)
        if a.abs().max() > 0:
            a = a / a.abs().max()
    if tuple(a.shape) != size:
        a = interpolation(a.shape[0], size[0]) @ a @ interpolation(a.shape[1], size[1]).T
    inside = torch.zeros(size, dtype=torch.bool)
    for x0, y0, x1, y1 in boxes:
        inside[max(y0, 0) : max(y1, 0), max(x0, 0) : max(x1, 0)] = True
    if kind == "energy":
        total = a[a > 0].sum()
        kept = a[(a > 0) & inside].sum()
        return 1 - kept if total < 1e-7 else 1 - kept / total
    if kind == "l1":
        return (a[inside] - 1).abs().sum() / a.numel() + a[~inside].abs().sum() / a.numel()
    if kind == "rrr":
        return a[~inside].square().sum()
    pixels = a[inside]
    if not len(pixels):
        return a.sum() * 0
    ordinary = pixels > math.exp(-100)
    return (100 * (~ordinary).sum() - pixels[ordinary].log().sum()) / len(pixels)


def energy_terms(maps: torch.Tensor, size: tuple[int, int] | None) -> float:
    """The largest 1/E (E the sum of a map's positive part) times a pixel's share: such terms cancel in its gradient."""
    largest = 0.0
    for a in maps.detach().cpu().double():
        a.requires_grad_()
        tall, wide = (interpolation(old, new) for old, new in zip(a.shape, size or a.shape))
        total = (tall @ a @ wide.T).relu().sum()
        if total > 1e-7:
            largest = max(largest, torch.autograd.grad(total.log(), a)[0].max().item())
    return largest


def interpolation(old: int, new: int) -> torch.Tensor:
    """[new, old] weights of bilinear interpolation along one axis, align_corners=False."""
    weights = torch.zeros(new, old, dtype=torch.float64)
    for i in range(new):
        position = max((i + 0.5) * old / new - 0.5, 0.0)
        low = min(int(position), old - 1)
        high = min(low + 1, old - 1)
        weights[i, low] += 1 - (position - low)
        weights[i, high] += position - low
    return weights


# ---- accuracy ----


def assert_accurate(
    actual: torch.Tensor, exact: torch.Tensor, eager: torch.Tensor, what: str = "", terms: float = 0.0
) -> None:
    """The error, against float64, is at most twice that of plain PyTorch in the same dtype.

    PyTorch's own error is taken for no less than half a unit in the last place of the largest value: nothing rounded to
    this dtype can promise better, and where PyTorch happens to hit the number exactly twice nothing is still nothing.
    In float32, in which the arithmetic itself is done, four roundings in a row are counted (factor, difference,
    product, upstream), and in float64, in which the oracle's sums round too, a thousand. Where the exact value is a
    difference, `terms` says how large the numbers are that cancel in it.
    """
    assert actual.shape == exact.shape, what
    assert actual.dtype == eager.dtype, what
    if actual.numel() == 0:
        return
    numbers = torch.finfo(actual.dtype)
    roundings = {torch.float32: 4, torch.float64: 1000}.get(actual.dtype, 1)
    rounding = roundings * numbers.eps / 2 * max(exact.abs().max().item(), terms, numbers.smallest_normal)
    allowed = 2 * max((eager.cpu().double() - exact).abs().max().item(), rounding)
    error = (actual.cpu().double() - exact).abs().max().item()
    assert error <= allowed, f"{what}: error {error:.3g}, allowed {allowed:.3g}"  # NaN fails too
