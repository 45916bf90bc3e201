"""Checkpoints: what resumes this run. Save, find the newest good one, prune.

A checkpoint is a folder `checkpoints/step-000001000` with `state.pt` and a `manifest.json` that holds its digest. It is
written under a scratch name, flushed and renamed, so a kill at any moment leaves the earlier ones as they were.
"""

import json
import os
import pickle
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from pipeline.artifacts import flush_folder, sha256, write_durably


@dataclass(frozen=True)
class Progress:
    """Where training stands: updates of the main network, and crops taken from the stream by all processes."""

    step: int
    samples: int


def save(folder: Path, progress: Progress, state: dict[str, Any], keep: int, keep_every: int | None = None) -> None:
    """Writes a checkpoint and removes all but the newest `keep` and those at multiples of `keep_every` steps.

    Raises: OSError if there is no room for it; the earlier ones are as they were then.
    """
    root = folder / "checkpoints"
    target = root / f"step-{progress.step:09d}"
    scratch = root / f".{target.name}.tmp"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        with (scratch / "state.pt").open("wb") as stream:
            torch.save(state, stream)
            stream.flush()
            os.fsync(stream.fileno())
        about = {"progress": asdict(progress), "sha256": sha256(scratch / "state.pt")}
        write_durably(scratch / "manifest.json", json.dumps(about).encode())
        if target.exists():  # a damaged one that resume passed over
            shutil.rmtree(target)
        scratch.rename(target)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    flush_folder(root)
    for old in _newest_first(root)[keep:]:
        if keep_every is None or int(old.name.removeprefix("step-")) % keep_every:
            shutil.rmtree(old)


def restore(folder: Path) -> tuple[Progress, dict[str, Any]] | None:
    """The newest undamaged checkpoint, on the CPU; says which damaged ones it passed over."""
    for path in _newest_first(folder / "checkpoints"):
        try:
            about = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
            progress = Progress(**about["progress"])
            if sha256(path / "state.pt") != about["sha256"]:
                raise ValueError("its SHA-256 differs from the manifest")
            return progress, torch.load(path / "state.pt", map_location="cpu", weights_only=True)
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, pickle.UnpicklingError) as error:
            reason = str(error).splitlines()[0]
            print(f"checkpoint {path} is damaged ({reason}); trying the one before", file=sys.stderr)
    return None


def _newest_first(root: Path) -> list[Path]:
    return sorted(root.glob("step-*"), reverse=True)
