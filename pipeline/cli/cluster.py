"""The commands around clusters: submit, doctor."""

import shlex
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli.arguments import ConfigArgument, folder_and_overrides
from pipeline.cli.arguments import WordsArgument as FolderWords
from pipeline.errors import UserError

app = typer.Typer()
submit = typer.Typer(help="Submit stages to a cluster.", no_args_is_help=True)
app.add_typer(submit, name="submit")


class Part(StrEnum):
    list = "list"
    examine = "examine"
    write = "write"


StagesOption = Annotated[str, typer.Option(help='In order, for instance "vqvae pretrain gan evaluate".')]
ConfigsOption = Annotated[Path, typer.Option(help="Folder with one configuration per stage.")]
RunsOption = Annotated[Path, typer.Option(help="Each stage runs in RUNS/STAGE.")]
WordsArgument = Annotated[list[str] | None, typer.Argument(metavar="STAGE.key=value ...", help="Overrides.")]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Check everything, print the commands, submit nothing.")]
GpusOption = Annotated[int, typer.Option(min=0, help="Per node; 0: train on the CPU.")]

WorkersOption = Annotated[int, typer.Option(min=1, help="Processes that train a stage.")]


def _none_or_one(gpus: float) -> float:
    if gpus not in (0, 1):
        raise UserError(
            f"--gpus {gpus:g}: expected 0 or 1, a process trains on one GPU; --workers says how many there are"
        )
    return gpus


def _words_of(sbatch: str) -> list[str]:
    try:
        return shlex.split(sbatch)
    except ValueError as error:
        raise UserError(f"--sbatch {sbatch}: {error}; expected options as in a shell") from None


WorkerGpusOption = Annotated[float, typer.Option(help="Of each worker: 0 or 1.", callback=_none_or_one)]


@submit.command("slurm")
def submit_slurm(
    words: WordsArgument = None,
    stages: StagesOption = "",
    configs: ConfigsOption = Path("configs"),
    runs: RunsOption = Path("runs"),
    nodes: Annotated[int, typer.Option(min=1, help="For each stage that trains.")] = 1,
    gpus: GpusOption = 0,
    cpus: Annotated[int, typer.Option(min=0, help="Per process that trains; 0: the site's default.")] = 0,
    time: Annotated[str, typer.Option(help="As sbatch takes it, for instance 24:00:00.")] = "",
    partition: Annotated[str, typer.Option(help="Default: the cluster's.")] = "",
    sbatch: Annotated[str, typer.Option(help='More options, for instance "--account=a --qos=b".')] = "",
    dry_run: DryRunOption = False,
) -> None:
    """One job per stage, each after the one before has succeeded."""
    from pipeline.cluster import slurm
    from pipeline.stages import plan

    steps = plan.plan(stages.split(), configs, runs, words or [], nodes * max(gpus, 1))
    _tell_done(steps)
    resources = slurm.Resources(nodes, gpus, cpus, time, partition, _words_of(sbatch))
    for line in slurm.submit(slurm.jobs_of(steps, resources), runs, dry_run):
        print(line)


JobsOption = Annotated[int, typer.Option(min=1, help="How many jobs share the work.")]
SbatchOption = Annotated[str, typer.Option(help='Options of sbatch, for instance "--time=60 --partition=p".')]


@submit.command("slurm-shard")
def submit_slurm_shard(
    config: ConfigArgument,
    words: FolderWords = None,
    jobs: JobsOption = 8,
    sbatch: SbatchOption = "",
    dry_run: DryRunOption = False,
) -> None:
    """Sharding as arrays of jobs: for more images than one node reads in a day."""
    from pipeline.cluster import slurm
    from pipeline.stages import plan

    folder, overrides = folder_and_overrides(words or [])
    plan.check_sources(config, overrides)
    resources = slurm.Resources(options=_words_of(sbatch))
    for line in slurm.submit(slurm.shard_jobs(config, folder, overrides, jobs, resources), folder, dry_run):
        print(line)


@submit.command("slurm-sweep")
def submit_slurm_sweep(
    config: ConfigArgument,
    words: FolderWords = None,
    max_parallel: Annotated[int, typer.Option(min=1, help="Trials that run at the same time.")] = 8,
    gpus: GpusOption = 0,
    sbatch: SbatchOption = "",
    dry_run: DryRunOption = False,
) -> None:
    """A sweep as an array of jobs, without Ray. For searches whose trials do not depend on each other."""
    from pipeline import config as configs
    from pipeline.cluster import slurm
    from pipeline.sweep import checks, space, stage

    folder, overrides = folder_and_overrides(words or [])
    cfg = configs.load(stage.StageConfig, config, overrides)
    space.require_static_trials(cfg)
    if dry_run:
        checks.check(cfg)
    else:
        stage.begin_array(cfg, folder)
    resources = slurm.Resources(gpus=gpus, options=_words_of(sbatch))
    for line in slurm.submit(
        slurm.sweep_jobs(folder, len(space.enumerate_trials(cfg)), max_parallel, resources), folder, dry_run
    ):
        print(line)


