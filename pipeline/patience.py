"""Shared file systems may show a file that another node wrote only after a while. Jobs wait for it, as long as they are told."""

import os
import time
from pathlib import Path

SECONDS = "ILLM_FILE_PATIENCE"  # environment: how long to wait for a file that has to be there; the job scripts set it


def wait_for(*paths: Path) -> bool:
    """Whether one of the files is there, now or within the patience."""
    deadline = time.monotonic() + float(os.environ.get(SECONDS) or 0)
    while not any(path.is_file() for path in paths):
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.5)
        for folder in {folder for path in paths for folder in (path.parent.parent, path.parent)}:
            if folder.is_dir():
                list(folder.iterdir())  # to list a folder makes NFS look again
    return True
