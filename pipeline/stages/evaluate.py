"""Compresses held-out images to real files, decompresses them, measures, and writes a report."""

import csv
import hashlib
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Literal

import torch
from PIL import Image
from pydantic import Field, PositiveInt
from rich.console import Console
from rich.progress import track
from rich.table import Table

from pipeline import artifacts, perceptual, runs, tracking, weights
from pipeline.artifacts import Artifact
from pipeline.bitstream.codec import ImageCodec
from pipeline.config import Config
from pipeline.data.images import SUFFIXES, Pixels, decode
from pipeline.data.loader import to_float
from pipeline.data.reader import ShardReader
from pipeline.data.sources import find_files
from pipeline.errors import DataError
from pipeline.evaluation import anchors, fidelity, metrics, report
from pipeline.evaluation.anchors import Anchor
from pipeline.models import saved
from pipeline.perceptual import Lpips

ModelName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$")]
METRICS = ("bpp", "psnr_db", "ms_ssim", "lpips", "fid", "kid")


class StageConfig(Config):
    """Which codecs are measured on which images."""

    stage: Literal["evaluate"] = "evaluate"
    images: str  # a shards artifact, whose validation images are taken, or a folder of images
    codecs: Annotated[dict[ModelName, str], Field(min_length=1)]  # name in the report -> codec artifact
    anchors: tuple[Anchor, ...] = ("jpeg", "webp")  # at each image's rate of the first codec, as near as they get
    max_images: PositiveInt = 1000
    report_images: PositiveInt = 6  # shown side by side in the report
    published: Literal["kodak", "clic2020", "div2k"] = "kodak"  # whose published points the figures show


@dataclass(frozen=True)
class Measurement:
    """One image through one model. lpips is None without its weights, ms_ssim for sides below 176 pixels."""

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


def run(cfg: StageConfig, folder: Path) -> Path:
    """Evaluates codecs and publishes measurements, files, reconstructions, figures and the report."""
    if done := runs.finished(folder, cfg):
        return done
    named = {name: (uri, artifacts.read(uri, "codec")) for name, uri in cfg.codecs.items()}
    images = HeldOut(cfg)
    facts = {"images digest": images.digest} | {
        f"{name} weights": "present" if weights.find(name) else "absent" for name in weights.FILES
    }
    given = runs.Inputs(named | images.parents, facts)
    runs.claim(folder, cfg, given)
    for name in weights.FILES:
        if weights.find(name) is None:
            print(weights.how_to_get(name))
    with tracking.run("evaluate", folder, cfg, given) as tracker:
        evaluation = Evaluation(cfg, {name: artifact for name, (_, artifact) in named.items()})
        totals: dict[str, dict[str, float | None]] = {}

        def write(scratch: Path) -> None:
            evaluation.measure(images, scratch)
            totals.update(evaluation.totals())
            manifest.metrics.update(
                {f"{m}/{k}": v for m, row in totals.items() for k, v in row.items() if v is not None}
            )
            _write_tables(scratch, evaluation.measurements, totals)
            report.write(scratch, totals, cfg.published, cfg.report_images)

        # The numbers exist only once the files do: `write` adds them to the manifest.
        manifest = runs.manifest("evaluation", cfg, given, {}, tracker.run_id)
        artifact = artifacts.publish(folder / "artifact", manifest, write)
        tracker.log(0, {name: value for name, value in artifact.manifest.metrics.items() if value is not None})
        tracker.artifact(artifact)
    print_table(totals, len(images))
    print(f"report: {artifact.path / 'report.html'}")
    return artifact.path


class HeldOut:
    """The images to measure on: (name, pixels), the same ones in the same order every time."""

    def __init__(self, cfg: StageConfig):
        self.limit = cfg.max_images
        self.parents: dict[str, tuple[str, Artifact]] = {}
        if (artifacts.resolve(cfg.images) / artifacts.MANIFEST).is_file():
            shards = artifacts.read(cfg.images, "shards")
            self.parents["images"] = (cfg.images, shards)
            self.reader: ShardReader | None = ShardReader(shards, "valid")
            self.files: list[Path] = []
            self.digest, count = shards.digest, len(self.reader)
        else:
            self.reader = None
            self.files = [p for p in find_files(cfg.images) if p.suffix.lower() in SUFFIXES]
            self.digest = hashlib.sha256("".join(artifacts.sha256(p) for p in self.files).encode()).hexdigest()
            count = len(self.files)
        if not count:
            raise DataError(f"{cfg.images}: no images to evaluate on")
        self.count = min(count, self.limit)

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[tuple[str, Pixels]]:
        if self.reader is not None:
            for sample, content in self.reader.first(self.count):
                yield f"{sample.key}-{Path(sample.source).stem}", decode(content).pixels
        for number, path in enumerate(self.files[: self.count]):
            yield f"{number:05d}-{path.stem}", decode(path).pixels


