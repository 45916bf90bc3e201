"""Compresses held-out images to real files, decompresses them, measures, and writes a report."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from pipeline.artifacts import ownership, run_folder
from pipeline.artifacts.artifact import Artifact, publish
from pipeline.bitstream.codec import ImageCodec
from pipeline.config import Config, Input
from pipeline.evaluation import evaluator, report
from pipeline.evaluation.anchors import Anchor
from pipeline.evaluation.evaluator import Evaluator
from pipeline.evaluation.held_out import HeldOut
from pipeline.evaluation.report import print_table
from pipeline.log import logger
from pipeline.models import pretrained, serialization
from pipeline.registry import resolve
from pipeline.tracking.run import tracked_run

ModelName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$")]


class StageConfig(Config):
    """Which codecs are measured on which images."""

    stage: Literal["evaluate"] = "evaluate"
    images: Annotated[str, Input("shards", or_folder=True)]
    """Held-out images: an artifact of kind "shards", whose validation split is used, or a folder."""
    codecs: Annotated[dict[ModelName, str], Field(min_length=1), Input("codec")]
    """Codecs to evaluate: name in the report -> artifact of kind "codec"."""
    anchors: tuple[Anchor, ...] = ("jpeg", "webp")
    """Conventional codecs, each as near as it gets to the first codec's size of each image."""
    max_images: PositiveInt = 1000
    num_report_images: PositiveInt = 6
    """Number of images that the report shows side by side."""
    published_results: Literal["kodak", "clic2020", "div2k"] = "kodak"
    """Data set whose published results the figures show."""


def run(cfg: StageConfig, folder: Path) -> Path:
    """Evaluates codecs and publishes measurements, files, reconstructions, figures and the report."""
    if done := run_folder.finished(folder, cfg):
        return done
    named = resolve.read_all({name: (uri, "codec") for name, uri in cfg.codecs.items()})
    images = HeldOut(cfg.images, cfg.max_images)
    facts = {"images digest": images.digest} | {
        f"{name} weights": "present" if pretrained.find(name) else "absent" for name in pretrained.FILES
    }
    given = run_folder.Inputs(named | images.parents, facts)
    with ownership.held(folder) as still_ours:
        # another process may have finished the run while this one waited for it to exit
        if done := run_folder.finished(folder, cfg):
            return done
        run_folder.claim(folder, cfg, given)
        return _evaluate(cfg, folder, given, named, images, still_ours)


def _evaluate(
    cfg: StageConfig,
    folder: Path,
    given: run_folder.Inputs,
    named: dict[str, tuple[str, Artifact]],
    images: HeldOut,
    still_ours: Callable[[], None],
) -> Path:
    for name in pretrained.FILES:
        if pretrained.find(name) is None:
            logger.warning(pretrained.how_to_get(name))
    with tracked_run("evaluate", folder, cfg, given) as tracker:
        for uri, shards in images.parents.values():
            tracker.dataset(uri, shards, "evaluation")
        codecs = {name: ImageCodec(serialization.load_codec(artifact)) for name, (_, artifact) in named.items()}
        evaluation = Evaluator(codecs, cfg.anchors)
        totals: dict[str, dict[str, float | None]] = {}

        def write(scratch: Path) -> None:
            evaluation.measure(images, len(images), scratch)
            totals.update(evaluation.totals())
            manifest.metrics.update(
                {f"{m}/{k}": v for m, row in totals.items() for k, v in row.items() if v is not None}
            )
            evaluator.write_csv(scratch / "per_image.csv", evaluation.measurements)
            (scratch / "totals.json").write_text(json.dumps(totals, indent=1), encoding="utf-8")
            report.write(scratch, totals, cfg.published_results, cfg.num_report_images)

        # The numbers exist only once the files do: `write` adds them to the manifest.
        manifest = run_folder.manifest("evaluation", cfg, given, {}, tracker.run_id)
        artifact = publish(folder / "artifact", manifest, write, still_ours)
        tracker.log(0, {name: value for name, value in artifact.manifest.metrics.items() if value is not None})
        tracker.artifact(artifact)
    print_table(totals, len(images))
    print(f"report: {artifact.path / 'report.html'}")
    return artifact.path
