"""The program ffmpeg, where there is one: VVC files, and VMAF."""

import json
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from pipeline.data.images import Pixels
from pipeline.errors import ConfigError

# Luma and chroma of BT.709, limited range
_TO_YUV = "scale=out_color_matrix=bt709:out_range=tv:flags=bicubic+accurate_rnd+full_chroma_int+full_chroma_inp"
_TO_RGB = "scale=in_color_matrix=bt709:in_range=tv:flags=bicubic+accurate_rnd+full_chroma_int+full_chroma_inp"
# The mean of this program's measurement has this name since VMAF 2
_VMAF_MODEL = "version=vmaf_v0.6.1"


@lru_cache(1)
def program() -> str | None:
    """Where ffmpeg is: that of the package imageio-ffmpeg, else the one on the PATH."""
    if find_spec("imageio_ffmpeg"):
        from imageio_ffmpeg import get_ffmpeg_exe

        try:
            return str(get_ffmpeg_exe())
        except RuntimeError:
            # the package without its program
            return shutil.which("ffmpeg")
    return shutil.which("ffmpeg")


@lru_cache
def has(part: str) -> bool:
    """Whether there is an ffmpeg with an encoder or filter of that name."""
    if (found := program()) is None:
        return False
    listed = ""
    for kind in ("-encoders", "-filters"):
        ran = subprocess.run([found, "-hide_banner", kind], capture_output=True, text=True, check=False)
        listed += ran.stdout
    return any(len(words) > 1 and words[1] == part for words in map(str.split, listed.splitlines()))


def encode_vvc(pixels: Pixels, qp: int) -> bytes:
    """A VVC stream of one intra frame: vvenc, preset medium, 4:2:0, 10 bits, BT.709. qp: 0 to 63, higher is smaller."""
    height, width = pixels.shape[:2]
    even = np.pad(pixels, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    options = ["-vf", _TO_YUV, "-pix_fmt", "yuv420p10le", "-c:v", "libvvenc", "-preset", "medium", "-qp", str(qp)]
    threads = ["-threads", "1"]
    return _run([*_raw("rgb24", even.shape), "-i", "-", *options, *threads, "-f", "vvc", "-"], even.tobytes())


def decode_vvc(content: bytes, shape: Sequence[int]) -> Pixels:
    """Shapes: returns (H, W, 3), as `shape` says."""
    height, width = shape[:2]
    even = (height + height % 2, width + width % 2, 3)
    return _pixels(["-f", "vvc", "-i", "-", "-vf", _TO_RGB, *_raw("rgb24"), "-"], content, even)[:height, :width]


def vmaf(ours: Pixels, original: Pixels) -> float:
    """VMAF 0.6.1 of one frame, 0 to 100, on luma (BT.709), with this program's built-in model."""
    with tempfile.TemporaryDirectory() as scratch:
        log, given = Path(scratch) / "vmaf.json", []
        for name, pixels in (("ours", ours), ("original", original)):
            path = Path(scratch) / name
            path.write_bytes(np.ascontiguousarray(pixels).tobytes())
            given += [*_raw("rgb24", pixels.shape), "-i", str(path)]
        convert = f"{_TO_YUV},format=yuv444p"
        measure = f"libvmaf=model={_VMAF_MODEL}:log_fmt=json:log_path={log}:n_threads=1"
        graph = f"[0]{convert}[a];[1]{convert}[b];[a][b]{measure}"
        _run([*given, "-lavfi", graph, "-frames:v", "1", "-f", "null", "-"], b"")
        return float(json.loads(log.read_text())["pooled_metrics"]["vmaf"]["mean"])


def _raw(pixel_format: str, shape: Sequence[int] = ()) -> list[str]:
    size = ["-s", f"{shape[1]}x{shape[0]}"] if shape else []
    return ["-f", "rawvideo", "-pix_fmt", pixel_format, *size]


def _pixels(arguments: list[str], content: bytes, shape: Sequence[int]) -> Pixels:
    return np.frombuffer(_run(arguments, content), np.uint8).reshape(tuple(shape)).copy()


def _run(arguments: list[str], given: bytes) -> bytes:
    """What ffmpeg writes. Raises: ConfigError with what it says if it fails."""
    found = program()
    if found is None:
        raise ConfigError("there is no ffmpeg any more; install imageio-ffmpeg")
    ran = subprocess.run([found, "-v", "error", "-y", *arguments], input=given, capture_output=True, check=False)
    if ran.returncode:
        lines = ran.stderr.decode(errors="replace").strip().splitlines()
        raise ConfigError(f"{found} failed: {lines[-1] if lines else f'exit code {ran.returncode}'}")
    return ran.stdout
