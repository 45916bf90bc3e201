"""Parts of JPEG files have the pixels that they have in the whole image, whoever decodes them."""

import io
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pipeline.data import images, windows
from pipeline.data.windows import Window, decode_window
from pipeline.errors import DataError
from tests.conftest import ROOT, picture

KINDS = {
    "plain": {},
    "no subsampling": {"subsampling": 0},
    "half the columns": {"subsampling": 1},
    "progressive": {"progressive": True},
    "restart markers": {"restart_marker_blocks": 3},
    "coarse": {"quality": 10},
    "gray": {"gray": True},
}
needs_library = pytest.mark.skipif(windows.partial_decoder() is None, reason="nvImageCodec is not installed")


def jpeg(height: int, width: int, gray: bool = False, **options: object) -> bytes:
    image, stream = Image.fromarray(picture(height, height, width)), io.BytesIO()
    (image.convert("L") if gray else image).save(stream, "JPEG", **options)
    return stream.getvalue()


@st.composite
def parts(draw: st.DrawFn) -> tuple[int, int, Window]:
    height, width = draw(st.integers(1, 90)), draw(st.integers(1, 90))
    top, left = draw(st.integers(0, height - 1)), draw(st.integers(0, width - 1))
    return height, width, Window(top, left, draw(st.integers(1, height - top)), draw(st.integers(1, width - left)))


@pytest.mark.parametrize("kind", KINDS)
@given(part=parts())
def test_a_part_has_the_pixels_of_the_whole(kind, part):
    height, width, window = part
    content = jpeg(height, width, **KINDS[kind])
    expected = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
    top, left, rows, columns = window
    expected = expected[top : top + rows, left : left + columns]
    assert np.array_equal(decode_window(content, width, height, window), expected)
    if windows.partial_decoder() is not None and columns >= windows.NARROWEST:
        decoded = windows.decode_part(content, width, height, window)
        assert decoded is not None
        assert np.array_equal(decoded, expected)


@needs_library
def test_a_small_part_is_decoded_alone_and_a_large_one_with_the_rest(monkeypatch):
    content = jpeg(100, 100)

    def refuse(*_: object) -> None:
        raise AssertionError("the whole image was decoded")

    monkeypatch.setattr(windows, "decode_jpeg", refuse)
    decode_window(content, 100, 100, Window(30, 20, 70, 70))
    with pytest.raises(AssertionError, match="whole"):
        decode_window(content, 100, 100, Window(0, 0, 90, 90))


@pytest.mark.skipif(sys.platform != "linux", reason="nvImageCodec is asked for on Linux only")
def test_the_library_works_here():
    assert windows.partial_decoder() is not None


def test_without_the_library_the_whole_image_is_decoded(monkeypatch):
    content, window = jpeg(70, 90), Window(8, 9, 30, 40)
    with_it = decode_window(content, 90, 70, window)
    monkeypatch.setattr(windows, "partial_decoder", lambda: None)
    assert np.array_equal(decode_window(content, 90, 70, window), with_it)


def test_a_library_that_does_not_work_is_named_and_not_used(monkeypatch, caplog):
    monkeypatch.setattr(windows.importlib.util, "find_spec", lambda name: SimpleNamespace(origin=__file__))
    for library, problem in (
        (ModuleType("nvimgcodec"), "no attribute 'Region'"),
        (
            SimpleNamespace(Region=lambda *sides: sides, CodeStream=lambda _: SimpleNamespace(codec_name="png")),
            "it does not decode",
        ),
    ):
        caplog.clear()
        monkeypatch.setattr(windows, "_imported", lambda folder, library=library: library)
        assert windows.partial_decoder.__wrapped__() is None
        assert "nvImageCodec is installed, but cannot be used" in caplog.text
        assert problem in caplog.text


def test_another_size_than_listed_and_what_is_no_jpeg_are_refused():
    with pytest.raises(DataError, match="90x70, expected 91x70"):
        decode_window(jpeg(70, 90), 91, 70, Window(0, 0, 9, 9))
    for content in (b"", b"no image", jpeg(70, 90)[:300]):
        with pytest.raises(DataError, match="not a readable image"):
            decode_window(content, 90, 70, Window(0, 0, 9, 9))


def test_a_truncated_file_gives_what_is_there_or_is_refused():
    content = jpeg(120, 90, quality=90)
    whole = images.decode_jpeg(content, 90, 120)
    window = Window(10, 10, 20, 20)
    for length in range(0, len(content), 97):
        try:
            found = decode_window(content[:length], 90, 120, window)
        except DataError:
            assert length < 0.6 * len(content)
        else:
            assert np.array_equal(found, window.of(whole))


def test_threads_do_not_disturb_each_other():
    contents = [jpeg(100, 120 + i) for i in range(8)]

    def decoded(number: int) -> tuple[np.ndarray, np.ndarray]:
        content, width, window = contents[number % 8], 120 + number % 8, Window(number % 60, number % 70, 40, 50)
        return decode_window(content, width, 100, window), window.of(images.decode_jpeg(content, width, 100))

    with ThreadPoolExecutor(8) as pool:
        # All are kept, so that none may be in memory of another
        assert all(np.array_equal(*pair) for pair in list(pool.map(decoded, range(1000))))


def test_it_is_imported_in_silence_and_leaves_the_environment_alone():
    program = """
import os, sys
kept = dict(os.environ)
from pipeline.data import windows
assert "nvidia.nvimgcodec" not in sys.modules
print(windows.partial_decoder() is not None)
assert dict(os.environ) == kept
"""
    environment = {**os.environ, "PYNVIMGCODEC_VERBOSITY": "3"}
    ended = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True)
    found = windows.partial_decoder() is not None
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, f"{found}\n", "")
