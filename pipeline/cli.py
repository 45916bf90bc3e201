"""The `illm` command. Nothing heavy is imported before a command runs."""

import errno
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from pipeline import __version__, cli_cluster, cli_registry, outputs
from pipeline.cli_registry import ConfigArgument, ForceOption, WordsArgument, folder_and_overrides
from pipeline.errors import NO_SPACE, Preempted, UserError
from pipeline.process import follow_parent

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.EISDIR)
# how torch says it: on the processor in a RuntimeError, on a GPU in an OutOfMemoryError
_OUT_OF_MEMORY = re.compile("can't allocate memory|out of memory", re.IGNORECASE)

CodecOption = Annotated[str, typer.Option(help="A run folder, or models:/NAME@ALIAS.")]
OutputOption = Annotated[
    str | None, typer.Option("--output", "-o", metavar="PLACE", help="A file, a folder, or - for standard output.")
]


STAGE_HELP = """The same command continues a run that was interrupted. Keys and their defaults: illm describe CONFIG.yaml

An override sets one key, data.batch_size=8, or is merged into a section of the file, 'codecs={{mine: runs/mine}}'. An empty
one first removes what the file has there: codecs= 'codecs={{mine: runs/mine}}' leaves mine alone.

\b
Example:
  illm {name} configs/{name}.yaml run=runs/{name}
"""


class NetworkKind(StrEnum):
    codec = "codec"
    labeler = "labeler"


class Names(StrEnum):
    as_imported = "as-imported"
    old = "old"
    new = "new"


def _version(wanted: bool) -> None:
    if wanted:
        print(f"illm {__version__}")
        raise typer.Exit


@app.callback()
def illm(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Train, judge and use MS-ILLM image codecs. `illm COMMAND -h` tells more of each."""


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

    command.__doc__ = f"{summary}\n\n{STAGE_HELP.format(name=name)}"
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
    images: Annotated[
        list[str],
        typer.Argument(metavar="IMAGE... [OUTPUT.illm]", help="Images, a folder of them, or - for standard input."),
    ],
    output: OutputOption = None,
    codec: CodecOption = "models:/illm@champion",
    force: ForceOption = False,
) -> None:
    """Compress images to files.

    PNG, JPEG, WebP, TIFF, BMP, GIF and PPM. photo.png becomes photo.illm beside it, if no output is named. A file that is
    there stays unless --force is given. The network is loaded once for all images.

    \b
    Examples:
      illm compress photo.png                        photo.illm
      illm compress photo.png small/photo.illm       the same elsewhere
      illm compress *.jpg -o small                   each into the folder small
      illm compress photos -o small                  a folder, with its subfolders
      illm compress - -o - < photo.png > photo.illm  from and to a pipe
    """
    from pipeline.bitstream import files

    files.compress(images, output, codec, force)


@app.command()
def decompress(
    compressed: Annotated[
        list[str],
        typer.Argument(
            metavar="FILE.illm... [OUTPUT.png]",
            help="What `illm compress` wrote, a folder of that, or - for standard input.",
        ),
    ],
    output: OutputOption = None,
    codec: CodecOption = "models:/illm@champion",
    force: ForceOption = False,
) -> None:
    """Decompress files to images.

    photo.illm becomes photo.restored.png beside it, if no output is named. The output's suffix says in which format: .png,
    .jpg, .webp, .tif; standard output gets PNG. A file that is there stays unless --force is given.

    \b
    Examples:
      illm decompress photo.illm                     photo.restored.png
      illm decompress photo.illm photo.jpg           as a JPEG
      illm decompress small -o restored              all files in a folder
      illm decompress - < photo.illm | display -     from and to a pipe
    """
    from pipeline.bitstream import files

    files.decompress(compressed, output, codec, force)


@app.command()
def inspect(file: Annotated[Path, typer.Argument(help="A compressed file, or a run or artifact folder.")]) -> None:
    """Check a compressed file or an artifact, and print what it holds."""
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
    """Make an artifact from a checkpoint of the authors' code."""
    from pipeline import reference

    print(reference.import_file(file, kind.value, output, words or []))


@app.command("export-reference")
def export_reference(
    run: Annotated[str, typer.Argument(help="A codec or labeler: a run folder or models:/NAME@ALIAS.")],
    file: Annotated[Path, typer.Argument(help="The checkpoint to write.")],
    names: Annotated[
        Names, typer.Option(help="CompressAI's names: before 1.2.7 (old), since (new), or those of the imported file.")
    ] = Names.as_imported,
    force: ForceOption = False,
) -> None:
    """Write a network as a checkpoint for the authors' code."""
    place = outputs.named(str(file))
    outputs.check(place, force)
    from pipeline import reference

    print(reference.export_file(run, place, names.value, force), file=sys.stdout if place else sys.stderr)


@app.command("fetch-weights")
def fetch_weights() -> None:
    """Download the weights that LPIPS, FID and KID need, and verify them. Needs internet."""
    from pipeline import weights

    for path in weights.fetch():
        print(path)


def main() -> None:
    """Runs a command; turns what a user can mend into one line and a documented exit code."""
    follow_parent()
    # compressai 1.2.8 scripts one function with torch.jit, which newer torch deprecates; nothing a user can mend
    warnings.filterwarnings("ignore", category=FutureWarning, message=".*torch.jit.script")
    warnings.filterwarnings("ignore", category=DeprecationWarning, message=".*torch.jit.script")
    code = exit_code(app)
    code = exit_code(_flush) or code
    # a normal exit takes torch's modules apart for a second or two, and gloo's threads sometimes abort in it
    os._exit(code)


def exit_code(command: Callable[[], object]) -> int:
    """Runs a command line and tells what went wrong, if anything: what `main` does, without ending the process."""
    try:
        command()
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 1
    except (UserError, Preempted) as error:
        return _tell(str(error), error.exit_code)
    except KeyboardInterrupt:
        return _tell("interrupted; the same command continues from the last checkpoint", 130)
    except Exception as error:
        if (told := _what_to_mend(error)) is not None:
            return _tell(told, 2)
        traceback.print_exc()
        return 1
    return 0


def _flush() -> None:
    """Raises: OSError that names what could not be written; SystemExit if nobody reads any more."""
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except BrokenPipeError:
        raise SystemExit(outputs.CLOSED_PIPE) from None
    except OSError as error:
        raise OSError(error.errno, error.strerror, "the output") from None


def _what_to_mend(error: Exception) -> str | None:
    """One line about trouble with files or memory; None for what may be our mistake."""
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and _OUT_OF_MEMORY.search(str(error))):
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
    if os.environ.get("RANK", "0") == "0":  # the other processes of a distributed run say the same
        print(f"illm: {message}", file=sys.stderr)
    return code
