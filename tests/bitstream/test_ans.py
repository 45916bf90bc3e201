"""Our coder in plain Python and constriction's make the same streams, and read each other's."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.bitstream import ans, symbols
from pipeline.bitstream.symbols import ConstrictionStack

pytestmark = pytest.mark.skipif(not symbols.HAS_CONSTRICTION, reason="constriction is not installed")
START = np.array([77, 1], np.uint32)


def counts_of(weights: list[int]) -> np.ndarray:
    """Counts of at least 1 that add up to 2**16, about in these proportions."""
    shares = np.array(weights, np.float64)
    counts = np.floor(shares / max(shares.sum(), 1) * (2**16 - len(weights))).astype(np.int64) + 1
    counts[counts.argmax()] += 2**16 - counts.sum()
    return counts


def test_shares_by_hand():
    """Of 2**24, each symbol has one, and of the other 2**24 - 4 its part in 2**16."""
    starts = ans.cumulative([1, 65533, 1, 1])
    assert starts == [0, 255 + 1, 65534 * 256 - 4 + 2, 65535 * 256 - 4 + 3, 2**24]
    assert ans.cumulative([2**15, 2**15]) == [0, 2**23, 2**24]


def test_pushing_by_hand():
    """A symbol of half the probability takes a bit: of the state 2**32 + 77, the second half of a share of 2**23."""
    stack = ans.Stack(START)
    starts = ans.cumulative([2**15, 2**15])
    stack.push(np.array([1], np.int32), starts)
    whole, rest = divmod(2**32 + 77, 2**23)
    assert stack._state == (whole << 24) + 2**23 + rest
    assert stack.pop(1, starts).tolist() == [1]
    assert stack.words().tolist() == START.tolist()


@settings(max_examples=200)
@given(
    parts=st.lists(
        st.tuples(st.lists(st.integers(0, 1000), min_size=2, max_size=40), st.lists(st.integers(0, 39), max_size=60)),
        max_size=6,
    ),
    bits=st.lists(st.tuples(st.integers(1, 20), st.integers(0, 2**20)), max_size=5),
)
def test_both_make_and_read_the_same_streams(parts, bits):
    tables = [counts_of(weights) for weights, _ in parts]
    drawn = [np.array([s % len(w) for s in chosen], np.int32) for w, chosen in parts]
    made = []
    for stack_type in (ans.Stack, ConstrictionStack):
        stack = stack_type(START)
        for counts, bins in zip(tables, drawn, strict=True):
            stack.push(bins, stack.model(counts))
        for num_bits, value in bits:
            stack.push_bits(value % 2**num_bits, num_bits)
        made.append(stack.words())
    assert made[0].tolist() == made[1].tolist()
    for stack_type in (ans.Stack, ConstrictionStack):
        stack = stack_type(made[0])
        for num_bits, value in reversed(bits):
            assert stack.pop_bits(num_bits) == value % 2**num_bits
        for counts, bins in reversed(list(zip(tables, drawn, strict=True))):
            assert stack.pop(len(bins), stack.model(counts)).tolist() == bins.tolist()
        assert stack.words().tolist() == START.tolist()


@settings(max_examples=200)
@given(words=st.lists(st.integers(0, 2**32 - 1), min_size=2, max_size=20), count=st.integers(0, 300))
def test_both_read_the_same_symbols_from_any_words(words, count):
    counts = counts_of([1, 500, 3, 0, 40])
    given_words = np.array([*words[:-1], words[-1] or 1], np.uint32)
    read = []
    for stack_type in (ans.Stack, ConstrictionStack):
        stack = stack_type(given_words)
        read.append(stack.pop(count, stack.model(counts)).tolist())
    assert read[0] == read[1]


@pytest.mark.parametrize("num_symbols", [2, 3, 257, 3132, 65536])
def test_tables_of_any_length_agree(num_symbols):
    generator = np.random.default_rng(num_symbols)
    counts = counts_of((generator.pareto(0.5, num_symbols) * 100).astype(np.int64).tolist())
    bins = generator.integers(0, num_symbols, 500).astype(np.int32)
    words = []
    for stack_type in (ans.Stack, ConstrictionStack):
        stack = stack_type(START)
        stack.push(bins, stack.model(counts))
        words.append(stack.words().tolist())
    assert words[0] == words[1]
