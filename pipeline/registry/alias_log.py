"""The log of a registered model's aliases: the parameters of one MLflow run, each written once.

`champion.000007` claims the seventh change, `champion.000007.end` says what became of it.
"""

import json
import secrets
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Literal

from pipeline.errors import ArtifactError, RegistryChanged
from pipeline.text import printable, timestamp
from pipeline.tracking import provenance, store

if TYPE_CHECKING:
    from mlflow import MlflowClient

# "found": moved by something else than illm
Action = Literal["promote", "force", "rollback", "found"]
# Tag of a registered model: the run with its log
HISTORY = "illm.history"
# Registered models that a message names
MAX_NAMED = 10


@dataclass(frozen=True)
class AliasChange:
    """One entry of the log: an alias went from version `before` to version `after`; "" is none."""

    number: int
    alias: str
    action: Action
    before: str
    after: str
    why: str
    run_id: str = ""
    who: str = field(default_factory=provenance.who)
    when: str = field(default_factory=timestamp)
    # Tells two equal claims apart
    token: str = field(default_factory=lambda: secrets.token_hex(8))
    # "", "done" or "interrupted"
    end: str = ""

    @property
    def key(self) -> str:
        return f"{self.alias}.{self.number:06d}"


def version_stack(changes: Sequence[AliasChange]) -> list[str]:
    """The versions one can go back to, the present one last: a promotion puts one on top, a rollback takes some off."""
    versions: list[str] = []
    for change in changes:
        if change.end != "done":
            continue
        if change.action == "rollback" and change.after in versions:
            while versions[-1] != change.after:
                versions.pop()
        elif change.after:
            versions.append(change.after)
    return versions


def log_run(client: "MlflowClient", name: str) -> str:
    from mlflow.exceptions import MlflowException

    try:
        tags = client.get_registered_model(name).tags
    except MlflowException as error:
        if store.is_unavailable(error):
            raise
        raise ArtifactError(f"{name}: no such registered model at {store.masked_uri()}; {offered(client)}") from None
    if HISTORY not in tags:
        raise ArtifactError(
            f"{name}: was not made by `illm promote`, so its aliases have no history; choose another name"
        )
    return str(tags[HISTORY])


def read(client: "MlflowClient", log: str, alias: str) -> list[AliasChange]:
    params = client.get_run(log).data.params
    changes: list[AliasChange] = []
    while (key := f"{alias}.{len(changes) + 1:06d}") in params:
        end = params.get(f"{key}.end", "")
        changes.append(AliasChange(**json.loads(params[key]), number=len(changes) + 1, alias=alias, end=end))
    return changes


def _write_once(client: "MlflowClient", log: str, key: str, value: str) -> bool:
    """Whether the log has this value under this key now, and not somebody else's."""
    from mlflow.exceptions import MlflowException

    try:
        client.log_param(log, key, value)
    except MlflowException:
        found = client.get_run(log).data.params.get(key)
        if found is None:
            raise
        return bool(found == value)
    return True


def claim(client: "MlflowClient", log: str, change: AliasChange) -> None:
    kept = {name: value for name, value in asdict(change).items() if name not in ("number", "alias", "end")}
    if not _write_once(client, log, change.key, json.dumps(kept)):
        raise RegistryChanged(f"{change.alias}: another change was faster; run the same command again to decide anew")


def end(client: "MlflowClient", log: str, change: AliasChange, end: str) -> bool:
    return _write_once(client, log, f"{change.key}.end", end)


def offered(client: "MlflowClient") -> str:
    """What is registered: names with their aliases."""
    from mlflow.exceptions import MlflowException

    try:
        models = list(client.search_registered_models(max_results=MAX_NAMED))
    except MlflowException:
        models = []
    names = [printable(f"{m.name}@{alias}") for m in models for alias in sorted(m.aliases)]
    names += [printable(m.name) for m in models if not m.aliases]
    return f"there is {', '.join(sorted(names))}" if names else "`illm promote` first"
