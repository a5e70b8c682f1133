"""From the bytes of any image file to upright RGB pixels, and to the JPEG that a pair set stores. Thread safe.

Files are untrusted: the size in the header is checked before a pixel is decoded, only raster formats are opened, and
whatever a decoder raises becomes an `UnreadableImageError` with a short reason that is the same every time.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, ImageCms, UnidentifiedImageError

from pipeline.sources.base import UnreadableImageError

Pixels = NDArray[np.uint8]

_WANTED_FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "AVIF", "JPEG2000")
Image.init()
FORMATS = tuple(name for name in _WANTED_FORMATS if name in Image.OPEN)  # AVIF is missing from some builds of Pillow

# `decode` has its own limit, which every caller sets; Pillow's would warn below it and refuse above.
Image.MAX_IMAGE_PIXELS = None
# Damaged metadata is no fault of the pixels; a real fault raises.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")

JPEG_MAX_SIDE = 65_500  # libjpeg's limit, a little below the format's own 65,535
_ORIENTATION_TAG = 0x0112
_BITS_PER_SAMPLE_TAG = 258
_FRAME_MARKERS = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # SOF0 to SOF15


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredImage:
    """One encoded image as it lies in a pair set; `width` and `height` are those of `data`."""

    data: bytes
    width: int
    height: int


def decode(data: bytes, *, max_pixels: int) -> Pixels:
    """The first frame of an image file as upright RGB, uint8 `[H, W, 3]`, transparency over white.

    Raises `UnreadableImageError` for everything that is no whole image of at most `max_pixels` pixels.
    """
    if not data:
        raise UnreadableImageError("empty file")
    image = _open(data)
    with image:
        width, height = image.size
        if width * height > max_pixels:
            raise UnreadableImageError(f"{width}x{height} pixels are more than the limit of {max_pixels}")
        try:
            return _upright(_pixels(image, data), _orientation(image))
        except UnreadableImageError:
            raise
        except Exception as error:
            raise UnreadableImageError(_reason(error, image.format)) from error


def encode(rgb: Pixels, quality: int) -> bytes:
    """Uint8 `[H, W, 3]` as a baseline 4:2:0 JPEG; raises `UnreadableImageError` if a side is too long for JPEG."""
    height, width = rgb.shape[:2]
    if max(height, width) > JPEG_MAX_SIDE:
        raise UnreadableImageError(f"{width}x{height} cannot be stored: a JPEG's side is at most {JPEG_MAX_SIDE}")
    pixels = np.ascontiguousarray(rgb)
    data: bytes = simplejpeg.encode_jpeg(pixels, quality, "RGB", "420", fastdct=False)
    return data


def stored_copy(data: bytes, rgb: Pixels, *, store: Literal["original"] | int, quality: int) -> StoredImage:
    """What a pair set stores of the image file `data`, whose upright pixels are `rgb`, uint8 `[H, W, 3]`.

    `"original"` copies a JPEG byte for byte if every reader shows it as `rgb`: baseline, YCbCr or grey, upright and
    undamaged. Anything else becomes a baseline 4:2:0 JPEG of `quality`. With a number, the short side is at most that
    many pixels, never enlarged; an image that need not shrink is treated as with `"original"`.
    """
    height, width = rgb.shape[:2]
    if store != "original" and min(height, width) > store:
        rgb = _shrunk(rgb, store)
        height, width = rgb.shape[:2]
        return StoredImage(data=encode(rgb, quality), width=width, height=height)
    kept = data if _is_plain_jpeg(data) else encode(rgb, quality)
    return StoredImage(data=kept, width=width, height=height)


def _open(data: bytes) -> Image.Image:
    try:
        return Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:
        raise UnreadableImageError("not an image of a known format") from None
    except Exception as error:
        raise UnreadableImageError(_reason(error, None)) from error


def _reason(error: Exception, kind: str | None) -> str:
    """A reason without addresses, offsets or counts, so that equal faults are counted together."""
    name = kind or "image"
    if isinstance(error, MemoryError):
        return f"not enough memory to decode this {name}"
    if "truncated" in str(error).lower() or isinstance(error, EOFError):
        return f"truncated {name}"
    return f"damaged or unsupported {name}"


def _pixels(image: Image.Image, data: bytes) -> Pixels:
    """The first frame as RGB, not yet upright."""
    if image.format in ("JPEG", "MPO") and image.mode in ("RGB", "L"):
        pixels = _jpeg_pixels(data)
        if pixels is not None:
            return pixels
    image.load()
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        return _deep_grey(image)
    if image.mode == "LAB":
        return _lab_pixels(image)
    if image.has_transparency_data:
        return _over_white(image)
    return np.array(image.convert("RGB"))


def _jpeg_pixels(data: bytes) -> Pixels | None:
    """Faster than Pillow, same pixels, and strict: Pillow fills what is missing before an end marker with grey.

    None for lesser damage, such as stray bytes between segments, which leaves the decision to Pillow.
    """
    try:
        pixels: Pixels = simplejpeg.decode_jpeg(data, "RGB", strict=True)
    except ValueError as error:
        if "premature end" in str(error).lower():
            raise UnreadableImageError("truncated JPEG") from None
        return None
    return pixels


def _over_white(image: Image.Image) -> Pixels:
    transparent = image.info.get("transparency")
    if isinstance(transparent, tuple) and max(transparent) > 255:
        # The colour of a 16-bit PNG, whose pixels Pillow has reduced to their high bytes.
        image.info["transparency"] = tuple(value >> 8 for value in transparent)
    if image.mode == "La":
        image = image.convert("LA")
    rgba = image.convert("RGBA")
    white = Image.new("RGBA", rgba.size, "white")
    return np.array(Image.alpha_composite(white, rgba).convert("RGB"))


def _lab_pixels(image: Image.Image) -> Pixels:
    lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    return np.array(ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB"))


def _deep_grey(image: Image.Image) -> Pixels:
    """Grey of more than eight bits: scaled, never clipped."""
    values = np.asarray(image)
    full = _full_scale(image, values)
    grey = _stretched(values) if full is None else _scaled(values, full)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey[values == transparent] = 255
    return np.repeat(grey[:, :, None], 3, axis=2)


def _full_scale(image: Image.Image, values: NDArray[np.generic]) -> int | None:
    """The value of white; None where neither the format nor the range of the values tells."""
    if image.mode.startswith("I;") or image.format in ("PNG", "PPM"):
        bits = getattr(image, "tag_v2", {}).get(_BITS_PER_SAMPLE_TAG, (16,))[0]
        return 2**bits - 1 if values.max() < 2**bits else 65_535
    low, high = float(values.min()), float(values.max())
    if not 0 <= low <= high:  # also where a value is not a number
        return None
    scales = (1, 255, 65_535) if image.mode == "F" else (255, 65_535)
    return next((scale for scale in scales if high <= scale), None)


def _scaled(values: NDArray[np.generic], full: int) -> Pixels:
    if values.dtype.kind == "f":
        return (values.astype(np.float64) * (255 / full) + 0.5).astype(np.uint8)
    return ((values.astype(np.uint32) * 255 + full // 2) // full).astype(np.uint8)


def _stretched(values: NDArray[np.generic]) -> Pixels:
    """From the least finite value as black to the greatest as white; what is not a number becomes black."""
    numbers = values.astype(np.float64)
    finite = np.isfinite(numbers)
    if not finite.any():
        return np.zeros(numbers.shape, np.uint8)
    low, high = numbers[finite].min(), numbers[finite].max()
    numbers = np.nan_to_num(numbers, nan=low, posinf=high, neginf=low)
    span = high - low if high > low else 1.0
    return ((numbers / span - low / span) * 255 + 0.5).clip(0, 255).astype(np.uint8)


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1 where there is none or it cannot be read."""
    try:
        value = image.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:  # damaged metadata raises as many things as damaged pixels, and must not cost the image
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _upright(pixels: Pixels, orientation: int) -> Pixels:
    if orientation == 1:
        return pixels
    if orientation >= 5:
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels)


