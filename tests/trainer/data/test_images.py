"""Any bytes of an image become RGB pixels, or a ValueError that says why not."""

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from trainer.data.images import decode


def picture(mode: str = "RGB", size: tuple[int, int] = (61, 45)) -> Image.Image:
    small = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC).convert(mode)


def encoded(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def pils(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


JPEGS = {
    "4:2:0": encoded(picture(), quality=90),
    "4:4:4": encoded(picture(), quality=90, subsampling=0),
    "4:2:2": encoded(picture(), quality=90, subsampling=1),
    "progressive": encoded(picture(), progressive=True),
    "grey": encoded(picture("L")),
    "CMYK": encoded(picture("CMYK")),
    "one pixel": encoded(picture(size=(1, 1))),
}


@pytest.mark.parametrize("name", JPEGS)
def test_jpeg_is_decoded_as_pil_does(name: str):
    found = decode(JPEGS[name])
    difference = np.abs(found.astype(int) - pils(JPEGS[name]))
    assert (found.dtype, found.shape) == (np.uint8, pils(JPEGS[name]).shape)
    assert found.flags.c_contiguous
    assert found.flags.writeable
    assert difference.mean() < 0.05  # builds of libjpeg may differ by a rounding
    assert difference.max() <= 2


def test_grey_has_three_equal_channels():
    found = decode(JPEGS["grey"])
    assert (found == found[..., :1]).all()
    assert found.std() > 10


@pytest.mark.parametrize(
    ("kind", "mode"),
    [
        ("PNG", "RGB"),
        ("PNG", "L"),
        ("PNG", "RGBA"),
        ("PNG", "P"),
        ("PNG", "1"),
        ("BMP", "RGB"),
        ("GIF", "P"),
        ("TIFF", "RGB"),
    ],
)
def test_other_formats_are_exact(kind: str, mode: str):
    image = picture(mode)
    assert (decode(encoded(image, kind)) == np.asarray(image.convert("RGB"))).all()


@pytest.mark.parametrize("part", [0, 2, 3, 10, 100, 0.5, 0.95])
@pytest.mark.parametrize("data", [JPEGS["4:2:0"], encoded(picture(), "PNG")], ids=["jpeg", "png"])
def test_truncated_is_refused(data: bytes, part: float):
    cut = data[: int(part if part >= 2 else part * len(data))]
    with pytest.raises(ValueError, match="not a readable image"):
        decode(cut)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_too_many_pixels_are_refused_by_the_header(kind: str):
    data = encoded(picture(), kind)
    assert decode(data, max_pixels=61 * 45).shape == (45, 61, 3)
    with pytest.raises(ValueError, match=r"61 x 45 pixels are more than the 2744"):
        decode(data, max_pixels=61 * 45 - 1)


@settings(deadline=None, max_examples=150)
@given(place=st.integers(0, 10**6), value=st.integers(0, 255), name=st.sampled_from(sorted(JPEGS)))
def test_a_hurt_byte_gives_pixels_or_a_value_error(place: int, value: int, name: str):
    data = bytearray(JPEGS[name])
    data[place % len(data)] = value
    try:
        found = decode(bytes(data), max_pixels=10**6)
    except ValueError:
        return
    assert found.dtype == np.uint8
    assert found.ndim == 3
    assert found.shape[2] == 3
