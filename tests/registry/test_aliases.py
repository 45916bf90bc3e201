"""Aliases on a real store: moved by many at once, killed at every point, rolled back. Every act is a process of its own."""

import json
import os
import shutil
import signal
import sqlite3
import traceback
from collections.abc import Callable

import mlflow
import pytest

from pipeline.errors import ArtifactError, RegistryChanged, UserError
from pipeline.registry import aliases, rollback
from pipeline.registry.alias_log import Action, version_stack
from pipeline.tracking import store

WRITES = ("log_param", "set_registered_model_alias", "delete_registered_model_alias")


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory):
    """A store with its tables, which take seconds to make."""
    folder = tmp_path_factory.mktemp("store")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")
        act(lambda: store.experiment(store.client(), " registry"))
    return folder / "mlflow.db"


@pytest.fixture(autouse=True)
def own_store(empty_store, tmp_path, monkeypatch):
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setattr(aliases, "CLAIM_TIMEOUT_S", 2.0)


class Act:
    """A forked process that calls a function; this process never opens the store, so they share no connection."""

    def __init__(self, function: Callable[[], object], wait_for: int | None = None):
        self.answers, answering = os.pipe()
        self.pid = os.fork()
        if not self.pid:
            if wait_for is not None:
                os.read(wait_for, 1)
            try:
                told = {"value": function()}
            except UserError as error:
                told = {"error": type(error).__name__, "message": str(error)}
            except BaseException:
                told = {"error": "crash", "message": traceback.format_exc()}
            os.write(answering, json.dumps(told, default=str).encode())
            os._exit(0)
        os.close(answering)

    def result(self) -> dict:
        with os.fdopen(self.answers, "rb") as stream:
            content = stream.read()
        status = os.waitpid(self.pid, 0)[1]
        return json.loads(content) if content else {"error": "killed", "signal": os.WTERMSIG(status)}


def act(function: Callable[[], object]) -> object:
    told = Act(function).result()
    if "error" in told:
        kinds = {kind.__name__: kind for kind in (RegistryChanged, ArtifactError)}
        raise kinds.get(told["error"], AssertionError)(told.get("message", told))
    return told["value"]


def with_versions(count: int) -> None:
    def make() -> None:
        client = store.client()
        aliases.ensure_model(client, "m")
        for _ in range(count):
            client.create_model_version("m", "/nowhere", None, tags={"artifact.digest": "0" * 64})

    act(make)


def move(version: str, expected: str, action: Action = "promote") -> object:
    return act(lambda: aliases.move("m", "champion", version, action, "why", expected).number)


def state() -> dict[str, str]:
    """Aliases, read from the database itself."""
    with sqlite3.connect("mlflow.db") as db:
        return {alias: str(v) for alias, v in db.execute("select alias, version from registered_model_aliases")}


def ends() -> list[tuple[str, str, str, str]]:
    told = json.loads(str(act(lambda: rollback.history("m", "champion", True))))
    return [(c["action"], c["before"], c["after"], c["end"]) for c in told]


def test_a_promotion_keeps_the_version_before_and_a_rollback_takes_steps_back():
    with_versions(3)
    for version, before in (("1", ""), ("2", "1"), ("3", "2")):
        move(version, before)
    assert state() == {"champion": "3", "previous": "2"}
    act(lambda: rollback.rollback("m", "champion", "", "bad"))
    assert state() == {"champion": "2", "previous": "1"}
    act(lambda: rollback.rollback("m", "champion", "", "worse"))
    assert state() == {"champion": "1"}
    with pytest.raises(ArtifactError, match="no earlier version"):
        act(lambda: rollback.rollback("m", "champion", "", "?"))
    act(lambda: rollback.rollback("m", "champion", "3", "it was good"))
    assert state() == {"champion": "3", "previous": "1"}
    assert ends() == [
        ("promote", "", "1", "done"), ("promote", "1", "2", "done"), ("promote", "2", "3", "done"),
        ("rollback", "3", "2", "done"), ("rollback", "2", "1", "done"), ("rollback", "1", "3", "done"),
    ]  # fmt: skip


def test_history_says_who_when_and_why():
    with_versions(1)
    move("1", "")
    (entry,) = json.loads(str(act(lambda: rollback.history("m", "champion", True))))
    assert "@" in entry["who"]
    assert entry["when"].startswith("20")
    assert entry["why"] == "why"


def test_what_cannot_be_done_is_told():
    with_versions(2)
    move("1", "")
    with pytest.raises(ArtifactError, match="is version 1 already"):
        move("1", "1")
    with pytest.raises(RegistryChanged, match="is version 1 now; it was version 2 when"):
        move("2", "2")
    with pytest.raises(ArtifactError, match="never was version 2; it was 1"):
        act(lambda: rollback.rollback("m", "champion", "2", "?"))
    with pytest.raises(ArtifactError, match="no such registered model"):
        act(lambda: rollback.history("nobody", "champion", True))


