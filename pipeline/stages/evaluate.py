"""Compresses held-out images to real files, decompresses them, measures, and writes a report."""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, PositiveInt

from pipeline.artifacts import ownership, run_folder
from pipeline.artifacts.artifact import publish
from pipeline.config import Changeable, Config, Input
from pipeline.evaluation import anchors, comparison, ffmpeg, measurement, spread
from pipeline.evaluation.anchors import Anchor
from pipeline.evaluation.evaluator import ORIGINAL
from pipeline.evaluation.held_out import HeldOut
from pipeline.evaluation.metric_table import METRICS, print_table
from pipeline.log import logger
from pipeline.models import pretrained
from pipeline.registry import resolve
from pipeline.report import content, facts, page
from pipeline.tracking.run import tracked_run


def _free(name: str) -> str:
    if name in (ORIGINAL, "images", ".", "..", *anchors.CLASSICS):
        raise ValueError(f"{name!r} is the name of something else in evaluations; choose another name for the codec")
    return name


ModelName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$"), AfterValidator(_free)]


def _known(name: str) -> str:
    if name not in METRICS:
        raise ValueError(f"expected one of {', '.join(METRICS)}, found {name!r}")
    return name


MetricName = Annotated[str, AfterValidator(_known)]


class StageConfig(Config):
    """Which codecs are measured on which images."""

    stage: Literal["evaluate"] = "evaluate"
    images: Annotated[str, Input("shards", or_folder=True)]
    """Held-out images: an artifact of kind "shards", whose validation split is used, or a folder."""
    codecs: Annotated[dict[ModelName, str], Field(min_length=1), Input("codec")]
    """Codecs to evaluate: name in the report -> artifact of kind "codec"."""
    anchors: tuple[Anchor, ...] = ("jpeg", "webp")
    """Conventional codecs, each as near as it gets to the first codec's size of each image: jpeg, webp, avif; jpegxl and vvc
    with requirements/classics.txt."""
    metrics: tuple[MetricName, ...] | None = None
    """Metrics to measure, for instance [lpips, dists, vgg_fd_64]; null: all. Bits per pixel and PSNR always are."""
    max_images: PositiveInt = 1000
    processes: Annotated[PositiveInt | None, Changeable()] = None
    """Number of processes that share the images; null: one per core and 4 images, at most 16, and one where there is a GPU."""
    report_mb: Annotated[PositiveInt, Field(ge=10)] = 30
    """Largest size of the report in MB, which decides how its pictures are stored and of how many images it has them."""
    published_results: Literal["kodak", "clic2020", "div2k"] = "kodak"
    """Data set whose published results the report shows."""


def run(cfg: StageConfig, folder: Path) -> Path:
    """Evaluates codecs and publishes measurements, files, reconstructions and the report."""
    if done := run_folder.finished(folder, cfg):
        return done
    anchors.require(cfg.anchors)
    named = resolve.read_all({name: (uri, "codec") for name, uri in cfg.codecs.items()})
    images = HeldOut(cfg.images, cfg.max_images)
    present = {f"{name} weights": pretrained.find(name) is not None for name in pretrained.FILES}
    present["vmaf"] = ffmpeg.has("libvmaf")
    noted = {"images digest": images.digest} | {k: "present" if v else "absent" for k, v in present.items()}
    given = run_folder.Inputs(named | images.parents, noted)
    with ownership.held(folder) as still_ours:
        # another process may have finished the run while this one waited for it to exit
        if done := run_folder.finished(folder, cfg):
            return done
        run_folder.claim(folder, cfg, given)
        return _evaluate(cfg, folder, given, images, still_ours)


def _evaluate(
    cfg: StageConfig, folder: Path, given: run_folder.Inputs, images: HeldOut, still_ours: Callable[[], None]
) -> Path:
    for name in pretrained.FILES:
        if pretrained.find(name) is None:
            logger.warning(pretrained.how_to_get(name))
    with tracked_run("evaluate", folder, cfg, given) as tracker:
        for uri, shards in images.parents.values():
            tracker.dataset(uri, shards, "evaluation")
        processes = spread.num_processes(cfg.processes, len(images))
        work = spread.Work(
            tuple(cfg.codecs.items()),
            cfg.anchors,
            cfg.images,
            cfg.max_images,
            str(folder / run_folder.MEASURED),
            spread.threads(processes),
            tuple(METRICS) if cfg.metrics is None else cfg.metrics,
        )
        results = spread.measure(work, len(images), processes)
        totals = results.totals()
        metrics = {f"{m}/{k}": v for m, row in totals.items() for k, v in row.items() if v is not None}
        found = comparison.uncertainty(results)
        made = _facts(cfg, len(images), images.digest)

        def write(scratch: Path) -> None:
            spread.collect(work, len(images), scratch)
            measurement.write_csv(scratch / "per_image.csv", results.measurements)
            (scratch / "totals.json").write_text(json.dumps(totals, indent=1), encoding="utf-8")
            (scratch / "intervals.json").write_text(json.dumps(asdict(found), indent=1), encoding="utf-8")
            facts.write(scratch, made)
            page.write(scratch / "report.html", [content.read(scratch, folder.name)], cfg.report_mb)

        manifest = run_folder.manifest("evaluation", cfg, given, metrics, tracker.run_id)
        artifact = publish(folder / "artifact", manifest, write, still_ours)
        shutil.rmtree(work.folder)
        tracker.log(0, {name: value for name, value in artifact.manifest.metrics.items() if value is not None})
        tracker.artifact(artifact)
    print_table(totals, len(images))
    print(f"report: {artifact.path / 'report.html'}")
    return artifact.path


def _facts(cfg: StageConfig, count: int, digest: str) -> facts.Facts:
    settings: dict[str, str] = {name: anchors.CLASSICS[name].settings for name in cfg.anchors}
    return facts.gather(
        cfg, cfg.codecs, f"{count} of {cfg.images} (digest {digest[:12]})", settings, cfg.published_results
    )
