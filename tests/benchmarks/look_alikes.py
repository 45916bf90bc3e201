"""CPU time to find look-alikes among many hashes, also among hostile ones: python -m tests.benchmarks.look_alikes.

Writes docs/results/look-alikes.json: CPU seconds on one thread, at the distance that is the default.
"""

import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from pipeline.sharding import duplicates
from pipeline.sharding.config import ShardConfig
from pipeline.sharding.duplicates import Hashes
from tests.benchmarks.measure import hardware

TARGET = Path("docs/results/look-alikes.json")
COUNTS = (20_000, 200_000, 2_000_000)
Generator = np.random.Generator


def uniform(count: int, rng: Generator) -> Hashes:
    return rng.integers(0, 2**64, count, dtype=np.uint64)


def near_few(count: int, rng: Generator) -> Hashes:
    """Each differs in three random bits from one of nine."""
    hashes = np.arange(count, dtype=np.uint64) % np.uint64(9) << np.uint64(50)
    for _ in range(3):
        hashes ^= np.uint64(1) << rng.integers(0, 64, count, dtype=np.uint64)
    return hashes


def code_words(count: int, rng: Generator) -> Hashes:
    """The first words of the extended Hamming code of 64 bits, any two of which differ in four bits or more, in any order."""
    places, checks = np.arange(64), [0, *(1 << power for power in range(6))]
    bits = np.zeros((count, 64), np.uint8)
    numbers = rng.permutation(np.arange(count))
    for power, place in enumerate(np.setdiff1d(places, checks)):
        bits[:, place] = numbers >> power & 1
    for check in checks[1:]:
        bits[:, check] = bits[:, places & check > 0].sum(axis=1) % 2
    bits[:, 0] = bits.sum(axis=1) % 2
    return np.packbits(bits, axis=1).view(np.uint64).ravel()


KINDS: dict[str, Callable[[int, Generator], Hashes]] = {
    "random": uniform,
    "all equal": lambda count, rng: np.full(count, 7, np.uint64),
    "a hundred times each": lambda count, rng: np.repeat(uniform(count // 100, rng), 100),
    "three random bits from one of nine": near_few,
    "all values of the lowest bits": lambda count, rng: rng.permutation(np.arange(count, dtype=np.uint64)),
    "words of a code, none within 3 bits of another": code_words,
}


def measure(kind: str, count: int, distance: int) -> float:
    hashes = KINDS[kind](count, np.random.default_rng(0))
    started = time.thread_time()
    duplicates.groups(hashes, distance)
    return round(time.thread_time() - started, 2)


def main() -> None:
    distance = ShardConfig(source="photos").duplicate_distance
    assert distance is not None
    rows = {}
    for kind in KINDS:
        rows[kind] = {f"{count}": measure(kind, count, distance) for count in COUNTS}
        print(kind, rows[kind], flush=True)
    TARGET.write_text(json.dumps({"hardware": hardware(), "distance": distance, "cpu_seconds": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
