"""The `illm` command. Nothing heavy is imported before a command runs."""

import errno
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from pipeline import cli_cluster, cli_registry
from pipeline.cli_registry import ConfigArgument, WordsArgument, folder_and_overrides
from pipeline.errors import NO_SPACE, Preempted, UserError
from pipeline.process import clean_up_when_interrupted, follow_parent

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)

CodecOption = Annotated[str, typer.Option(help="A run folder, or models:/NAME@ALIAS.")]

INTERRUPTED = 128 + 2  # exit code after Ctrl-C where there was nothing to save
_CONTINUES = "interrupted; the same command does it again, and a stage goes on from what it has saved"


class NetworkKind(StrEnum):
    codec = "codec"
    labeler = "labeler"


class Names(StrEnum):
    as_imported = "as-imported"
    old = "old"
    new = "new"


def _stage(name: str, summary: str) -> None:
    def command(config: ConfigArgument, words: WordsArgument = None) -> None:
        from pipeline import config as configs
        from pipeline import runs, stages, tracking

        folder, overrides = folder_and_overrides(words or [])
        stage = stages.get(name)
        cfg = configs.load(stage.StageConfig, config, overrides)
        if done := runs.finished(folder, cfg):
            tracking.deliver_rest(folder)
            print(f"{name}: already done: {done}")
            return
        artifact = stage.run(cfg, folder)
        if os.environ.get("RANK", "0") == "0":
            print(f"{name}: done: {artifact}")

    command.__doc__ = summary
    app.command(name)(command)


_stage("shard", "Turn a folder of images into WebDataset tars.")
_stage("vqvae", "Train the VQ-VAE that labels image patches.")
_stage("pretrain", "Train a codec for rate and distortion.")
_stage("gan", "Fine-tune a codec against the label discriminator.")
_stage("evaluate", "Compress held-out images to files, measure, and write a report.")
_stage("sweep", "Search over settings with Ray Tune.")
app.add_typer(cli_registry.app)
app.add_typer(cli_cluster.app)


@app.command()
def describe(
    config: ConfigArgument,
    words: Annotated[list[str] | None, typer.Argument(metavar="key=value ...", help="Overrides.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """Print what a configuration would do, without doing it."""
    from pipeline import describe as descriptions

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
    from pipeline import demo as demonstration

    demonstration.run(configs, run, data or None)


@app.command()
def compress(
    image: Annotated[Path, typer.Argument(help="PNG, JPEG, WebP, TIFF or BMP.")],
    output: Annotated[Path | None, typer.Argument(help="Default: the image's name with .illm.")] = None,
    codec: CodecOption = "models:/illm@champion",
) -> None:
    """Compress an image to a file."""
    from pipeline.bitstream import files

    print(files.compress(image, output or image.with_suffix(".illm"), codec))


@app.command()
def decompress(
    file: Annotated[Path, typer.Argument(help="A file that `illm compress` wrote.")],
    output: Annotated[Path | None, typer.Argument(help="Default: the file's name with .png.")] = None,
    codec: CodecOption = "models:/illm@champion",
) -> None:
    """Decompress a file to an image."""
    from pipeline.bitstream import files

    print(files.decompress(file, output or file.with_suffix(".png"), codec))


@app.command()
def inspect(file: Annotated[Path, typer.Argument(help="A compressed file, or a run or artifact folder.")]) -> None:
    """Print what a compressed file or an artifact holds, after checking it."""
    from pipeline.bitstream import files

    print(files.inspect(file))


@app.command("import-reference")
def import_reference(
    file: Annotated[Path, typer.Argument(help="A checkpoint of the published implementation.")],
    words: Annotated[
        list[str] | None, typer.Argument(metavar="key=value ...", help="Architecture, if not the published one.")
    ] = None,
    kind: Annotated[NetworkKind, typer.Option(help="Which network it holds.")] = NetworkKind.codec,
    output: Annotated[Path, typer.Option(help="The run folder that gets the artifact.")] = Path("runs/reference"),
) -> None:
    """Make an artifact from a checkpoint of the published implementation."""
    from pipeline import reference

    print(reference.import_file(file, kind.value, output, words or []))


@app.command("export-reference")
def export_reference(
    run: Annotated[str, typer.Argument(help="A codec or labeler: a run folder or models:/NAME@ALIAS.")],
    file: Annotated[Path, typer.Argument(help="The checkpoint to write.")],
    names: Annotated[
        Names, typer.Option(help="CompressAI's names: before 1.2.7 (old), since (new), or those of the imported file.")
    ] = Names.as_imported,
) -> None:
    """Write a codec or labeler as a checkpoint that the published implementation loads."""
    from pipeline import reference

    print(reference.export_file(run, file, names.value))


@app.command("fetch-weights")
def fetch_weights() -> None:
    """Download the weights that LPIPS, FID and KID need, and verify them. Needs internet."""
    from pipeline import weights

    for path in weights.fetch():
        print(path)


def main() -> None:
    """Runs a command; turns what a user can mend into one line and a documented exit code."""
    follow_parent()
    clean_up_when_interrupted()
    # compressai 1.2.8 scripts one function with torch.jit, which newer torch deprecates; nothing a user can mend
    warnings.filterwarnings("ignore", category=FutureWarning, message=".*torch.jit.script")
    warnings.filterwarnings("ignore", category=DeprecationWarning, message=".*torch.jit.script")
    code = exit_code(app)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(
        code
    )  # a normal exit takes torch's modules apart for a second or two, and gloo's threads sometimes abort in it


def exit_code(command: Callable[[], object]) -> int:
    """Runs a command line and tells what went wrong, if anything: what `main` does, without ending the process."""
    try:
        command()
    except SystemExit as stop:
        if stop.code == INTERRUPTED:  # Typer has made this of Ctrl-C, and said nothing
            return _tell(_CONTINUES, INTERRUPTED)
        return stop.code if isinstance(stop.code, int) else 1
    except (UserError, Preempted) as error:
        return _tell(str(error), error.exit_code)
    except OSError as error:
        if error.errno in (
            *NO_SPACE,
            errno.EACCES,
            errno.EPERM,
            errno.EROFS,
            errno.ENOTDIR,
            errno.EEXIST,
            errno.EISDIR,
        ):
            full = "free some space" if error.errno in NO_SPACE else "choose a place that can be written"
            return _tell(
                f"cannot write {error.filename or 'a file'}: {error.strerror}; {full} and run the same command", 2
            )
        traceback.print_exc()
        return 1
    except KeyboardInterrupt:
        return _tell(_CONTINUES, INTERRUPTED)
    except Exception:
        traceback.print_exc()
        return 1
    return 0


def _tell(message: str, code: int) -> int:
    if os.environ.get("RANK", "0") == "0":  # the other processes of a distributed run say the same
        print(f"illm: {message}", file=sys.stderr)
    return code
