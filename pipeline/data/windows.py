"""Parts of images, and how one is decoded without the rest."""

import importlib.util
import os
import tempfile
import threading
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from pipeline.data.images import Pixels, decode_jpeg


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
    """The same pixels as `window.of(decode_jpeg(content, width, height))`, without decoding what lies around them.

    Rows above the window and columns beside it are parsed, but not turned into pixels; nothing below it is read. So a damaged file
    may give pixels. Large parts, and all where nvImageCodec is not installed, are cut out of the whole image.
    Raises: DataError as `decode_jpeg` does, or not at all.
    """
    small = window.width >= NARROWEST and window.height * window.width < _PAYS * height * width
    part = _decode_part(PARTIAL, content, (height, width), window) if PARTIAL is not None and small else None
    # What it cannot decode, this decoder can, or says why
    return window.of(decode_jpeg(content, width, height)) if part is None else part


def _decode_part(library: ModuleType, content: bytes, size: tuple[int, int], window: Window) -> Pixels | None:
    """None if the file is damaged, or of another kind or size."""
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


def _load() -> ModuleType | None:
    """nvImageCodec with nothing but libjpeg-turbo, or None where it is not installed.

    It decodes on GPUs, too. Those parts look for CUDA's libraries as soon as it is imported, and complain on stderr; it takes them
    from a folder that the environment may name.
    """
    try:
        found = importlib.util.find_spec("nvidia.nvimgcodec")
    except ModuleNotFoundError:
        found = None
    if found is None or found.origin is None:
        return None
    kept = {name: os.environ.get(name) for name in ("NVIMGCODEC_EXTENSIONS_PATH", "PYNVIMGCODEC_VERBOSITY")}
    try:
        with tempfile.TemporaryDirectory() as folder:
            for path in (Path(found.origin).parent / "extensions").glob("libjpeg_turbo_ext*"):
                (Path(folder) / path.name).symlink_to(path)
            os.environ.update(NVIMGCODEC_EXTENSIONS_PATH=folder, PYNVIMGCODEC_VERBOSITY="0")
            from nvidia import nvimgcodec

            return nvimgcodec
    except (ImportError, OSError):
        return None
    finally:
        for name, value in kept.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})


# A decoder belongs to one thread
_THREAD = threading.local()
PARTIAL = _load()


def _decoder(library: ModuleType) -> Any:
    """This thread's decoder, which works in it and nowhere else."""
    if not hasattr(_THREAD, "decoder"):
        backend = library.Backend(library.BackendKind.CPU_ONLY)
        _THREAD.decoder = library.Decoder(
            device_id=library.NVIMGCODEC_DEVICE_CPU_ONLY, max_num_cpu_threads=1, backends=[backend]
        )
    return _THREAD.decoder
