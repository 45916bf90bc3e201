"""How an evaluation was made, for its page: `facts.json` in the evaluation's artifact."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict

from pipeline.config import Config, flatten
from pipeline.errors import ArtifactError
from pipeline.registry import lineage
from pipeline.text import timestamp
from pipeline.tracking import provenance

FACTS = "facts.json"


class Facts(TypedDict):
    """made: label -> text. config: key -> value, as the evaluation ran. lineage: codec -> the tree of what it was made from.
    anchors: name -> settings.
    """

    made: dict[str, str]
    config: dict[str, str]
    lineage: dict[str, str]
    anchors: dict[str, str]
    published: str


def gather(cfg: Config, codecs: Mapping[str, str], images: str, anchors: Mapping[str, str], published: str) -> Facts:
    """Facts of an evaluation that this process made. codecs: name -> artifact. images: which, in words."""
    tags = provenance.tags()
    commit = tags.get("mlflow.source.git.commit", "")
    made = {
        "made": timestamp(),
        "images": images,
        "command": tags["command"],
        "code": tags["code"].partition(": provenance")[0] + (f", commit {commit}" if commit else ""),
        "machine": tags["machine"],
        "packages": tags["packages"],
    }
    return Facts(
        made=made,
        config={key: str(value) for key, value in flatten(cfg).items()},
        lineage={name: lineage.as_text(lineage.trace(source)) for name, source in codecs.items()},
        anchors=dict(anchors),
        published=published,
    )


def write(folder: Path, facts: Facts) -> None:
    (folder / FACTS).write_text(json.dumps(facts, indent=1), encoding="utf-8")


def read(folder: Path) -> Facts:
    """What `write` wrote; nothing known, where an evaluation is older than that file. Raises: ArtifactError."""
    path = folder / FACTS
    if not path.is_file():
        return Facts(made={}, config={}, lineage={}, anchors={}, published="kodak")
    try:
        found: Any = json.loads(path.read_text(encoding="utf-8"))
        return Facts(**{key: found[key] for key in Facts.__annotations__})  # type: ignore[typeddict-item]
    except (ValueError, KeyError, TypeError):
        raise ArtifactError(f"{path}: not the facts of an evaluation; evaluate again") from None
