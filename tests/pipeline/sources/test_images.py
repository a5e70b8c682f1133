import io
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import simplejpeg
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, features

from pipeline.sources.base import UnreadableImageError
from pipeline.sources.images import JPEG_MAX_SIDE, decode, encode, stored_copy
from tests.pipeline.sources.pictures import LIMIT, corners, distance, encoded, jpeg, noise

# pytest undoes the filter that `images` sets for all of Pillow's complaints about metadata.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")

# How a camera would have stored the upright picture, by EXIF orientation: the standard's wording, row 0 and column 0.
STORED = {
    1: lambda upright: upright,
    2: lambda upright: upright[:, ::-1],  # row 0 is the top, column 0 the right
    3: lambda upright: upright[::-1, ::-1],  # bottom, right
    4: lambda upright: upright[::-1],  # bottom, left
    5: lambda upright: np.swapaxes(upright, 0, 1),  # left, top
    6: lambda upright: np.swapaxes(upright[:, ::-1], 0, 1),  # right, top
    7: lambda upright: np.swapaxes(upright[::-1, ::-1], 0, 1),  # right, bottom
    8: lambda upright: np.swapaxes(upright[::-1], 0, 1),  # left, bottom
}
KINDS = [
    ("JPEG", {"quality": 95}, 6),
    ("PNG", {}, 0),
    ("WEBP", {"lossless": True}, 0),
    ("TIFF", {}, 0),
    ("TIFF", {"compression": "tiff_lzw"}, 0),
    pytest.param("AVIF", {"quality": 95}, 6, marks=pytest.mark.skipif(not features.check("avif"), reason="no AVIF")),
]


def fails(data, reason, max_pixels=LIMIT):
    with pytest.raises(UnreadableImageError, match=reason) as caught:
        decode(data, max_pixels=max_pixels)
    assert " at 0x" not in str(caught.value)
    return str(caught.value)


def exif(orientation):
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


