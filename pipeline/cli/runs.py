"""The commands that look at runs: report, export-run, compare-run."""

from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli.arguments import ForceOption

app = typer.Typer()


@app.command()
def report(
    evaluations: Annotated[
        list[str], typer.Argument(help="Run folders of `illm evaluate`, for instance of several rates.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The page.")] = Path("report.html"),
    max_mb: Annotated[int, typer.Option(min=10, help="Its largest size in MB.")] = 30,
    force: ForceOption = False,
) -> None:
    """Write one HTML page of several evaluations: their codecs in the same plots, pictures and tables."""
    from pipeline.registry import resolve
    from pipeline.report import content, page
    from pipeline.storage import outputs

    outputs.check(output, force)
    found = content.read_several([(name, resolve.read(name, "evaluation")) for name in evaluations])
    outputs.write(output, page.make(found, max_mb).encode(), force)
    print(f"report: {output}")


@app.command("export-run")
def export_run(
    run: Annotated[Path, typer.Argument(help="A training stage's run folder.")],
    output: Annotated[str, typer.Argument(metavar="CURVES.json", help="The file, or - for standard output.")],
    force: ForceOption = False,
) -> None:
    """Write a training run's curves, configuration and machine to a file that other runs are compared with."""
    from pipeline.storage import outputs
    from pipeline.tracking import curves

    path = outputs.named(output)
    if path is not None:
        outputs.check(path, force)
    outputs.write(path, curves.as_json(curves.of_run(run)).encode(), force)


@app.command("compare-run")
def compare_run(
    run: Annotated[str, typer.Argument(help="A training stage's run folder, of a run in progress too.")],
    reference: Annotated[str, typer.Argument(help="A file of docs/runs or of export-run, or another run folder.")],
) -> None:
    """Say where a training run's curves leave those of a reference run."""
    from pipeline.tracking import curves

    print(curves.as_text(curves.of(run), curves.of(reference), run, reference))
