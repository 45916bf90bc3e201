import io
import struct
import zlib
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms

from pipeline.data import images
from pipeline.errors import DataError
from pipeline.sharding import duplicates
from pipeline.sharding.filters import AcceptedImage, FilterConfig, NameLists, examine
from tests.conftest import picture
from tests.data.test_transforms import encoded


def result(content: bytes, path: str = "x.png", **rules: object):
    made = FilterConfig(min_side=16, **rules)
    return examine(path, "set", content, made, NameLists.of(made))


@pytest.mark.parametrize(
    ("height", "width", "rules", "reason"),
    [
        (96, 128, {}, None),
        (96, 128, {"max_aspect": 1.34}, None),
        (96, 128, {"max_aspect": 1.33}, "too long: 128x96"),
        (96, 128, {"max_pixels": 96 * 128 - 1}, "128x96 pixels are more than 12287"),
        (96, 128, {"min_colors": 1000}, None),
        (96, 128, {"min_colors": 12289}, "not a photo: "),
        (15, 128, {}, "too small: 128x15"),
    ],
)
def test_rules(height, width, rules, reason):
    found = result(encoded(Image.fromarray(picture(0, height, width))), **rules)
    assert isinstance(found, AcceptedImage) if reason is None else reason in found.reason


def test_a_drawing_has_few_colors():
    drawing = np.zeros((200, 200, 3), np.uint8)
    drawing[50:100] = (255, 0, 0)
    assert "not a photo: 2 colors" in result(encoded(Image.fromarray(drawing)), min_colors=64).reason


def test_lists_allow_and_deny_by_path_name_and_digest(tmp_path):
    content = encoded(Image.fromarray(picture(0)))
    digest = result(content).sha256
    (tmp_path / "list").write_text(f"folder/a.png\n{digest}\n")
    denied = {"deny_list": str(tmp_path / "list")}
    assert "deny list" in result(content, "other.png", **denied).reason
    other = encoded(Image.fromarray(picture(1)))
    assert isinstance(result(other, "b.png", **denied), AcceptedImage)
    assert "deny list" in result(other, "folder/a.png", **denied).reason
    assert isinstance(result(content, "b.png", allow_list=str(tmp_path / "list")), AcceptedImage)
    assert "not on the allow list" in result(other, "b.png", allow_list=str(tmp_path / "list")).reason
    with pytest.raises(DataError, match="cannot read this list"):
        result(content, deny_list=str(tmp_path / "nothing"))


def test_what_is_no_image_is_told_without_the_address_of_an_object(tmp_path):
    (tmp_path / "text.jpg").write_text("no photo")
    with pytest.raises(DataError, match=r"text\.jpg: not a readable image \(cannot identify image file\)$"):
        images.decode(tmp_path / "text.jpg")


def test_cmyk_profiles_and_animations():
    cmyk = Image.new("CMYK", (32, 32), (0, 255, 255, 0))
    red = images.decode(encoded(cmyk, "JPEG", quality=100)).pixels[5, 5]
    assert red[0] > 200
    assert red[1:].max() < 60
    frames = [Image.fromarray(picture(i)).convert("P") for i in range(3)]
    stream = io.BytesIO()
    frames[0].save(stream, "GIF", save_all=True, append_images=frames[1:])
    decoded = images.decode(stream.getvalue())
    assert decoded.animated
    assert np.abs(decoded.pixels.astype(int) - np.asarray(frames[0].convert("RGB"))).max() == 0
    assert "animated" in result(stream.getvalue(), "x.gif").note


