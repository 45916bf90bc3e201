"""Parts of images, and how one is decoded without the rest."""

import importlib.util
import io
import os
import tempfile
import threading
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from pipeline.data.images import Pixels, decode_jpeg
from pipeline.log import logger
from pipeline.text import reason


class Window(NamedTuple):
    """A part of an image, in its pixels."""

    top: int
    left: int
    height: int
    width: int

    def of(self, pixels: Pixels) -> Pixels:
        """What an image, (H, W, 3), shows there."""
        return pixels[self.top : self.top + self.height, self.left : self.left + self.width]


# Columns; a single one has other colors than in the whole image, since libjpeg-turbo does not smooth it
NARROWEST = 8
# Share of the image up to which decoding a part is faster than all of it
_PAYS = 0.6


def decode_window(content: bytes, width: int, height: int, window: Window) -> Pixels:
    """The same pixels as `window.of(decode_jpeg(content, width, height))`, in less time for a small part of a baseline file.

    Rows above the window and columns beside it are parsed, but not turned into pixels, and little below it is read. Large parts,
    and all where nvImageCodec is not installed, are cut out of the whole image.
    Raises: DataError as `decode_jpeg` does; damage outside the window may go unnoticed.
    """
    small = window.width >= NARROWEST and window.height * window.width < _PAYS * height * width
    part = decode_part(content, width, height, window) if small else None
    # What it cannot decode, this decoder can, or says why
    return window.of(decode_jpeg(content, width, height)) if part is None else part


def decode_part(content: bytes, width: int, height: int, window: Window) -> Pixels | None:
    """None if the file is damaged, of another kind or size, or nothing here decodes parts."""
    library = partial_decoder()
    return None if library is None else _decode_part(library, content, (height, width), window)


@cache
def partial_decoder() -> ModuleType | None:
    """nvImageCodec, or None where it is not installed or does not work. To be called first before there are threads."""
    try:
        found = importlib.util.find_spec("nvidia.nvimgcodec")
    except ModuleNotFoundError:
        found = None
    if found is None or found.origin is None:
        return None
    stream = io.BytesIO()
    Image.new("RGB", (16, 16), (9, 99, 199)).save(stream, "JPEG")
    window, content = Window(2, 3, 10, 9), stream.getvalue()
    try:
        library = _imported(Path(found.origin).parent)
        part = _decode_part(library, content, (16, 16), window)
        right = part is not None and np.array_equal(part, window.of(decode_jpeg(content, 16, 16)))
        problem = "" if right else "it does not decode JPEG"
    except Exception as error:
        problem = reason(error)
    if problem:
        logger.warning(f"nvImageCodec is installed, but cannot be used ({problem}): JPEG files are decoded whole")
        return None
    return library


def _imported(folder: Path) -> ModuleType:
    """nvImageCodec with nothing but libjpeg-turbo.

    It decodes on GPUs, too. Those parts look for CUDA's libraries as soon as it is imported, and complain on stderr; it takes them
    from a folder that the environment may name.
    """
    kept = {name: os.environ.get(name) for name in ("NVIMGCODEC_EXTENSIONS_PATH", "PYNVIMGCODEC_VERBOSITY")}
    try:
        with tempfile.TemporaryDirectory() as scratch:
            for path in (folder / "extensions").glob("libjpeg_turbo_ext*"):
                (Path(scratch) / path.name).symlink_to(path)
            os.environ.update(NVIMGCODEC_EXTENSIONS_PATH=scratch, PYNVIMGCODEC_VERBOSITY="0")
            from nvidia import nvimgcodec

            return nvimgcodec
    finally:
        for name, value in kept.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})


def _decode_part(library: ModuleType, content: bytes, size: tuple[int, int], window: Window) -> Pixels | None:
    region = library.Region(window.top, window.left, window.top + window.height, window.left + window.width)
    try:
        stream = library.CodeStream(content)
        if stream.codec_name != "jpeg" or (stream.height, stream.width) != size:
            return None
        image = _decoder(library).decode(stream.get_sub_code_stream(region=region))
    except RuntimeError:
        return None
    if image is None or tuple(image.shape) != (window.height, window.width, 3):
        return None
    return np.asarray(image.cpu())


# A decoder belongs to one thread
_THREAD = threading.local()


def _decoder(library: ModuleType) -> Any:
    """This thread's decoder, which works in it and nowhere else."""
    if not hasattr(_THREAD, "decoder"):
        backend = library.Backend(library.BackendKind.CPU_ONLY)
        _THREAD.decoder = library.Decoder(
            device_id=library.NVIMGCODEC_DEVICE_CPU_ONLY, max_num_cpu_threads=1, backends=[backend]
        )
    return _THREAD.decoder
