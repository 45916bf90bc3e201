"""The compressed file: a short header, one entropy-coded stream, a checksum. docs/bitstream.md specifies it.

Version 2, which is written:

offset  bytes  content
0       3      magic "ILL"
3       1      version, 2, and flags: 16 gray, 32 transparent
4       2      of the codec that can read the stream: the first bytes of its bitstream id
6       1-5    image height, then width: unsigned LEB128 numbers of pixels, at least 1
        1-5    only if transparent: length of the transparency in bytes, LEB128
        ...    only if transparent: the transparency, a grayscale PNG file of the image's size
        ...    the stream of both latents
end-2   2      the low half of CRC-32 (zlib's) of all bytes before it, little-endian

Version 1, which is read: magic "ILLM", 1, four bytes of the id, height, width, the length of the hyper-latent's stream, both
streams, and all of the CRC-32.
"""

import zlib
from dataclasses import dataclass

from pipeline.errors import BitstreamError

MAGIC = b"ILL"
VERSION = 2
GRAY, TRANSPARENT = 0x10, 0x20
# The magic of version 1 ends with it
VERSION_1 = ord("M")
# Networks see images padded to multiples of it, at the right and at the bottom
SIDE_MULTIPLE = 64
# Pixels of the padded image; more are refused before memory is allocated
MAX_PIXELS = 2**27


@dataclass(frozen=True)
class Packet:
    """The content of a compressed file. Height and width are the image's own, without padding.

    bitstream_id: the bytes of it that the file has. streams: one of both latents; of version 1, one for z and one for y.
    is_gray: all three channels are equal. transparency: a PNG file, or nothing.
    """

    version: int
    bitstream_id: bytes
    height: int
    width: int
    streams: tuple[bytes, ...]
    is_gray: bool = False
    transparency: bytes = b""


def pack(packet: Packet) -> bytes:
    """The file's bytes. Only version 2 is written."""
    flags = (GRAY if packet.is_gray else 0) | (TRANSPARENT if packet.transparency else 0)
    (stream,) = packet.streams
    body = MAGIC + bytes([VERSION | flags]) + packet.bitstream_id[:2] + _leb128(packet.height) + _leb128(packet.width)
    if packet.transparency:
        body += _leb128(len(packet.transparency)) + packet.transparency
    body += stream
    return body + (zlib.crc32(body) & 0xFFFF).to_bytes(2, "little")


def unpack(content: bytes) -> Packet:
    """The packet in a file's bytes.

    Raises: BitstreamError if they are not such a file, of another version, damaged, or claim an absurd size.
    """
    if not content.startswith(MAGIC):
        raise BitstreamError(
            f"not a compressed image: begins with {content[:3].hex() or 'nothing'}, expected {MAGIC.hex()} ('ILL')"
        )
    kind = content[3] if len(content) > 3 else -1
    if kind == VERSION_1:
        packet = _unpack_1(content)
    elif kind & 0x0F == VERSION and kind <= VERSION | GRAY | TRANSPARENT:
        packet = _unpack_2(content)
    else:
        found = "none" if kind < 0 else str(kind & 0x0F) if kind & 0x0F != VERSION else f"2 with flags {kind & 0xF0:#x}"
        raise BitstreamError(f"format version {found}, this program reads versions 1 and 2; update it")
    if not 0 < padded(packet.height) * padded(packet.width) <= MAX_PIXELS:
        raise BitstreamError(f"malformed: {packet.width}x{packet.height} pixels, expected 1 to {MAX_PIXELS}, padded")
    return packet


def _unpack_2(content: bytes) -> Packet:
    body, checksum = content[:-2], int.from_bytes(content[-2:], "little")
    if len(content) < 10 or zlib.crc32(body) & 0xFFFF != checksum:
        raise _damaged()
    height, at = _read_leb128(body, 6)
    width, at = _read_leb128(body, at)
    transparency = b""
    if content[3] & TRANSPARENT:
        transparency, at = _read_part(body, at, "transparency")
        if not transparency:
            raise BitstreamError("malformed: an empty transparency")
    return Packet(VERSION, body[4:6], height, width, (body[at:],), bool(content[3] & GRAY), transparency)


def _unpack_1(content: bytes) -> Packet:
    if len(content) < 5 or content[4] != 1:
        raise BitstreamError(
            f"format version {content[4:5].hex() or 'none'} of an older kind, of which there is only 1"
        )
    body, checksum = content[:-4], int.from_bytes(content[-4:], "little")
    if len(content) < 16 or zlib.crc32(body) != checksum:
        raise _damaged()
    height, at = _read_leb128(body, 9)
    width, at = _read_leb128(body, at)
    hyper_stream, at = _read_part(body, at, "hyper-latent")
    return Packet(1, body[5:9], height, width, (hyper_stream, body[at:]))


def _damaged() -> BitstreamError:
    return BitstreamError("damaged: the checksum does not match the content; get the file again")


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
    """A number and the place behind it."""
    number = 0
    for shift in range(0, 35, 7):
        if at >= len(content):
            break
        byte, at = content[at], at + 1
        number |= (byte & 0x7F) << shift
        if not byte & 0x80:
            return number, at
    raise BitstreamError("malformed: a number in the header does not end")


def _read_part(content: bytes, at: int, name: str) -> tuple[bytes, int]:
    """A part that its length precedes, and the place behind it."""
    length, at = _read_leb128(content, at)
    if length > len(content) - at:
        raise BitstreamError(f"malformed: a {name} of {length} bytes in a file of {len(content)}")
    return content[at : at + length], at + length
