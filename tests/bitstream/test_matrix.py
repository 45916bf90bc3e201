"""Files decode to the same symbols with other kernels, orders of summation, and coders. `matrix.py` has more ways and photos."""

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


@pytest.mark.slow
def test_every_way_of_decoding_gives_the_encoders_symbols(files):
    ways = [
        "torch: default", "oneDNN: SSE41", "MKL: SSE4_2", "oneDNN off", "channels last", "strips of 1 row",
        "products of matrices", "int64", "coder in plain Python", *matrix.MUST_FAIL,
    ]  # fmt: skip
    command = [sys.executable, "-m", "tests.bitstream.matrix", str(files), *ways]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    ended = subprocess.run(command, cwd=ROOT, env=env, check=True, capture_output=True, text=True)
    rows = {row["way"]: row for row in map(matrix.json.loads, ended.stdout.splitlines())}
    assert rows.keys() == {*ways}
    for way, row in rows.items():
        assert (row["demo"]["files"], row["published hyperprior"]["files"]) == (10, 10)
        wrong = row["demo"]["wrong"] + row["published hyperprior"]["wrong"]
        assert (wrong > 0) == (way in matrix.MUST_FAIL), way
