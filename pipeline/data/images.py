"""The bytes of an image file to 8-bit sRGB pixels, as a viewer would show them."""

import io
import warnings
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, ImageCms, ImageOps, PngImagePlugin, PpmImagePlugin, TiffImagePlugin

from pipeline.errors import DataError
from pipeline.text import printable, reason

Pixels = NDArray[np.uint8]  # (H, W, 3) RGB
# Larger images are refused before they are decoded
MAX_PIXELS = 2**27
# Pillow's name of a format -> the file name extension that samples of it get. No others are tried: some start programs.
EXTENSIONS = {
    "JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp", "TIFF": "tif", "BMP": "bmp", "GIF": "gif", "PPM": "ppm",
}  # fmt: skip
# Pillow opens those as JPEG
_FORMATS = [name for name in EXTENSIONS if name != "MPO"]
SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp", ".gif", ".ppm"}
# Pixels whose colors are converted at a time: that takes some 30 bytes for each
_BAND = 2**21
# What Pillow's readers raise on damaged files
DAMAGE = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    OverflowError,
    MemoryError,
    Image.DecompressionBombError,
)
_SRGB = ImageCms.createProfile("sRGB")

# Pillow warns of damage that it tolerates; worse is an error
warnings.filterwarnings("ignore", module="PIL")


@dataclass(frozen=True)
class Decoded:
    """RGB pixels (H, W, 3) and what was done to get them.

    flattened: an alpha channel was laid over white. animated: there are more frames than this one. deep: the file has more
    than 8 bits per sample. plain_jpeg: the file is what `decode_jpeg` takes. opacity: the alpha channel (H, W), if it was kept.
    """

    pixels: Pixels
    extension: str
    flattened: bool = False
    animated: bool = False
    deep: bool = False
    plain_jpeg: bool = False
    opacity: NDArray[np.uint8] | None = None


def _allow(max_pixels: int) -> None:
    """Raises Pillow's own limit, which the host program may rely on, only as far as a caller asks for more than it."""
    limit = Image.MAX_IMAGE_PIXELS
    # Pillow warns above its limit and refuses above twice as much
    if limit is not None and max_pixels > 2 * limit:
        Image.MAX_IMAGE_PIXELS = max_pixels


def decode(content: bytes | Path, max_pixels: int = MAX_PIXELS, keep_opacity: bool = False) -> Decoded:
    """The first frame of an image file as 8-bit sRGB: turned as its EXIF orientation says, colors by its ICC profile.

    keep_opacity: give an alpha channel apart; what cannot be seen at all is white then.
    Raises: DataError if it is not an image of a known format, truncated, or has more than `max_pixels` pixels.
    """
    _allow(max_pixels)
    try:
        data = content if isinstance(content, bytes) else content.read_bytes()
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise DataError(f"{width}x{height} pixels are more than {max_pixels}")
            return _decode(image, data, keep_opacity)
    except FileNotFoundError:
        raise DataError(f"{printable(str(content))}: no such file") from None
    except Image.DecompressionBombError:
        raise DataError(f"more than {max_pixels} pixels") from None
    except DAMAGE as error:
        name = f"{printable(str(content))}: " if isinstance(content, Path) else ""
        raise DataError(f"{name}not a readable image ({reason(error)})") from None


def image_file(pixels: Pixels, kind: str, **options: object) -> bytes:
    """A file of Pillow's format `kind`, with its options for that format."""
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind, **options)
    return stream.getvalue()


def pixels_in(content: bytes) -> int:
    """How many pixels the header of an image file declares; 0 if it is not an image."""
    try:
        with Image.open(io.BytesIO(content), formats=_FORMATS) as image:
            return image.width * image.height
    except Image.DecompressionBombError:
        # Unknown, but more than anybody decodes beside other work
        return 2**62
    except DAMAGE:
        return 0


