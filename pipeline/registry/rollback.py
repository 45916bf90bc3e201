"""`illm rollback` and `illm history`: an alias's past, and going back to it."""

import json
from dataclasses import asdict

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pipeline.errors import ArtifactError
from pipeline.registry import aliases, versions
from pipeline.registry.alias_log import version_stack
from pipeline.text import printable

COLUMNS = ("when", "who", "action", "from", "to", "why")


def rollback(name: str, alias: str, to: str, why: str) -> str:
    """Points an alias at the version before, or at `to`, which it must have stood for; returns a line for the user."""
    changes = aliases.history(name, alias)
    before = version_stack(changes)
    now = aliases.current(name, alias)
    if not to and len(before) < 2:
        raise ArtifactError(
            f"{name}@{alias}: has no earlier version to go back to; `illm history {name}` shows what there was"
        )
    target = to or before[-2]
    stood_for = {change.after for change in changes if change.end == "done" and change.after}
    if target not in stood_for:
        known = ", ".join(sorted(stood_for, key=int)) or "none"
        raise ArtifactError(f"{name}@{alias}: never was version {target}; it was {known}. Others need `illm promote`")
    done = aliases.move(name, alias, target, "rollback", why, expected=now)
    if now:
        stamp = {f"{alias}.rolled_back": f"{done.when} by {done.who} to version {target}: {why}"}
        versions.tag(versions.find(f"models:/{name}/{now}"), stamp)
    return f"{name}@{alias} is version {done.after} again, and was {done.before or 'unset'}"


def history(name: str, alias: str, as_json: bool) -> str:
    """Every change of an alias, oldest first."""
    changes = aliases.history(name, alias)
    if as_json:
        return json.dumps([asdict(change) for change in changes], indent=1)
    table = Table(title=f"{escape(name)}@{escape(alias)}: now version {aliases.current(name, alias) or '(unset)'}")
    for heading in COLUMNS:
        table.add_column(heading)
    for change in changes:
        ended = {"done": "", "": " (under way, or interrupted)", "interrupted": " (interrupted: nothing changed)"}[
            change.end
        ]
        cells = (change.when, change.who, change.action + ended, change.before or "-", change.after or "-", change.why)
        table.add_row(*(escape(printable(cell)) for cell in cells))
    console = Console(width=140)
    with console.capture() as captured:
        console.print(table)
    return captured.get().rstrip()
