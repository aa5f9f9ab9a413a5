"""Files to pixels: every mode an image may come in, files that are none, and boxes that go where pixels go."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from debiaskd.data import pixels

Image = pytest.importorskip("PIL.Image", reason="images are decoded with pillow")

ramp = np.linspace(0, 255, 40 * 30).astype(np.uint8).reshape(30, 40)


def decoded(path: Path) -> np.ndarray:
    image = pixels.decode(path)
    assert image.mode == "RGB"
    return np.asarray(image)


@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp", "webp", "tif"])
def test_grayscale(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(ramp).save(path, quality=100)
    made = decoded(path)
    assert np.abs(made.astype(int) - ramp[:, :, None]).max() <= 4  # JPEG's and WebP's own loss


def test_cmyk(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    Image.new("RGB", (16, 16), (200, 40, 90)).convert("CMYK").save(path, quality=100)
    assert np.abs(decoded(path).astype(int) - [200, 40, 90]).max() <= 4


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bits_are_scaled_and_not_cut(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    wide = (ramp.astype(np.uint16) * 257).astype(np.uint16)
    Image.fromarray(wide).save(path)
    assert (decoded(path) == ramp[:, :, None]).all()


def test_thirty_two_bits_are_cut_at_sixteen(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    Image.fromarray(np.array([[-5, 0], [65535, 100_000]], np.int32)).save(path)
    assert decoded(path)[:, :, 0].tolist() == [[0, 0], [255, 255]]


def test_palette_transparency_bilevel(tmp_path: Path) -> None:
    colour = Image.new("RGB", (8, 8), (10, 200, 30))
    colour.quantize(4).save(tmp_path / "palette.png")
    colour.quantize(4).save(tmp_path / "palette.gif", transparency=0)
    colour.convert("RGBA").save(tmp_path / "alpha.png")
    Image.new("LA", (8, 8), (77, 0)).save(tmp_path / "la.png")
    Image.new("1", (8, 8), 1).save(tmp_path / "bilevel.png")
    for name in ("palette.png", "palette.gif", "alpha.png"):
        assert (decoded(tmp_path / name) == [10, 200, 30]).all(), name
    assert (decoded(tmp_path / "la.png") == 77).all()  # transparency is ignored
    assert (decoded(tmp_path / "bilevel.png") == 255).all()


def test_one_pixel(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.new("RGB", (1, 1), (1, 2, 3)).save(path)
    for how in pixels.FITS:
        made, placed, corner = pixels.fit(pixels.decode(path), 8, how)
        assert (made == [1, 2, 3]).all()
        assert (placed, corner) == ((8, 8), (0, 0))


def test_orientation_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    Image.fromarray(ramp).save(path, exif=exif)
    assert decoded(path).shape == (30, 40, 3)


def test_files_that_are_no_pictures(tmp_path: Path) -> None:
    whole = tmp_path / "whole.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(whole)
    content = whole.read_bytes()
    bad = {
        "cut.jpg": content[: len(content) // 2],
        "header.jpg": content[:20],
        "empty.jpg": b"",
        "text.jpg": b"not an image at all",
        "broken.png": b"\x89PNG\r\n\x1a\n" + bytes(range(64)),
        "broken.gif": b"GIF89a" + bytes(range(30)),
        "broken.tif": b"II*\0" + bytes(range(60)),
    }
    for name, text in bad.items():
        (tmp_path / name).write_bytes(text)
        with pytest.raises(pixels.UnreadableError) as error:
            pixels.decode(tmp_path / name)
        assert error.value.kind == "truncated or non-image file", name
        assert "\n" not in str(error.value)


def test_files_that_are_missing_or_unusable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(pixels.UnreadableError) as error:
        pixels.decode(tmp_path / "nothing.png")
    assert error.value.kind == "missing file"
    with pytest.raises(pixels.UnreadableError) as error:
        pixels.decode(tmp_path)  # a folder
    assert error.value.kind == "file that cannot be read"
    Image.fromarray(np.ones((4, 4), np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(pixels.UnreadableError, match="no known range"):
        pixels.decode(tmp_path / "float.tif")
    Image.fromarray(ramp).save(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(pixels.UnreadableError) as error:
        pixels.decode(tmp_path / "large.png")
    assert error.value.kind == "image larger than pillow decodes"


def test_pad_keeps_the_shape() -> None:
    image = Image.new("RGB", (40, 10), (255, 255, 255))
    made, placed, corner = pixels.fit(image, 20, "pad")
    assert (placed, corner) == ((5, 20), (7, 0))
    assert (made[7:12] == 255).all()
    assert (np.delete(made, range(7, 12), 0) == 0).all()


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        ([0.4, 0.6, 9.5, 9.4], [0, 1, 10, 9]),
        ([-5, -5, 100, 100], [0, 0, 40, 30]),
        ([10.1, 10.1, 10.2, 10.2], [10, 10, 11, 11]),
        ([39.9, 29.9, 40, 30], [39, 29, 40, 30]),
        ([-1e300, 3, 1e300, 4], [0, 3, 40, 4]),
        ([40, 3, 50, 4], None),
        ([-9, 3, 0, 4], None),
    ],
)
def test_boxes_in_whole_pixels(box: list[float], expected: list[int] | None) -> None:
    made, inside = pixels.to_pixels(np.array([box], np.float64), 30, 40)
    assert made.dtype == np.int32
    assert inside.tolist() == [expected is not None]
    if expected is not None:
        assert made.tolist() == [expected]


@given(
    st.tuples(st.integers(1, 60), st.integers(1, 60)),
    st.integers(1, 48),
    st.sampled_from(pixels.FITS),
    st.lists(st.floats(0, 1), min_size=4, max_size=4),
)
def test_boxes_go_where_pixels_go(shape: tuple[int, int], size: int, how: str, shares: list[float]) -> None:
    """The white area of a black image is, fitted, within a pixel of its fitted box, at either side of the edge."""
    height, width = shape
    (x0, x1), (y0, y1) = sorted(shares[:2]), sorted(shares[2:])
    x0, x1 = int(x0 * (width - 1)), int(x1 * (width - 1)) + 1
    y0, y1 = int(y0 * (height - 1)), int(y1 * (height - 1)) + 1
    white = np.zeros((height, width, 3), np.uint8)
    white[y0:y1, x0:x1] = 255
    made, placed, corner = pixels.fit(Image.fromarray(white), size, how)
    ((a, b, c, d),) = pixels.fit_boxes(np.array([[x0, y0, x1, y1]], np.int32), shape, size, placed, corner).tolist()
    assert 0 <= a < c <= size
    assert 0 <= b < d <= size
    exact_x = [corner[1] + x * placed[1] / width for x in (x0, x1)]
    exact_y = [corner[0] + y * placed[0] / height for y in (y0, y1)]
    assert np.abs(np.array([a, c]) - exact_x).max() <= 1
    assert np.abs(np.array([b, d]) - exact_y).max() <= 1
    # Interpolation reaches half a source pixel (or, made smaller, one of the result) beyond the exact edge.
    reach_x, reach_y = max(placed[1] / width, 1) + 1, max(placed[0] / height, 1) + 1
    ys, xs = np.nonzero(made[:, :, 0])
    if len(xs):
        assert xs.min() >= a - reach_x and xs.max() < c + reach_x
        assert ys.min() >= b - reach_y and ys.max() < d + reach_y
