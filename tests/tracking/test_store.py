"""Stores that cannot be used, or do not answer: one line, within a bounded time."""

import socket
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from pipeline.artifacts import run_folder
from pipeline.artifacts.run_folder import RECORDS, Inputs
from pipeline.tracking import store
from pipeline.tracking.run import _begun, deliver_rest
from tests.conftest import CONFIGS, assert_one_clear_line, illm_here
from tests.support.ranks import free_port


@contextmanager
def answering(answer: bytes, pause: float) -> Iterator[str]:
    """The address of a server that takes requests, and answers a byte at a time with a pause after each; then no more."""
    over = threading.Event()
    taken = []

    def serve() -> None:
        while not over.is_set():
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            taken.append(connection)
            threading.Thread(target=drip, args=(connection,), daemon=True).start()

    def drip(connection: socket.socket) -> None:
        try:
            for byte in answer * 10_000:
                connection.sendall(bytes([byte]))
                if over.wait(pause):
                    return
        except OSError:
            return

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=serve, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            over.set()
            for connection in taken:
                connection.close()


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 200 OK\r\nX-Long: "], ids=["hangs", "drips"])
@pytest.mark.parametrize("words", ["history m", "lineage models:/m@champion", "train"])
def test_a_server_without_an_answer_is_given_up_within_a_bounded_time(answer, words, tmp_path, monkeypatch):
    monkeypatch.setattr(store, "ANSWER_TIMEOUT_S", 1.0)
    monkeypatch.setattr(store, "WARN_AFTER_S", 0.2)
    given = words.split()
    if words == "train":
        (tmp_path / "photos").mkdir()
        from tests.conftest import write_images

        given = ["shard", CONFIGS / "shard.yaml", "run=runs/x", f"source={write_images(tmp_path / 'more', 2)}"]
    with answering(answer, 0.05) as uri:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        began = time.monotonic()
        ended = illm_here(*given, cwd=tmp_path)
        assert time.monotonic() - began < 20  # a socket's timeout is 30 s, and there are three tries
    assert_one_clear_line(ended, uri, "has not answered within 1 s", "correct MLFLOW_TRACKING_URI")
    assert f"waiting for {uri}, 1 s at most" in ended.err


def test_the_wait_for_a_first_answer_is_below_a_minute():
    assert store.WARN_AFTER_S < store.ANSWER_TIMEOUT_S < 60


def test_a_run_that_is_resumed_goes_on_without_its_server(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "ANSWER_TIMEOUT_S", 0.5)
    monkeypatch.setattr(store, "WARN_AFTER_S", 0.2)
    (tmp_path / run_folder.RUN_ID_FILE).write_text("abc\n")
    with answering(b"", 0.05) as uri:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        assert _begun("pretrain", tmp_path, Inputs({}, {}))[1] == "abc"


def test_what_a_finished_run_still_holds_waits_for_an_unavailable_server(tmp_path, monkeypatch, capsys, cli_log):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    (tmp_path / run_folder.RUN_ID_FILE).write_text("abc\n")
    (tmp_path / RECORDS).write_text('{"kind": "status", "status": "FINISHED"}\n')
    deliver_rest(tmp_path)
    assert "1 records for http://127.0.0.1" in capsys.readouterr().err


def test_a_locked_file_is_one_line(tmp_path, monkeypatch):
    import mlflow.store.db.utils

    monkeypatch.setattr(mlflow.store.db.utils, "MAX_RETRY_COUNT", 1)
    with sqlite3.connect(tmp_path / "mlflow.db") as db:
        db.execute("create table experiments (x)")
        db.commit()
        db.execute("begin exclusive")
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db?timeout=0.1")
        for words in (("history", "m"), ("shard", CONFIGS / "shard.yaml", "run=runs/x", f"source={tmp_path}")):
            assert_one_clear_line(illm_here(*words, cwd=tmp_path), "cannot be reached", "database is locked")


@pytest.mark.parametrize("uri", ["foo://x", "mysql://x/y", "runs/mlruns"])
def test_an_address_that_cannot_be_used_is_one_line(uri, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    assert_one_clear_line(illm_here("history", "m", cwd=tmp_path), uri, "cannot be used")
    assert list(tmp_path.iterdir()) == []
