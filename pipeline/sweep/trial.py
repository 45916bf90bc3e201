"""One trial: pretrain, gan and evaluate as ordinary stages in `SWEEP/trials/NAME`, resumed wherever they stopped.

Trials that differ only after pretraining share the pretrained codec, which lies in `SWEEP/pretrained/NAME`.
"""

import json
import os
import shutil
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from pipeline import config
from pipeline.artifacts import ownership, run_folder
from pipeline.errors import Preempted, UserError
from pipeline.processes import signals
from pipeline.processes.command import illm_command
from pipeline.registry import resolve
from pipeline.stages import TRAINING
from pipeline.storage import disk
from pipeline.sweep.space import Space, Values, evaluation_inputs, name_of, of_stage, overrides
from pipeline.tracking.run import run_group

SETTINGS, RESULT, STOPPED, FAILED = "settings.json", "result.json", "stopped.json", "failed.json"
# Of a population's member: which run of the gan stage is the present one
GENERATION = "generation.json"
# A trial's outcome
Point = dict[str, Any]


class TrialFailed(UserError):
    """A stage of a trial ended with an error."""


class Interrupted(Preempted):
    """The trial was asked to stop, and its stage has saved."""

    def __init__(self) -> None:
        Exception.__init__(self, "stopped; the same command continues")


def place_of(sweep: Path, values: Values) -> Path:
    """A trial's folder."""
    return sweep / "trials" / name_of(values)


def prepare(place: Path, values: Values) -> None:
    """Writes down what the trial tries."""
    place.mkdir(parents=True, exist_ok=True)
    disk.write_atomic(place / SETTINGS, json.dumps(values, indent=1, default=list).encode())


def outcome(place: Path) -> Point | None:
    """What is known of a trial that ended: metrics of its codec, or `stopped`, or `failed`; None if it has not ended."""
    for name in (RESULT, STOPPED, FAILED):
        if (place / name).is_file():
            found: Point = json.loads((place / name).read_text(encoding="utf-8"))
            return found
    return None


def run(space: Space, sweep: Path, place: Path) -> Point:
    """Runs what is left of a trial whose settings are written down.

    Raises: TrialFailed if a stage failed; Preempted after SIGTERM, when the stage has saved.
    """
    values = _settings(place)
    if (place / RESULT).is_file():
        return json.loads((place / RESULT).read_text(encoding="utf-8"))
    for stale in (FAILED, STOPPED):
        (place / stale).unlink(missing_ok=True)
    told = ", ".join(f"{key.split('.')[-1]} {_short(value)}" for key, value in values.items())
    with run_group("trial", place, f"A trial of the sweep in `{sweep}`.", values, name=told) as group:
        try:
            point = _stages(space, sweep, place, values, group.environment)
        except TrialFailed as error:
            disk.write_atomic(place / FAILED, json.dumps({"failed": str(error)}).encode())
            raise
        group.log({name: value for name, value in point.items() if isinstance(value, float)})
    disk.write_atomic(place / RESULT, json.dumps(point, indent=1).encode())
    return point


def _stages(space: Space, sweep: Path, place: Path, values: Values, environment: dict[str, str]) -> Point:
    log = place / "log.txt"
    codec = space.codec or _pretrained(space, sweep, values, environment, log)
    tuned = place / "gan"
    if space.scheduler.kind == "pbt":
        number, values = generation(place)
        tuned = place / f"gan-{number:02d}"
    words = [f"data.shards={space.shards}", f"codec={codec}", f"labeler={space.labeler}"]
    if space.scheduler.kind != "pbt":
        _share_warmup(space, sweep, place, [*words, *overrides("gan", values)])
    _stage(space, "gan", tuned, [*words, *overrides("gan", values)], environment, log)
    words = [*evaluation_inputs(space, codec, tuned), *overrides("evaluate", values)]
    _stage(space, "evaluate", place / "evaluate", words, environment, log)
    evaluation = resolve.read(str(place / "evaluate"), "evaluation")
    totals = evaluation.json("totals.json")["fine-tuned"]
    return {name: value for name, value in totals.items() if value is not None} | {"settings": values}


