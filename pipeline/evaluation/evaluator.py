"""Images through codecs, as real files and back, and what was measured of each."""

import csv
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from pydantic import TypeAdapter, ValidationError
from rich.console import Console
from rich.progress import track
from torch import Tensor

from pipeline.bitstream.codec import ImageCodec
from pipeline.bitstream.latents import Symbols
from pipeline.data.images import Pixels
from pipeline.data.transforms import to_float
from pipeline.errors import ArtifactError, BitstreamError
from pipeline.evaluation import anchors, fid, metrics
from pipeline.evaluation.anchors import Anchor
from pipeline.evaluation.metric_table import PER_IMAGE
from pipeline.models import pretrained
from pipeline.models.lpips import load_lpips


@dataclass(frozen=True)
class Measurement:
    """One image through one model. lpips is None without its weights, ms_ssim for sides below 176 pixels.

    latent: SHA-256 of the symbols that the encoder coded (`Symbols.digest`); None for JPEG and WebP.
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

    @property
    def encode_seconds_per_megapixel(self) -> float:
        return self.encode_seconds * 1e6 / (self.width * self.height)

    @property
    def decode_seconds_per_megapixel(self) -> float:
        return self.decode_seconds * 1e6 / (self.width * self.height)


class Evaluator:
    """Runs codecs, and anchors at the rate of the first of them, over images and keeps what it measured."""

    def __init__(self, codecs: Mapping[str, ImageCodec], others: Sequence[Anchor] = ()):
        self.codecs = dict(codecs)
        self.models = [*self.codecs, *others]
        self.lpips = load_lpips()
        inception = pretrained.find("inception")
        self.inception = fid.PatchFeatures(inception) if inception else None
        self.features: dict[str, list[Tensor]] = {name: [] for name in ["original", *self.models]}
        self.measurements: list[Measurement] = []

    def measure(self, images: Iterable[tuple[str, Pixels]], count: int, folder: Path) -> None:
        """Writes `files/` and `reconstructions/` and measures all of them.

        Raises: BitstreamError naming every image whose file does not decode to the latent that its encoder coded.
        """
        # The first use is slow and must not count in the first codec's time
        for codec in self.codecs.values():
            # Errors are reported per image below
            with suppress(BitstreamError):
                codec.decompress(codec.compress(np.zeros((64, 64, 3), np.uint8)))
        failures: list[str] = []
        console = Console(stderr=True)
        shown = track(images, "evaluating", total=count, console=console, disable=not console.is_terminal)
        for image, pixels in shown:
            self._features_of("original", pixels)
            save_png(folder / "reconstructions" / "original" / f"{image}.png", pixels)
            target_bytes = 0
            for model in self.models:
                try:
                    measured, ours = self._one(image, pixels, model, folder / "files" / model, target_bytes)
                except BitstreamError as error:
                    failures.append(f"{image} by {model}: {error}")
                    continue
                target_bytes = target_bytes or measured.bytes
                self.measurements.append(measured)
                self._features_of(model, ours)
                save_png(folder / "reconstructions" / model / f"{image}.png", ours)
        if failures:
            total = count * len(self.codecs)
            raise BitstreamError(
                f"{len(failures)} of {total} files do not hold what was encoded, so nothing is published:\n"
                + "\n".join(f"  {failure}" for failure in failures)
            )

    def of(self, model: str) -> list[Measurement]:
        """A model's measurements, in the order of the images."""
        return [m for m in self.measurements if m.model == model]

    def totals(self) -> dict[str, dict[str, float | None]]:
        """Model -> metric -> mean over images; None where an image has no value. FID and KID over all patches."""
        result = {}
        for model in self.models:
            result[model] = {name: mean([getattr(row, name) for row in self.of(model)]) for name in PER_IMAGE}
            result[model] |= {"fid": None, "kid": None}
            if self.inception is not None:
                both = fid.compare(torch.cat(self.features[model]), torch.cat(self.features["original"]))
                result[model] |= {"fid": both.fid, "kid": both.kid}
        return result

    def _one(
        self, image: str, pixels: Pixels, model: str, folder: Path, target_bytes: int
    ) -> tuple[Measurement, Pixels]:
        folder.mkdir(parents=True, exist_ok=True)
        codec = self.codecs.get(model)
        path = folder / f"{image}.{'illm' if codec else model}"
        meant: Symbols | None = None
        started = time.perf_counter()
        if codec:
            content, meant = codec.encode(pixels)
        else:
            content = anchors.encode(pixels, model, target_bytes)  # type: ignore[arg-type]
        path.write_bytes(content)
        written = time.perf_counter()
        if codec and meant:
            ours, said = codec.decode(path.read_bytes())
            if not said.equals(meant):
                raise BitstreamError("the file's latent is not the encoder's")
        else:
            ours = anchors.decode(path.read_bytes())
        read = time.perf_counter()
        height, width = pixels.shape[:2]
        size = path.stat().st_size
        measured = Measurement(
            image=image,
            model=model,
            width=width,
            height=height,
            bytes=size,
            bpp=metrics.bits_per_pixel(size, height, width),
            psnr_db=metrics.psnr_db(ours, pixels),
            ms_ssim=metrics.ms_ssim(ours, pixels),
            lpips=self._lpips(ours, pixels),
            encode_seconds=written - started,
            decode_seconds=read - written,
            latent=meant.digest() if meant else None,
        )
        return measured, ours

    def _lpips(self, ours: Pixels, original: Pixels) -> float | None:
        if self.lpips is None:
            return None
        with torch.no_grad():
            return float(self.lpips(to_float(ours[None]), to_float(original[None])))

    def _features_of(self, model: str, pixels: Pixels) -> None:
        if self.inception is not None:
            self.features[model].append(self.inception.of(pixels))


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


def save_png(path: Path, pixels: Pixels) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def mean(values: Sequence[float | None]) -> float | None:
    """None if any value is."""
    present = [value for value in values if value is not None]
    return sum(present) / len(present) if present and len(present) == len(values) else None
