import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.bitstream import container
from pipeline.bitstream.container import Packet
from pipeline.errors import BitstreamError
from pipeline.models.codec import HYPER_STRIDE

PACKET = Packet(b"\x01\x02\x03\x04", 300, 200, b"hyper", b"latent stream")


def test_the_layout_is_the_documented_one():
    body = b"ILLM" + b"\x01" + b"\x01\x02\x03\x04" + b"\xac\x02" + b"\xc8\x01" + b"\x05" + b"hyper" + b"latent stream"
    assert container.pack(PACKET) == body + zlib.crc32(body).to_bytes(4, "little")


@given(
    st.builds(
        Packet,
        st.binary(min_size=4, max_size=4),
        st.integers(1, 8000),
        st.integers(1, 8000),
        st.binary(max_size=300),
        st.binary(max_size=300),
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
    body = b"ILLM\x01" + tail
    for content in (tail, body, body + zlib.crc32(body).to_bytes(4, "little")):
        try:
            packet = container.unpack(content)
        except BitstreamError:
            continue
        assert 0 < container.padded(packet.height) * container.padded(packet.width) <= container.MAX_PIXELS
        assert len(packet.hyper_stream) + len(packet.latent_stream) < len(content)


@pytest.mark.parametrize(("height", "width"), [(0, 5), (2**31, 2**31), (2**14, 2**14), (1, 2**27), (2**22, 1)])
def test_an_absurd_size_is_refused_before_memory_is_asked_for(height, width):
    with pytest.raises(BitstreamError, match="malformed"):
        container.unpack(container.pack(Packet(b"abcd", height, width, b"", b"")))


def test_padding_is_what_the_networks_need():
    assert container.SIDE_MULTIPLE == HYPER_STRIDE
    assert [container.padded(side) for side in (1, 63, 64, 65, 200)] == [64, 64, 64, 128, 256]


def test_another_version_is_told():
    content = bytearray(container.pack(PACKET))
    content[4] = 9
    with pytest.raises(BitstreamError, match="format version 9"):
        container.unpack(bytes(content))
