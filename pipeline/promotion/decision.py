"""Evaluates a codec for promotion: its gates, and the champion side by side with it on the same images."""

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import Field, PositiveInt

from pipeline.artifacts.artifact import Artifact
from pipeline.bitstream.codec import ImageCodec
from pipeline.config import Config, Input
from pipeline.data.images import Pixels, decode
from pipeline.errors import ArtifactError, BitstreamError, ConfigError, TrackingError
from pipeline.evaluation import comparison, evaluator, measurement
from pipeline.evaluation.comparison import Difference, Interval
from pipeline.evaluation.measurement import Measurement
from pipeline.evaluation.metric_table import PER_IMAGE, TIMES
from pipeline.models import serialization
from pipeline.promotion import gates, package
from pipeline.promotion.gates import BdRateGate, Gate, GateResult, RelativeGate
from pipeline.registry import aliases, resolve

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$")]
CHAMPION = "champion"
Rows = Sequence[Measurement]
# How far a pixel, in 0..255, decoded on another machine may be from the measured one
MAX_PIXEL_DIFF = 2


class PromotionConfig(Config):
    """Which codec of which evaluation is registered, under which name, if which gates hold."""

    evaluation: Annotated[str, Input("evaluation")]
    """Artifact of kind "evaluation"."""
    codec: str
    """The candidate: a name among the evaluation's codecs."""
    name: Name = "illm"
    alias: Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_-]*$")] = CHAMPION
    """The alias to move: champion, challenger, ..."""
    gates: Annotated[dict[str, Gate], Field(min_length=1)]
    """Gates of the codec alone: metric -> bounds."""
    against_champion: dict[str, RelativeGate] = Field(default_factory=dict)
    """Gates against the champion on the evaluation's images: metric -> largest regression."""
    bd_rate: BdRateGate | None = None
    allow_new_bitstream: bool = False
    """Accept a codec that cannot read the present champion's files."""
    max_images: PositiveInt = 100
    """Number of the evaluation's images that are decoded again here and compared with the champion's."""


@dataclass
class Decision:
    """The candidate, the champion and the verdicts."""

    codec: Artifact
    evaluation: Artifact
    # Version, or ""
    champion: str
    # The version that the alias stands for now, or ""
    expected: str
    bitstream_id: str
    verdicts: list[GateResult]
    values: dict[str, float]
    intervals: dict[str, Interval] = field(default_factory=dict)
    num_images: int = 0

    @property
    def failed(self) -> list[GateResult]:
        return [verdict for verdict in self.verdicts if verdict.holds is False]


def evaluated_codec(cfg: PromotionConfig, evaluation: Artifact) -> tuple[str, Artifact]:
    """The codec artifact that was evaluated under that name, unchanged since."""
    parents = {name: p for name, p in evaluation.manifest.parents.items() if name != "images"}
    if cfg.codec not in parents:
        raise ConfigError(f"codec: {cfg.codec!r} was not evaluated; expected one of {', '.join(parents)}")
    parent = parents[cfg.codec]
    artifact = resolve.read(parent.source, "codec")
    if artifact.digest != parent.digest:
        raise ArtifactError(f"{parent.source}: is not the codec that {cfg.evaluation} evaluated; evaluate it again")
    return parent.source, artifact


def evaluate_gates(cfg: PromotionConfig, codec: Artifact, evaluation: Artifact) -> Decision:
    """Every verdict. The candidate and the champion code the evaluation's images again, side by side in this process."""
    champion, expected = aliases.current(cfg.name, CHAMPION), aliases.current(cfg.name, cfg.alias)
    rows = measurement.read_csv(evaluation.path / "per_image.csv")
    mine = [row for row in rows if row.model == cfg.codec]
    totals = evaluation.json("totals.json")[cfg.codec]
    values = {name: value for name, value in totals.items() if value is not None}
    values["weights_mb"] = package.weights_mb(codec)
    _check_known(cfg, [*values, *TIMES], {row.model for row in rows})
    intervals = {
        name: comparison.interval([getattr(row, name) for row in mine])
        for name in PER_IMAGE
        if totals.get(name) is not None
    }
    images = EvaluatedImages(evaluation, cfg.max_images)
    ours, theirs, verdicts = ImageCodec(serialization.load_codec(codec)), None, []
    if champion:
        try:
            theirs = ImageCodec.load(f"models:/{cfg.name}/{champion}")
        except (ArtifactError, TrackingError) as error:
            # A champion that is lost can be replaced by force only
            verdicts.append(GateResult("champion", str(error), "readable", False))
    verdicts += [_undecodable(cfg, ours, evaluation, images, mine), _bitstream(cfg, ours, theirs, champion)]
    found, times = _measure(cfg, ours, theirs, images)
    values |= times
    verdicts += gates.own(cfg.gates, values, intervals)
    verdicts += gates.against_champion(cfg.against_champion, found, champion, len(images))
    if cfg.bd_rate:
        families = (*cfg.bd_rate.ours, *cfg.bd_rate.theirs)
        verdicts.append(gates.bd_rate(cfg.bd_rate, {n: [r for r in rows if r.model == n] for n in families}))
    return Decision(
        codec, evaluation, champion, expected, ours.bitstream_id.hex(), verdicts, values, intervals, len(mine)
    )


