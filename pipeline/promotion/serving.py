"""The registered codec as MLflow loads it: image files in, compressed files out, and back. No code comes with a model."""

import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.bitstream import container
from pipeline.errors import BitstreamError, UserError

if TYPE_CHECKING:
    import pandas

    from pipeline.bitstream.codec import ImageCodec

COLUMN = "content"
# environment: how many pixels an image may have that a served codec compresses or decompresses
MAX_PIXELS = "ILLM_SERVE_MAX_PIXELS"


def most_pixels() -> int:
    """33 megapixels, unless the environment says otherwise: concurrent requests share the memory."""
    return int(os.environ.get(MAX_PIXELS) or 2**25)


def _check_size(height: int, width: int) -> None:
    """Raises: BitstreamError for an image whose padded size, which the networks see, is more than what is served."""
    if container.padded(height) * container.padded(width) > most_pixels():
        raise BitstreamError(
            f"{width}x{height} pixels, padded, are more than the {most_pixels()} served ({MAX_PIXELS})"
        )


class FileCodec:
    """Turns files into files; the network is loaded with the first one."""

    def __init__(self, folder: str):
        self._folder = folder
        self._codec: ImageCodec | None = None
        self._loading = threading.Lock()

    def predict(self, frame: "pandas.DataFrame") -> "pandas.DataFrame":
        """Column `content`: files that the codec wrote become PNGs, image files become compressed files.

        Raises: MlflowException naming the row that is neither, or damaged; a server answers with it.
        """
        import pandas
        from mlflow.exceptions import MlflowException
        from mlflow.protos.databricks_pb2 import BAD_REQUEST

        answers = []
        for number, content in enumerate(frame[COLUMN]):
            try:
                answers.append(self.convert(bytes(content)))
            except UserError as error:
                raise MlflowException(f"row {number}: {error}", BAD_REQUEST) from None
        return pandas.DataFrame({COLUMN: answers})

    def convert(self, content: bytes) -> bytes:
        """One file. Raises: BitstreamError, DataError; for images of more pixels than `most_pixels`, too."""
        import io

        from PIL import Image

        from pipeline.data import images

        if not content.startswith(container.MAGIC):
            decoded = images.decode(content, most_pixels(), keep_opacity=True)
            _check_size(*decoded.pixels.shape[:2])
            return self.codec.compress(decoded.pixels, decoded.opacity)
        packet = container.unpack(content)
        _check_size(packet.height, packet.width)
        stream = io.BytesIO()
        restored = self.codec.decode(content)
        Image.fromarray(images.with_opacity(restored.pixels, restored.opacity)).save(stream, "PNG")
        return stream.getvalue()

    @property
    def codec(self) -> "ImageCodec":
        with self._loading:
            if self._codec is None:
                from pipeline.bitstream.codec import ImageCodec

                self._codec = ImageCodec.load(self._folder)
        return self._codec


# MLflow's name
def _load_pyfunc(path: str) -> FileCodec:
    return FileCodec(str(Path(path) / "codec"))
