import io

import pytest
from PIL import Image

from pipeline.artifacts.artifact import publish
from pipeline.artifacts.manifest import Manifest
from pipeline.bitstream import container
from pipeline.bitstream.container import Packet
from pipeline.errors import UserError
from pipeline.models import serialization
from pipeline.promotion import serving
from tests.conftest import picture
from tests.models.test_networks import SMALL, small_codec


@pytest.fixture
def served(tmp_path):
    publish(
        tmp_path / "artifact",
        Manifest(kind="codec"),
        lambda scratch: serialization.save_codec(scratch, small_codec(), SMALL),
    )
    return serving.FileCodec(str(tmp_path / "artifact"))


def png(height: int, width: int) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(picture(1, height, width)).save(stream, "PNG")
    return stream.getvalue()


def test_a_served_codec_takes_images_of_a_bounded_size_both_ways(served, monkeypatch):
    monkeypatch.setenv(serving.MAX_PIXELS, "16384")
    file = served.convert(png(100, 100))
    assert Image.open(io.BytesIO(served.convert(file))).size == (100, 100)
    with pytest.raises(UserError, match="16384"):
        served.convert(png(100, 200))
    with pytest.raises(UserError, match="1x300 pixels, padded"):
        served.convert(png(300, 1))
    claim = container.pack(Packet(2, served.codec.bitstream_id, 2500, 2500, (bytes(10),)))
    with pytest.raises(UserError, match="2500x2500 pixels, padded, are more than the 16384 served"):
        served.convert(claim)
