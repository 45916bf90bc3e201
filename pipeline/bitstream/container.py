"""The compressed file: a short header, two entropy-coded streams, a checksum.

offset  bytes  content
0       4      magic "ILLM"
4       1      format version, 1
5       4      bitstream id of the codec that can read the streams (Codec.bitstream_id)
9       1-5    image height, then width: unsigned LEB128 numbers of pixels, at least 1
        1-5    length of the hyper-latent stream in bytes, LEB128
        ...    hyper-latent stream, latent stream (the rest)
end-4   4      CRC-32 (zlib's) of all bytes before it, little-endian
"""

import zlib
from dataclasses import dataclass

from pipeline.errors import BitstreamError

MAGIC = b"ILLM"
VERSION = 1
# Networks see images padded to multiples of it, at the right and at the bottom
SIDE_MULTIPLE = 64
# Pixels of the padded image; more are refused before memory is allocated
MAX_PIXELS = 2**27


@dataclass(frozen=True)
class Packet:
    """The content of a compressed file. Height and width are the image's own, without padding."""

    bitstream_id: bytes
    height: int
    width: int
    hyper_stream: bytes
    latent_stream: bytes


def pack(packet: Packet) -> bytes:
    """The file's bytes."""
    head = MAGIC + bytes([VERSION]) + packet.bitstream_id
    numbers = b"".join(_leb128(n) for n in (packet.height, packet.width, len(packet.hyper_stream)))
    body = head + numbers + packet.hyper_stream + packet.latent_stream
    return body + zlib.crc32(body).to_bytes(4, "little")


def unpack(content: bytes) -> Packet:
    """The packet in a file's bytes.

    Raises: BitstreamError if they are not such a file, of another version, damaged, or claim an absurd size.
    """
    if not content.startswith(MAGIC):
        raise BitstreamError(
            f"not a compressed image: begins with {content[:4].hex() or 'nothing'}, expected {MAGIC.hex()} ('ILLM')"
        )
    if len(content) < 5 or content[4] != VERSION:
        found = content[4] if len(content) > 4 else "none"
        raise BitstreamError(f"format version {found}, this program reads version {VERSION}; update it")
    body, checksum = content[:-4], int.from_bytes(content[-4:], "little")
    if len(content) < 16 or zlib.crc32(body) != checksum:
        raise BitstreamError("damaged: the checksum does not match the content; get the file again")
    height, at = _read_leb128(body, 9)
    width, at = _read_leb128(body, at)
    length, at = _read_leb128(body, at)
    if not 0 < padded(height) * padded(width) <= MAX_PIXELS or length > len(body) - at:
        raise BitstreamError(f"malformed: {width}x{height} pixels, hyper-latent of {length} bytes in {len(content)}")
    return Packet(body[5:9], height, width, body[at : at + length], body[at + length :])


def padded(side: int) -> int:
    """The next multiple of SIDE_MULTIPLE."""
    return -(-side // SIDE_MULTIPLE) * SIDE_MULTIPLE


def _leb128(number: int) -> bytes:
    groups = []
    while True:
        number, low = number >> 7, number & 0x7F
        groups.append(low | (0x80 if number else 0))
        if not number:
            return bytes(groups)


def _read_leb128(content: bytes, at: int) -> tuple[int, int]:
    number = 0
    for shift in range(0, 35, 7):
        if at >= len(content):
            break
        byte, at = content[at], at + 1
        number |= (byte & 0x7F) << shift
        if not byte & 0x80:
            return number, at
    raise BitstreamError("malformed: a number in the header does not end")