class Evaluation:
    """Runs every model over every image and keeps what it measured."""

    def __init__(self, cfg: StageConfig, codecs: dict[str, Artifact]):
        self.cfg = cfg
        self.codecs = {name: ImageCodec(saved.load_codec(artifact)) for name, artifact in codecs.items()}
        self.models = [*self.codecs, *cfg.anchors]
        self.lpips: Lpips | None = perceptual.load()
        inception = weights.find("inception")
        self.inception = fidelity.PatchFeatures(inception) if inception else None
        self.features: dict[str, list[torch.Tensor]] = {name: [] for name in ["original", *self.models]}
        self.measurements: list[Measurement] = []

    def measure(self, images: HeldOut, folder: Path) -> None:
        """Writes `files/` and `reconstructions/` and measures all of them."""
        console = Console(stderr=True)
        shown = track(images, "evaluating", total=len(images), console=console, disable=not console.is_terminal)
        for image, pixels in shown:
            _save_png(folder / "reconstructions" / "original" / f"{image}.png", pixels)
            self._features_of("original", pixels)
            target_bytes = 0
            for model in self.models:
                measured, ours = self._one(image, pixels, model, folder / "files" / model, target_bytes)
                target_bytes = target_bytes or measured.bytes
                self.measurements.append(measured)
                self._features_of(model, ours)
                _save_png(folder / "reconstructions" / model / f"{image}.png", ours)

    def totals(self) -> dict[str, dict[str, float | None]]:
        """Model -> metric -> mean over images; None where an image has no value. FID and KID over all patches."""
        result = {}
        for model in self.models:
            rows = [m for m in self.measurements if m.model == model]
            result[model] = {name: _mean([getattr(row, name) for row in rows]) for name in METRICS[:4]}
            result[model] |= {"fid": None, "kid": None}
            if self.inception is not None:
                both = fidelity.compare(torch.cat(self.features[model]), torch.cat(self.features["original"]))
                result[model] |= {"fid": both.fid, "kid": both.kid}
        return result

    def _one(
        self, image: str, pixels: Pixels, model: str, folder: Path, target_bytes: int
    ) -> tuple[Measurement, Pixels]:
        folder.mkdir(parents=True, exist_ok=True)
        codec = self.codecs.get(model)
        path = folder / f"{image}.{'illm' if codec else model}"
        started = time.perf_counter()
        path.write_bytes(codec.compress(pixels) if codec else anchors.encode(pixels, model, target_bytes))  # type: ignore[arg-type]
        written = time.perf_counter()
        ours = codec.decompress(path.read_bytes()) if codec else anchors.decode(path.read_bytes())
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


def print_table(totals: dict[str, dict[str, float | None]], num_images: int) -> None:
    """The mean of every metric that was measured, one row per model."""
    names = [name for name in METRICS if any(row[name] is not None for row in totals.values())]
    table = Table(title=f"mean over {num_images} held-out image(s)")
    table.add_column("model")
    for name in names:
        table.add_column(name, justify="right")
    for model, row in totals.items():
        table.add_row(model, *(report.shown(name, row[name]) for name in names))
    Console(width=100).print(table)


def _write_tables(folder: Path, measurements: list[Measurement], totals: dict[str, dict[str, float | None]]) -> None:
    with (folder / "per_image.csv").open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, [field.name for field in fields(Measurement)])
        writer.writeheader()
        writer.writerows(asdict(m) for m in measurements)
    (folder / "totals.json").write_text(json.dumps(totals, indent=1), encoding="utf-8")


def _save_png(path: Path, pixels: Pixels) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def _mean(values: list[float | None]) -> float | None:
    present = [value for value in values if value is not None]
    return sum(present) / len(present) if present and len(present) == len(values) else None
