import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.bitstream import container
from pipeline.bitstream.container import Packet
from pipeline.errors import BitstreamError
from pipeline.models.codec import HYPER_STRIDE

PACKET = Packet(2, b"\x01\x02", 300, 200, (b"stream",))
FULL = Packet(2, b"\x01\x02", 300, 200, (b"stream",), is_gray=True, transparency=b"PNG")


def test_the_layout_is_the_documented_one():
    body = b"ILL" + b"\x02" + b"\x01\x02" + b"\xac\x02" + b"\xc8\x01" + b"stream"
    assert container.pack(PACKET) == body + zlib.crc32(body).to_bytes(4, "little")[:2]
    body = b"ILL" + b"\x32" + b"\x01\x02" + b"\xac\x02" + b"\xc8\x01" + b"\x03PNG" + b"stream"
    assert container.pack(FULL) == body + zlib.crc32(body).to_bytes(4, "little")[:2]


def test_the_layout_of_version_1():
    body = b"ILLM" + b"\x01" + b"\x01\x02\x03\x04" + b"\xac\x02" + b"\xc8\x01" + b"\x05" + b"hyper" + b"latent stream"
    packet = container.unpack(body + zlib.crc32(body).to_bytes(4, "little"))
    assert packet == Packet(1, b"\x01\x02\x03\x04", 300, 200, (b"hyper", b"latent stream"))


def test_a_header_takes_at_most_sixteen_bytes_with_the_checksum_of_symbols():
    """4 bytes of a stream are that checksum; see test_symbols.py."""
    assert len(container.pack(Packet(2, b"id", 4096, 4096, (b"",)))) + 4 <= 16


@given(
    st.builds(
        Packet,
        st.just(2),
        st.binary(min_size=2, max_size=2),
        st.integers(1, 8000),
        st.integers(1, 8000),
        st.tuples(st.binary(max_size=300)),
        st.booleans(),
        st.binary(max_size=40),
    )
)
def test_what_was_packed_is_unpacked(packet):
    assert container.unpack(container.pack(packet)) == packet


@given(st.integers(0, len(container.pack(PACKET)) * 8 - 1))
def test_any_flipped_bit_is_noticed(bit):
    content = bytearray(container.pack(PACKET))
    content[bit // 8] ^= 1 << bit % 8
    with pytest.raises(BitstreamError):
        container.unpack(bytes(content))


@given(st.integers(0, len(container.pack(PACKET)) - 1))
def test_any_truncation_is_noticed(length):
    with pytest.raises(BitstreamError):
        container.unpack(container.pack(PACKET)[:length])


@given(st.binary(max_size=64))
def test_any_bytes_give_a_packet_of_a_bounded_image_or_a_clear_error(tail):
    old, new = b"ILLM\x01" + tail, b"ILL\x32" + tail
    sums = [zlib.crc32(body).to_bytes(4, "little") for body in (old, new)]
    for content in (tail, old, new, old + sums[0], new + sums[1][:2]):
        try:
            packet = container.unpack(content)
        except BitstreamError:
            continue
        assert 0 < container.padded(packet.height) * container.padded(packet.width) <= container.MAX_PIXELS
        assert sum(map(len, packet.streams)) + len(packet.transparency) < len(content)


@pytest.mark.parametrize(("height", "width"), [(0, 5), (2**31, 2**31), (2**14, 2**14), (1, 2**27), (2**22, 1)])
def test_an_absurd_size_is_refused_before_memory_is_asked_for(height, width):
    with pytest.raises(BitstreamError, match="malformed"):
        container.unpack(container.pack(Packet(2, b"ab", height, width, (b"",))))


def test_padding_is_what_the_networks_need():
    assert container.SIDE_MULTIPLE == HYPER_STRIDE
    assert [container.padded(side) for side in (1, 63, 64, 65, 200)] == [64, 64, 64, 128, 256]


@pytest.mark.parametrize(
    ("fourth", "told"),
    [(0x03, "version 3"), (0x42, "version 2 with flags 0x40"), (0x01, "version 1,"), (0xFF, "version 15")],
)
def test_another_version_is_told(fourth, told):
    content = bytearray(container.pack(PACKET))
    content[3] = fourth
    with pytest.raises(BitstreamError, match=f"format {told}"):
        container.unpack(bytes(content))


@pytest.mark.parametrize("length", [0, 8, 2**34])
def test_a_transparency_that_is_not_there_is_told(length):
    body = b"ILL\x22ab\x05\x05" + container._leb128(length) + b"PNG"
    with pytest.raises(BitstreamError, match="transparency"):
        container.unpack(body + (zlib.crc32(body) & 0xFFFF).to_bytes(2, "little"))
