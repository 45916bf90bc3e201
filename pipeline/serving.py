"""The registered codec as MLflow loads it: image files in, compressed files out, and back. No code comes with a model."""

import threading
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.bitstream import container
from pipeline.errors import UserError

if TYPE_CHECKING:
    import pandas

    from pipeline.bitstream.codec import ImageCodec

COLUMN = "content"


class FileCodec:
    """Turns files into files; the network is loaded when the first comes."""

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
        """One file. Raises: BitstreamError, DataError."""
        import io

        from PIL import Image

        from pipeline.data import images

        if not content.startswith(container.MAGIC):
            return self.codec.compress(images.decode(content).pixels)
        stream = io.BytesIO()
        Image.fromarray(self.codec.decompress(content)).save(stream, "PNG")
        return stream.getvalue()

    @property
    def codec(self) -> "ImageCodec":
        with self._loading:
            if self._codec is None:
                from pipeline.bitstream.codec import ImageCodec

                self._codec = ImageCodec.load(self._folder)
        return self._codec


def _load_pyfunc(path: str) -> FileCodec:  # MLflow's name
    return FileCodec(str(Path(path) / "codec"))
