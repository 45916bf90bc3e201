import io

import numpy as np
import pytest
from PIL import Image

from pipeline.data import images, transforms
from pipeline.errors import DataError
from tests.conftest import picture


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def test_exif_orientation_is_applied():
    image = Image.fromarray(picture(0, 40, 60))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to view
    turned = images.decode(encoded(image, "PNG", exif=exif)).pixels
    assert np.array_equal(turned, np.rot90(picture(0, 40, 60), k=-1))


def test_alpha_is_laid_over_white_and_that_is_told():
    rgba = np.zeros((2, 2, 4), np.uint8)
    rgba[0, 0] = (200, 100, 0, 255)
    decoded = images.decode(encoded(Image.fromarray(rgba)))
    assert decoded.flattened
    assert decoded.pixels[0, 0].tolist() == [200, 100, 0]
    assert decoded.pixels[1, 1].tolist() == [255, 255, 255]
    opaque = images.decode(encoded(Image.fromarray(picture(0)).convert("RGBA")))
    assert not opaque.flattened


def test_grey_palette_and_sixteen_bit_images_become_rgb():
    gray = np.arange(16, dtype=np.uint8).reshape(4, 4)
    assert images.decode(encoded(Image.fromarray(gray))).pixels[1, 2].tolist() == [6, 6, 6]
    deep = Image.fromarray(np.full((4, 4), 65535 // 2, np.uint16))
    assert images.decode(encoded(deep)).pixels[0, 0].tolist() == [127, 127, 127]
    palette = Image.fromarray(picture(0)).convert("P")
    assert images.decode(encoded(palette)).pixels.shape == (96, 128, 3)


@pytest.mark.parametrize("content", [b"", b"GIF89a", encoded(Image.fromarray(picture(0)))[:500]])
def test_what_is_no_whole_image_is_refused(content):
    with pytest.raises(DataError, match="not a readable image"):
        images.decode(content)


def test_an_absurd_size_is_refused_before_decoding():
    with pytest.raises(DataError, match="more than 100"):
        images.decode(encoded(Image.fromarray(picture(0))), max_pixels=100)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 90), (90, 1), (3, 200), (64, 64), (200, 65)])
def test_crops_of_any_image_have_the_asked_size(height, width):
    pixels = picture(3, height, width).copy()
    rng = np.random.default_rng(0)
    square, window = transforms.random_square(height, width, 64, rng), transforms.random_window(height, width, rng)
    assert transforms.pad_to(square.of(pixels), 64, 64).shape == (64, 64, 3)
    assert transforms.scaled(window.of(pixels), 64).shape == (64, 64, 3)
    assert all(c.shape == (64, 64, 3) for c in transforms.spread_crops(pixels, 64, 3))


def test_padding_reflects():
    row = np.arange(3, dtype=np.uint8).reshape(1, 3, 1).repeat(3, axis=2)
    assert transforms.pad_to(row, 1, 6)[0, :, 0].tolist() == [0, 1, 2, 1, 0, 1]


def test_spread_crops_do_not_overlap_and_one_is_the_centre():
    pixels = np.zeros((70, 200, 3), np.uint8)
    pixels[:] = np.arange(200)[None, :, None]
    three = transforms.spread_crops(pixels, 64, 8)
    assert [int(c[0, 0, 0]) for c in three] == [4, 68, 132]
    assert int(transforms.spread_crops(pixels, 64, 1)[0][0, 0, 0]) == 68
    assert [int(c[0, 0, 0]) for c in transforms.spread_crops(pixels, 64, 2)] == [4, 132]
    square = np.arange(128 * 128, dtype=np.int32).reshape(128, 128, 1).repeat(3, axis=2)
    corners = [int(c[0, 0, 0]) for c in transforms.spread_crops(square, 64, 2)]
    assert corners == [64, 64 * 128 + 64]  # not top left and bottom right