def _share_warmup(space: Space, sweep: Path, place: Path, words: Sequence[str]) -> None:
    """Lets a trial begin where the discriminator of another one, that differs in the GAN weight alone, had learned by itself.

    Until then both compute the same, bit for bit. Their checkpoints of that step must be kept: fit.keep_every.
    """
    # It imports torch
    from pipeline.stages import gan

    ours = place / "gan/checkpoints"
    if ours.is_dir():
        return
    cfg = config.load(gan.StageConfig, space.gan, words)
    steps, kept = cfg.discriminator_warmup_steps, cfg.fit.keep_every
    if not (steps and kept and steps % kept == 0 and cfg.adversarial_weight):
        return
    given = resolve.read_inputs(cfg, gan.facts(cfg))
    for other in sorted((sweep / "trials").glob("*/gan")):
        warm = other / f"checkpoints/step-{steps:09d}"
        has_begun = (other / run_folder.RUN_FILE).is_file()
        if not warm.is_dir() or not has_begun or _settings(other.parent).get("gan.gan_weight") == 0:
            continue
        if not run_folder.unlike(other, cfg, given, but={"gan_weight"}):
            scratch = ours.with_name("checkpoints.tmp")
            shutil.rmtree(scratch, ignore_errors=True)
            shutil.copytree(warm, scratch / warm.name)
            scratch.rename(ours)
            return


def _settings(place: Path) -> Values:
    found: Values = json.loads((place / SETTINGS).read_text(encoding="utf-8"))
    return found


def _pretrained(space: Space, sweep: Path, values: Values, environment: dict[str, str], log: Path) -> Path:
    """The run folder of the pretrained codec, trained by the first trial that needs it while the others wait."""
    place = sweep / "pretrained" / name_of(of_stage("pretrain", values))
    place.mkdir(parents=True, exist_ok=True)
    if not (place / "artifact").is_dir():
        with _locked(place / "lock"):
            if not (place / "artifact").is_dir():
                started = time.monotonic()
                words = [f"data.shards={space.shards}", *overrides("pretrain", values)]
                _stage(space, "pretrain", place, words, environment, log)
                (place / "seconds").write_text(f"{time.monotonic() - started:.1f}")
    return place


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds a lock for which another trial may train for hours. Raises: Interrupted if asked to stop while it waits."""
    with ExitStack() as held:
        with signals.stop_signals() as stopped:

            def stop_if_asked() -> None:
                if stopped():
                    raise Interrupted

            held.enter_context(disk.exclusive_lock(path, stop_if_asked))
        yield


def _stage(
    space: Space, stage: str, folder: Path, words: Sequence[str], environment: dict[str, str], log: Path
) -> None:
    processes = space.processes if stage in TRAINING else 1
    if processes > 1 and not space.gpus_per_trial:
        environment = environment | {"ACCELERATE_USE_CPU": "true"}
    command = illm_command([stage, str(getattr(space, stage)), f"run={folder}", *words], processes)
    with log.open("a", encoding="utf-8") as stream:
        # a stage of a trial whose worker died may still be saving when the trial starts again
        patience = {ownership.WAIT_ENV: os.environ.get(ownership.WAIT_ENV) or "120"}
        code, received = signals.run(command, environment | patience | signals.die_with_parent_env(), stream)
    if code and received:
        raise Interrupted
    if code:
        raise TrialFailed(f"{stage}: {reason(code, log)}; all it said is in {log}")


def reason(code: int, log: Path) -> str:
    """Why a stage ended, from its exit code and the last lines of its log."""
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines()[-60:] if line.strip()]
    if any("out of memory" in line.lower() or "OutOfMemoryError" in line for line in lines[-25:]):
        return "out of memory; lower data.batch_size, or raise engine.gradient_accumulation_steps or gpus_per_trial"
    if code in (-signal.SIGKILL, 128 + signal.SIGKILL):
        return "killed (signal 9), as the system does when memory runs out; lower `max_concurrent` or data.batch_size"
    told = [line.removeprefix("illm: ") for line in lines if line.startswith("illm: ")]
    return (told or lines or [f"exit code {code}"])[-1][:300]


def generation(place: Path) -> tuple[int, Values]:
    """Of a population's member: the number of its present gan run, and that run's values."""
    if not (place / GENERATION).is_file():
        return 0, _settings(place)
    found = json.loads((place / GENERATION).read_text(encoding="utf-8"))
    return found["number"], found["values"]


def exploit_from(place: Path, donor: Path, values: Values) -> None:
    """Makes a population's member continue from another member's newest checkpoint, with other values."""
    number, _ = generation(place)
    theirs, _ = generation(donor)
    target = place / f"gan-{number + 1:02d}"
    # Of an earlier attempt to do this
    shutil.rmtree(target, ignore_errors=True)
    for newest in sorted((donor / f"gan-{theirs:02d}" / "checkpoints").glob("step-*"), reverse=True):
        # The donor trains on, and removes old ones
        with suppress(FileNotFoundError):
            shutil.copytree(newest, target / "checkpoints" / newest.name)
            break
    about = {"number": number + 1, "values": values, "from": str(donor / f"gan-{theirs:02d}")}
    disk.write_atomic(place / GENERATION, json.dumps(about, indent=1, default=list).encode())


def _short(value: Any) -> Any:
    return f"{value:.4g}" if isinstance(value, float) else value
