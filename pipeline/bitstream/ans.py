"""The entropy coder of compressed files in plain Python: asymmetric numeral systems, as docs/bitstream.md specifies them.

It is the specification in code, what tests compare constriction's coder with, and what codes where constriction has no wheel:
bit for bit the same streams, some twenty times slower. Source: Duda 2013, arXiv:1311.2540; Bamler 2022, arXiv:2201.01741.
"""

from bisect import bisect_right
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

# Probabilities are multiples of 2**-24. Between two symbols a state has 33 to 64 bits.
PRECISION, WORD_BITS = 24, 32
WORD = 2**WORD_BITS - 1


def cumulative(counts: Sequence[int]) -> list[int]:
    """Where each symbol's share of 2**24 begins, and 2**24. counts: of a table, at least 1 each, 2**16 in all."""
    free, below, starts = 2**PRECISION - len(counts), 0, []
    for number, count in enumerate(counts):
        starts.append((free * below >> 16) + number)
        below += count
    return [*starts, 2**PRECISION]


class Stack:
    """A stack of symbols in the bits of one number; symbols are popped in the reverse order of pushing.

    words: of a stream, at least two of 32 bits; the last one is the number's most significant one, and not zero.
    """

    def __init__(self, words: NDArray[np.uint32]):
        self._words = words.tolist()
        self._state = self._words.pop() << WORD_BITS | self._words.pop()

    @staticmethod
    def model(counts: NDArray[np.int64]) -> list[int]:
        """What `push` and `pop` take."""
        return cumulative(counts.tolist())

    def push(self, bins: NDArray[np.int32], starts: Sequence[int]) -> None:
        """Pushes symbols of one table, the last one first."""
        for symbol in bins[::-1].tolist():
            self._push(starts[symbol], starts[symbol + 1] - starts[symbol])

    def pop(self, count: int, starts: Sequence[int]) -> NDArray[np.int32]:
        """So many symbols of one table."""
        bins = np.empty(count, np.int32)
        for at in range(count):
            quantile = self._state & (2**PRECISION - 1)
            symbol = bisect_right(starts, quantile) - 1
            self._pop(quantile - starts[symbol], starts[symbol + 1] - starts[symbol])
            bins[at] = symbol
        return bins

    def push_bits(self, value: int, num_bits: int) -> None:
        """A number below 2**num_bits, of 1 to 24 bits."""
        share = 2 ** (PRECISION - num_bits)
        self._push(value * share, share)

    def pop_bits(self, num_bits: int) -> int:
        share = 2 ** (PRECISION - num_bits)
        value, offset = divmod(self._state & (2**PRECISION - 1), share)
        self._pop(offset, share)
        return value

    def words(self) -> NDArray[np.uint32]:
        """The stream."""
        return np.array([*self._words, self._state & WORD, self._state >> WORD_BITS], np.uint32)

    def _push(self, start: int, share: int) -> None:
        if self._state >> (2 * WORD_BITS - PRECISION) >= share:
            self._words.append(self._state & WORD)
            self._state >>= WORD_BITS
        whole, rest = divmod(self._state, share)
        self._state = whole << PRECISION | (start + rest)

    def _pop(self, offset: int, share: int) -> None:
        self._state = share * (self._state >> PRECISION) + offset
        if self._state <= WORD and self._words:
            self._state = self._state << WORD_BITS | self._words.pop()
