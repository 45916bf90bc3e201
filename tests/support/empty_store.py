"""New SQLite stores of MLflow as copies of the first one: running its hundred migrations takes seconds of every test that begins
with an empty folder."""

import os
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path


def copied(template: Path) -> Callable[[], None]:
    """From now on this process makes the tables of one new store, keeps them in `template`, and copies those to others.

    Returns what ends that.
    """
    import mlflow.store.db.utils as tables

    making = tables._initialize_tables

    def initialize(engine) -> None:
        path = engine.url.database if engine.dialect.name == "sqlite" else None
        if not path or (os.path.exists(path) and os.path.getsize(path)):
            making(engine)
        elif template.exists():
            _copy(template, path)
        else:
            making(engine)
            scratch = template.with_suffix(f".{os.getpid()}")
            _copy(path, scratch)
            scratch.rename(template)

    tables._initialize_tables = initialize

    def end() -> None:
        tables._initialize_tables = making

    return end


def _copy(source: Path | str, target: Path | str) -> None:
    with closing(sqlite3.connect(source)) as found, closing(sqlite3.connect(target)) as made:
        found.backup(made)
