"""Images through codecs, as real files and back, and what was measured of each."""

import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image
from rich.console import Console
from rich.progress import track

from pipeline.bitstream.codec import ImageCodec
from pipeline.data.images import Pixels
from pipeline.errors import BitstreamError
from pipeline.evaluation import anchors, metrics, sanity
from pipeline.evaluation.anchors import CLASSICS, Anchor
from pipeline.evaluation.frechet import Features, FeatureSet
from pipeline.evaluation.instruments import Instruments, Original, set_distances
from pipeline.evaluation.measurement import Measurement, mean
from pipeline.evaluation.metric_table import METRICS, PER_IMAGE

ORIGINAL = "original"
T = TypeVar("T")


@dataclass(frozen=True)
class ImageResult:
    """One image through all codecs. features: "original" or model -> kind -> (patches, features)."""

    measurements: list[Measurement]
    features: dict[str, dict[str, Features]]
    failures: list[str]


class Bench:
    """Codecs, conventional ones at the rate of the first of them, and what measures them, checked before anything is measured."""

    def __init__(self, codecs: Mapping[str, ImageCodec], others: Sequence[Anchor], wanted: Collection[str]):
        self.codecs, self.others, self.instruments = dict(codecs), tuple(others), Instruments({*wanted, "psnr_db"})
        sanity.check(self.instruments)
        # The first use is slow and must not count in the first codec's time
        for codec in self.codecs.values():
            # Errors are reported per image
            with suppress(BitstreamError):
                codec.decompress(codec.compress(np.zeros((64, 64, 3), np.uint8)))

    def run(self, image: str, pixels: Pixels, folder: Path) -> ImageResult:
        """Writes `files/MODEL/` and `reconstructions/MODEL/` of one image and measures them.

        A model whose file does not decode to the latent that its encoder coded is in the failures instead.
        """
        original = self.instruments.original(pixels)
        found = ImageResult([], {ORIGINAL: original.patch_features}, [])
        save_png(folder / "reconstructions" / ORIGINAL / f"{image}.png", pixels)
        target_bytes = 0
        for model in [*self.codecs, *self.others]:
            try:
                ours, measured = self._one(image, original, model, folder / "files" / model, target_bytes)
            except BitstreamError as error:
                found.failures.append(f"{image} by {model}: {error}")
                continue
            target_bytes = target_bytes or measured.bytes
            found.measurements.append(measured)
            found.features[model] = self.instruments.features_of(ours)
            save_png(folder / "reconstructions" / model / f"{image}.png", ours)
        return found

    def _one(
        self, image: str, original: Original, model: str, folder: Path, target_bytes: int
    ) -> tuple[Pixels, Measurement]:
        folder.mkdir(parents=True, exist_ok=True)
        pixels = original.pixels
        height, width = pixels.shape[:2]
        codec, latent = self.codecs.get(model), None
        path = folder / f"{image}.{'illm' if codec else model}"
        started = time.perf_counter()
        if codec:
            content, meant = codec.encode(pixels)
            path.write_bytes(content)
            written = time.perf_counter()
            restored = codec.decode(path.read_bytes())
            ours = restored.pixels
            if not restored.symbols.equals(meant):
                raise BitstreamError("the file's latent is not the encoder's")
            latent = meant.digest()
        else:
            classic = CLASSICS[model]  # type: ignore[index]
            content, seconds = anchors.encode(pixels, classic, target_bytes)
            path.write_bytes(content)
            written = time.perf_counter()
            # the search for the size is not part of encoding
            started = written - seconds
            ours = classic.decode(path.read_bytes(), pixels.shape)
        read = time.perf_counter()
        size = path.stat().st_size
        measured = Measurement(
            image=image,
            model=model,
            width=width,
            height=height,
            bytes=size,
            bpp=metrics.bits_per_pixel(size, height, width),
            encode_seconds=written - started,
            decode_seconds=read - written,
            latent=latent,
            **({name: None for name in PER_IMAGE if name != "bpp"} | self.instruments.of_pair(ours, original)),  # type: ignore[arg-type]
        )
        return ours, measured


class Results:
    """What was measured of all images, in their order."""

    def __init__(self, models: Sequence[str]):
        self.models = list(models)
        self.measurements: list[Measurement] = []
        self.features: dict[str, list[dict[str, Features]]] = {name: [] for name in [ORIGINAL, *models]}
        self._failures: list[str] = []

    def add(self, result: ImageResult) -> None:
        self.measurements += result.measurements
        self._failures += result.failures
        for model, features in result.features.items():
            self.features[model].append(features)

    def check(self, num_files: int) -> None:
        """Raises: BitstreamError naming every image whose file does not hold what was encoded."""
        if self._failures:
            raise BitstreamError(
                f"{len(self._failures)} of {num_files} files do not hold what was encoded, so nothing is published:\n"
                + "\n".join(f"  {failure}" for failure in self._failures)
            )

    def of(self, model: str) -> list[Measurement]:
        """A model's measurements, in the order of the images."""
        return [m for m in self.measurements if m.model == model]

    def set_distances(self, images: Sequence[int] | None = None) -> dict[str, dict[str, float]]:
        """Model -> distances between its patches and the originals'. images: their numbers, each as often as it counts."""
        originals = self._joined(ORIGINAL, images)
        return {model: set_distances(self._joined(model, images), originals) for model in self.models}

    def totals(self) -> dict[str, dict[str, float | None]]:
        """Model -> metric -> mean over images, or distance of sets; None where an image has no value or patches are few."""
        result = {}
        for model, distances in self.set_distances().items():
            rows = self.of(model)
            values = {name: mean([getattr(row, name) for row in rows]) for name in PER_IMAGE}
            result[model] = {name: values.get(name, distances.get(name)) for name in METRICS}
        return result

    def _joined(self, model: str, images: Sequence[int] | None) -> dict[str, FeatureSet]:
        listed = self.features[model]
        chosen = listed if images is None else [listed[number] for number in images]
        kinds = chosen[0] if chosen else {}
        return {kind: FeatureSet(np.concatenate([features[kind] for features in chosen])) for kind in kinds}


def measure(
    codecs: Mapping[str, ImageCodec],
    images: Iterable[tuple[str, Pixels]],
    count: int,
    folder: Path,
    others: Sequence[Anchor] = (),
    wanted: Collection[str] = tuple(METRICS),
) -> Results:
    """Measures all images in this process; writes `files/` and `reconstructions/`. wanted: names of metrics.

    Raises: BitstreamError naming every image whose file does not decode to the latent that its encoder coded.
    """
    bench, results = Bench(codecs, others, wanted), Results([*codecs, *others])
    for image, pixels in shown(images, count):
        results.add(bench.run(image, pixels, folder))
    results.check(count * len(codecs))
    return results


def shown(work: Iterable[T], count: int) -> Iterable[T]:
    """The same, with a progress bar on a terminal."""
    console = Console(stderr=True)
    return track(work, "evaluating", total=count, console=console, disable=not console.is_terminal)


def save_png(path: Path, pixels: Pixels) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
