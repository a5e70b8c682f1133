"""From the bytes of any image file, as a camera or a scanner wrote it, to upright RGB pixels.

Files are untrusted: the size in the header is checked before a pixel is decoded, and only raster formats are opened.
`trainer.data.images` is the faster reader of what pair sets hold, which is upright already.
"""

from __future__ import annotations

import io
import warnings

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, ImageCms, UnidentifiedImageError

Pixels = NDArray[np.uint8]

_WANTED_FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "AVIF", "JPEG2000")
Image.init()
FORMATS = tuple(name for name in _WANTED_FORMATS if name in Image.OPEN)  # AVIF is missing from some builds of Pillow

# `max_pixels` is the limit, which every caller sets; Pillow's would warn below it and refuse above.
Image.MAX_IMAGE_PIXELS = None
# Damaged metadata is no fault of the pixels; a real fault raises.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")

_JPEG = b"\xff\xd8\xff"
_EXIF = b"Exif\0\0"
_EXIF_WITHIN = 1 << 17  # of a JPEG's first bytes; other segments may come before
_ORIENTATION = 0x0112
_TAIL = 4096  # bytes in which the end marker of a JPEG is looked for: some writers append data of their own


def decode(data: bytes, max_pixels: int) -> Pixels:
    """The first frame as upright RGB, uint8 [H, W, 3] and contiguous: any depth and colours, transparency over white.

    Raises ValueError with the reason for anything that is no whole image of at most `max_pixels`.
    """
    if data.startswith(_JPEG) and _EXIF not in data[:_EXIF_WITHIN]:
        pixels = _decode_jpeg(data, max_pixels)
        if pixels is not None:
            return pixels
    with _opened(data) as image:
        _check_size(*image.size, max_pixels)
        try:
            pixels = _decode_jpeg(data, max_pixels) if image.format in ("JPEG", "MPO") else None
            pixels = rgb(image) if pixels is None else pixels
            return _upright(pixels, _orientation(image))
        except ValueError:
            raise
        except Exception as error:  # Pillow's readers raise whatever their format's parser meets in damaged bytes
            raise ValueError(_reason(error, image.format)) from error


def upright(image: Image.Image, max_pixels: int) -> Pixels:
    """An image that is opened already, as `decode` gives it."""
    _check_size(*image.size, max_pixels)
    return _upright(rgb(image), _orientation(image))


def rgb(image: Image.Image) -> Pixels:
    """An opened image as RGB, uint8 [H, W, 3], not turned by its orientation."""
    image.load()
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        return _deep_grey(image)
    if image.mode == "LAB":
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        return np.array(ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB"))
    if image.has_transparency_data:
        return _over_white(image)
    return np.array(image.convert("RGB"))


def sides(data: bytes, max_pixels: int) -> tuple[int, int]:
    """Height and width of the upright image, from its header alone; `data` may be the file's first bytes.

    Raises ValueError like `decode`, also where the header needs more bytes than there are.
    """
    if data.startswith(_JPEG) and _EXIF not in data[:_EXIF_WITHIN]:
        try:
            height, width, _, _ = simplejpeg.decode_jpeg_header(data)
        except (ValueError, RuntimeError):
            pass  # Pillow decides
        else:
            return _check_size(width, height, max_pixels)
    with _opened(data) as image:
        height, width = _check_size(*image.size, max_pixels)
        turned = image.format != "TIFF" and _orientation(image) >= 5  # Pillow turns TIFF by itself
        return (width, height) if turned else (height, width)


def looks_whole(head: bytes, tail: bytes, size: int) -> bool:
    """Whether a file of `size` bytes with this beginning and end is not evidently cut off; cheap, and may be wrong."""
    if head.startswith(_JPEG):
        return b"\xff\xd9" in tail[-_TAIL:]
    if head.startswith(b"\x89PNG"):
        return b"IEND" in tail[-_TAIL:]
    if head.startswith(b"RIFF"):
        return int.from_bytes(head[4:8], "little") + 8 <= size
    return True


def _decode_jpeg(data: bytes, max_pixels: int) -> Pixels | None:
    """Faster than Pillow, same pixels, and strict: Pillow fills what is missing before an end marker with grey.

    None for what only Pillow reads, CMYK, and for lesser damage such as stray bytes between segments.
    """
    try:
        height, width, space, _ = simplejpeg.decode_jpeg_header(data)
        _check_size(width, height, max_pixels)
        if space not in ("YCbCr", "Gray", "RGB"):
            return None
        pixels: Pixels = simplejpeg.decode_jpeg(data, "RGB", strict=True)
    except TooManyPixelsError:
        raise
    except (ValueError, RuntimeError) as error:
        if "premature end" in str(error).lower():
            raise ValueError("it is cut off (JPEG)") from None
        return None
    return pixels


def _opened(data: bytes) -> Image.Image:
    if not data:
        raise ValueError("the file is empty")
    try:
        return Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:
        raise ValueError(f"not an image of a known format, it begins with {data[:8]!r}") from None
    except Exception as error:  # as in `decode`
        raise ValueError(_reason(error, None)) from error


def _reason(error: Exception, kind: str | None) -> str:
    said = " ".join(str(error).split())
    cut = isinstance(error, EOFError) or "truncated" in said.lower()
    return f"{'it is cut off' if cut else 'it is damaged'} ({kind or 'image'}{f': {said}' if said else ''})"


class TooManyPixelsError(ValueError):
    """The header announces more pixels than allowed: a bomb, or a scan that was never meant for training."""


def _check_size(width: int, height: int, max_pixels: int) -> tuple[int, int]:
    if width * height > max_pixels:
        raise TooManyPixelsError(f"{width} x {height} pixels are more than the {max_pixels} that are allowed")
    if width < 1 or height < 1:
        raise ValueError(f"it has no pixels ({width} x {height})")
    return height, width


def _over_white(image: Image.Image) -> Pixels:
    transparent = image.info.get("transparency")
    if isinstance(transparent, tuple) and max(transparent) > 255:
        # The colour of a 16-bit PNG, whose pixels Pillow has reduced to their high bytes.
        image.info["transparency"] = tuple(value >> 8 for value in transparent)
    rgba = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
    white = Image.new("RGBA", rgba.size, "white")
    return np.array(Image.alpha_composite(white, rgba).convert("RGB"))


def _deep_grey(image: Image.Image) -> Pixels:
    """Grey of more than eight bits: scaled by the depth where that is known or fits, else from least to greatest."""
    values = np.nan_to_num(np.asarray(image).astype(np.float64), posinf=0, neginf=0)
    low, high = float(values.min()), float(values.max())
    sixteen = image.mode.startswith("I;") or image.format in ("PNG", "PPM")
    possible = (65_535,) if sixteen else (1, 255, 65_535) if image.mode == "F" else (255, 65_535)
    full = next((full for full in possible if low >= 0 and high <= full), None)
    grey = values / full if full else (values - low) / max(high - low, 1e-300)
    return np.repeat(np.round(grey * 255).clip(0, 255).astype(np.uint8)[:, :, None], 3, axis=2)


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1 where there is none or it cannot be read."""
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # damaged metadata raises as many things as damaged pixels, and must not cost the image
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _upright(pixels: Pixels, orientation: int) -> Pixels:
    if orientation >= 5:
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels)
