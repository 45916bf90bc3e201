"""What was measured of one image through one codec, and tables of it."""

import csv
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from pipeline.errors import ArtifactError


@dataclass(frozen=True)
class Measurement:
    """One image through one codec. A metric is None without its weights or program, or where an image is too small for it.

    latent: SHA-256 of the symbols that the encoder coded (`Symbols.digest`); None for conventional codecs.
    """

    image: str
    model: str
    width: int
    height: int
    bytes: int
    bpp: float
    psnr_db: float
    ms_ssim: float | None
    lpips: float | None
    encode_seconds: float
    decode_seconds: float
    latent: str | None
    # not in tables of earlier versions
    dists: float | None = None
    ssimulacra2: float | None = None
    vmaf: float | None = None

    @property
    def encode_seconds_per_megapixel(self) -> float:
        return self.encode_seconds * 1e6 / (self.width * self.height)

    @property
    def decode_seconds_per_megapixel(self) -> float:
        return self.decode_seconds * 1e6 / (self.width * self.height)


def write_csv(path: Path, measurements: Iterable[Measurement]) -> None:
    """One row per image and model."""
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, [field.name for field in fields(Measurement)])
        writer.writeheader()
        writer.writerows(asdict(m) for m in measurements)


def read_csv(path: Path) -> list[Measurement]:
    """What `write_csv` wrote. Raises: ArtifactError if it is something else."""
    try:
        with path.open(encoding="utf-8", newline="") as stream:
            rows = [{name: value or None for name, value in row.items()} for row in csv.DictReader(stream)]
        return TypeAdapter(list[Measurement]).validate_python(rows)
    except ValidationError as error:
        raise ArtifactError(
            f"{path}: not a table of measurements ({error.error_count()} problems); evaluate again"
        ) from None


def mean(values: Sequence[float | None]) -> float | None:
    """None if any value is."""
    present = [value for value in values if value is not None]
    return sum(present) / len(present) if present and len(present) == len(values) else None
