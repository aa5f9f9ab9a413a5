"""What the localization kernels share: what becomes of the pixels of a tile."""

from __future__ import annotations

import triton
import triton.language as tl

from .precision import divide

# The codes of debiaskd/ops/localization.py.
ENERGY, L1, PPCE, RRR = (tl.constexpr(kind) for kind in range(4))


@triton.jit
def _log(x):
    """-100 at least. A subnormal number, which some GPUs take for 0, is multiplied by 2^24 first."""
    dtype: tl.constexpr = x.dtype
    small = x < 1e-36
    log = tl.log(tl.where(small, x * 16777216, x)) - tl.where(small, tl.full([], 16.635532333438686, dtype), 0)
    return tl.where(log < -100, -100, log)


@triton.jit
def add_pixels(pixels, covered, mask, counted, partial, tiles, KIND: tl.constexpr):
    """Stores what each band adds to the sums of its map: two numbers, of which the second means by kind: the positive
    part inside of the boxes (energy), pixels inside (ppce), nothing."""
    if KIND == ENERGY:
        term = tl.where(pixels < 0, 0, pixels)  # this way round a NaN stays one, and shows in the loss
        inside = tl.where(covered, term, 0)
    elif KIND == L1:
        term = tl.abs(pixels - covered.to(pixels.dtype))
        inside = tl.zeros_like(pixels)
    elif KIND == PPCE:
        term = tl.where(covered, -_log(tl.where(pixels < 0, 0, pixels)), 0)
        inside = (covered & mask).to(pixels.dtype)
    else:
        term = pixels * tl.where(covered, 0, pixels)
        inside = tl.zeros_like(pixels)
    program = tl.program_id(0)
    band = (program // tiles.strips).to(tl.int64) * term.shape[0] + tl.arange(0, term.shape[0])
    place = 2 * (band * tiles.strips + program % tiles.strips)
    tl.store(partial + place, tl.sum(tl.sum(tl.where(mask, term, 0), 2), 1), mask=counted)
    tl.store(partial + (place + 1), tl.sum(tl.sum(inside, 2), 1), mask=counted)


@triton.jit
def factors_of(coefficients, upstream, images, counted):
    """Of a map's gradient inside and outside of its boxes, for each band."""
    scale = tl.load(upstream.data + images * upstream.stride, mask=counted, other=0)
    within = scale * tl.load(coefficients + 2 * images, mask=counted, other=0)
    beyond = scale * tl.load(coefficients + (2 * images + 1), mask=counted, other=0)
    return within[:, None, None], beyond[:, None, None]


@triton.jit
def pixel_gradients(pixels, covered, within, beyond, KIND: tl.constexpr):
    """d loss / d pixel. `within` and `beyond` are the factors of its map."""
    dtype: tl.constexpr = pixels.dtype
    factor = tl.where(covered, within, beyond)
    if KIND == ENERGY:
        return tl.where(pixels > 0, factor, 0)
    elif KIND == L1:
        difference = pixels - covered.to(dtype)
        return tl.where(difference > 0, factor, tl.where(difference < 0, -factor, 0))
    elif KIND == PPCE:
        counts = covered & (pixels > tl.full([], 3.720075976020836e-44, dtype))  # whose logarithm is not clamped
        return tl.where(counts, divide(factor, tl.where(counts, pixels, 1)), 0)
    else:
        return factor * pixels
