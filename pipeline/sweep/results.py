"""What comes out of a sweep: a table, fronts, figures, and the best trials' configurations ready to run."""

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from scipy import stats

from pipeline import config, stages
from pipeline.errors import ConfigError
from pipeline.evaluation.metric_table import METRICS, REALISM, format_value, sign
from pipeline.sweep.space import Space, name_of, overrides
from pipeline.sweep.trial import Point

# Rates of trials that are compared with each other differ by less than this factor
MATCHED = 1.15
# Metrics of realism that the figure over GAN weights has beside the sweep's own, where they were measured
PANELS = ("fid_64", "vgg_fd_64", "lpips", "dists")
KINDS = {"label": "label discriminator", "patch": "PatchGAN"}


def realism_of(points: Sequence[Point], wanted: str | None) -> str:
    """The metric that stands for realism: the wanted one, else FID where there are its weights and enough patches, else the
    next best.

    Raises: ConfigError if the wanted one was not measured.
    """
    if wanted is not None and not all(wanted in p for p in points):
        raise ConfigError(
            f"realism: {wanted} was not measured in every trial (too few patches?); leave it out to take another"
        )
    return wanted or next(name for name in REALISM if all(name in p for p in points))


def mark_pareto_fronts(points: Sequence[Point], distortion: str, fidelity: str) -> None:
    """Sets on each point `rate_group`, and `front`: no other of its group is at least as good in both and better in one."""
    ordered = sorted(points, key=lambda p: p["bpp"])
    group, start = -1, 0.0
    for p in ordered:
        if group < 0 or p["bpp"] > start * MATCHED:
            group, start = group + 1, p["bpp"]
        p["rate_group"] = group
    for p in points:
        ours = _goodness(p, distortion, fidelity)
        rivals = [_goodness(q, distortion, fidelity) for q in points if q["rate_group"] == p["rate_group"]]
        p["front"] = not any(
            all(t >= o for t, o in zip(theirs, ours, strict=True)) and theirs != ours for theirs in rivals
        )


def _goodness(point: Point, *metrics: str) -> tuple[float, ...]:
    return tuple(sign(metric) * point[metric] for metric in metrics)


def fronts_figure(points: Sequence[Point], distortion: str, fidelity: str) -> Figure:
    """Distortion against fidelity, a front per rate, dominated points in gray."""
    figure = Figure(figsize=(6.8, 4.8), layout="constrained")
    axes = figure.subplots()
    for group in sorted({p["rate_group"] for p in points}):
        mine = [p for p in points if p["rate_group"] == group]
        front = sorted((p[distortion], p[fidelity]) for p in mine if p["front"])
        rates = sorted(p["bpp"] for p in mine)
        label = f"{rates[0]:.3f} bpp" if rates[0] == rates[-1] else f"{rates[0]:.3f} to {rates[-1]:.3f} bpp"
        (line,) = axes.plot(*zip(*front, strict=True), "o-", label=label)
        others = [(p[distortion], p[fidelity]) for p in mine if not p["front"]]
        if others:
            axes.plot(*zip(*others, strict=True), "o", color=line.get_color(), alpha=0.25)
    axes.plot([], [], "o", color="0.5", alpha=0.4, label="dominated")
    return _finished(figure, distortion, fidelity)


def rate_figure(points: Sequence[Point], metric: str) -> Figure:
    """All trials in the plane of rate and one metric."""
    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axes = figure.subplots()
    axes.plot([p["bpp"] for p in points], [p[metric] for p in points], "o")
    return _finished(figure, "bpp", metric, legend=False)


