"""From an artifact back to the shards: every ancestor, by digest, and how far it could be verified here.

A manifest's digest covers its files' digests and its parents' digests, so a chain of manifests verifies itself: it needs
no server, and manifests may come from anywhere (the run folders here, or the copy packed with a registered version).
"""

import io
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console
from rich.markup import escape
from rich.tree import Tree

from pipeline.artifacts.artifact import Artifact, manifest_at, refuse_outside
from pipeline.artifacts.manifest import MANIFEST, Manifest
from pipeline.data.shards import Shard
from pipeline.errors import ArtifactError
from pipeline.registry import cache, resolve
from pipeline.storage import disk, outputs
from pipeline.text import printable
from pipeline.tracking import store

if TYPE_CHECKING:
    from matplotlib.figure import Figure

State = Literal["files verified", "manifest verified", "damaged", "not here"]
FIGURES = (".png", ".svg", ".pdf")
# Folders below runs/ in which artifacts are looked for
DEPTH = 6


@dataclass
class Node:
    """An artifact in the tree. manifest: None if it is known by its digest alone; problem: what is wrong, if damaged."""

    role: str
    digest: str
    # Where the child's config found it
    source: str
    manifest: Manifest | None = None
    state: State = "not here"
    problem: str = ""
    parents: list["Node"] = field(default_factory=list)

    def walk(self) -> Iterator["Node"]:
        """This node and its ancestors, each as often as it is reached."""
        yield self
        for parent in self.parents:
            yield from parent.walk()


def trace(name: str, tars: bool = False) -> Node:
    """The tree of an artifact: a run folder, an artifact folder or a models:/ URI.

    tars: also compare every shard's SHA-256 with the index, which reads all images.

    Raises: ArtifactError if there is none.
    """
    path = resolve.path_of(name)
    artifact = resolve.read(str(path), resolve.kind_of(str(path)))
    known = _manifests(_packed(name))
    return _node("", artifact.digest, name, known | {artifact.digest: (artifact.manifest, path)}, tars)


def manifests(artifact: Artifact) -> list[Manifest]:
    """The manifests of all ancestors that are known here, nearest first, each once: what is packed with a version."""
    known = _manifests(_packed(""))
    found: dict[str, Manifest] = {}
    waiting = [parent for _, parent in sorted(artifact.manifest.parents.items())]
    while waiting:
        parent = waiting.pop(0)
        manifest, _ = _known(parent.digest, parent.source, known)
        if manifest is not None and parent.digest not in found:
            found[parent.digest] = manifest
            waiting += [grandparent for _, grandparent in sorted(manifest.parents.items())]
    return list(found.values())


def broken(tree: Node) -> list[str]:
    """What does not agree with its digest, one line each."""
    return sorted({printable(node.problem) for node in tree.walk() if node.problem})


def as_text(tree: Node) -> str:
    """The tree with one line per artifact."""
    shown: set[str] = set()

    def label(node: Node) -> str:
        stage = node.manifest.stage if node.manifest else "?"
        run = f"  run {node.manifest.run_id}" if node.manifest and node.manifest.run_id else ""
        words = f"{node.role + ': ' if node.role else ''}{stage} {node.digest[:12]}  {node.source}"
        return escape(printable(f"{words}  ({'see above' if node.digest in shown else node.state}){run}"))

    def add(tree: Tree, node: Node) -> None:
        for parent in node.parents:
            branch = tree.add(label(parent))
            if parent.digest not in shown:
                shown.add(parent.digest)
                add(branch, parent)

    root = Tree(label(tree))
    shown.add(tree.digest)
    add(root, tree)
    console = Console(width=200, color_system=None)
    with console.capture() as captured:
        console.print(root, highlight=False)
    return "\n".join(line.rstrip() for line in captured.get().splitlines())


def as_json(tree: Node) -> str:
    """The tree with everything the manifests say."""
    return json.dumps(_plain(tree), indent=1)


def figure(tree: Node) -> "Figure":
    """The tree with each artifact once: its ancestors to the left of it."""
    depths: dict[str, int] = {}
    nodes: dict[str, Node] = {}

    def place(node: Node, depth: int) -> None:
        depths[node.digest] = max(depth, depths.get(node.digest, 0))
        nodes[node.digest] = node
        for parent in node.parents:
            place(parent, depth + 1)

    place(tree, 0)
    columns: dict[int, list[str]] = {}
    for digest, depth in depths.items():
        columns.setdefault(depth, []).append(digest)
    at = {
        digest: (-3.2 * depth, row - (len(column) - 1) / 2)
        for depth, column in columns.items()
        for row, digest in enumerate(column)
    }
    high = max(len(column) for column in columns.values())
    # It takes a second to import
    from matplotlib.figure import Figure

    made = Figure(figsize=(3.4 * len(columns), 1.2 + 1.1 * high), layout="constrained")
    axes = made.subplots()
    colors = {"files verified": "#d9ead3", "manifest verified": "#fff2cc", "not here": "#eeeeee", "damaged": "#f4cccc"}
    for digest, node in nodes.items():
        for parent in node.parents:
            axes.annotate(
                "",
                at[digest],
                at[parent.digest],
                arrowprops={"arrowstyle": "->", "shrinkA": 52, "shrinkB": 52, "color": "0.4"},
            )
        stage = node.manifest.stage if node.manifest else "?"
        text = f"{stage}\n{digest[:12]}\n{node.state}"
        axes.text(*at[digest], text, ha="center", va="center", bbox={"boxstyle": "round", "fc": colors[node.state]})
    across = [x for x, _ in at.values()]
    axes.set(xlim=(min(across) - 1.6, max(across) + 1.6), ylim=(-high / 2 - 0.2, high / 2 + 0.2))
    axes.axis("off")
    return made