def png(width, height, depth, colour, rows, *chunks):
    """A PNG written by hand: raw rows of pixels, and further chunks before them."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows)))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunk(*pair) for pair in chunks) + pixels + chunk(b"IEND", b"")


@pytest.mark.parametrize(("kind", "options", "tolerance"), KINDS)
@pytest.mark.parametrize("orientation", STORED)
def test_every_exif_orientation_ends_upright(kind, options, tolerance, orientation):
    stored = np.ascontiguousarray(STORED[orientation](corners()))
    data = encoded(stored, kind, exif=exif(orientation), **options)
    assert distance(decode(data, max_pixels=LIMIT), corners()) <= tolerance


@pytest.mark.parametrize("orientation", [0, 9, 77])
def test_an_impossible_orientation_is_ignored(orientation):
    data = encoded(corners(), "PNG", exif=exif(orientation))
    assert distance(decode(data, max_pixels=LIMIT), corners()) == 0


@pytest.mark.parametrize(
    "damaged", [b"Exif\0\0", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff", b"Exif\0\0II*\0\xff\xff\xff\xff", b"?"]
)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_broken_exif_does_not_cost_the_image(kind, damaged):
    data = encoded(corners(), kind, exif=damaged)
    assert distance(decode(data, max_pixels=LIMIT), corners()) < 12


@pytest.mark.parametrize(
    ("pixels", "mode"),
    [
        (np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8), None),
        (np.linspace(0, 65535, 64).astype(np.int32).reshape(8, 8), None),
        (np.linspace(0, 1, 64).astype(np.float32).reshape(8, 8), None),
        (np.linspace(0, 255, 64).astype(np.float32).reshape(8, 8), None),
        (np.linspace(-5, 1e9, 64).astype(np.float32).reshape(8, 8), None),
        (np.linspace(-1e6, 1e6, 64).astype(np.int32).reshape(8, 8), None),
    ],
)
def test_deep_greys_are_scaled_and_not_clipped(pixels, mode):
    rgb = decode(encoded(pixels, "TIFF"), max_pixels=LIMIT)
    expected = np.linspace(0, 255, 64).reshape(8, 8, 1).repeat(3, 2)
    assert np.abs(rgb - expected).max() <= 1


def test_floats_that_are_no_numbers_do_not_matter():
    pixels = np.linspace(0, 2e5, 64).astype(np.float32).reshape(8, 8)
    pixels[0, :3] = np.nan, np.inf, -np.inf
    rgb = decode(encoded(pixels, "TIFF"), max_pixels=LIMIT)
    assert rgb[0, :3, 0].tolist() == [0, 255, 0]
    assert rgb[7, 7, 0] == 255
    assert (decode(encoded(np.full((4, 4), np.nan, np.float32), "TIFF"), max_pixels=LIMIT) == 0).all()


@pytest.mark.parametrize("order", ["<", ">"])
def test_sixteen_bit_grey_of_both_byte_orders(order):
    values = np.array([[0, 257, 32768, 65535]], np.uint16)
    tags = [(256, 4, 1, 4), (257, 4, 1, 1), (258, 3, 1, 16), (259, 3, 1, 1), (262, 3, 1, 1), (273, 4, 1, 200)]
    tags += [(277, 3, 1, 1), (278, 4, 1, 1), (279, 4, 1, 8)]
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}IH", 8, len(tags))
    for tag, kind, count, value in tags:
        head += struct.pack(f"{order}HHI", tag, kind, count)
        head += struct.pack(f"{order}HH", value, 0) if kind == 3 else struct.pack(f"{order}I", value)
    data = (head + bytes(4)).ljust(200, b"\0") + values.astype(f"{order}u2").tobytes()
    assert decode(data, max_pixels=LIMIT)[0, :, 0].tolist() == [0, 1, 128, 255]


def test_sixteen_bit_png_in_grey_colour_and_with_a_transparent_value():
    values = struct.pack(">4H", 0, 257, 32768, 65535)
    assert decode(png(4, 1, 16, 0, [values]), max_pixels=LIMIT)[0, :, 0].tolist() == [0, 1, 128, 255]
    keyed = png(4, 1, 16, 0, [values], (b"tRNS", struct.pack(">H", 257)))
    assert decode(keyed, max_pixels=LIMIT)[0, :, 0].tolist() == [0, 255, 128, 255]
    colour = struct.pack(">6H", 65535, 0, 32768, 257, 257, 257)
    assert decode(png(2, 1, 16, 2, [colour]), max_pixels=LIMIT).tolist() == [[[255, 0, 128], [1, 1, 1]]]
    keyed = png(2, 1, 16, 2, [colour], (b"tRNS", struct.pack(">3H", 65535, 0, 32768)))
    assert decode(keyed, max_pixels=LIMIT).tolist() == [[[255, 255, 255], [1, 1, 1]]]
    assert decode(png(1, 1, 16, 6, [struct.pack(">4H", 65535, 0, 0, 0)]), max_pixels=LIMIT).tolist() == [[[255] * 3]]


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_alpha_lies_over_white(kind):
    rgba = np.zeros((2, 3, 4), np.uint8)
    rgba[..., :3] = (200, 100, 0)
    rgba[:, 1, 3] = 255
    rgba[:, 2, 3] = 51
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    rgb = decode(encoded(rgba, kind, **options), max_pixels=LIMIT)
    assert rgb[0].tolist() == [[255, 255, 255], [200, 100, 0], [244, 224, 204]]


def test_other_transparency_lies_over_white():
    palette = Image.new("P", (2, 1))
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.putpixel((1, 0), 1)
    assert decode(encoded(palette, "PNG", transparency=0), max_pixels=LIMIT).tolist() == [[[255] * 3, [0, 0, 255]]]
    assert decode(encoded(palette, "GIF", transparency=0), max_pixels=LIMIT).tolist() == [[[255] * 3, [0, 0, 255]]]
    half = encoded(palette, "PNG", transparency=b"\x33\xff")
    assert decode(half, max_pixels=LIMIT).tolist() == [[[255, 204, 204], [0, 0, 255]]]
    grey = Image.fromarray(np.array([[[100, 0], [100, 255]]], np.uint8), "LA")
    assert decode(encoded(grey, "PNG"), max_pixels=LIMIT).tolist() == [[[255] * 3, [100] * 3]]
    keyed = encoded(np.array([[[9, 8, 7], [1, 2, 3]]], np.uint8), "PNG", transparency=(9, 8, 7))
    assert decode(keyed, max_pixels=LIMIT).tolist() == [[[255] * 3, [1, 2, 3]]]


def test_palette_grey_and_bilevel():
    assert (
        decode(encoded(Image.fromarray(corners()).quantize(4), "GIF"), max_pixels=LIMIT).tolist() == corners().tolist()
    )
    assert (
        decode(encoded(Image.fromarray(corners()).quantize(4), "PNG"), max_pixels=LIMIT).tolist() == corners().tolist()
    )
    grey = np.arange(12, dtype=np.uint8).reshape(3, 4) * 20
    for kind in ("PNG", "BMP", "TIFF", "PPM", "GIF"):
        assert (decode(encoded(grey, kind), max_pixels=LIMIT) == grey[..., None]).all()
    bits = Image.fromarray(np.array([[0, 255, 0]], np.uint8)).convert("1")
    for kind in ("PNG", "BMP", "TIFF", "PPM", "GIF"):
        assert decode(encoded(bits, kind), max_pixels=LIMIT)[0, :, 0].tolist() == [0, 255, 0]


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_cmyk(kind):
    ink = np.zeros((16, 16, 4), np.uint8)
    ink[..., 0] = 255  # cyan
    rgb = decode(encoded(Image.fromarray(ink, "CMYK"), kind), max_pixels=LIMIT)
    assert distance(rgb, np.full((16, 16, 3), (0, 255, 255), np.uint8)) < 2


def test_lab():
    lab = ImageCms.profileToProfile(
        Image.fromarray(corners()), ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB"
    )
    assert distance(decode(encoded(lab, "TIFF"), max_pixels=LIMIT), corners()) < 8  # eight bits are few for Lab


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_frame_of_several(kind):
    frames = [Image.new("RGB", (8, 6), colour) for colour in ("red", "lime", "blue")]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
    assert distance(decode(data, max_pixels=LIMIT), np.asarray(frames[0])) < 2


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": "4:1:1"}, {"keep_rgb": True}])
def test_jpegs_of_all_kinds_look_as_pillow_shows_them(options):
    data = jpeg(**options)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    assert distance(decode(data, max_pixels=LIMIT), expected) == 0


@pytest.mark.parametrize("shape", [(1, 1), (3, 3000), (3000, 3), (1, 2000)])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP", "PPM"])
def test_every_shape_is_decoded_and_stored(kind, shape):
    rgb = decode(encoded(noise(*shape), kind), max_pixels=LIMIT)
    assert rgb.shape == (*shape, 3)
    assert rgb.dtype == np.uint8
    assert rgb.flags.writeable
    for store in ("original", 2):
        stored = stored_copy(encoded(noise(*shape), kind), rgb, store=store, quality=90)
        assert decode(stored.data, max_pixels=LIMIT).shape == (stored.height, stored.width, 3)


@pytest.mark.filterwarnings("error")
def test_the_limit_of_pixels_is_ours_and_holds_before_a_pixel_is_decoded():
    fails(png(60_000, 60_000, 8, 2, []), "60000x60000 pixels are more than the limit of 100000000", 100_000_000)
    fails(png(9_500, 9_500, 8, 2, []), "truncated PNG", 100_000_000)
    fails(encoded(noise(10, 10), "PNG"), "10x10 pixels are more than the limit of 99", 99)


def test_reasons_are_short_and_say_what_is_wrong():
    assert fails(b"", "empty") == "empty file"
    assert fails(b"GIF", "not") == "not an image of a known format"
    assert fails(b"<html>" * 99, "not") == "not an image of a known format"
    assert fails(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not") == "not an image of a known format"
    assert fails(jpeg()[:-2], "trunc") == "truncated JPEG"
    assert fails(encoded(noise(), "PNG")[:-60], "trunc") == "truncated PNG"


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"optimize": True}])
def test_a_jpeg_cut_anywhere_is_a_failure_and_no_grey_picture(options):
    data = jpeg(**options)
    for end in range(2, len(data), 97):
        fails(data[:end], "truncated|damaged|not an image")
    fails(data[:-60] + b"\xff\xd9", "truncated JPEG")


@pytest.mark.parametrize("kind", ["PNG", "GIF", "WEBP", "TIFF", "BMP", "PPM"])
def test_other_files_cut_within_their_pixels_fail(kind):
    data = encoded(noise(), kind)
    fails(data[: len(data) // 2], "truncated|damaged|not an image")


def originals():
    still = [(kind, {}) for kind in ("JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP", "PPM")]
    return [
        *(encoded(noise(), kind, **options) for kind, options in still),
        jpeg(progressive=True),
        jpeg(exif=exif(6)),
        encoded(noise(), "TIFF", compression="tiff_lzw"),
        encoded(noise(), "GIF", save_all=True, append_images=[Image.fromarray(noise(seed=1))]),
        encoded(Image.fromarray(noise()).convert("CMYK"), "JPEG"),
    ]


ORIGINALS = originals()


@settings(max_examples=250, deadline=None, derandomize=True)
@given(st.data())
def test_whatever_the_bytes_there_is_an_image_or_a_reason(draw):
    data = bytearray(draw.draw(st.sampled_from(ORIGINALS)))
    for _ in range(draw.draw(st.integers(0, 8))):
        data[draw.draw(st.integers(0, len(data) - 1))] = draw.draw(st.integers(0, 255))
    data = bytes(data[: draw.draw(st.just(len(data)) | st.integers(0, len(data)))])
    try:
        rgb = decode(data, max_pixels=LIMIT)
    except UnreadableImageError as error:
        assert 0 < len(str(error)) < 100
        return
    assert rgb.dtype == np.uint8
    assert rgb.ndim == 3
    assert stored_copy(data, rgb, store="original", quality=90).data[:2] == b"\xff\xd8"


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    st.binary(max_size=200),
    st.sampled_from([b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"BM", b"II*\0", b"P6 "]),
)
def test_random_bytes_are_no_image(noise_bytes, magic):
    try:
        decode(magic + noise_bytes, max_pixels=LIMIT)
    except UnreadableImageError:
        return


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"subsampling": "4:4:4"},
        {"optimize": True},
        {"exif": exif(1)},
        {"comment": b"x"},
        {"restart_marker_blocks": 2},
    ],
)
@pytest.mark.parametrize("store", ["original", 40, 1000])
def test_an_upright_baseline_jpeg_is_copied_byte_for_byte(options, store):
    for data in (jpeg(**options), jpeg(**options) + b"trailing", encoded(noise()[..., 0], "JPEG")):
        stored = stored_copy(data, decode(data, max_pixels=LIMIT), store=store, quality=90)
        assert stored.data == data
        assert (stored.width, stored.height) == (60, 40)


def several_pictures():
    return encoded(noise(), "MPO", save_all=True, append_images=[Image.fromarray(noise(seed=1))])


@pytest.mark.parametrize(
    "data",
    [
        jpeg(progressive=True),
        jpeg(exif=exif(6)),
        jpeg(exif=exif(3)),
        jpeg(keep_rgb=True),
        several_pictures(),
        encoded(Image.fromarray(noise()).convert("CMYK"), "JPEG"),
        encoded(noise(), "PNG"),
    ],
    ids=["progressive", "turned", "upside down", "RGB", "MPO", "CMYK", "PNG"],
)
def test_anything_else_becomes_an_upright_baseline_jpeg(data):
    rgb = decode(data, max_pixels=LIMIT)
    stored = stored_copy(data, rgb, store="original", quality=95)
    assert stored.data != data
    assert (stored.height, stored.width) == rgb.shape[:2]
    assert simplejpeg.decode_jpeg_header(stored.data) == (stored.height, stored.width, "YCbCr", "420")
    opened = Image.open(io.BytesIO(stored.data))
    assert "progressive" not in opened.info
    assert not opened.getexif()
    assert distance(np.asarray(opened), rgb) < 6
    assert stored_copy(stored.data, rgb, store="original", quality=1).data == stored.data


def test_a_jpeg_whose_colours_readers_could_disagree_on_is_not_copied():
    data = jpeg()
    start = data.index(b"\xff\xdb")
    bare = b"\xff\xd8" + data[start:]  # no JFIF: the components' numbers tell
    assert stored_copy(bare, decode(bare, max_pixels=LIMIT), store="original", quality=90).data == bare
    with_adobe = b"\xff\xd8\xff\xee\x00\x0eAdobe\0\x64\0\0\0\0\x00" + data[start:]
    rgb = decode(with_adobe, max_pixels=LIMIT)
    assert stored_copy(with_adobe, rgb, store="original", quality=90).data != with_adobe
    assert distance(rgb, decode(bare, max_pixels=LIMIT)) > 10


def test_the_short_side_is_at_most_what_was_asked_and_never_enlarged():
    data = encoded(noise(400, 600), "JPEG")
    rgb = decode(data, max_pixels=LIMIT)
    stored = stored_copy(data, rgb, store=100, quality=95)
    assert (stored.width, stored.height) == (150, 100)
    reference = np.asarray(Image.fromarray(rgb).resize((150, 100), Image.Resampling.BOX))
    assert distance(decode(stored.data, max_pixels=LIMIT), reference) < 12
    assert stored_copy(data, rgb, store=400, quality=95).data == data


def test_a_side_too_long_for_jpeg_is_a_reason_unless_it_is_made_shorter():
    wide = np.zeros((2, JPEG_MAX_SIDE + 1, 3), np.uint8)
    with pytest.raises(UnreadableImageError, match="65501x2 cannot be stored: a JPEG's side is at most 65500"):
        stored_copy(encoded(wide, "PNG"), wide, store="original", quality=90)
    assert stored_copy(b"", wide, store=1, quality=90).width in (32_750, 32_751)
    assert encode(wide[:, :JPEG_MAX_SIDE], 90).startswith(b"\xff\xd8")


def test_threads_do_not_disturb_each_other():
    files = [encoded(noise(seed=seed), kind) for seed in range(8) for kind in ("JPEG", "PNG", "TIFF")]
    expected = [decode(data, max_pixels=LIMIT) for data in files]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda data: decode(data, max_pixels=LIMIT), files * 5))
    assert all((one == other).all() for one, other in zip(found, expected * 5, strict=True))
