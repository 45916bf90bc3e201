"""The commands that read and write single files and codecs: compress, decompress, inspect, compact, and the reference's."""

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli.arguments import ForceOption
from pipeline.errors import ConfigError
from pipeline.registry import shipped
from pipeline.registry.shipped import Quality
from pipeline.storage import outputs

app = typer.Typer()

CodecOption = Annotated[
    str | None, typer.Option(help="A run folder, or models:/NAME@ALIAS. Without: a codec of this package.")
]
OutputOption = Annotated[
    str | None, typer.Option("--output", "-o", metavar="PLACE", help="A file, a folder, or - for standard output.")
]


class NetworkKind(StrEnum):
    codec = "codec"
    labeler = "labeler"


class Names(StrEnum):
    as_imported = "as-imported"
    old = "old"
    new = "new"


@app.command()
def compress(
    images: Annotated[
        list[str],
        typer.Argument(metavar="IMAGE... [OUTPUT.illm]", help="Images, a folder of them, or - for standard input."),
    ],
    output: OutputOption = None,
    quality: Annotated[
        Quality | None,
        typer.Option("--quality", "-q", help="About 0.11, 0.33 or 0.51 bits per pixel. Without: medium."),
    ] = None,
    codec: CodecOption = None,
    force: ForceOption = False,
) -> None:
    """Compress images to files.

    PNG, JPEG, WebP, TIFF, BMP, GIF and PPM. photo.png becomes photo.illm beside it, if no output is named. A file that is
    there stays unless --force is given. The network is loaded once for all images.

    \b
    Examples:
      illm compress photo.png                        photo.illm
      illm compress photo.png -q high                larger and better
      illm compress photo.png small/photo.illm       the same elsewhere
      illm compress *.jpg -o small                   each into the folder small
      illm compress photos -o small                  a folder, with its subfolders
      illm compress - -o - < photo.png > photo.illm  from and to a pipe
    """
    if codec is not None and quality is not None:
        raise ConfigError("--quality chooses among the codecs of this package; leave it out, or --codec")
    from pipeline.bitstream import files

    chosen = shipped.PREFIX + (quality or Quality.medium) if codec is None else codec
    files.compress(images, output, chosen, force)


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
    codec: CodecOption = None,
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
def inspect(
    file: Annotated[
        str, typer.Argument(help="A compressed file, or an artifact: run folder, models:/NAME, shipped:QUALITY.")
    ],
) -> None:
    """Check a compressed file or an artifact, and print what it holds."""
    from pipeline.bitstream import files
    from pipeline.registry import resolve

    print(files.inspect(resolve.path_of(file)))


@app.command()
def compact(
    codec: Annotated[str, typer.Argument(help="A codec: a run folder, models:/NAME@ALIAS or shipped:QUALITY.")],
    run: Annotated[Path, typer.Argument(help="The run folder that gets the artifact.")],
) -> None:
    """Make a codec of a quarter of the size: the weights of its convolutions in 8 bits.

    It costs some hundredths of a decibel, which `illm evaluate` of both measures. Neither reads the files of the other.
    """
    from pipeline.models import serialization
    from pipeline.registry import resolve

    made = serialization.publish_compact(resolve.read(codec, "codec"), codec, run)
    megabytes = made.manifest.files[serialization.WEIGHTS].size / 1e6
    print(f"{made.path}: {megabytes:.1f} MB, bitstream id {made.manifest.config['bitstream_id']}")


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
    from pipeline.models import reference

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
    from pipeline.models import reference
    from pipeline.registry import resolve

    artifact = resolve.read(run, "codec", "labeler")
    print(reference.export_file(artifact, place, names.value, force), file=sys.stdout if place else sys.stderr)
