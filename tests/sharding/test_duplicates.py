"""Which images look alike: hashes, and groups of hashes, also of hostile ones."""

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFilter

from pipeline.sharding import duplicates
from pipeline.sharding.config import ShardConfig
from tests.conftest import picture
from tests.data.test_transforms import encoded
from tests.sharding.planning import Planned, all_pairs, planned, results_of
from tests.sharding.test_filters import result


def test_images_that_look_alike_have_hashes_close_by_and_others_far_off():
    photo = Image.fromarray(picture(3, 240, 320))
    alike = [
        photo.resize((160, 120)),
        Image.open(io.BytesIO(encoded(photo, "JPEG", quality=40))),
        photo.filter(ImageFilter.GaussianBlur(1)),
        photo.point(lambda v: min(255, int(v * 1.1))),
    ]
    first = duplicates.perceptual_hash(np.asarray(photo))
    assert all((first ^ duplicates.perceptual_hash(np.asarray(a))).bit_count() <= 3 for a in alike)
    others = [duplicates.perceptual_hash(picture(seed, 240, 320)) for seed in range(20, 60)]
    assert min((first ^ other).bit_count() for other in others) > 12


@settings(max_examples=60)
@given(st.integers(0, 6), st.lists(st.tuples(st.integers(0, 7), st.integers(0, 2**12 - 1)), min_size=1, max_size=40))
def test_groups_are_those_of_comparing_every_pair(distance, parts):
    hashes = [(high << 61) | (low * 0x1001) for high, low in parts]
    for sizes in ((2**22, 512), (5, 512), (5, 2)):
        # Also in blocks, and dividing again what many hashes agree in
        with pytest.MonkeyPatch.context() as patch:
            for name, size in zip(("_BLOCK", "_COMPARED"), sizes, strict=True):
                patch.setattr(duplicates, name, size)
            assert duplicates.groups(np.array(hashes, np.uint64), distance).tolist() == all_pairs(hashes, distance)


def flipped(hashes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return hashes ^ (np.uint64(1) << rng.integers(0, 64, len(hashes), dtype=np.uint64))


HOSTILE = {
    "equal": lambda n, rng: np.full(n, 7, np.uint64),
    "all values of some bits": lambda n, rng: rng.permutation(np.arange(n, dtype=np.uint64)) << np.uint64(20),
    "two bits from one of few": lambda n, rng: flipped(
        flipped(np.arange(n, dtype=np.uint64) % np.uint64(9) << np.uint64(50), rng), rng
    ),
    "chain": lambda n, rng: np.bitwise_xor.accumulate(np.uint64(1) << rng.integers(0, 64, n, dtype=np.uint64)),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_groups_of_hostile_hashes_are_those_of_comparing_every_pair(kind, monkeypatch):
    monkeypatch.setattr(duplicates, "_COMPARED", 20)
    hashes = HOSTILE[kind](500, np.random.default_rng(0))
    for distance in (1, 3, 6):
        assert duplicates.groups(hashes, distance).tolist() == all_pairs(hashes.tolist(), distance)


@pytest.mark.parametrize("kind", HOSTILE)
def test_work_on_hostile_hashes_grows_about_as_their_number(kind, monkeypatch):
    """Counted in hashes that are sorted or compared, not in seconds."""
    work = 0

    def counting(name):
        function = getattr(duplicates, name)

        def call(keys, *more):
            nonlocal work
            work += len(keys)
            return function(keys, *more)

        monkeypatch.setattr(duplicates, name, call)

    counting("_runs")
    counting("_bit_count")
    spent = []
    for count in (4_000, 32_000):
        work = 0
        duplicates.groups(HOSTILE[kind](count, np.random.default_rng(0)), 3)
        spent.append(work)
    # Eight times as many: comparing every pair would be 64 times the work
    assert spent[1] < 24 * spent[0]
    assert spent[1] < 32_000 * 3_000


def test_look_alikes_share_a_group_and_the_largest_stays_if_asked(tmp_path):
    large = Image.fromarray(picture(3, 240, 320))
    contents = {"large.png": large, "small.png": large.resize((160, 120)), "other.png": Image.fromarray(picture(9))}
    results = [result(encoded(image), name) for name, image in contents.items()]

    def made(**rules: object) -> Planned:
        return planned(ShardConfig(source="photos", **rules), results_of(results), tmp_path)

    kept = made()
    assert set(kept.paths("")) == set(contents)
    assert kept.refused == []
    assert kept.look_alikes == 1
    dropped = made(drop_near_duplicates=True)
    assert set(dropped.paths("")) == {"large.png", "other.png"}
    assert [refusal.reason for refusal in dropped.refused] == ["looks like large.png"]
    assert made(duplicate_distance=None).look_alikes == 0
