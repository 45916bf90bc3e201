"""The symbols of both latents to one stream and back, each with the table that its place calls for.

Symbols are coded table by table, since all indexes are known before: one call of the coder for each.
"""

import hashlib
import math
import zlib
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.bitstream import ans
from pipeline.errors import BitstreamError
from pipeline.models.tables import Tables

HAS_CONSTRICTION = find_spec("constriction") is not None
# of |symbol| <= 2**15 beyond a table of at least one symbol, with the sign as one bit
MAX_ESCAPE_BITS = 17
# The state that a stream starts from, above the checksum of its symbols: so it never has fewer than 33 bits, and a decoder
# that took a wrong turn anywhere does not end where the encoder began
FIRST_WORD = 1
# A stream takes at least this share of the bits that its symbols' probabilities say: a state has more than 32 bits, of which
# a symbol's 24 are rounded
SPENT_AT_LEAST = 1 - 2**-8
SORTED_AT_ONCE = 2**22


class Symbols(NamedTuple):
    """The symbols in a file: z (1, hyper_channels, H/64, W/64) and y (1, latent_channels, H/16, W/16), int32, contiguous."""

    z: Tensor
    y: Tensor

    def equals(self, other: "Symbols") -> bool:
        return torch.equal(self.z, other.z) and torch.equal(self.y, other.y)

    def digest(self) -> str:
        """SHA-256 of all numbers, z before y, as little-endian 32-bit integers."""
        digest = hashlib.sha256()
        for part in self:
            digest.update(little_endian(part))
        return digest.hexdigest()

    def checksum(self) -> int:
        """CRC-32 (zlib's) of the same bytes."""
        return zlib.crc32(little_endian(self.y), zlib.crc32(little_endian(self.z)))


def little_endian(part: Tensor) -> memoryview:
    """The bytes of int32 numbers, in order."""
    return np.ascontiguousarray(part.numpy(), "<i4").view(np.uint8).data


class Places(NamedTuple):
    """Symbols grouped by table: the order in which they are coded.

    order: the place of each, None for the order in which they are. tables: those that are used, rising, and how many symbols
    each of them codes.
    """

    order: NDArray[np.integer[Any]] | None
    tables: NDArray[np.int64]
    counts: NDArray[np.int64]

    def groups(self) -> Iterator[tuple[int, int, int]]:
        """Each table, and where its symbols begin and end in the order."""
        ends = [0, *np.cumsum(self.counts).tolist()]
        return zip(self.tables.tolist(), ends, ends[1:], strict=False)

    def of(self, positions: NDArray[np.int64]) -> NDArray[np.integer[Any]]:
        return positions if self.order is None else self.order[positions]


def by_table(indexes: NDArray[np.integer[Any]]) -> Places:
    """Shapes: indexes (n,), of the table of each symbol."""
    num_tables = int(indexes.max(initial=-1)) + 1
    # Of integers this small, a stable sort is a radix sort. Part by part, since it takes 16 bytes for each.
    small = indexes.astype(np.uint8 if num_tables <= 256 else np.uint16, copy=False)
    parts = [small[begin : begin + SORTED_AT_ONCE] for begin in range(0, len(small), SORTED_AT_ONCE)]
    each = [np.bincount(part, minlength=num_tables) for part in parts]
    counts = np.sum(each, axis=0, dtype=np.int64) if each else np.zeros(0, np.int64)
    order: NDArray[np.integer[Any]] = np.empty(len(small), np.uint32 if len(small) < 2**32 else np.int64)
    free = np.cumsum(counts) - counts
    for number, (part, found) in enumerate(zip(parts, each, strict=True)):
        ordered, begin = np.argsort(part, kind="stable") + number * SORTED_AT_ONCE, 0
        for table in np.flatnonzero(found):
            order[free[table] : free[table] + found[table]] = ordered[begin : begin + found[table]]
            begin += found[table]
        free += found
    return Places(order, np.flatnonzero(counts), counts[counts > 0])


