"""20,000 damaged, foreign and invented files: each decodes, or is refused in one line. `fuzz.py` makes them."""

import pytest

from tests.bitstream import fuzz


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_no_file_crashes_hangs_or_takes_memory(seed):
    done = fuzz.run(5000, seed)
    # restreamed files are right ones, and must decode
    assert done["ends"]["restreamed: an image"] == 100
    assert "restreamed: refused" not in done["ends"]
    assert sum(n for what, n in done["ends"].items() if what.endswith("refused")) > 4000
    assert done["lines"] == 1
    assert done["slowest_s"] < 20
    assert done["grown_mib"] < fuzz.MAX_GROWTH / 2**20
