"""Image pixels to a compressed file and back, with the codec of an artifact."""

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline import artifacts
from pipeline.bitstream import container
from pipeline.bitstream.container import Packet
from pipeline.data.images import Pixels
from pipeline.data.loader import to_float
from pipeline.errors import BitstreamError
from pipeline.models import saved
from pipeline.models.codec import HYPER_STRIDE, Codec


class ImageCodec:
    """Compresses and decompresses 8-bit RGB images of any size.

    Everything runs on the CPU: means and scales decide which table decodes each symbol, and another device's rounding
    would decode garbage.
    """

    def __init__(self, codec: Codec):
        self.codec = codec.eval()
        self.bitstream_id = codec.bitstream_id()

    @classmethod
    def load(cls, name: str) -> "ImageCodec":
        """From an artifact: a run folder or a models:/ URI. Raises: ArtifactError."""
        return cls(saved.load_codec(artifacts.read(name, "codec")))

    def compress(self, pixels: Pixels) -> bytes:
        """The compressed file of an image. Shapes: pixels (H, W, 3) uint8 RGB, any sides of at least 1."""
        height, width = pixels.shape[:2]
        hyper_stream, latent_stream = self.codec.compress(pad(to_float(pixels[None])))
        return container.pack(Packet(self.bitstream_id, height, width, hyper_stream, latent_stream))

    def decompress(self, content: bytes) -> Pixels:
        """The image in a compressed file. Shapes: returns (H, W, 3) uint8 RGB.

        Raises: BitstreamError if the file is damaged, foreign, or made by a codec with other entropy models.
        """
        packet = container.unpack(content)
        if packet.bitstream_id != self.bitstream_id:
            raise BitstreamError(
                f"made by another model: bitstream id {packet.bitstream_id.hex()}, this codec reads "
                f"{self.bitstream_id.hex()}; name the codec it was made with, or one fine-tuned from it"
            )
        height, width = (padded(side) for side in (packet.height, packet.width))
        x_hat = self.codec.decompress(packet.hyper_stream, packet.latent_stream, height, width)
        return to_pixels(x_hat[0, :, : packet.height, : packet.width])


def padded(side: int) -> int:
    """The next multiple of the hyper-latent's stride."""
    return -(-side // HYPER_STRIDE) * HYPER_STRIDE


def pad(x: Tensor) -> Tensor:
    """Pads right and bottom to multiples of 64, by reflection where the image is large enough and by repetition where not.

    Shapes: x (1, 3, H, W).
    """
    height, width = x.shape[-2:]
    right, bottom = padded(width) - width, padded(height) - height
    x = F.pad(x, (0, right, 0, 0), mode="reflect" if right < width else "replicate")
    return F.pad(x, (0, 0, 0, bottom), mode="reflect" if bottom < height else "replicate")


def to_pixels(x_hat: Tensor) -> Pixels:
    """Clamped and rounded to 8 bits. Shapes: x_hat (3, H, W); returns (H, W, 3)."""
    clean = torch.nan_to_num(x_hat, nan=0.0).clamp(0, 1)
    return (clean * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
