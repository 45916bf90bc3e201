"""What a run tells its tracking store, kept on disk until the store has it: in order, and nothing twice.

`tracking.jsonl` in the run folder holds one record per line; `tracking.delivered` says for which run of the store and up
to which byte they were delivered. A thread delivers; whoever records never waits for it.
"""

import json
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

from pipeline.artifacts.run_folder import DELIVERED, RECORDS
from pipeline.errors import NO_SPACE
from pipeline.log import logger
from pipeline.storage import disk

# Records handed over together
BATCH_SIZE = 200
# Seconds between two tries to reach a store that is unavailable
FIRST_RETRY_S, MAX_RETRY_S = 0.5, 30.0

Record = dict[str, Any]
# Raises StoreUnavailable if it is to be tried again later
Send = Callable[[list[Record]], None]


class StoreUnavailable(Exception):
    """The store cannot be reached now."""


class Journal:
    """The records of one run folder, on their way to the run `run_id` of the store called `store`."""

    def __init__(self, folder: Path, run_id: str, store: str, send: Send):
        self.folder, self.run_id, self.store, self._send = folder, run_id, store, send
        self._path = folder / RECORDS
        # Whole lines that found no room on the disk
        self._unwritten = b""
        self._changed, self._lock = threading.Condition(), threading.Lock()
        self._closing = False
        self._hurry = threading.Event()
        self._recorded = self._known_steps()
        self._sent = self._sent_until()
        self._thread = threading.Thread(target=self._deliver, name="tracking", daemon=True)
        self._thread.start()

    def metrics(self, step: int, metrics: dict[str, float], time_ms: int) -> None:
        """Records metrics, leaving out those that are known for this or a later step: a resumed run repeats some."""
        new = {name: value for name, value in metrics.items() if step > self._recorded.get(name, -1)}
        if new:
            self._recorded |= dict.fromkeys(new, step)
            self.add({"kind": "metrics", "step": step, "time_ms": time_ms, "metrics": new})

    def add(self, record: Record) -> None:
        """Appends a record. A full disk loses nothing: what found no room is written with the next record."""
        with self._lock:
            self._unwritten += json.dumps(record).encode() + b"\n"
            before = self._path.stat().st_size if self._path.exists() else 0
            try:
                with self._path.open("ab") as stream:
                    stream.write(self._unwritten)
                self._unwritten = b""
            except OSError as error:
                if error.errno not in NO_SPACE:
                    raise
                # whatever part of it found room
                if self._path.exists():
                    os.truncate(self._path, before)
        with self._changed:
            self._changed.notify()

    def close(self, patience: float) -> int:
        """Waits up to `patience` seconds for delivery; returns the number of records that are left."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._hurry.set()
        self._thread.join(patience)
        return _lines_after(self._path, self._sent)

    def _deliver(self) -> None:
        pause, told = FIRST_RETRY_S, False
        while True:
            # Before looking: what is recorded before closing is found by this or the next look
            closing = self._closing
            records, end = self._next()
            if not records:
                if closing:
                    return
                with self._changed:
                    if not self._closing:
                        self._changed.wait(timeout=1)
                continue
            try:
                self._send(records)
            except StoreUnavailable as error:
                if not told:
                    logger.warning(
                        f"{self.store} is unavailable ({error}); records are kept in {self._path} until it is reachable"
                    )
                told = True
                if self._hurry.wait(pause):
                    # Closing: one more try at once, then in the usual rhythm
                    self._hurry.clear()
                pause = min(2 * pause, MAX_RETRY_S)
                continue
            if told:
                logger.info(f"{self.store} is reachable again; the records kept meanwhile are delivered")
            pause, told = FIRST_RETRY_S, False
            self._sent = end
            # A full disk: then some are delivered again, and the store knows them
            with suppress(OSError):
                disk.write_atomic(self.folder / DELIVERED, json.dumps({"run": self.run_id, "bytes": end}).encode())

    def _next(self) -> tuple[list[Record], int]:
        """The next records to deliver and where they end."""
        # not while a line is written that a full disk may cut: a reader in the middle of it would see it change
        with self._lock:
            return read(self.folder, self._sent, BATCH_SIZE)

    def _known_steps(self) -> dict[str, int]:
        """Name of metric -> last step it was recorded for; cuts off what a killed process left of a line."""
        self._cut()
        known: dict[str, int] = {}
        for record in read(self.folder)[0]:
            known |= dict.fromkeys(record.get("metrics", ()), record.get("step", 0))
        return known

    def _cut(self) -> None:
        """Removes an unfinished line at the end."""
        if self._path.exists():
            content = self._path.read_bytes()
            whole = content.rfind(b"\n") + 1
            if whole < len(content):
                os.truncate(self._path, whole)

    def _sent_until(self) -> int:
        """How many bytes the store's run has; a new run of the store gets everything."""
        delivered = _delivered(self.folder)
        return delivered["bytes"] if delivered["run"] == self.run_id else 0


def read(folder: Path, start: int = 0, limit: int | None = None) -> tuple[list[Record], int]:
    """The whole records of a run folder from byte `start` on, at most `limit` of them, and the byte where they end."""
    try:
        with (folder / RECORDS).open("rb") as stream:
            stream.seek(start)
            lines = [line for line in islice(stream, limit) if line.endswith(b"\n")]
    except FileNotFoundError:
        return [], start
    return [json.loads(line) for line in lines], start + sum(map(len, lines))


def attempts(folder: Path) -> int:
    """How many attempts at the run of a folder have begun."""
    return sum(record.get("status") == "RUNNING" for record in read(folder)[0])


def undelivered(folder: Path) -> int:
    """How many records in `folder` its store does not have yet."""
    return _lines_after(folder / RECORDS, _delivered(folder)["bytes"])


def _lines_after(path: Path, start: int) -> int:
    return path.read_bytes()[start:].count(b"\n") if path.exists() else 0


def _delivered(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / DELIVERED).read_text())
        return {"run": str(found["run"]), "bytes": int(found["bytes"])}
    except (OSError, ValueError, KeyError, TypeError):
        return {"run": "", "bytes": 0}
