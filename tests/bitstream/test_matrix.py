"""Files decode to the same symbols with other kernels, orders of summation, and coders. `matrix.py` has more ways and photos."""

import json
import os
import subprocess
import sys

import pytest

from tests.bitstream import matrix
from tests.conftest import ROOT


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    matrix.write(folder, count=10, side=256)
    return folder


def wrong(row: dict[str, dict[str, int]]) -> int:
    assert (row["demo"]["files"], row["published hyperprior"]["files"]) == (10, 10)
    return row["demo"]["wrong"] + row["published hyperprior"]["wrong"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "way",
    [
        "oneDNN off",
        "channels last",
        "strips of 1 row",
        "products of matrices",
        "int64",
        "coder in plain Python",
        *matrix.MUST_FAIL,
    ],
)
def test_every_way_of_decoding_gives_the_encoders_symbols(files, way):
    environment, options = matrix.WAYS[way]
    assert not environment
    assert (wrong(matrix.decode(files, options)) > 0) == (way in matrix.MUST_FAIL)


@pytest.mark.slow
def test_so_do_the_kernels_for_old_processors(files):
    names = ("torch: default", "oneDNN: SSE41", "MKL: SSE4_2", "2 threads")
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    for name in names:
        env |= matrix.WAYS[name][0]
    command = [sys.executable, "-m", "tests.bitstream.matrix", str(files), "--in-this-process", "here"]
    ended = subprocess.run(command, cwd=ROOT, env=env, check=True, capture_output=True, text=True)
    assert wrong(json.loads(ended.stdout)) == 0