@app.command("shard-part", hidden=True)
def shard_part(
    what: Annotated[Part, typer.Argument(help="In this order; all jobs of one before the next.")],
    config: ConfigArgument,
    words: FolderWords = None,
    number: Annotated[int, typer.Option(min=0, help="Of this job, from 0 on.")] = 0,
    count: JobsOption = 1,
) -> None:
    """A share of the shard stage: what an array of jobs runs."""
    from pipeline import config as configs
    from pipeline.stages import shard

    folder, overrides = folder_and_overrides(words or [])
    print(shard.run_part(configs.load(shard.StageConfig, config, overrides), folder, what.value, number, count))


@app.command("sweep-results")
def sweep_results(
    sweep: Annotated[Path, typer.Argument(help="A sweep's run folder.")],
    allow_failed: Annotated[bool, typer.Option("--allow-failed", help="Leave out trials that failed.")] = False,
) -> None:
    """Collect the trials of a sweep that ran as an array of jobs."""
    from pipeline.sweep import stage

    print(f"sweep: done: {stage.gather(sweep, allow_failed)}")


@app.command()
def doctor(
    folder: Annotated[Path, typer.Option(help="Where runs will be.")] = Path("runs"),
    nodes: Annotated[int, typer.Option(help="On this many SLURM nodes, through srun; 0: here.")] = 0,
    srun: Annotated[str, typer.Option(help='Options of srun, for instance "--partition=p --gpus-per-node=8".')] = "",
) -> None:
    """Check that this machine, or the nodes of a cluster, have what jobs need."""
    from pipeline.cluster import doctor as doctors

    if nodes:
        raise SystemExit(doctors.on_nodes(nodes, folder, shlex.split(srun)))
    failed = 0
    for finding in doctors.run(folder):
        print(finding, flush=True)
        failed += finding.level == "FAIL"
    if failed:
        raise doctors.DoctorFailed(f"{failed} finding(s) would stop jobs; see FAIL above")


def _tell_done(steps: list) -> None:  # type: ignore[type-arg]
    for step in steps:
        if step.done:
            print(f"{step.stage}: already done: {step.folder / 'artifact'}")


@app.command(hidden=True)
def trial(
    sweep: Annotated[Path, typer.Argument(help="A sweep's run folder.")],
    name: Annotated[str, typer.Argument(help="The trial's folder, or its number from 0 on.")],
) -> None:
    """Run one trial of a sweep: what the sweep itself and array jobs start."""
    from pipeline.sweep import stage

    point = stage.run_trial(sweep, name)
    print(
        f"trial {name}: " + "  ".join(f"{key} {value:.4g}" for key, value in point.items() if isinstance(value, float))
    )


@submit.command("ray")
def submit_ray(
    words: WordsArgument = None,
    stages: StagesOption = "",
    configs: ConfigsOption = Path("configs"),
    runs: RunsOption = Path("runs"),
    workers: WorkersOption = 1,
    gpus: WorkerGpusOption = 0,
    address: Annotated[
        str, typer.Option(envvar=["RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"], help="Of the cluster's jobs.")
    ] = "http://127.0.0.1:8265",
    wait: Annotated[bool, typer.Option("--wait", help="Show the job's output until it ends.")] = False,
    dry_run: DryRunOption = False,
) -> None:
    """All stages as one job on a running Ray cluster."""
    from pipeline.cluster import ray_submit
    from pipeline.stages import plan

    steps = plan.plan(stages.split(), configs, runs, words or [], workers)
    _tell_done(steps)
    given = [f"--stages={stages}", f"--configs={configs}", f"--runs={runs}", f"--workers={workers}", f"--gpus={gpus:g}"]
    raise SystemExit(ray_submit.submit([*given, *(words or [])], address, wait, dry_run))


@app.command(
    "launch",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    add_help_option=False,
)
def launch(context: typer.Context) -> None:
    """Start a stage as several processes: `illm launch [options of accelerate launch] -m pipeline STAGE ...`.

    Unlike `accelerate launch`, it forwards SIGTERM, SIGUSR2, SIGHUP and SIGINT to the processes, which save a checkpoint, and
    exits with their exit code.
    """
    from pipeline.training import launch as launcher

    raise SystemExit(launcher.launch(context.args))


@app.command("on-ray", hidden=True)
def on_ray(
    words: WordsArgument = None,
    stages: StagesOption = "",
    configs: ConfigsOption = Path("configs"),
    runs: RunsOption = Path("runs"),
    workers: WorkersOption = 1,
    gpus: WorkerGpusOption = 0,
) -> None:
    """What a job of `submit ray` runs on the cluster: the stages, in order."""
    from pipeline.cluster import ray_run
    from pipeline.stages import plan

    ray_run.run(plan.plan(stages.split(), configs, runs, words or [], workers), workers, gpus)
