"""Which version an alias stands for, who moved it, and how two who move it at the same time are kept apart.

MLflow keeps no history of aliases and cannot compare-and-set one. What it has is a parameter of a run: written once, never
changed, refused to the second who writes another value. So each registered model has a run whose parameters are the log of
its aliases: `champion.000007` claims the seventh change, `champion.000007.end` says what became of it. Whoever gets the
claim may move the alias, as its last act, within half of CLAIM_TIMEOUT_S; a claim without an end that moved nothing is
declared interrupted by the next who comes, CLAIM_TIMEOUT_S later.
"""

import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING

from pipeline.errors import ArtifactError, RegistryChanged
from pipeline.log import logger
from pipeline.registry.alias_log import HISTORY, Action, AliasChange, claim, end, log_run, offered, read, version_stack
from pipeline.text import printable
from pipeline.tracking import store

if TYPE_CHECKING:
    from mlflow import MlflowClient

# Seconds
CLAIM_TIMEOUT_S = 60.0
# Seconds after which a claim is over whatever two machines' clocks say
LONG_AGO = 600.0
# Characters
MAX_WHY = 1000


def ensure_model(client: "MlflowClient", name: str) -> None:
    """Creates a registered model with its log, unless it is there."""
    from mlflow.exceptions import MlflowException

    try:
        client.get_registered_model(name)
        return
    except MlflowException as error:
        if store.is_unavailable(error):
            raise
    experiment = store.experiment(client, " registry", store.ABOUT_HISTORY)
    tags = {
        "mlflow.note.content": f"Every change of the aliases of {name}. `illm history {name}` prints it. Do not edit."
    }
    run_id = client.create_run(experiment, run_name=f"history of {name}", tags=tags).info.run_id
    about = (
        "MS-ILLM image codec: image files in, compressed files out, and back. `illm compress --codec models:/"
        f"{name}@champion`, `mlflow models serve -m models:/{name}@champion`. `illm history {name}` shows who moved the aliases."
    )
    try:
        client.create_registered_model(name, tags={HISTORY: run_id}, description=about)
        client.set_terminated(run_id)
    except MlflowException:
        # Another process was faster
        client.delete_run(run_id)
        client.get_registered_model(name)


def history(name: str, alias: str) -> list[AliasChange]:
    """The log of an alias, oldest first. Raises: ArtifactError if no such model is registered by us."""
    client = store.reader()
    with store.mlflow_errors("read the history"):
        return read(client, log_run(client, name), alias)


def current(name: str, alias: str) -> str:
    """The version an alias stands for now; "" if none, or no such model, or no store yet."""
    try:
        client = store.reader()
    except store.NoStore:
        return ""
    from mlflow.exceptions import MlflowException

    with store.mlflow_errors("look up an alias"):
        try:
            return str(client.get_registered_model(name).aliases.get(alias, ""))
        except MlflowException as error:
            if store.is_unavailable(error):
                raise
            return ""


def instead_of(client: "MlflowClient", name: str, alias: str | None) -> str:
    """Says that a name is not registered, or has no such alias or version, and what there is instead."""
    from mlflow.exceptions import MlflowException

    try:
        has = client.get_registered_model(name).aliases
    except MlflowException:
        return f"nothing is registered under that name at {store.masked_uri()}; {offered(client)}"
    listed = (
        ", ".join(f"{printable(known)} (version {version})" for known, version in sorted(has.items())) or "no alias"
    )
    return f"has no {f'alias {alias!r}' if alias else 'such version'} at {store.masked_uri()}; it has {listed}"


def previous_of(alias: str) -> str:
    """The alias that keeps the version before: `previous` for the champion."""
    return "previous" if alias == "champion" else f"previous-{alias}"


def move(name: str, alias: str, version: str, action: Action, why: str, expected: str, run_id: str = "") -> AliasChange:
    """Points an alias at a version, as the last act of what is recorded first.

    expected: the version it stood for when the decision was made.

    Raises: RegistryChanged if it stands for another one now, or somebody else is faster; then nothing was changed.
    """
    client = store.client()
    with store.mlflow_errors("move an alias"):
        log = log_run(client, name)
        changes = _wait_for_pending(client, name, log, alias)
        now = current(name, alias)
        if now != expected:
            raise RegistryChanged(
                f"{name}@{alias} is {_named(now)} now; it was {_named(expected)} when this was decided. Run the same command "
                "again to decide anew"
            )
        if now == version:
            raise ArtifactError(f"{name}@{alias} is version {version} already; nothing to do")
        if now != (version_stack(changes) or [""])[-1]:
            changes.append(_found(client, log, alias, changes, now))
        mine = AliasChange(len(changes) + 1, alias, action, now, version, why[:MAX_WHY], run_id)
        claim(client, log, mine)
        begun, tried = time.monotonic(), False
        try:
            _set(client, name, previous_of(alias), _before_top([*changes, replace(mine, end="done")]))
            if time.monotonic() - begun > CLAIM_TIMEOUT_S / 2:
                raise RegistryChanged(
                    f"{name}@{alias}: the store was too slow; nothing was changed, run the same command again"
                )
            tried = True
            _set(client, name, alias, version)
        except BaseException:
            # Where the alias may have been moved, the next process looks whether it was
            if not tried:
                end(client, log, mine, "interrupted")
                _set(client, name, previous_of(alias), _before_top(read(client, log, alias)))
            raise
        if end(client, log, mine, "done"):
            return replace(mine, end="done")
        _set(client, name, alias, (version_stack(read(client, log, alias)) or [now])[-1])
        raise RegistryChanged(f"{name}@{alias}: another change was faster; run the same command again to decide anew")


def _before_top(changes: Sequence[AliasChange]) -> str:
    """The version that `previous` has to keep after these changes; "" if none."""
    versions = version_stack(changes)
    return versions[-2] if len(versions) > 1 else ""


def _set(client: "MlflowClient", name: str, alias: str, version: str) -> None:
    if version:
        store.retried(partial(client.set_registered_model_alias, name, alias, version))
    else:
        client.delete_registered_model_alias(name, alias)


def _found(client: "MlflowClient", log: str, alias: str, changes: Sequence[AliasChange], now: str) -> AliasChange:
    """Records that something else than illm had moved an alias."""
    before = (version_stack(changes) or [""])[-1]
    change = AliasChange(len(changes) + 1, alias, "found", before, now, "moved by something else than illm")
    claim(client, log, change)
    end(client, log, change, "done")
    return replace(change, end="done")


def _wait_for_pending(client: "MlflowClient", name: str, log: str, alias: str) -> list[AliasChange]:
    """The log, after waiting for a change that is under way, or that was interrupted."""
    began = time.monotonic()
    waiting = False
    while True:
        changes = read(client, log, alias)
        last = changes[-1] if changes else None
        if last is None or last.end:
            return changes
        age = (datetime.now(UTC) - datetime.fromisoformat(last.when)).total_seconds()
        if current(name, alias) == last.after:
            end(client, log, last, "done")
        elif time.monotonic() - began > CLAIM_TIMEOUT_S or age > LONG_AGO:
            if end(client, log, last, "interrupted"):
                _set(client, name, previous_of(alias), _before_top(read(client, log, alias)))
        else:
            if not waiting:
                logger.info(
                    f"waiting for a change of {name}@{alias} that {printable(last.who)} began at {printable(last.when)}, "
                    f"{CLAIM_TIMEOUT_S:.0f} s at most"
                )
            waiting = True
            time.sleep(min(0.5, CLAIM_TIMEOUT_S / 10))


def _named(version: str) -> str:
    return f"version {version}" if version else "unset"