def headline_figure(
    points: Sequence[Point], distortion: str, fidelities: Sequence[str], base: Mapping[str, Any] | None = None
) -> Figure | None:
    """The paper's comparison: distortion and realism along the GAN weight, a line per discriminator, a panel per metric of
    realism; None if no weights were searched, or not by number.

    Of trials that differ in nothing but seeds, the mean with its 95 % interval. base: the discriminator of trials that do not
    search it; None: the published one.

    Source: Muckley et al. 2023, the figure of PSNR against FID over GAN weights.
    """
    # null, the published weight, is another one for each kind
    if not all(isinstance(p["settings"].get("gan.gan_weight"), int | float) for p in points):
        return None
    figure = Figure(figsize=(1.2 + 5.6 * len(fidelities), 4.8), layout="constrained")
    lines = _lines(points, base)
    for axes, fidelity in zip(figure.subplots(1, len(fidelities), squeeze=False)[0], fidelities, strict=True):
        for label, by_weight in sorted(lines.items()):
            # of trials that differ in their seed alone
            x, x_error, y, y_error = zip(
                *(
                    (*mean_and_error(p[distortion] for p in mine), *mean_and_error(p[fidelity] for p in mine))
                    for _, mine in sorted(by_weight.items())
                ),
                strict=True,
            )
            axes.errorbar(x, y, xerr=x_error, yerr=y_error, fmt="o-", capsize=2, label=label)
            for weight, *place in zip(sorted(by_weight), x, y, strict=True):
                axes.annotate(
                    f"{weight:.3g}", (place[0], place[1]), fontsize=7, xytext=(4, 4), textcoords="offset points"
                )
        axes.set(xlabel=METRICS[distortion].label, ylabel=METRICS[fidelity].label)
        axes.grid(alpha=0.3)
    figure.axes[0].legend(fontsize=8)
    several = max(len(mine) for by_weight in lines.values() for mine in by_weight.values())
    bars = f"; means of up to {several} seeds with 95 % intervals" if several > 1 else ""
    figure.suptitle(f"numbers at the points: GAN weight{bars}", fontsize=9)
    return figure


def _lines(points: Sequence[Point], base: Mapping[str, Any] | None) -> dict[str, dict[float, list[Point]]]:
    """Label of a line -> GAN weight -> its points. Those without a discriminator, weight 0, are the start of all lines.

    Of those that differ in their discriminator alone, which they do not have, one counts.
    """
    rates = {p["rate_group"]: min(q["bpp"] for q in points if q["rate_group"] == p["rate_group"]) for p in points}
    lines: dict[tuple[str, ...], dict[float, list[Point]]] = {}
    without: dict[str, Point] = {}
    for p in points:
        if p["settings"]["gan.gan_weight"] == 0:
            without.setdefault(name_of(p["settings"] | {"gan.discriminator": None}), p)
            continue
        line = lines.setdefault((discriminator_of(p, base), *_others(p), *_rate(p, rates)), {})
        line.setdefault(p["settings"]["gan.gan_weight"], []).append(p)
    for p in without.values():
        rest = (*_others(p), *_rate(p, rates))
        alike = [line for (_, *others), line in lines.items() if (*others,) == rest]
        for line in alike or [lines.setdefault((discriminator_of(p, base), *rest), {})]:
            line.setdefault(0.0, []).append(p)
    return {", ".join(names): line for names, line in lines.items()}


def _rate(point: Point, rates: Mapping[int, float]) -> list[str]:
    """What tells lines of several rates apart. rates: the lowest of each group."""
    return [f"{rates[point['rate_group']]:.2f} bpp"] if len(rates) > 1 else []


def discriminator_of(point: Point, base: Mapping[str, Any] | None) -> str:
    """What the figure calls it."""
    given = point["settings"].get("gan.discriminator") or base or {}
    kind = given.get("kind", "label")
    return KINDS.get(kind, kind) + ("" if given.get("conditional", True) else ", unconditional")


def _others(point: Point) -> list[str]:
    """What else tells a line from another one: not seeds, and not a rate, which is measured."""
    known = {"gan.discriminator", "gan.gan_weight", "pretrain.rate.bpp", "pretrain.rate.weight"}
    others = {key: value for key, value in point["settings"].items() if key not in known and not key.endswith(".seed")}
    return [f"{key.split('.', 1)[1]} {_cell(key, value)}" for key, value in sorted(others.items())]


def mean_and_error(values: Iterable[float]) -> tuple[float, float]:
    """Mean and half of its 95 % interval by Student's t; 0 for a single value."""
    found = np.fromiter(values, float)
    if len(found) < 2:
        return float(found.mean()), 0.0
    return float(found.mean()), float(stats.t.ppf(0.975, len(found) - 1) * stats.sem(found))


def _finished(figure: Figure, x: str, y: str, legend: bool = True) -> Figure:
    axes = figure.axes[0]
    axes.set(xlabel=METRICS[x].label, ylabel=METRICS[y].label)
    axes.grid(alpha=0.3)
    if legend:
        axes.legend(fontsize=8)
    return figure


