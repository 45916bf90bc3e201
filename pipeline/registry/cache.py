"""What registries said and what came from them: a folder per store, below the user's cache folder.

It holds `names/` (what a name stood for when it was last looked up), `DIGEST.lineage.json` and `DIGEST/`, a codec's artifact.
An entry that is damaged, or of another store, is ignored. Where nothing can be written, nothing is kept.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from pipeline.artifacts.manifest import Manifest
from pipeline.storage import disk
from pipeline.text import timestamp
from pipeline.tracking import store

DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Version:
    """A registered version. digest: of its codec artifact; source: the folder in the store that holds its files."""

    name: str
    number: str
    digest: str
    source: str
    run_id: str = ""


def folder() -> Path:
    """Of the current store: `registry/` and a digest of the store's address, below $ILLM_CACHE or ~/.cache/illm."""
    from pipeline.storage import cache

    return cache.home() / "registry" / hashlib.sha256(store.identity().encode()).hexdigest()[:16]


def remember(uri: str, version: Version) -> None:
    """Keeps what a name stands for now."""
    now = {"store": store.identity(), "asked": timestamp()}
    _keep(_record(uri), json.dumps(asdict(version) | now).encode())


def recall(uri: str) -> tuple[str, Version] | None:
    """When a name was last looked up in this store, and what it stood for; None if that is not known."""
    try:
        known = json.loads(_record(uri).read_text(encoding="utf-8"))
        asked, of = str(known.pop("asked")), known.pop("store")
        version = Version(**{key: str(value) for key, value in known.items()})
    except (OSError, ValueError, TypeError, LookupError, AttributeError):
        return None
    return (asked, version) if of == store.identity() and DIGEST.fullmatch(version.digest) else None


def lineage(digest: str) -> list[Manifest] | None:
    """The manifests that were packed with a codec; None if they are not here."""
    return _manifests(_lineage(digest))


def keep_lineage(digest: str, content: bytes) -> None:
    """Keeps a version's lineage.json."""
    _keep(_lineage(digest), content)


def manifests() -> Iterator[Manifest]:
    """Every manifest that came with a version of this store."""
    for path in sorted(folder().glob("*.lineage.json")):
        yield from _manifests(path) or ()


def parsed(content: bytes) -> list[Manifest]:
    """The manifests in a lineage.json. Raises: ValueError."""
    listed = json.loads(content)
    if not isinstance(listed, list):
        raise ValueError(f"expected a list of manifests, found {type(listed).__name__}")
    return [Manifest.model_validate(entry) for entry in listed]


def codec(digest: str) -> Path:
    """The folder of a codec's copy, which may not be there yet."""
    return folder() / digest


def codecs() -> list[Path]:
    """The copies of codecs of this store."""
    return [path for path in sorted(folder().glob("*")) if DIGEST.fullmatch(path.name) and path.is_dir()]


def _record(uri: str) -> Path:
    return folder() / "names" / f"{re.sub(r'[^A-Za-z0-9_.@-]', '-', uri.removeprefix('models:/'))}.json"


def _lineage(digest: str) -> Path:
    return folder() / f"{digest}.lineage.json"


def _manifests(path: Path) -> list[Manifest] | None:
    with suppress(OSError, ValueError):
        return parsed(path.read_bytes())
    return None


def _keep(path: Path, content: bytes) -> None:
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        disk.write_atomic(path, content)
