"""Checkpoints: what resumes this run. Save in the background, find the newest valid one, prune.

A checkpoint is a folder `checkpoints/step-000001000` with `state.pt` and a `manifest.json` that holds its digest. It is
written under a scratch name, flushed and renamed, so a kill at any moment leaves the earlier ones as they were. Its
contents do not depend on the engine or the number of processes.
"""

import hashlib
import json
import os
import pickle
import shutil
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import torch
from torch import Tensor

from pipeline.errors import NO_SPACE
from pipeline.log import logger
from pipeline.storage.disk import fsync_folder, sha256, write_atomic

# In a checkpoint, written last: where training stood, and the digest of its state
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class TrainProgress:
    """Where training stands: updates of the main network, and crops taken from the stream by all processes."""

    step: int
    samples: int


def save(
    folder: Path, progress: TrainProgress, state: dict[str, Any], keep: int, keep_every: int | None = None
) -> None:
    """Writes a checkpoint and removes all but the newest `keep` and those at multiples of `keep_every` steps.

    Raises: OSError if there is no room for it; the earlier ones are as they were then.
    """
    root = folder / "checkpoints"
    target = path_of(folder, progress.step)
    scratch = root / f".{target.name}.tmp"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        with (scratch / "state.pt").open("wb") as stream:
            digesting = _Digesting(stream)
            torch.save(state, digesting)  # type: ignore[arg-type]  # only writes
            stream.flush()
            os.fsync(stream.fileno())
        about = {"progress": asdict(progress), "sha256": digesting.digest.hexdigest()}
        write_atomic(scratch / MANIFEST, json.dumps(about).encode())
        # A damaged checkpoint of the same step, which resuming skipped
        if target.exists():
            shutil.rmtree(target)
        scratch.rename(target)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    fsync_folder(root)
    # Later ones are damaged: resuming skipped them
    for old in [found for found in _newest_first(root) if found.name <= target.name][keep:]:
        if keep_every is None or int(old.name.removeprefix("step-")) % keep_every:
            shutil.rmtree(old)


class Saver:
    """Saves in the background: training waits only for the copy of the state to the host's memory.

    Leaving its context lets what is being written end, so that an error that ends training costs no checkpoint, and nothing
    is written any more when the folder may be somebody else's. Only Ctrl-C does not wait.
    """

    def __init__(self, folder: Path, keep: int, keep_every: int | None):
        self.folder, self.keep, self.keep_every = folder, keep, keep_every
        self._thread: threading.Thread | None = None
        self._error: OSError | None = None

    def __enter__(self) -> "Saver":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # Ctrl-C does not wait
        if isinstance(error, Exception) and self._thread is not None:
            self._thread.join()

    def save(self, progress: TrainProgress, state: dict[str, Any], needed: bool) -> float:
        """Begins to save a copy of `state`, after the previous save has ended; returns how long training was blocked, in s.

        A full disk is only a warning, unless the checkpoint is `needed`.
        Raises: OSError if the previous save failed for another reason.
        """
        started = time.perf_counter()
        self.wait()
        self._thread = threading.Thread(target=self._write, args=(progress, on_host(state), needed), name="checkpoint")
        self._thread.start()
        return time.perf_counter() - started

    def wait(self) -> None:
        """Returns when nothing is being written any more.

        Raises: OSError if the last save failed.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _write(self, progress: TrainProgress, state: dict[str, Any], needed: bool) -> None:
        try:
            save(self.folder, progress, state, self.keep, self.keep_every)
        except (OSError, RuntimeError) as raised:
            # torch's zip writer reports a failed write of its stream in its own words
            cause = raised.__context__ if isinstance(raised.__context__, OSError) else raised
            error = cause if isinstance(cause, OSError) else OSError(str(cause))
            if error.errno is not None and error.filename is None:
                error.filename = str(path_of(self.folder, progress.step))
            if needed or error.errno not in NO_SPACE:
                self._error = error
                return
            logger.warning(
                f"no checkpoint at step {progress.step}: {error.strerror}; training continues, the previous one is kept. "
                f"Free some space for {self.folder}"
            )


class _Digesting:
    """A stream that only writes, and digests what it writes."""

    def __init__(self, stream: BinaryIO):
        self.stream, self.digest = stream, hashlib.sha256()

    def write(self, content: Any) -> int:
        self.digest.update(content)
        return self.stream.write(content)

    def flush(self) -> None:
        self.stream.flush()


def on_host(state: Any) -> Any:
    """A copy of nested dicts, lists and tensors whose tensors are in the host's memory and not shared."""
    if isinstance(state, Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, dict):
        return {key: on_host(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(on_host(value) for value in state)
    return state


def restore(folder: Path, step: int | None = None) -> tuple[TrainProgress, dict[str, Any]] | None:
    """The newest undamaged checkpoint, or that of `step`, on the CPU; warns of the damaged ones that it skipped."""
    for path in _newest_first(folder / "checkpoints") if step is None else [path_of(folder, step)]:
        try:
            about = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
            progress = TrainProgress(**about["progress"])
            if sha256(path / "state.pt") != about["sha256"]:
                raise ValueError("its SHA-256 differs from the manifest")
            return progress, torch.load(path / "state.pt", map_location="cpu", weights_only=True)
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, pickle.UnpicklingError) as error:
            reason = str(error).splitlines()[0]
            logger.warning(f"checkpoint {path} is damaged ({reason}); trying the previous one")
    return None


def path_of(folder: Path, step: int) -> Path:
    """Where the run in `folder` keeps its checkpoint of a step."""
    return folder / "checkpoints" / f"step-{step:09d}"


def _newest_first(root: Path) -> list[Path]:
    return sorted(root.glob("step-*"), reverse=True)
