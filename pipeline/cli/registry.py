"""The commands around registered models: promote, rollback, history, compare, lineage, prune."""

from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli.arguments import (
    AliasOption,
    ConfigArgument,
    ForceOption,
    NameArgument,
    WordsArgument,
    folder_and_overrides,
)

app = typer.Typer()


@app.command()
def promote(
    config: ConfigArgument,
    words: WordsArgument = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Evaluate and show the gates; change nothing.")] = False,
    force: Annotated[
        str, typer.Option(metavar="REASON", help="Promote although gates fail; the reason is recorded.")
    ] = "",
    reason: Annotated[str, typer.Option(metavar="TEXT", help="Recorded with the promotion.")] = "",
) -> None:
    """Register an evaluated codec and move an alias to it, if its gates hold."""
    from pipeline import config as configs
    from pipeline.stages import promote as stage
    from pipeline.tracking.run import deliver_rest

    folder, overrides = folder_and_overrides(words or [])
    cfg = configs.load(stage.StageConfig, config, overrides)
    path = stage.run(cfg, folder, dry_run, force, reason)
    if not dry_run:
        deliver_rest(folder)
        print(f"promote: done: {path}")


@app.command()
def rollback(
    name: NameArgument,
    reason: Annotated[str, typer.Option(help="Recorded in the history.")],
    alias: AliasOption = "champion",
    to: Annotated[str, typer.Option(metavar="VERSION", help="Default: the version before the current one.")] = "",
) -> None:
    """Point an alias back at an earlier version."""
    from pipeline.registry import rollback as back

    print(back.rollback(name, alias, to, reason))


@app.command()
def history(
    name: NameArgument,
    alias: AliasOption = "champion",
    json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """Print every change of an alias: when, who, from, to, why."""
    from pipeline.registry import rollback as back

    print(back.history(name, alias, json))


@app.command()
def compare(
    first: Annotated[str, typer.Argument(help="An alias, a run folder, or a models:/ URI.")],
    second: Annotated[str, typer.Argument(help="What it is compared with.")],
    images: Annotated[str, typer.Option(help="A folder of images, or shards, whose validation images are taken.")],
    model: Annotated[str, typer.Option(help="The registered model whose aliases are meant.")] = "illm",
    max_images: Annotated[int, typer.Option(min=1)] = 1000,
    json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """Measure two codecs side by side on the same images."""
    from pipeline.evaluation import compare as comparing

    print(comparing.run(first, second, model, images, max_images, json))


@app.command()
def lineage(
    name: Annotated[str, typer.Argument(help="A run folder, or models:/NAME@ALIAS.")],
    json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
    figure: Annotated[Path | None, typer.Option(help="Also draw it to this file: .png, .svg or .pdf.")] = None,
    verify_shards: Annotated[
        bool, typer.Option("--verify-shards", help="Also hash the shards' tars, which reads all images.")
    ] = False,
    force: ForceOption = False,
) -> None:
    """Print what an artifact was made from, back to the shards, verifying digests on the way."""
    from pipeline.errors import ArtifactError
    from pipeline.registry import lineage as lines

    if figure:
        lines.check_figure(figure, force)
    tree = lines.trace(name, verify_shards)
    print(lines.as_json(tree) if json else lines.as_text(tree))
    if figure:
        lines.draw(tree, figure, force)
    if problems := lines.broken(tree):
        raise ArtifactError("\n".join(problems))


@app.command()
def prune(
    runs: Annotated[Path, typer.Argument(help="The folder that holds the runs.")] = Path("runs"),
    remove: Annotated[bool, typer.Option("--remove", help="Remove what is listed.")] = False,
    older_than: Annotated[
        float, typer.Option(metavar="DAYS", min=0, help="Only what has not changed for this long.")
    ] = 30,
) -> None:
    """List artifacts and checkpoints that no registered version and no unfinished run needs."""
    from pipeline.registry import prune as pruning

    leftovers = pruning.find(runs, older_than)
    print(pruning.as_text(leftovers))
    if remove:
        pruning.remove(leftovers)
        print(f"removed {len(leftovers)} folder(s)")
    elif leftovers:
        print("nothing was removed; --remove does it")
