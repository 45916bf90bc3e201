"""What a run tells its store while the store comes and goes."""

import json
import os
import threading
import time

import pytest

from pipeline.artifacts.run_folder import DELIVERED, RECORDS
from pipeline.storage import disk
from pipeline.tracking.journal import Journal, StoreUnavailable, undelivered


class Store:
    """Takes records, unless it is away."""

    def __init__(self):
        self.got, self.away, self.tries = [], False, 0
        self.answers = threading.Event()
        self.answers.set()

    def take(self, records):
        assert self.answers.wait(60)
        self.tries += 1
        if self.away:
            raise StoreUnavailable("connection refused")
        self.got += records

    def steps(self):
        return [r["step"] for r in self.got]


def logged(journal: Journal, *steps: int) -> None:
    for step in steps:
        journal.metrics(step, {"a": float(step)}, time_ms=step)


def until(true) -> None:
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_everything_arrives_in_order(tmp_path):
    store = Store()
    journal = Journal(tmp_path, "r", "the store", store.take)
    logged(journal, *range(1, 1001))
    assert journal.close(10) == 0
    assert store.steps() == list(range(1, 1001))


def test_an_unavailable_store_gets_the_rest_when_it_is_reachable_again(tmp_path, capsys, cli_log):
    store = Store()
    journal = Journal(tmp_path, "r", "the store", store.take)
    logged(journal, 1, 2)
    until(lambda: len(store.got) == 2)
    store.away = True
    store.answers.clear()
    # whoever waited for it here would wait for what comes only afterwards
    logged(journal, *range(3, 103))
    store.answers.set()
    until(lambda: store.tries > 3)
    assert undelivered(tmp_path) == 100
    store.away = False
    until(lambda: len(store.got) == 102)
    assert journal.close(10) == 0
    assert store.steps() == list(range(1, 103))
    told = capsys.readouterr().err
    assert told.count("the store is unavailable (connection refused)") == 1
    assert told.count("the store is reachable again") == 1


def test_closing_does_not_wait_for_ever_and_the_next_process_delivers_the_rest(tmp_path):
    store = Store()
    store.away = True
    journal = Journal(tmp_path, "r", "the store", store.take)
    logged(journal, 1, 2, 3)
    assert journal.close(0.2) == 3
    back = Store()
    assert Journal(tmp_path, "r", "the store", back.take).close(10) == 0
    assert back.steps() == [1, 2, 3]
    assert Journal(tmp_path, "r", "the store", Store().take).close(10) == 0


def test_a_resumed_run_does_not_say_twice_what_it_said_before_it_was_killed(tmp_path):
    store = Store()
    first = Journal(tmp_path, "r", "the store", store.take)
    logged(first, 10, 20, 30)
    first.metrics(20, {"val": 1.0}, time_ms=0)
    first.close(10)
    resumed = Journal(tmp_path, "r", "the store", store.take)
    logged(resumed, 20, 30, 40)
    resumed.metrics(30, {"val": 2.0}, time_ms=0)
    resumed.close(10)
    assert [(r["step"], *r["metrics"]) for r in store.got] == [
        (10, "a"), (20, "a"), (30, "a"), (20, "val"), (40, "a"), (30, "val"),
    ]  # fmt: skip


def test_half_a_line_of_a_killed_process_is_cut_off(tmp_path):
    store = Store()
    first = Journal(tmp_path, "r", "the store", store.take)
    logged(first, 1)
    first.close(10)
    with (tmp_path / RECORDS).open("ab") as stream:
        stream.write(b'{"kind": "metrics", "st')
    second = Journal(tmp_path, "r", "the store", store.take)
    logged(second, 2)
    second.close(10)
    assert store.steps() == [1, 2]


def test_what_is_recorded_just_before_closing_is_delivered(tmp_path):
    store, taken = Store(), threading.Event()
    store_takes = store.take

    def take(records):
        store_takes(records)
        taken.wait(10)

    journal = Journal(tmp_path, "r", "the store", take)
    logged(journal, 1)
    until(lambda: store.got)
    with journal._changed:  # the delivering thread looks once more, finds nothing, and comes no further than here
        taken.set()
        time.sleep(0.3)
        logged(journal, 2)
        journal._closing = True
    assert journal.close(10) == 0
    assert store.steps() == [1, 2]


@pytest.mark.parametrize("damage", ["", "{", '{"run": "r"}', "[1]"])
def test_without_a_readable_mark_everything_is_sent_again(tmp_path, damage):
    first = Journal(tmp_path, "r", "the store", Store().take)
    logged(first, 1, 2)
    first.close(10)
    (tmp_path / DELIVERED).write_text(damage)
    store = Store()
    Journal(tmp_path, "r", "the store", store.take).close(10)
    assert store.steps() == [1, 2]


def test_a_new_run_of_the_store_gets_everything(tmp_path):
    first = Journal(tmp_path, "r", "the store", Store().take)
    logged(first, 1, 2)
    first.close(10)
    store = Store()
    Journal(tmp_path, "another", "the store", store.take).close(10)
    assert store.steps() == [1, 2]


def test_a_full_disk_loses_no_record(small_disk):
    store = Store()
    journal = Journal(small_disk, "r", "the store", store.take)
    logged(journal, 1)
    until(lambda: store.got)
    filler = small_disk / "filler"
    with filler.open("wb") as stream:
        while True:
            try:
                os.write(stream.fileno(), bytes(4096))
            except OSError:
                break
    for step in range(2, 200):
        journal.metrics(step, {"a": 1.0, "long" * 50: 1.0}, time_ms=0)
    with pytest.raises(OSError, match="No space left"):
        disk.write_atomic(small_disk / DELIVERED, bytes(10**6))
    filler.unlink()
    logged(journal, 200)
    assert journal.close(10) == 0
    assert list(small_disk.glob(".*.tmp")) == []
    assert store.steps() == list(range(1, 201))


def test_two_threads_may_record_at_once(tmp_path):
    store = Store()
    journal = Journal(tmp_path, "r", "the store", store.take)
    threads = [threading.Thread(target=lambda: [journal.add({"kind": "tag"}) for _ in range(200)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert journal.close(10) == 0
    assert len(store.got) == 800
    assert json.loads((tmp_path / DELIVERED).read_text())["run"] == "r"