def check_figure(file: Path, force: bool) -> None:
    """Raises: OutputError if the figure cannot be drawn to `file`."""
    if file.suffix.lower() not in FIGURES:
        raise outputs.OutputError(f"{file}: a figure's name ends with one of {', '.join(FIGURES)}; name another file")
    outputs.check(file, force)


def draw(tree: Node, file: Path, force: bool) -> None:
    """Writes the figure to `file`, in the format of its suffix."""
    stream = io.BytesIO()
    figure(tree).savefig(stream, format=file.suffix.lower().removeprefix("."), dpi=110)
    outputs.write(file, stream.getvalue(), force)


def _plain(node: Node) -> dict[str, Any]:
    about = node.manifest.model_dump(mode="json", exclude={"parents", "files"}) if node.manifest else {}
    own = {
        "role": node.role,
        "digest": node.digest,
        "source": node.source,
        "state": node.state,
        "problem": node.problem,
    }
    return own | about | {"parents": [_plain(parent) for parent in node.parents]}


def _packed(name: str) -> list[Manifest]:
    """Manifests that came with registered versions: of `name`, and of all of this store that were ever looked at here."""
    asked: list[Manifest] = []
    if name.startswith("models:/"):
        # Imports mlflow
        from pipeline.registry import versions

        asked = versions.ancestry(name)
    return [*cache.manifests(), *asked]


def _manifests(packed: Iterable[Manifest]) -> dict[str, tuple[Manifest, Path | None]]:
    """Digest -> manifest and folder of every artifact below runs/, and of those that were packed."""
    found: dict[str, tuple[Manifest, Path | None]] = {manifest.digest: (manifest, None) for manifest in packed}
    paths = [path for depth in range(1, DEPTH) for path in sorted(store.HOME.glob("*/" * depth + MANIFEST))]
    for path in [*(folder / MANIFEST for folder in cache.codecs()), *paths]:
        try:
            manifest = Manifest.model_validate_json(path.read_bytes())
        except (ValueError, OSError):
            # Of something else, or just removed
            continue
        found[manifest.digest] = (manifest, path.parent)
    return found


def _known(
    digest: str, source: str, known: dict[str, tuple[Manifest, Path | None]]
) -> tuple[Manifest | None, Path | None]:
    """The manifest of that digest: where the child found its parent, or anywhere here."""
    if _is_path(source):
        try:
            path = resolve.path_of(source)
            manifest = manifest_at(path, source)
            if manifest.digest == digest:
                return manifest, path
        except ArtifactError:
            # Moved, removed, or another one by now
            pass
    return known.get(digest, (None, None))


def _is_path(source: str) -> bool:
    """Whether it is a place on this machine: others are not asked for."""
    return "://" not in source and not source.startswith("models:/")


def _node(role: str, digest: str, source: str, known: dict[str, tuple[Manifest, Path | None]], tars: bool) -> Node:
    manifest, path = _known(digest, source, known)
    node = Node(role, digest, source, manifest)
    if manifest is None:
        if _is_path(source) and (resolve.path_of(source) / MANIFEST).is_file():
            node.problem = (
                f"{source}: holds another artifact now than {digest[:12]}, which is nowhere below {store.HOME}/"
            )
        return node
    # It was found by the digest of its own content
    node.state = "manifest verified"
    if path is not None:
        try:
            artifact = resolve.read(str(path), manifest.kind)
            node.state = "files verified"
            if tars and manifest.kind == "shards":
                _verify_tars(artifact)
        except ArtifactError as error:
            node.state, node.problem = "damaged", str(error)
    parents = sorted(manifest.parents.items())
    node.parents = [_node(name, parent.digest, parent.source, known, tars) for name, parent in parents]
    return node


def _verify_tars(artifact: Artifact) -> None:
    for shard in (Shard(**entry) for split in artifact.json("index.json")["splits"].values() for entry in split):
        path = artifact.path / shard.file
        refuse_outside(artifact.path, shard.file)
        if not path.is_file() or disk.sha256(path) != shard.sha256:
            raise ArtifactError(f"{path}: missing, or not what the index says; make the shards again")
