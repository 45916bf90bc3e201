"""Decodes the symbols of a compressed file with Python's integers alone: python docs/reference_decoder.py FILE ARTIFACT.

The specification in bitstream.md, as a program of its own: it imports nothing of the project, no torch and no numpy, and is as
slow as that sounds. It prints the SHA-256 of all symbols. Tests compare the project's decoder with it.
"""

import hashlib
import json
import struct
import sys
import zlib
from bisect import bisect_right
from itertools import product
from pathlib import Path

KINDS = {"I16": "h", "I32": "i", "I64": "q"}


def integers(file: Path) -> dict:
    """The integer tensors of a safetensors file: name -> (shape, numbers)."""
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    found = {}
    for name, about in json.loads(content[8 : 8 + length]).items():
        if about.get("dtype") in KINDS:
            begin, end = (8 + length + at for at in about["data_offsets"])
            found[name] = (
                about["shape"],
                [n for (n,) in struct.iter_unpack("<" + KINDS[about["dtype"]], content[begin:end])],
            )
    return found


def leb128(content: bytes, at: int) -> tuple:
    number = shift = 0
    while True:
        number, shift, at = number | (content[at] & 127) << shift, shift + 7, at + 1
        if content[at - 1] < 128:
            return number, at


class Ans:
    """Pops symbols from the number that a stream is."""

    def __init__(self, stream: bytes):
        stream += bytes(-len(stream) % 4)
        self.words = [n for (n,) in struct.iter_unpack("<I", stream)]
        self.state = self.words.pop() << 32 | self.words.pop()

    def pop(self, starts: list) -> int:
        quantile = self.state % 2**24
        symbol = bisect_right(starts, quantile) - 1
        share = starts[symbol + 1] - starts[symbol]
        self.state = share * (self.state >> 24) + quantile - starts[symbol]
        if self.state < 2**32 and self.words:
            self.state = self.state << 32 | self.words.pop()
        return symbol

    def pop_bits(self, count: int) -> int:
        return self.pop([n << 24 - count for n in range(2**count + 1)]) if count else 0


def tables(weights: dict, name: str) -> list:
    """Of each table: where its symbols' shares of 2**24 begin, and its first symbol."""
    (_, width), rows = weights[f"{name}._quantized_cdf"]
    made = []
    for i, (length, offset) in enumerate(
        zip(weights[f"{name}._cdf_length"][1], weights[f"{name}._offset"][1], strict=True)
    ):
        row = rows[i * width : i * width + length]
        free = 2**24 - (length - 1)
        made.append(([(free * below >> 16) + k for k, below in enumerate(row[:-1])] + [2**24], offset))
    return made


def latent(ans: Ans, table_of_each: list, all_tables: list) -> list:
    """The symbols of a latent: table by table, then those that are outside of their tables, in order."""
    symbols = [0] * len(table_of_each)
    escaped = []
    for place in sorted(range(len(symbols)), key=lambda i: table_of_each[i]):
        starts, offset = all_tables[table_of_each[place]]
        number = ans.pop(starts)
        symbols[place] = number + offset
        if number == len(starts) - 2:
            escaped.append(place)
    for place in sorted(escaped):
        starts, offset = all_tables[table_of_each[place]]
        bits = ans.pop_bits(5)
        number = 2**bits + ans.pop_bits(bits) - 1
        symbols[place] = offset + (len(starts) - 2 + number // 2 if number % 2 == 0 else -(number + 1) // 2)
    return symbols


def layer(x: list, exact: dict, number: int) -> list:
    """A convolution of integers, x[channel][row][column]: transposed 5x5 of stride 2, or 3x3."""
    transposed = number < 2
    (_, second, side, _), weight = exact[f"{number}.weight"]
    bias, shift = exact[f"{number}.bias"][1], exact[f"{number}.shift"][1]
    limit = exact.get(f"{number}.limit", (0, [None]))[1][0]
    height, width, scale = len(x[0]), len(x[0][0]), 2 if transposed else 1
    out = [[[b] * (width * scale) for _ in range(height * scale)] for b in bias]
    for c, o in product(range(len(x)), range(len(bias))):
        begin = (c * second + o if transposed else o * second + c) * side * side
        for i, j, a, b in product(range(height), range(width), range(side), range(side)):
            # padding of 2 and of 1
            row, column = (2 * i + a - 2, 2 * j + b - 2) if transposed else (i - a + 1, j - b + 1)
            if 0 <= row < height * scale and 0 <= column < width * scale:
                out[o][row][column] += weight[begin + a * side + b] * x[c][i][j]
    for o, rows in enumerate(out):
        for row in rows:
            for j, value in enumerate(row):
                value = value + (1 << shift[o] >> 1) >> shift[o]
                row[j] = value if limit is None else min(max(value, 0), limit)
    return out


def decode(content: bytes, artifact: Path) -> bytes:
    """SHA-256 of the symbols of both latents, as little-endian 32-bit integers."""
    weights, exact = integers(artifact / "weights.safetensors"), integers(artifact / "exact_scales.safetensors")
    assert content[:3] == b"ILL"
    assert content[3] & 15 == 2
    assert zlib.crc32(content[:-2]) & 0xFFFF == int.from_bytes(content[-2:], "little")
    height, at = leb128(content, 6)
    width, at = leb128(content, at)
    if content[3] & 32:
        length, at = leb128(content, at)
        at += length
    ans = Ans(content[at:-2])
    hyper_channels = len(exact["medians"][1])
    rows, columns = -(-height // 64), -(-width // 64)
    channels = [c for c in range(hyper_channels) for _ in range(rows * columns)]
    z = latent(ans, channels, tables(weights, "hyper_entropy"))
    limit = exact["limit"][1][0]
    x = [
        [
            [
                min(max(1024 * z[(c * rows + i) * columns + j] + exact["medians"][1][c], -limit), limit)
                for j in range(columns)
            ]
            for i in range(rows)
        ]
        for c in range(hyper_channels)
    ]
    for number in range(3):
        x = layer(x, exact, number)
    thresholds = exact["thresholds"][1]
    indexes = [
        sum(value > t for t in thresholds)
        for rows_ in x
        for row in rows_[: -(-height // 16)]
        for value in row[: -(-width // 16)]
    ]
    y = latent(ans, indexes, tables(weights, "entropy"))
    symbols = struct.pack(f"<{len(z) + len(y)}i", *z, *y)
    assert (ans.state, ans.words) == (2**32 + zlib.crc32(symbols), []), "these are not the symbols that were encoded"
    return hashlib.sha256(symbols).digest()


if __name__ == "__main__":
    print(decode(Path(sys.argv[1]).read_bytes(), Path(sys.argv[2])).hex())
