"""Arguments that several commands take, and how `run=FOLDER key=value ...` is read."""

from pathlib import Path
from typing import Annotated

import typer

from pipeline.errors import ConfigError


def _config_first(context: typer.Context, config: Path) -> Path:
    if "=" in str(config) and not config.exists():
        raise ConfigError(
            f"{config}: expected the configuration first: illm {context.info_name} CONFIG.yaml run=FOLDER key=value ..."
        )
    return config


ConfigArgument = Annotated[
    Path, typer.Argument(metavar="CONFIG.yaml", help="The stage's configuration.", callback=_config_first)
]

WordsArgument = Annotated[
    list[str] | None, typer.Argument(metavar="run=FOLDER key=value ...", help="Where to write, and overrides.")
]

ForceOption = Annotated[bool, typer.Option("--force", "-f", help="Replace what is there.")]

AliasOption = Annotated[str, typer.Option(help="Which alias.")]

NameArgument = Annotated[str, typer.Argument(help="A registered model's name.")]


def folder_and_overrides(words: list[str]) -> tuple[Path, list[str]]:
    folders = [word.removeprefix("run=") for word in words if word.startswith("run=")]
    if len(folders) != 1 or not folders[0]:
        raise ConfigError(
            f"expected exactly one run=FOLDER, the folder this run writes to and resumes from; found {len(folders)}"
        )
    return Path(folders[0]), [word for word in words if not word.startswith("run=")]
