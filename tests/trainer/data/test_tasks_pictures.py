"""Any image file becomes upright RGB: every format, depth and orientation against Pillow or by hand, and all damage."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from tests.trainer.data.task_builders import file_bytes
from trainer.data.labelled import pictures

MOST = 100_000_000
SMOOTH = np.linspace(0, 255, 24 * 16 * 3).reshape(24, 16, 3).astype(np.uint8)
RGB = Image.fromarray(SMOOTH)
ORIENTATION = 0x0112


def decode(data):
    pixels = pictures.decode(data, MOST)
    assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3 and pixels.flags["C_CONTIGUOUS"]
    assert pictures.sides(data, MOST) == pixels.shape[:2]
    return pixels


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM", "GIF", "WEBP", "JPEG2000", "AVIF"])
def test_lossless_and_other_formats(kind):
    how = {"lossless": True} if kind == "WEBP" else {}
    data = file_bytes(RGB, kind, **how)
    with Image.open(io.BytesIO(data)) as image:
        assert np.array_equal(decode(data), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("how", [{}, {"progressive": True}, {"subsampling": 0}, {"quality": 5}, {"keep_rgb": True}])
def test_jpegs_are_decoded_as_pillow_does(how):
    data = file_bytes(RGB, "JPEG", **how)
    assert np.array_equal(decode(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


def test_grey_cmyk_and_palettes():
    grey = RGB.convert("L")
    assert (np.ptp(decode(file_bytes(grey, "JPEG")), axis=2) == 0).all()
    assert np.array_equal(decode(file_bytes(grey, "PNG"))[..., 1], np.asarray(grey))
    cmyk = decode(file_bytes(RGB.convert("CMYK"), "JPEG", quality=100, subsampling=0))
    assert np.abs(cmyk.astype(int) - SMOOTH).mean() < 6
    palette = RGB.quantize(200)
    assert np.array_equal(decode(file_bytes(palette, "PNG")), np.asarray(palette.convert("RGB")))
    bits = grey.convert("1")
    assert np.array_equal(decode(file_bytes(bits, "PNG"))[..., 2], np.asarray(bits) * np.uint8(255))


def test_lab_is_converted():
    from PIL import ImageCms

    lab = ImageCms.profileToProfile(
        RGB, ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB"
    )
    assert np.abs(decode(file_bytes(lab, "TIFF")).astype(int) - SMOOTH).mean() < 6


def test_transparency_lies_over_white():
    alpha = np.full((24, 16), 255, np.uint8)
    alpha[:12], alpha[12:, :8] = 0, 128
    rgba = Image.fromarray(np.dstack([SMOOTH, alpha]))
    pixels = decode(file_bytes(rgba, "PNG"))
    assert (pixels[:12] == 255).all() and np.array_equal(pixels[12:, 8:], SMOOTH[12:, 8:])
    expected = (SMOOTH[12:, :8] * 128.0 + 255 * 127.0) / 255
    assert np.abs(pixels[12:, :8] - expected).max() <= 1
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([10, 20, 30, 40, 50, 60])
    assert (decode(file_bytes(palette, "PNG", transparency=1)) == 255).all()
    assert (decode(file_bytes(Image.new("LA", (4, 4), (9, 0)), "PNG")) == 255).all()


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_keep_their_range(kind):
    values = np.array([[0, 256, 32_768, 65_535]], np.uint16)
    pixels = decode(file_bytes(Image.fromarray(values), kind))
    assert pixels[0, :, 0].tolist() == [0, 1, 128, 255]
    dark = decode(file_bytes(Image.fromarray(np.array([[0, 200]], np.uint16)), kind))
    assert dark.max() == 1  # a dark picture stays dark


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.0, 0.5, 1.0], [0, 128, 255]),
        ([0.0, 100.4, 255.0], [0, 100, 255]),
        ([-1.0, 0.0, 1.0], [0, 128, 255]),
        ([0.0, float("nan"), 1.0], [0, 0, 255]),
        ([-5.0, -5.0, -5.0], [0, 0, 0]),
    ],
)
def test_floats_are_scaled(values, expected):
    pixels = decode(file_bytes(Image.fromarray(np.array([values], np.float32)), "TIFF"))
    assert pixels[0, :, 1].tolist() == expected


def with_orientation(kind, number):
    exif = Image.Exif()
    exif[ORIENTATION] = number
    return file_bytes(RGB, kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))


@pytest.mark.parametrize("number", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_orientation_is_applied(kind, number):
    data = with_orientation(kind, number)
    with Image.open(io.BytesIO(data)) as image:
        expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    assert expected.shape == ((24, 16, 3) if number < 5 else (16, 24, 3))
    assert np.array_equal(decode(data), expected)


@pytest.mark.parametrize("number", [0, 9, 65_535])
def test_orientations_that_do_not_exist_are_none(number):
    assert decode(with_orientation("JPEG", number)).shape == (24, 16, 3)


def test_damaged_metadata_does_not_cost_the_image():
    data = with_orientation("JPEG", 6)
    at = data.index(b"Exif\0\0") + 6
    assert decode(data[:at] + b"\xff" * 8 + data[at + 8 :]).shape == (24, 16, 3)


def test_the_first_frame_is_taken():
    other = Image.fromarray(255 - SMOOTH)
    for kind in ("GIF", "TIFF"):
        data = file_bytes(RGB, kind, save_all=True, append_images=[other])
        assert np.array_equal(decode(data), decode(file_bytes(RGB, kind)))


def big_png():
    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "the file is empty"),
        (b"just some words\n", "not an image of a known format, it begins with b'just som'"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
        (b"\xff\xd8\xff", "image|JPEG"),
        (big_png(), "20000 x 20000 pixels are more than the 100000000 that are allowed"),
    ],
)
def test_what_is_no_image_says_why(data, reason):
    with pytest.raises(ValueError, match=reason):
        pictures.decode(data, MOST)
    with pytest.raises(ValueError):
        pictures.sides(data, MOST)


def test_the_limit_of_pixels_holds_for_jpegs_too():
    data = file_bytes(RGB, "JPEG")
    assert pictures.decode(data, 24 * 16).shape == (24, 16, 3)
    for read in (pictures.decode, pictures.sides):
        with pytest.raises(ValueError, match="16 x 24 pixels are more than the 383"):
            read(data, 383)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP"])
def test_files_that_are_cut_off_are_refused(kind):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    data = file_bytes(noise, kind)
    with pytest.raises(ValueError):
        pictures.decode(data[: len(data) * 2 // 3], MOST)


def test_a_jpeg_that_is_cut_off_before_an_end_mark_is_refused():
    """Pillow fills the rest with grey."""
    data = file_bytes(Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)), "JPEG")
    with pytest.raises(ValueError, match="cut off"):
        pictures.decode(data[: len(data) // 2] + b"\xff\xd9", MOST)


@settings(max_examples=150, deadline=None)
@given(kind=st.sampled_from(["JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP"]), draw=st.randoms(use_true_random=False))
def test_any_damage_gives_pixels_or_a_reason(kind, draw):
    data = bytearray(file_bytes(RGB, kind))
    for _ in range(draw.randint(1, 8)):
        data[draw.randrange(len(data))] = draw.randrange(256)
    cut = bytes(data[: draw.randint(0, len(data))]) if draw.random() < 0.3 else bytes(data)
    try:
        pixels = pictures.decode(cut, 1 << 20)
    except ValueError as error:
        assert str(error) and "\n" not in str(error)
    else:
        assert pixels.dtype == np.uint8 and pixels.shape[2] == 3


def test_headers_are_read_from_the_first_bytes():
    data = file_bytes(Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 200, 3), np.uint8)), "JPEG")
    assert pictures.sides(data[:2000], MOST) == (300, 200)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_the_end_of_a_file_tells_that_it_was_cut_off(kind):
    data = file_bytes(RGB, kind)
    assert pictures.looks_whole(data, data, len(data))
    cut = data[:-40]
    assert pictures.looks_whole(cut, cut, len(cut)) == (kind == "TIFF")
    assert pictures.looks_whole(data, data + b"\0" * 100, len(data) + 100)
