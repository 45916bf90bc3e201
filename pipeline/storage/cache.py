"""Shards that live elsewhere, and the local files that stand for them.

Files are named by digest, so ranks of a node, runs and data sets share them; a lock per file lets one process download
while the others wait; the least recently used go when there is no room.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from pipeline.errors import DataError
from pipeline.storage import disk, fetch

DOWNLOADS_AT_ONCE = 4
# Suffixes of what other processes may be working with
IN_USE = (".lock", ".part")


def home() -> Path:
    """$ILLM_CACHE, by default ~/.cache/illm."""
    return Path(
        os.environ.get("ILLM_CACHE") or Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "illm"
    ).expanduser()


class ShardCache:
    """Local copies of a remote artifact's files, together at most `max_bytes` and what is on its way."""

    def __init__(self, origin: str, max_bytes: int):
        self.origin, self.max_bytes = origin, max_bytes
        self.folder = home() / "shards"
        self.folder.mkdir(parents=True, exist_ok=True)
        self._pool = ThreadPoolExecutor(DOWNLOADS_AT_ONCE, thread_name_prefix="shards")

    def check_size(self, name: str, size: int) -> None:
        """Raises: DataError if a file is larger than the cache may be."""
        if size > self.max_bytes:
            raise DataError(f"{self.origin}/{name}: {size} bytes, more than data.shard_cache_gb allows; raise it")

    def path(self, name: str, size: int, sha256: str) -> Path:
        """Where the file is; downloads it if it is missing. Its digest is verified at download.

        Raises: DataError if it cannot be fetched.
        """
        target = self.folder / f"{sha256}{Path(name).suffix}"
        with suppress(FileNotFoundError):
            # Used now
            os.utime(target)
            return target
        with disk.exclusive_lock(self.folder / f"{sha256}.lock"):
            if not target.is_file():
                self._make_room(size)
                fetch.download(f"{self.origin}/{name}", target, size, sha256)
                # Others may have come at the same time
                self._make_room(0, target)
        return target

    def read(self, name: str, size: int, sha256: str, start: int, count: int) -> bytes:
        """`count` bytes of the file from `start`. Removed by another process meanwhile: it is downloaded again."""
        while True:
            try:
                with self.path(name, size, sha256).open("rb") as stream:
                    return os.pread(stream.fileno(), count, start)
            except FileNotFoundError:
                continue

    def want(self, name: str, size: int, sha256: str) -> None:
        """Downloads the file in the background. Failures are raised when it is read."""

        def go() -> None:
            with suppress(DataError, OSError):
                self.path(name, size, sha256)

        self._pool.submit(go)

    def _make_room(self, size: int, keep: Path | None = None) -> None:
        with disk.exclusive_lock(self.folder / "room.lock"):
            known = []
            for file in self.folder.iterdir():
                with suppress(FileNotFoundError):
                    known.append((file.stat().st_mtime, file.stat().st_size, file))
            used = sum(each for _, each, _ in known)
            for _, each, file in sorted(known):
                if used + size <= self.max_bytes:
                    return
                if file.suffix not in IN_USE and file != keep:
                    file.unlink(missing_ok=True)
                    used -= each