def channels(shape: tuple[int, ...]) -> Places:
    """Of a hyper-latent, whose tables are its channels. shape: (1, C, h, w)."""
    return Places(None, np.arange(shape[1]), np.full(shape[1], shape[2] * shape[3]))


class ConstrictionStack:
    """As `ans.Stack`, by the library constriction."""

    def __init__(self, words: NDArray[np.uint32]):
        import constriction

        self._coder = constriction.stream.stack.AnsCoder(words)
        self._uniform = constriction.stream.model.Uniform

    @staticmethod
    def model(counts: NDArray[np.int64]) -> Any:
        import constriction

        return constriction.stream.model.Categorical(counts.astype(np.float64), perfect=False)

    def push(self, bins: NDArray[np.int32], model: Any) -> None:
        self._coder.encode_reverse(bins, model)

    def pop(self, count: int, model: Any) -> NDArray[np.int32]:
        return self._coder.decode(model, count)

    def push_bits(self, value: int, num_bits: int) -> None:
        self._coder.encode_reverse(value, self._uniform(2**num_bits))

    def pop_bits(self, num_bits: int) -> int:
        return int(self._coder.decode(self._uniform(2**num_bits)))

    def words(self) -> NDArray[np.uint32]:
        return self._coder.get_compressed()


class Part:
    """One latent's tables, ready to code with.

    least_bits: the fewest that a symbol of each table can take.
    """

    def __init__(self, tables: Tables, stack: Any):
        counts = [np.diff(row[:length]) for row, length in zip(tables.rows, tables.lengths, strict=True)]
        self.models = [stack.model(count) for count in counts]
        self.offsets = np.array(tables.offsets, np.int32)
        # the last bin of a table stands for every symbol that it lacks
        self.escapes = np.array([len(count) - 1 for count in counts], np.int32)
        largest = [max(np.diff(ans.cumulative(count.tolist()))) for count in counts]
        self.least_bits = ans.PRECISION - np.log2(largest)

    def push(self, stack: Any, symbols: NDArray[np.int32], places: Places) -> None:
        """Shapes: symbols (n,)."""
        bins = symbols.copy() if places.order is None else symbols[places.order]
        outside = []
        # table by table, since arrays as long as the symbols are what takes memory
        for table, begin, end in places.groups():
            part = bins[begin:end]
            part -= self.offsets[table]
            outside.append(begin + np.flatnonzero((part < 0) | (part >= self.escapes[table])))
        for at, escape in reversed(self._in_order_of_places(outside, places)):
            self._push_escape(stack, int(bins[at]), escape)
            bins[at] = escape
        for table, begin, end in reversed(list(places.groups())):
            stack.push(bins[begin:end], self.models[table])

    def pop(self, stack: Any, places: Places) -> NDArray[np.int32]:
        """The symbols (n,) at these places. Raises: BitstreamError for one that no encoder writes."""
        bins = np.empty(int(places.counts.sum()), np.int32)
        outside = []
        for table, begin, end in places.groups():
            bins[begin:end] = stack.pop(end - begin, self.models[table])
            outside.append(begin + np.flatnonzero(bins[begin:end] == self.escapes[table]))
        for at, escape in self._in_order_of_places(outside, places):
            bins[at] = self._pop_escape(stack, escape)
        for table, begin, end in places.groups():
            bins[begin:end] += self.offsets[table]
        if places.order is None:
            return bins
        symbols = np.empty_like(bins)
        symbols[places.order] = bins
        return symbols

    def _in_order_of_places(self, outside: list[NDArray[np.int64]], places: Places) -> list[tuple[int, int]]:
        """Symbols that their tables lack, of each table in turn -> where they are among the grouped ones, and their escapes."""
        at = np.concatenate([*outside, np.empty(0, np.int64)])
        escapes = np.repeat(self.escapes[places.tables], [len(found) for found in outside])
        order = np.argsort(places.of(at))
        return list(zip(at[order].tolist(), escapes[order].tolist(), strict=True))

    def _push_escape(self, stack: Any, bin_: int, escape: int) -> None:
        """How far outside, and on which side: in a number of so many bits, pushed so that their count is popped first."""
        number = 2 * (bin_ - escape) if bin_ >= escape else -2 * bin_ - 1
        num_bits = (number + 1).bit_length() - 1
        if num_bits:
            stack.push_bits(number + 1 - 2**num_bits, num_bits)
        stack.push_bits(num_bits, 5)

    def _pop_escape(self, stack: Any, escape: int) -> int:
        num_bits = stack.pop_bits(5)
        if num_bits > MAX_ESCAPE_BITS:
            raise BitstreamError(f"malformed: a symbol of {num_bits} bits, expected at most {MAX_ESCAPE_BITS}")
        number = 2**num_bits + (stack.pop_bits(num_bits) if num_bits else 0) - 1
        return escape + number // 2 if number % 2 == 0 else -(number + 1) // 2


