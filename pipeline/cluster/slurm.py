"""Submits stages to SLURM: one job per stage, each after the one before has succeeded. jobs/slurm holds what the jobs run."""

import os
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.errors import ConfigError, UserError
from pipeline.stages import TRAINING
from pipeline.stages.plan import PlannedStage

SCRIPT = Path("jobs/slurm/stage.sbatch")
WITHOUT_GPU = ("shard", "promote")
# In an array's words: the number of the task; stage.sbatch replaces it
TASK = "%TASK%"


class SlurmError(UserError):
    """SLURM is not available, or refused a job."""


@dataclass(frozen=True)
class Resources:
    """What jobs ask for. Stages that do not train take one node and at most one GPU."""

    nodes: int = 1
    # Per node
    gpus: int = 0
    # Per process that trains; 0: the site's default
    cpus: int = 0
    # As sbatch takes it; empty: the partition's default
    time: str = ""
    partition: str = ""
    # Further options of sbatch, for every job
    options: Sequence[str] = field(default_factory=tuple)

    def of(self, stage: str) -> list[str]:
        training = stage in TRAINING
        gpus = self.gpus if training else min(self.gpus, int(stage not in WITHOUT_GPU))
        words = [f"--nodes={self.nodes if training else 1}"]
        words += [f"--gpus-per-node={gpus}"] if gpus else []
        # One task per node starts them all
        words += [f"--cpus-per-task={self.cpus * max(gpus, 1)}"] if self.cpus else []
        words += [f"--time={self.time}"] if self.time else []
        words += [f"--partition={self.partition}"] if self.partition else []
        return [*words, *self.options]


@dataclass(frozen=True)
class Job:
    """One line of sbatch. after: (kind of dependency, name of an earlier job)."""

    name: str
    options: Sequence[str]
    words: Sequence[str]
    after: tuple[str, str] | None = None
    folder: Path | None = None

    def command(self, logs: Path, submitted: Mapping[str, str] | None = None) -> list[str]:
        """The line of sbatch; without the numbers of `submitted` jobs one that only tests whether SLURM would accept it."""
        array = any(option.startswith("--array") for option in self.options)
        words = ["sbatch", "--parsable", f"--job-name=illm-{self.name}"]
        words += [f"--output={logs}/{'%A-%a' if array else '%j'}-{self.name}.log", f"--comment=illm {self.folder}"]
        if submitted is None:
            words += ["--test-only"]
        elif self.after:
            kind, name = self.after
            words += [f"--dependency={kind}:{submitted[name]}", "--kill-on-invalid-dep=yes"]
        return [*words, *self.options, str(SCRIPT), *self.words]


def jobs_of(steps: Sequence[PlannedStage], resources: Resources) -> list[Job]:
    """A job per stage that is not done yet, in a chain."""
    waiting = [step for step in steps if not step.done]
    return [
        Job(
            step.stage,
            resources.of(step.stage),
            step.words,
            ("afterok", before.stage) if before else None,
            step.folder.resolve(),
        )
        for before, step in zip([None, *waiting], waiting, strict=False)
    ]


def shard_jobs(config: Path, folder: Path, overrides: Sequence[str], parts: int, resources: Resources) -> list[Job]:
    """The shard stage as arrays of `parts` jobs: list the files, examine them, write the shards, put the artifact together."""
    given = [str(config), f"run={folder}", *overrides]
    array, one = [f"--array=0-{parts - 1}", *resources.of("shard")], resources.of("shard")
    share = [f"--number={TASK}", f"--count={parts}"]
    place = folder.resolve()
    return [
        Job("list", one, ["shard-part", "list", *given], None, place),
        Job("examine", array, ["shard-part", "examine", *given, *share], ("afterok", "list"), place),
        Job("write", array, ["shard-part", "write", *given, *share], ("afterok", "examine"), place),
        Job("shard", one, ["shard", *given], ("afterok", "write"), place),
    ]


def sweep_jobs(folder: Path, trials: int, at_once: int, resources: Resources) -> list[Job]:
    """A sweep's trials as an array, and a job that collects their results."""
    array = [f"--array=0-{trials - 1}%{at_once}", *resources.of("gan")]
    return [
        Job("trial", array, ["trial", str(folder), TASK], None, folder.resolve()),
        Job("sweep", resources.of("promote"), ["sweep-results", str(folder)], ("afterany", "trial"), folder.resolve()),
    ]


def submit(jobs: Sequence[Job], folder: Path, dry_run: bool) -> Iterator[str]:
    """Submits all jobs or none; yields lines for the user. folder: the logs go below it.

    Raises: SlurmError with sbatch's own words if it refuses one; the jobs before it are canceled then.
    """
    if not SCRIPT.is_file():
        raise ConfigError(f"{SCRIPT} is not here; submit from the project's folder, which all nodes have to see")
    logs = folder / "logs"
    if dry_run:
        for job in jobs:
            yield shlex.join(job.command(logs, {other.name: f"JOB_OF_{other.name}" for other in jobs}))
        return
    if shutil.which("sbatch") is None:
        raise SlurmError("sbatch is not on the PATH: this is not a SLURM login node; --dry-run shows what would be run")
    _refuse_queued(jobs)
    for job in jobs:
        _sbatch(job, job.command(logs))
    logs.mkdir(parents=True, exist_ok=True)
    submitted: dict[str, str] = {}
    try:
        for job in jobs:
            submitted[job.name] = _sbatch(job, job.command(logs, submitted)).split(";")[0].strip()
    except SlurmError:
        if submitted:
            subprocess.run(["scancel", *submitted.values()], check=False)
        raise
    for job in jobs:
        number = submitted[job.name]
        after = f", after {submitted[job.after[1]]}" if job.after else ""
        pattern = f"{number}-*" if any(o.startswith("--array") for o in job.options) else number
        yield f"{job.name}: job {number}{after}, run {job.folder}, log {logs}/{pattern}-{job.name}.log"
    yield f"watch: squeue --me    cancel: scancel {' '.join(submitted.values())}"


def _sbatch(job: Job, command: Sequence[str]) -> str:
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if ended.returncode:
        said = [line.partition("error: ")[2] for line in ended.stderr.splitlines() if "error: " in line]
        raise SlurmError(
            f"{job.name}: SLURM refuses: {'; '.join(said) or ended.stderr.strip()}. Nothing stays submitted; `sinfo` shows the "
            "partitions and their limits"
        )
    return ended.stdout


def _refuse_queued(jobs: Sequence[Job]) -> None:
    """Raises: SlurmError if a job for one of the folders waits or runs already."""
    shown = subprocess.run(
        ["squeue", "--noheader", "--format=%A %k", "--user", str(os.getuid())],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if shown.returncode:
        raise SlurmError(
            f"squeue: {shown.stderr.strip() or 'failed'}; is the controller up? Check with `scontrol ping`"
        )
    comments = dict(line.split(" ", 1)[::-1] for line in shown.stdout.splitlines() if " " in line)
    taken = [f"{job.folder} (job {comments[comment]})" for job in jobs if (comment := f"illm {job.folder}") in comments]
    if taken:
        raise SlurmError(f"queued already: {', '.join(taken)}; wait, or `scancel` those jobs first")
