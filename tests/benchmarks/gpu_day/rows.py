"""Rows of figures in one JSON file per machine. The rows of a step replace that step's earlier ones."""

import json
import os
import re
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import torch

from tests.benchmarks.measure import CUDA, hardware, versions

# What a measurement found: numbers, texts, or a dict of numbers
Result = dict[str, object]
# The rows of a step: a name, and what measures it
Rows = Iterator[tuple[str, Callable[[], Result]]]


class LeftOut(Exception):
    """What a row needs is not here; the row says so, and nothing has failed."""


def target() -> Path:
    """The file of this machine's rows, in the folder OUT or in docs/bench."""
    folder = Path(os.environ.get("OUT") or "docs/bench")
    found = re.search(r"[A-Z]{0,3}\d+\w*", torch.cuda.get_device_name()) if CUDA else None
    return folder / f"{found.group().lower() if found else 'gpu' if CUDA else 'no-gpu'}.json"


class Group:
    """The rows of one step."""

    def __init__(self, name: str, command: str):
        self.name, self.path = name, target()
        self.about = {"hardware": hardware(), "versions": versions(), "command": command}
        self.about["date"] = datetime.now(UTC).date().isoformat()

    def begin(self) -> None:
        """Removes the step's earlier rows."""
        self._write([row for row in self._read() if row["group"] != self.name])

    def add(self, name: str, result: Result) -> None:
        self._write([*self._read(), {"group": self.name, "name": name, **rounded(result), **self.about}])
        print(f"{name}: {rounded(result)}", flush=True)

    def _read(self) -> list[Result]:
        # A new folder begins with the rows there are, so that its file can take the place of the one in docs/bench
        there = [path for path in (self.path, Path("docs/bench") / self.path.name) if path.exists()]
        return json.loads(there[0].read_text(encoding="utf-8")) if there else []

    def _write(self, rows: list[Result]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        scratch = self.path.with_suffix(".new")
        scratch.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
        scratch.replace(self.path)


def rounded(value: object) -> object:
    """Numbers with four digits, in whatever holds them: the rest is noise."""
    if isinstance(value, dict):
        return {key: rounded(inner) for key, inner in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value