class SymbolCoder:
    """Both latents of a codec to a stream and back.

    plain: by `ans.Stack` even where constriction is there.
    """

    def __init__(self, z: Tables, y: Tables, plain: bool = False):
        self._stack: Any = ConstrictionStack if HAS_CONSTRICTION and not plain else ans.Stack
        self._z, self._y = Part(z, self._stack), Part(y, self._stack)

    def encode(self, symbols: Symbols, y_indexes: Tensor) -> bytes:
        """The stream. Shapes: y_indexes as symbols.y."""
        stack = self._stack(np.array([symbols.checksum(), FIRST_WORD], np.uint32))
        self._y.push(stack, _flat(symbols.y), by_table(_flat(y_indexes)))
        self._z.push(stack, _flat(symbols.z), channels(symbols.z.shape))
        return stack.words().astype("<u4").tobytes().rstrip(b"\0")

    def decode(self, stream: bytes, z_shape: tuple[int, ...], y_indexes: Callable[[Tensor], Tensor]) -> Symbols:
        """The symbols in a stream. y_indexes: of the tables of y, from z, both as in `Symbols`.

        Any bytes are safe to pass.
        Raises: BitstreamError if the stream is not an encoder's, or these are not the tables that it used.
        """
        stack = self._stack(_words(stream))
        z = torch.from_numpy(self._z.pop(stack, channels(z_shape)).reshape(z_shape))
        indexes = y_indexes(z)
        y = torch.from_numpy(self._y.pop(stack, by_table(_flat(indexes))).reshape(indexes.shape))
        symbols = Symbols(z, y)
        if stack.words().tolist() != [symbols.checksum(), FIRST_WORD]:
            raise BitstreamError(
                "its symbols are not those that were encoded: it is damaged, or was made with another codec; "
                "get the file again, or name the codec it was made with"
            )
        return symbols

    def check_length(self, stream: bytes, z_shape: tuple[int, ...], y_count: int) -> None:
        """Raises: BitstreamError if so many symbols cannot be in so short a stream."""
        positions = z_shape[-2] * z_shape[-1]
        least = SPENT_AT_LEAST * (self._z.least_bits.sum() * positions + self._y.least_bits.min() * y_count)
        if 8 * len(stream) + ans.WORD_BITS < least:
            raise BitstreamError(f"malformed: a stream of {len(stream)} bytes is too short for its image, which needs at "
                                 f"least {math.ceil((least - ans.WORD_BITS) / 8)}")  # fmt: skip


def _flat(values: Tensor) -> NDArray[Any]:
    return values.numpy().reshape(-1)


def _words(stream: bytes) -> NDArray[np.uint32]:
    """The last word's leading zero bytes are not in a file."""
    words = np.frombuffer(stream + bytes(-len(stream) % 4), "<u4")
    if len(words) < 2 or not words[-1]:
        raise BitstreamError("malformed: a stream has more than four bytes, and does not end with four zeros")
    return words