def write(scratch: Path, space: Space, points: Sequence[Point], sweep: Path) -> None:
    """Table, figures and the best trials' configurations, into a sweep's artifact. sweep: its run folder."""
    _write_table(scratch / "trials.csv", space, points)
    finished = [p for p in points if "bpp" in p]
    fidelity = realism_of(finished, space.realism)
    fronts_figure(finished, "psnr_db", fidelity).savefig(scratch / "fronts.png", dpi=110)
    rate_figure(finished, "psnr_db").savefig(scratch / "rate.png", dpi=110)
    base = config.flatten(config.load(stages.get("gan").StageConfig, space.gan, _inputs(space, "gan")))
    ours = {key.removeprefix("discriminator."): v for key, v in base.items() if key.startswith("discriminator.")}
    panels = dict.fromkeys([fidelity, *(name for name in PANELS if all(name in p for p in finished))])
    headline = headline_figure(finished, "psnr_db", [*panels], ours)
    if headline is not None:
        headline.savefig(scratch / "gan_weights.png", dpi=110)
    for p in finished:
        if p["front"]:
            write_configs(scratch / "best" / p["name"], space, p, sweep)


def write_configs(folder: Path, space: Space, point: Point, sweep: Path) -> None:
    """A trial's stages as files that `illm STAGE FILE run=...` takes; `promote.yaml` promotes the trial itself."""
    folder.mkdir(parents=True)
    for stage in space.stages:
        cfg = config.load(
            stages.get(stage).StageConfig,
            getattr(space, stage),
            [*_inputs(space, stage), *overrides(stage, point["settings"])],
        )
        told = f"# {stage} of trial {point['name']}: bpp {point['bpp']:.4g}, PSNR {point['psnr_db']:.2f} dB\n"
        (folder / f"{stage}.yaml").write_text(told + config.dump(cfg), encoding="utf-8")
    if space.promote is not None:
        judged = [f"evaluation={sweep / 'trials' / point['name'] / 'evaluate'}", "codec=fine-tuned"]
        values = config.read_yaml(space.promote)
        values |= dict(word.split("=", 1) for word in judged)
        (folder / "promote.yaml").write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")


def _inputs(space: Space, stage: str) -> list[str]:
    """The base configs name runs/pretrain and so on; shards and labeler are the sweep's."""
    if stage == "evaluate":
        measured = [f"codecs={{pretrained: {space.codec}}}"] if space.codec else []
        return [f"images={space.images or space.shards}", *measured]
    codec = [f"codec={space.codec}"] if space.codec and stage == "gan" else []
    return [f"data.shards={space.shards}", *codec, *([f"labeler={space.labeler}"] if stage == "gan" else [])]


def columns(space: Space) -> list[str]:
    measured = [name for name in METRICS if name != "bpp"]
    return ["name", *space.search, "bpp", *measured, "rate_group", "front", "stopped", "failed"]


def _row(space: Space, point: Point) -> list[Any]:
    settings = point.get("settings", {})
    return [settings.get(name, point.get(name, "")) for name in columns(space)]


def _write_table(path: Path, space: Space, points: Sequence[Point]) -> None:
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(columns(space))
        writer.writerows([json.dumps(v) if isinstance(v, dict) else v for v in _row(space, p)] for p in points)


def print_table(space: Space, points: Sequence[Point]) -> None:
    """One row per trial, the best first within its rate."""
    ordered = sorted(points, key=lambda p: (p.get("rate_group", len(points)), not p.get("front"), -p.get("psnr_db", 0)))
    rows = [_row(space, p) for p in ordered]
    used = [
        n for n, name in enumerate(columns(space)) if name == "name" or any(row[n] not in ("", None) for row in rows)
    ]
    table = Table(title=f"{len(points)} trials")
    for n in used:
        table.add_column(columns(space)[n])
    for row in rows:
        table.add_row(*(_cell(columns(space)[n], row[n]) for n in used))
    Console(width=140).print(table)


def _cell(name: str, value: Any) -> str:
    if name in METRICS and isinstance(value, float):
        return format_value(name, value)
    if isinstance(value, dict):
        return str(value.get("kind", value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def reuse_summary(sweep: Path, points: Sequence[Point]) -> str:
    """How much the sharing of pretrained codecs saved, in measured time."""
    times = [float(path.read_text()) for path in (sweep / "pretrained").glob("*/seconds")]
    trials = sum("failed" not in p for p in points)
    if not times or trials <= len(times):
        return ""
    spared = (trials - len(times)) * sum(times) / len(times)
    return (
        f"pretrained {len(times)} codec(s) for {trials} trials: about {_duration(spared)} of training were not repeated"
    )


def _duration(seconds: float) -> str:
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"