def _shrunk(rgb: Pixels, short_side: int) -> Pixels:
    height, width = rgb.shape[:2]
    scale = short_side / min(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return np.array(Image.fromarray(rgb).resize(size, Image.Resampling.BICUBIC))


def _is_plain_jpeg(data: bytes) -> bool:
    """Whether every reader, with or without EXIF, gives the same whole RGB picture for these bytes."""
    if not data.startswith(b"\xff\xd8"):
        return False
    try:
        if not _has_plain_header(data) or _orientation(_open(data)) != 1:
            return False
        # Strict, and at an eighth of the size: all data is checked at half the cost. Some readers refuse
        # what Pillow forgives.
        simplejpeg.decode_jpeg(data, "RGB", min_height=1, min_width=1, min_factor=8, strict=True)
    except (UnreadableImageError, ValueError, IndexError):
        return False
    return True


def _has_plain_header(data: bytes) -> bool:
    """Whether the segments before the first scan describe one baseline picture, in grey or beyond doubt in YCbCr."""
    jfif, adobe_transform, components = False, None, b""
    for marker, segment in _jpeg_segments(data):
        if marker == 0xE0 and segment.startswith(b"JFIF\0"):
            jfif = True
        elif marker == 0xE2 and segment.startswith(b"MPF\0"):
            return False  # several pictures in one file: readers differ in what they make of it
        elif marker == 0xEE and segment.startswith(b"Adobe"):
            adobe_transform = segment[11]
        elif marker in _FRAME_MARKERS:
            if marker != 0xC0 or segment[0] != 8:
                return False
            components = segment[6 : 6 + 3 * segment[5] : 3]
    if len(components) != 3:
        return len(components) == 1
    if adobe_transform is not None:
        return adobe_transform == 1
    return jfif or components == b"\1\2\3"


def _jpeg_segments(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Marker and payload of each segment before the first scan; raises `ValueError` or `IndexError` on bad ones."""
    position = 2
    while True:
        if data[position] != 0xFF:
            raise ValueError("no marker where a segment should begin")
        marker = data[position + 1]
        if marker == 0xFF:  # a fill byte
            position += 1
            continue
        if marker == 0xDA:
            return
        length = int.from_bytes(data[position + 2 : position + 4], "big")
        yield marker, data[position + 4 : position + 2 + length]
        position += 2 + length
