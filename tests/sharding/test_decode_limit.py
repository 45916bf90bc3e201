"""The memory of decoding is bounded by the pixels of one image, whatever its kind and however many are at hand.

Each script limits or measures its own process.
"""

import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT

BEGIN = """
import io, resource, sys
from pathlib import Path
from PIL import Image
from pipeline.sharding import decode_limit as room, filters as piece
from pipeline.sharding.filters import FilterConfig as Rules, NameLists as Lists, examine
from pipeline.sharding.sources import Item

def photo(kind, side):
    stream = io.BytesIO()
    Image.new(kind, (side, side)).save(stream, "PNG", compress_level=1)
    return stream.getvalue()

def status(name):  # bytes
    return int(Path("/proc/self/status").read_text().split(name + ":")[1].split()[0]) * 1024

rules = Rules(min_side=16)
for kind in ("I;16", "RGBA", "RGB"):  # first uses take memory of their own
    examine("x.png", "x", photo(kind, 64), rules, Lists.of(rules))
SIDE = 4096
ONE = room.BYTES_PER_PIXEL * SIDE**2 + 2**27  # an image, and what is constant: the band at hand, buffers
"""

LIMITED = """
content = photo(sys.argv[1], SIDE)
resource.setrlimit(resource.RLIMIT_AS, [status("VmSize") + ONE] * 2)
found = examine("x.png", "x", content, rules, Lists.of(rules))
assert type(found).__name__ == "AcceptedImage", found
"""

MANY = """
folder = Path(sys.argv[1])
items = [Item(f"{n}.png", "x", str(folder / f"{n}.png")) for n in range(6)]
for item in items:
    Path(item.location).write_bytes(photo("RGB", SIDE))
room.SHARE = 2**20
before = status("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # begin a new maximum
assert len(piece.examine_chunk(items, rules, Lists.of(rules), folder, 2**30, threads=6)) == 6
assert status("VmHWM") - before < ONE, (status("VmHWM") - before, ONE)
"""


def assert_runs(script: str, argument: object) -> None:
    # with a fixed threshold, freed blocks go back at once
    environment = os.environ | {"PYTHONPATH": str(ROOT), "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", BEGIN + script, str(argument)]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr


@pytest.mark.parametrize("kind", ["I;16", "RGBA", "RGB"])
def test_an_image_takes_eight_bytes_per_pixel(kind):
    assert_runs(LIMITED, kind)


def test_large_images_are_decoded_one_at_a_time(tmp_path):
    assert_runs(MANY, tmp_path)
