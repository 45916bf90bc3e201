"""More lines than fit into memory, sorted on disk."""

import heapq
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import count
from pathlib import Path

# Bytes of the lines that are sorted in memory
RUN_BYTES = 2**27
# Files that are merged at a time: a process may usually open 1024
MERGED = 256


class SortedLines:
    """Lines of bytes without line ends, given in any order and read back sorted. The folder is its own, and new."""

    def __init__(self, folder: Path):
        self._folder, self._count, self._bytes = folder, 0, 0
        self._lines: list[bytes] = []
        self._runs: list[Path] = []
        self._names = count()
        folder.mkdir(parents=True)

    def __len__(self) -> int:
        return self._count

    def add(self, line: bytes) -> None:
        self._lines.append(line + b"\n")
        self._count += 1
        self._bytes += len(line)
        if self._bytes >= RUN_BYTES:
            self._write_run()

    def __iter__(self) -> Iterator[bytes]:
        """The lines in order, each with its line end."""
        self._write_run()
        while len(self._runs) > MERGED:
            merged, self._runs = self._runs[:MERGED], self._runs[MERGED:]
            self._runs.append(self._written(_merged(merged)))
            for run in merged:
                run.unlink()
        yield from _merged(self._runs)

    def remove(self) -> None:
        """Removes the files."""
        shutil.rmtree(self._folder)

    def _write_run(self) -> None:
        if self._lines:
            self._lines.sort()
            self._runs.append(self._written(self._lines))
            self._lines, self._bytes = [], 0

    def _written(self, lines: Iterator[bytes] | list[bytes]) -> Path:
        path = self._folder / f"{next(self._names):06d}"
        with path.open("wb") as stream:
            stream.writelines(lines)
        return path


def _merged(runs: list[Path]) -> Iterator[bytes]:
    with ExitStack() as opened:
        yield from heapq.merge(*(opened.enter_context(run.open("rb")) for run in runs))