class EvaluatedImages:
    """The first images of an evaluation, as it kept them."""

    def __init__(self, evaluation: Artifact, limit: int):
        self.files = sorted((evaluation.path / "reconstructions" / "original").glob("*.png"))[:limit]

    def __len__(self) -> int:
        return len(self.files)

    def __iter__(self) -> Iterator[tuple[str, Pixels]]:
        for path in self.files:
            yield path.stem, decode(path).pixels


def _measure(
    cfg: PromotionConfig, ours: ImageCodec, theirs: ImageCodec | None, images: EvaluatedImages
) -> tuple[list[Difference], dict[str, float]]:
    """The differences from the champion, and the candidate's seconds per megapixel on this machine."""
    if not cfg.against_champion and not any(name in TIMES for name in cfg.gates):
        return [], {}
    compared = theirs if cfg.against_champion else None
    codecs = {"candidate": ours} | ({CHAMPION: compared} if compared else {})
    with tempfile.TemporaryDirectory() as scratch:
        results = evaluator.measure(codecs, images, len(images), Path(scratch), wanted=tuple(cfg.against_champion))
    mine = results.of("candidate")
    times = {name: sum(getattr(row, name) for row in mine) / len(mine) for name in TIMES}
    if not compared:
        return [], times
    found = comparison.differences(mine, results.of(CHAMPION))
    return found + comparison.set_differences(results, "candidate", CHAMPION), times


def _undecodable(
    cfg: PromotionConfig, codec: ImageCodec, evaluation: Artifact, images: EvaluatedImages, rows: Rows
) -> GateResult:
    """Whether the evaluation's files decode here to the latent that their encoder coded, and to the pixels that were
    measured, except for rounding: another number of threads or another processor sums in another order.
    """
    meant = {row.image: row.latent for row in rows}
    bad = []
    for path in images.files:
        kept = decode(evaluation.path / "reconstructions" / cfg.codec / path.name).pixels
        try:
            found = codec.decode((evaluation.path / "files" / cfg.codec / f"{path.stem}.illm").read_bytes())
        except (BitstreamError, OSError):
            bad.append(path.stem)
            continue
        same = found.symbols.digest() == meant.get(path.stem) and found.pixels.shape == kept.shape
        if not same or np.abs(found.pixels.astype(int) - kept).max() > MAX_PIXEL_DIFF:
            bad.append(path.stem)
    told = f"{len(bad)} of {len(images)} files" + (f" ({', '.join(bad[:3])})" if bad else "")
    return GateResult("undecodable", told, "0 files", not bad)


def _bitstream(cfg: PromotionConfig, ours: ImageCodec, theirs: ImageCodec | None, champion: str) -> GateResult:
    mine = ours.bitstream_id.hex()
    if theirs is None:
        bound = "as the champion's (unreadable)" if champion else "as the champion's (no champion yet)"
        return GateResult("bitstream id", mine, bound, None)
    bound = f"{theirs.bitstream_id.hex()}, as version {champion}'s"
    if cfg.allow_new_bitstream:
        return GateResult("bitstream id", mine, f"{bound} (a new one is declared)", True)
    return GateResult(
        "bitstream id", mine, f"{bound}, or allow_new_bitstream: true", ours.bitstream_id == theirs.bitstream_id
    )


def _check_known(cfg: PromotionConfig, measured: list[str], models: set[str]) -> None:
    problems = [
        f"gates: {name} was not measured; expected one of {', '.join(measured)}"
        for name in cfg.gates
        if name not in measured
    ]
    problems += [
        f"against_champion: {name}: expected one of {', '.join(gates.RELATIVE)}"
        for name in cfg.against_champion
        if name not in gates.RELATIVE
    ]
    families = (*cfg.bd_rate.ours, *cfg.bd_rate.theirs) if cfg.bd_rate else ()
    problems += [
        f"bd_rate: {name} was not evaluated; expected one of {', '.join(sorted(models))}"
        for name in families
        if name not in models
    ]
    if problems:
        raise ConfigError("\n".join(problems))
