"""`make bench`: measures on this machine, prints a table, writes docs/bench/cpu.json, or the GPU's file.

ARGS names groups (gan, pretrain, vqvae, tricks, data, coding, evaluation, system; all without); other groups' rows stay in the
file.
REFERENCE=folder is where the published implementation's package lies, if it is not installed. IMAGES=folder has photos for `data`
and `evaluation`.
"""

import json
import os
import sys
import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.benchmarks import coding, data, evaluation, steps, system, tricks
from tests.benchmarks.gpu_day.rows import target as machine_file
from tests.benchmarks.measure import CUDA, Row, hardware, versions

GROUPS: dict[str, Callable[[], Iterable[Row]]] = {
    **{stage: partial(steps.rows, stage) for stage in steps.OURS},
    "tricks": tricks.rows,
    "data": data.rows,
    "coding": coding.rows,
    "evaluation": evaluation.rows,
    "system": system.rows,
}
TARGET = machine_file() if CUDA else Path("docs/bench/cpu.json")


def shown(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def main(wanted: list[str]) -> None:
    warnings.filterwarnings("ignore")
    if unknown := set(wanted) - set(GROUPS):
        sys.exit(f"no such group: {', '.join(sorted(unknown))}; there are {', '.join(GROUPS)}")
    command = " ".join(["make bench", *([f'ARGS="{" ".join(wanted)}"'] if wanted else [])])
    command = f"REFERENCE=checkout {command}" if os.environ.get("REFERENCE") else command
    command = f"IMAGES=folder {command}" if os.environ.get("IMAGES") else command
    about = {"hardware": hardware(), "versions": versions(), "command": command}
    kept = json.loads(TARGET.read_text()) if TARGET.exists() else []
    table = Table(title=f"{hardware()}, torch {versions()['torch']}")
    for heading in ("what", "ours", "against", "that", "ratio", "unit"):
        table.add_column(heading)
    for group in wanted or GROUPS:
        rows = []
        for row in GROUPS[group]():
            print(f"{row.name}: {shown(row.ours)} {row.unit}, ratio {shown(row.ratio)}", file=sys.stderr, flush=True)
            rows.append(asdict(row) | {"ratio": row.ratio, "group": group} | about)
            table.add_row(row.name, shown(row.ours), row.peer_name, shown(row.peer), shown(row.ratio), row.unit)
        kept = [row for row in kept if row.get("group") != group] + rows
        TARGET.parent.mkdir(parents=True, exist_ok=True)
        TARGET.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    Console(width=160).print(table)
    print(f"written: {TARGET}")


if __name__ == "__main__":
    main(sys.argv[1:])