def deep_png() -> bytes:
    """A PNG of 1x1 with 16 bits per sample in color, which Pillow cannot write."""
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(bytes(7))),
        (b"IEND", b""),
    ]
    parts = [struct.pack(">I", len(c)) + t + c + struct.pack(">I", zlib.crc32(t + c)) for t, c in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize(
    ("content", "deep"),
    [
        (encoded(Image.new("I;16", (8, 8))), True),
        (encoded(Image.new("F", (8, 8)), "TIFF"), True),
        (encoded(Image.new("RGB", (8, 8)), "TIFF"), False),
        (encoded(Image.new("1", (8, 8)), "TIFF"), False),
        (deep_png(), True),
        (b"P6 1 1 65535\n" + bytes(6), True),
        (b"P6 1 1 255\n" + bytes(3), False),
        (encoded(Image.new("RGBA", (8, 8))), False),
        (encoded(Image.new("RGB", (8, 8)), "JPEG"), False),
    ],
)
def test_more_than_eight_bits_per_sample_are_noticed(content, deep):
    assert images.decode(content).deep is deep


@pytest.mark.parametrize("kind", ["I;16", "F", "RGBA", "P", "CMYK", "RGB"])
def test_a_large_image_is_converted_in_bands_like_a_small_one(kind, monkeypatch):
    photo = Image.fromarray(picture(0, 200, 100))
    exif = Image.Exif()
    exif[0x0112] = 6
    if kind in ("I;16", "F"):
        photo = Image.fromarray(
            np.asarray(photo.convert("L")).astype(np.uint16 if kind == "I;16" else np.float32) * 200
        )
    elif kind == "RGBA":
        photo.putalpha(Image.linear_gradient("L").resize(photo.size))
    content = encoded(photo.convert(kind), "TIFF" if kind in ("F", "CMYK") else "PNG", exif=exif)
    whole = images.decode(content)
    looks = duplicates.perceptual_hash(whole.pixels)
    monkeypatch.setattr(images, "_BAND", 700)
    monkeypatch.setattr(duplicates, "_BAND", 700)
    bands = images.decode(content)
    assert np.array_equal(bands.pixels, whole.pixels)
    assert bands.pixels.shape == (100, 200, 3)
    assert bands.flattened == whole.flattened == (kind == "RGBA")
    assert duplicates.perceptual_hash(bands.pixels) == looks


def test_colors_are_shown_as_the_profile_says():
    linear = _profile_with_gamma_one()
    gray = Image.new("RGB", (8, 8), (55, 55, 55))
    shown = images.decode(encoded(gray, "PNG", icc_profile=linear)).pixels[0, 0]
    assert abs(int(shown[0]) - 128) <= 2  # (55 / 255) of the light is 128 in sRGB
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    photo = Image.fromarray(picture(0))
    assert np.array_equal(images.decode(encoded(photo, "PNG", icc_profile=srgb)).pixels, picture(0))
    assert np.array_equal(images.decode(encoded(photo, "PNG", icc_profile=b"no profile")).pixels, picture(0))


def _profile_with_gamma_one() -> bytes:
    """An RGB profile with sRGB's primaries and a straight line for its curves."""
    content = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    count = int.from_bytes(content[128:132], "big")
    for i in range(count):
        tag, offset, size = (content[132 + 12 * i + 4 * j :][:4] for j in range(3))
        if tag in (b"rTRC", b"gTRC", b"bTRC"):
            start = int.from_bytes(offset, "big")
            length = int.from_bytes(size, "big")
            content[start : start + length] = (b"curv" + bytes(8)).ljust(length, b"\0")
        if tag == b"desc":
            start = int.from_bytes(offset, "big")
            content[start : start + int.from_bytes(size, "big")] = content[
                start : start + int.from_bytes(size, "big")
            ].replace(b"\0s\0R\0G\0B", b"\0l\0i\0n\0e")
    return bytes(content)


def jpeg(seed: int = 0, **options: object) -> bytes:
    return encoded(Image.fromarray(picture(seed, 203, 301)), "JPEG", **options)


@pytest.mark.parametrize("options", [{}, {"quality": 95, "subsampling": 0}, {"progressive": True}])
def test_a_plain_jpeg_has_the_same_pixels_either_way(options):
    content = jpeg(**options)
    decoded = images.decode(content)
    assert decoded.plain_jpeg
    pillows = np.asarray(Image.open(io.BytesIO(content)))
    assert np.array_equal(images.decode_jpeg(content, 301, 203), pillows)
    assert np.array_equal(decoded.pixels, pillows)
    gray = encoded(Image.fromarray(picture(0)).convert("L"), "JPEG")
    shown = np.asarray(Image.open(io.BytesIO(gray)).convert("RGB"))
    assert np.array_equal(images.decode_jpeg(gray, 128, 96), shown)


def test_a_jpeg_that_only_pillow_reads_is_not_plain(monkeypatch):
    def strict(*_: object) -> None:
        raise DataError("no")

    monkeypatch.setattr(images, "decode_jpeg", strict)
    decoded = images.decode(jpeg())
    assert not decoded.plain_jpeg
    assert decoded.pixels.shape == (203, 301, 3)


def test_jpegs_that_need_more_are_not_plain():
    exif = Image.Exif()
    exif[0x0112] = 3
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    cmyk = encoded(Image.new("CMYK", (32, 32)), "JPEG")
    for content in (jpeg(exif=exif), jpeg(icc_profile=profile), cmyk, encoded(Image.fromarray(picture(0)))):
        assert not images.decode(content).plain_jpeg


@pytest.mark.parametrize("shrink", [2, 4, 8])
def test_a_shrunken_jpeg_is_about_the_mean(shrink):
    content = jpeg(quality=98)
    small = images.decode_jpeg(content, 301, 203, shrink)
    assert small.shape == (-(-203 // shrink), -(-301 // shrink), 3)
    whole = images.decode(content).pixels[: 203 // shrink * shrink, : 301 // shrink * shrink].astype(float)
    means = whole.reshape(203 // shrink, shrink, 301 // shrink, shrink, 3).mean((1, 3))
    assert np.abs(small[: 203 // shrink, : 301 // shrink] - means).mean() < 4


def test_a_jpeg_of_another_size_than_listed_is_refused_before_decoding():
    with pytest.raises(DataError, match="301x203, expected 300x203"):
        images.decode_jpeg(jpeg(), 300, 203)


KINDS = {
    "PNG": encoded(Image.fromarray(picture(0))),
    "JPEG": jpeg(),
    "WEBP": encoded(Image.fromarray(picture(0)), "WEBP"),
    "TIFF": encoded(Image.fromarray(picture(0)), "TIFF"),
    "GIF": encoded(Image.fromarray(picture(0)).convert("P"), "GIF"),
    "BMP": encoded(Image.fromarray(picture(0)), "BMP"),
    "PPM": encoded(Image.fromarray(picture(0)), "PPM"),
}


@pytest.mark.filterwarnings("ignore::UserWarning")  # pytest undoes the filter that images.py sets
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=100)
@given(data=st.data())
def test_damaged_images_are_refused_or_decoded_and_nothing_else(kind, data):
    content = bytearray(KINDS[kind][: data.draw(st.integers(0, len(KINDS[kind])))])
    for place, value in data.draw(st.lists(st.tuples(st.integers(0, 600), st.integers(0, 255)), max_size=20)):
        if place < len(content):
            content[place] = value
    with suppress(DataError):
        pixels = images.decode(bytes(content), max_pixels=2**22).pixels
        assert pixels.shape[2] == 3
        assert pixels.shape[0] * pixels.shape[1] <= 2**22
    with suppress(DataError):
        assert images.decode_jpeg(bytes(content), 301, 203).shape == (203, 301, 3)


def test_the_host_programs_own_limit_stays_unless_more_is_asked_for():
    limit = Image.MAX_IMAGE_PIXELS
    stream = io.BytesIO()
    Image.new("L", (16, 16)).save(stream, "PNG")
    images.decode(stream.getvalue())
    assert limit == Image.MAX_IMAGE_PIXELS
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
        with pytest.raises(DataError, match="more than 150 pixels"):
            images.decode(stream.getvalue(), 150)
        assert images.pixels_in(stream.getvalue()) > 256
        assert images.decode(stream.getvalue(), 1000).pixels.shape == (16, 16, 3)
