"""A run folder has one writer: whoever began last. An earlier one that still runs, for instance on a node that the cluster
holds for dead and has replaced, finds out before it writes a checkpoint or an artifact, and stops.
"""

import os
import uuid
from datetime import UTC, datetime
from pathlib import Path

from pipeline import artifacts
from pipeline.errors import ArtifactError

FILE = "owner"


def take(folder: Path) -> str:
    """Makes this process the folder's writer; returns what `check` wants."""
    job = f", job {os.environ['SLURM_JOB_ID']}" if "SLURM_JOB_ID" in os.environ else ""
    when = datetime.now(UTC).isoformat(timespec="seconds")
    owner = f"process {os.getpid()} on {os.uname().nodename}{job}, since {when} ({uuid.uuid4().hex[:8]})"
    folder.mkdir(parents=True, exist_ok=True)
    artifacts.write_durably(folder / FILE, owner.encode())
    return owner


def check(folder: Path, owner: str) -> None:
    """Raises: ArtifactError if another process has taken over."""
    found = (folder / FILE).read_text(encoding="utf-8")
    if found != owner:
        raise ArtifactError(f"{folder}: taken over by {found}; this one, {owner}, stops and writes nothing more")