def decode_jpeg(content: bytes, width: int, height: int, shrink: int = 1) -> Pixels:
    """The pixels of a plain JPEG file: 8-bit gray or RGB, without profile or orientation. Twice as fast as `decode`.

    shrink: 1, 2, 4 or 8; each pixel is then the mean of about shrink x shrink, at an eighth to a half of the work.
    Shapes: returns (ceil(height / shrink), ceil(width / shrink), 3).
    Raises: DataError if it is damaged, or of another size than `width` x `height`.
    """
    try:
        found = simplejpeg.decode_jpeg_header(content)[:2]
        if found != (height, width):
            raise DataError(f"not the image that was listed: {found[1]}x{found[0]}, expected {width}x{height}")
        return simplejpeg.decode_jpeg(content, min_height=-(-height // shrink), min_width=-(-width // shrink))
    except ValueError as error:
        raise DataError(f"not a readable image ({reason(error)})") from None


def _decode(image: Image.Image, data: bytes, keep_opacity: bool) -> Decoded:
    extension = EXTENSIONS[image.format or ""]
    animated = int(getattr(image, "n_frames", 1)) > 1 and image.format != "MPO"
    profile = image.info.get("icc_profile")
    turned = image.getexif().get(0x0112, 1) != 1
    if image.format == "JPEG" and image.mode in ("L", "RGB") and not profile and not turned:
        # Damage that Pillow tolerates
        with suppress(DataError):
            return Decoded(decode_jpeg(data, *image.size), extension, plain_jpeg=True)
    deep = _is_deep(image, data)
    ImageOps.exif_transpose(image, in_place=True)
    opacity = _opacity(image) if keep_opacity else None
    pixels, flattened = _to_rgb(image, profile, opacity is not None)
    return Decoded(pixels, extension, flattened and opacity is None, animated, deep, opacity=opacity)


def _opacity(image: Image.Image) -> NDArray[np.uint8] | None:
    """The alpha channel, where it says anything."""
    if image.mode.startswith(("I", "F")) or not image.has_transparency_data:
        return None
    alpha = np.array(image.convert("RGBA").getchannel("A"))
    return alpha if alpha.min() < 255 else None


def with_opacity(pixels: Pixels, opacity: NDArray[np.uint8] | None) -> NDArray[np.uint8]:
    """Shapes: pixels (H, W, 3), opacity (H, W); returns (H, W, 3 or 4)."""
    return pixels if opacity is None else np.dstack([pixels, opacity])


def over_white(pixels: Pixels, opacity: NDArray[np.uint8]) -> Pixels:
    """Shapes: pixels (H, W, 3), opacity (H, W); returns (H, W, 3)."""
    under = Image.new("RGB", (pixels.shape[1], pixels.shape[0]), (255, 255, 255))
    return np.array(Image.composite(Image.fromarray(pixels), under, Image.fromarray(opacity)))


def _is_deep(image: Image.Image, data: bytes) -> bool:
    """Whether an image that was opened but not read has samples of more than 8 bits, of which Pillow may keep 8."""
    if image.mode.startswith(("I", "F")):
        return True
    if isinstance(image, PngImagePlugin.PngImageFile):
        # The bit depth in its IHDR
        return data[24] > 8
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        return max(image.tag_v2.get(TiffImagePlugin.BITSPERSAMPLE, (1,))) > 8
    # a PPM whose maximum is not 255
    return isinstance(image, PpmImagePlugin.PpmImageFile) and image.mode == "RGB" and image.tile[0].args != "RGB"


def _to_rgb(image: Image.Image, profile: bytes | None, keep_opacity: bool) -> tuple[Pixels, bool]:
    """Pixels, and whether they were transparent somewhere; in bands, since the intermediate steps take several times their
    memory."""
    width, height = image.size
    rows = max(1, _BAND // max(1, width))
    bands = [(top, min(top + rows, height)) for top in range(0, height, rows)]
    white = max(_gray(_cut(image, *band)).max() for band in bands) if image.mode.startswith("F") else 65535.0
    pixels, flattened = np.empty((height, width, 3), np.uint8), False
    for top, bottom in bands:
        pixels[top:bottom], transparent = _band_to_rgb(
            _cut(image, top, bottom), profile, max(1.0, float(white)), keep_opacity
        )
        flattened |= transparent
    return pixels, flattened


def _cut(image: Image.Image, top: int, bottom: int) -> Image.Image:
    return image if bottom - top == image.height else image.crop((0, top, image.width, bottom))


def _gray(image: Image.Image) -> NDArray[np.float64]:
    return np.nan_to_num(np.asarray(image, dtype=np.float64))


def _band_to_rgb(image: Image.Image, profile: bytes | None, white: float, keep_opacity: bool) -> tuple[Pixels, bool]:
    """white: the value of 16 and 32 bit gray that is shown as white."""
    # Pillow's convert() would clip, not scale
    if image.mode.startswith(("I", "F")):
        gray = np.clip(np.rint(_gray(image) / white * 255), 0, 255).astype(np.uint8)
        return np.repeat(gray[..., None], 3, axis=2), False
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        alpha = rgba.getchannel("A")
        colors = _to_srgb(rgba.convert("RGB"), profile)
        if keep_opacity:
            # only what cannot be seen
            alpha = alpha.point(lambda value: 255 * (value > 0))
        under = Image.new("RGB", rgba.size, (255, 255, 255))
        return np.array(Image.composite(colors, under, alpha)), bool(np.asarray(alpha).min() < 255)
    if image.mode not in ("L", "RGB", "CMYK", "LAB"):
        image = image.convert("RGB")
    return np.array(_to_srgb(image, profile).convert("RGB")), False


def _to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """Converts colors by the file's ICC profile; a damaged or mismatched one is ignored, as viewers do."""
    if not profile:
        return image
    try:
        theirs = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if "srgb" in ImageCms.getProfileDescription(theirs).lower():
            return image
        converted = ImageCms.profileToProfile(
            image,
            theirs,
            _SRGB,
            ImageCms.Intent.RELATIVE_COLORIMETRIC,
            outputMode="RGB",
            flags=ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
    except (ImageCms.PyCMSError, OSError, ValueError):
        return image
    return converted if converted is not None else image
