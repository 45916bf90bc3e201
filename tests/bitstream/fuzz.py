"""Damaged, foreign and invented files with right checksums, decoded: python -m tests.bitstream.fuzz COUNT [SEED].

A file either decodes to an image, or is refused in one line. Prints what happened as JSON.
"""

import json
import resource
import sys
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from pipeline.bitstream import container
from pipeline.bitstream.codec import ImageCodec
from pipeline.bitstream.container import Packet
from pipeline.bitstream.latents import Size
from pipeline.bitstream.symbols import Symbols
from pipeline.errors import BitstreamError

GOLDEN = Path(__file__).parent / "golden"
# What the process may grow by while it decodes them, in bytes
MAX_GROWTH = 2**29
Generator = np.random.Generator


def sealed(body: bytes) -> bytes:
    """With the checksum that belongs to it."""
    length = 4 if body[3:4] == b"M" else 2
    return body + (zlib.crc32(body) & (2 ** (8 * length) - 1)).to_bytes(length, "little")


def flipped(body: bytes, draw: Generator) -> bytes:
    changed = bytearray(body)
    for _ in range(draw.integers(1, 4)):
        changed[draw.integers(len(changed))] ^= 1 << int(draw.integers(8))
    return bytes(changed)


def replaced(body: bytes, draw: Generator) -> bytes:
    at, length = int(draw.integers(len(body))), int(draw.integers(1, 40))
    return body[:at] + draw.bytes(length) + body[at + length :]


def cut(body: bytes, draw: Generator) -> bytes:
    return body[: draw.integers(len(body))]


def extended(body: bytes, draw: Generator) -> bytes:
    return body + draw.bytes(int(draw.integers(1, 60)))


def moved(body: bytes, draw: Generator) -> bytes:
    a, b = sorted(draw.integers(len(body), size=2).tolist())
    return body[b:] + body[a:b] + body[:a] if draw.random() < 0.5 else body[:a] + body[b:]


def resized(body: bytes, draw: Generator) -> bytes:
    """Another size in the header: small, large, or absurd."""
    begin = 9 if body[3:4] == b"M" else 6
    _, end = container._read_leb128(body, container._read_leb128(body, begin)[1])
    sides = (int(2 ** draw.uniform(0, 18)) for _ in range(2))
    return body[:begin] + b"".join(container._leb128(side) for side in sides) + body[end:]


def invented(body: bytes, draw: Generator) -> bytes:
    """The header of a file, and any stream."""
    return body[: draw.integers(4, 14)] + draw.bytes(int(draw.integers(0, 400)))


def restreamed(codec: ImageCodec, draw: Generator) -> bytes:
    """A right file of any symbols: what somebody can make who knows the codec."""
    size = Size(int(draw.integers(1, 130)), int(draw.integers(1, 130)))
    spread = float(2 ** draw.uniform(0, 14))
    shape = (1, codec.codec.cfg.hyper_channels, *size.z)
    z = torch.from_numpy(draw.normal(0, spread, shape).clip(-(2**15), 2**15).astype(np.int32))
    y = draw.normal(0, spread, (1, codec.codec.cfg.latent_channels, *size.y)).clip(-(2**15), 2**15).astype(np.int32)
    symbols = Symbols(z, torch.from_numpy(y))
    stream = codec.latents.coder.encode(symbols, codec.latents.indexes(z, size))
    return container.pack(Packet(2, codec.bitstream_id, *size, (stream,), bool(draw.integers(2))))


MUTATIONS = (flipped, replaced, cut, extended, moved, resized, invented)


def inputs(codec: ImageCodec, count: int, seed: int) -> Iterator[tuple[str, bytes]]:
    """Each with the name of what was done to it."""
    draw = np.random.default_rng(seed)
    files = [path.read_bytes() for path in sorted(GOLDEN.glob("*.illm"))]
    # small ones more often: they take less time
    files.sort(key=len)
    for number in range(count):
        if number % 50 == 0:
            yield "restreamed", restreamed(codec, draw)
            continue
        content = files[min(int(draw.exponential(1.2)), len(files) - 1)]
        body = content[: -4 if content[3:4] == b"M" else -2]
        change = MUTATIONS[number % len(MUTATIONS)]
        yield change.__name__, sealed(change(body, draw))


def run(count: int, seed: int = 0) -> dict[str, object]:
    """Raises: whatever decoding raises that is no BitstreamError."""
    codec = ImageCodec.load(str(GOLDEN / "codec"))
    codec.decompress((GOLDEN / "version2.illm").read_bytes())
    codec.decompress((GOLDEN / "version1.illm").read_bytes())
    before, ends, slowest, lines = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, Counter(), 0.0, 0
    reasons: Counter[str] = Counter()
    for what, content in inputs(codec, count, seed):
        what += ", version 1" if content[3:4] == b"M" else ""
        started = time.perf_counter()
        try:
            codec.decode(content)
            ends[f"{what}: an image"] += 1
        except BitstreamError as error:
            ends[f"{what}: refused"] += 1
            reasons[str(error).split(":")[0].split(",")[0][:40]] += 1
            lines = max(lines, len(str(error).splitlines()))
        slowest = max(slowest, time.perf_counter() - started)
    grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    return {
        "inputs": count,
        "lines": lines,
        "slowest_s": round(slowest, 2),
        "grown_mib": round(grown / 2**20, 1),
        "ends": dict(sorted(ends.items())),
        "reasons": dict(reasons.most_common(12)),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(run(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0), indent=1))