def test_of_many_promotions_at_once_one_wins(monkeypatch):
    # They write one after the other, and nobody here waits for a claim that was left
    monkeypatch.setattr(aliases, "CLAIM_TIMEOUT_S", 60.0)
    with_versions(9)
    move("1", "")
    ready, go = os.pipe()
    acts = [
        Act(lambda v=v: aliases.move("m", "champion", str(v), "promote", "race", "1").after, wait_for=ready)
        for v in range(2, 10)
    ]
    os.write(go, b"x" * len(acts))
    told = [a.result() for a in acts]
    winners = [t["value"] for t in told if "value" in t]
    assert len(winners) == 1, told
    assert {t["error"] for t in told if "error" in t} == {"RegistryChanged"}
    assert state() == {"champion": winners[0], "previous": "1"}
    assert ends() == [("promote", "", "1", "done"), ("promote", "1", winners[0], "done")]


def killed_at(point: int, after: bool, function: Callable[[], object]) -> dict:
    """Kills a process at its `point`-th write to the store, before or after it was done."""

    def run() -> object:
        count = 0

        def deadly(write):
            def call(self, *args, **kwargs):
                nonlocal count
                count += 1
                if count == point and not after:
                    os.kill(os.getpid(), signal.SIGKILL)
                result = write(self, *args, **kwargs)
                if count == point:
                    os.kill(os.getpid(), signal.SIGKILL)
                return result

            return call

        for name in WRITES:
            setattr(mlflow.MlflowClient, name, deadly(getattr(mlflow.MlflowClient, name)))
        return function()

    return Act(run).result()


@pytest.mark.parametrize("after", [False, True])
def test_killed_at_any_point_the_old_champion_stays_and_the_next_promotion_goes_on(after):
    with_versions(30)
    move("1", "")
    move("2", "1")
    now, previous, version, killed = "2", "1", 2, 0
    for point in range(1, 20):
        version += 1
        told = killed_at(
            point, after, lambda v=version, now=now: aliases.move("m", "champion", str(v), "promote", "k", now).after
        )
        if "value" in told:
            break
        killed += 1
        assert told == {"error": "killed", "signal": signal.SIGKILL}
        found = state()
        if found["champion"] == str(version):  # it was moved, by the very last act
            now, previous = str(version), now
        assert found["champion"] == now
        version += 1
        move(str(version), now)  # waits for the claim that was left, if any
        now, previous = str(version), now
        assert state() == {"champion": now, "previous": previous}
    assert killed == 4  # claim, previous, champion, end
    assert {end for *_, end in ends()} == {"done", "interrupted"}
    assert act(lambda: version_stack(aliases.history("m", "champion"))[-1]) == str(version)


def test_an_error_on_the_way_leaves_everything_as_it_was():
    with_versions(3)
    move("1", "")
    move("2", "1")

    def fail() -> None:
        def full(self, name, alias, version):
            if version == "2":
                raise OSError(28, "No space left on device")
            return original(self, name, alias, version)

        original = mlflow.MlflowClient.set_registered_model_alias
        mlflow.MlflowClient.set_registered_model_alias = full
        aliases.move("m", "champion", "3", "promote", "why", "2")

    assert Act(fail).result()["error"] == "crash"
    assert state() == {"champion": "2", "previous": "1"}
    assert ends()[-1] == ("promote", "2", "3", "interrupted")
    move("3", "2")
    assert state() == {"champion": "3", "previous": "2"}


def test_who_is_too_slow_gives_up_and_leaves_the_winner_alone():
    with_versions(3)
    move("1", "")
    waiting, go = os.pipe()
    told, tell = os.pipe()

    def slow() -> object:
        original = mlflow.MlflowClient.set_registered_model_alias

        def wait(self, name, alias, version):
            original(self, name, alias, version)
            if alias == "previous":  # it has claimed, and now it is suspended
                mlflow.MlflowClient.set_registered_model_alias = original
                os.write(tell, b"x")
                os.read(waiting, 1)

        mlflow.MlflowClient.set_registered_model_alias = wait
        return aliases.move("m", "champion", "2", "promote", "slow", "1").after

    sleeper = Act(slow)
    os.read(told, 1)
    move("3", "1")
    os.write(go, b"x")
    assert sleeper.result()["error"] == "RegistryChanged"
    assert state() == {"champion": "3", "previous": "1"}
    assert [end for *_, end in ends()] == ["done", "interrupted", "done"]


def test_an_alias_that_something_else_moved_is_recorded_as_found():
    with_versions(3)
    move("1", "")
    act(lambda: store.client().set_registered_model_alias("m", "champion", "2"))
    with pytest.raises(RegistryChanged):
        move("3", "1")
    move("3", "2")
    assert ends() == [("promote", "", "1", "done"), ("found", "1", "2", "done"), ("promote", "2", "3", "done")]
    assert state() == {"champion": "3", "previous": "2"}


def test_a_model_of_somebody_else_is_refused():
    act(lambda: store.client().create_registered_model("m").name)
    with pytest.raises(ArtifactError, match="was not made by `illm promote`"):
        act(lambda: aliases.history("m", "champion"))


def test_a_registered_model_is_made_once_by_many():
    ready, go = os.pipe()
    acts = [Act(lambda: aliases.ensure_model(store.client(), "m"), wait_for=ready) for _ in range(6)]
    os.write(go, b"x" * len(acts))
    assert [a.result() for a in acts] == [{"value": None}] * 6
    with sqlite3.connect("mlflow.db") as db:
        assert db.execute("select count(*) from registered_models").fetchone() == (1,)
        assert db.execute("select count(*) from runs where lifecycle_stage = 'active'").fetchone() == (1,)
