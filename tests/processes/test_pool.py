import os
import platform
import resource
import subprocess
import sys
import time
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path

import pytest

from pipeline.errors import DataError, UserError
from pipeline.processes import ray_session
from pipeline.processes.pool import backend_for, map_chunks
from tests.conftest import ROOT
from tests.support.ranks import wait_until


def square(chunk: int, marker: Path, on: str) -> int:
    """A worker that dies once: its chunk is done again."""
    if on != "threads" and chunk == 3 and not marker.exists():
        marker.touch()
        os._exit(1)
    if chunk == 99:
        raise DataError("chunk 99 is bad")
    return chunk * chunk


@pytest.mark.parametrize("on", ["threads", "processes", pytest.param("ray", marks=pytest.mark.ray)])
def test_every_chunk_is_done_and_a_mistake_is_reported(tmp_path, on):
    work = partial(square, marker=tmp_path / "died", on=on)
    assert sorted(map_chunks(work, range(10), 2, on)) == [(n, n * n) for n in range(10)]
    assert (tmp_path / "died").exists() == (on != "threads")
    with pytest.raises(DataError, match="chunk 99 is bad"):
        list(map_chunks(work, [1, 99, 2], 2, on))
    assert list(map_chunks(work, [], 2, on)) == []


def pages_of_images(_: int) -> int:
    """Pages that the kernel hands out while three blocks of 9 MB, as of an image of 3 megapixels, are filled ten times."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        blocks = [b"\xff" * 9_000_000 for _ in range(3)]
        del blocks
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="it is glibc that returns an image's memory after each image"
)
@pytest.mark.parametrize("on", ["processes", pytest.param("ray", marks=pytest.mark.ray)])
def test_workers_keep_the_memory_of_an_image_for_the_next(on):
    ((_, pages),) = map_chunks(pages_of_images, [0], 1, on)
    # Twice those of one image, of ten
    assert pages < 2 * 27_000_000 / resource.getpagesize()


def die(chunk: int) -> int:
    os._exit(1)


def test_a_chunk_that_kills_every_worker_ends_the_work():
    with pytest.raises(BrokenProcessPool):
        list(map_chunks(die, [0], 2, "processes"))


def linger(place: Path) -> None:
    (place / str(os.getpid())).touch()
    time.sleep(600)


ABANDONED = """
import sys
from functools import partial
from pathlib import Path
from pipeline.processes.pool import map_chunks
from tests.processes.test_pool import linger
if __name__ == "__main__":
    list(map_chunks(linger, [Path(sys.argv[1])] * 2, 2, "processes"))
"""


def test_workers_end_with_a_killed_parent(tmp_path):
    script = tmp_path / "abandoned.py"
    script.write_text(ABANDONED)
    (tmp_path / "pids").mkdir()
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    parent = subprocess.Popen([sys.executable, script, tmp_path / "pids"], env=environment)
    wait_until(lambda: len(list((tmp_path / "pids").iterdir())) == 2, "two workers are at work")
    parent.kill()
    parent.wait()
    pids = [int(path.name) for path in (tmp_path / "pids").iterdir()]
    # Without their watch they would sleep for ten minutes
    wait_until(lambda: not any(is_running(pid) for pid in pids), "the workers end")
    assert [pid for pid in pids if is_running(pid)] == []


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(")")[-1].split()[0] != "Z"
    except OSError:
        return False


def test_little_work_starts_no_process(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert backend_for("auto", 15, 2) == "threads"
    assert backend_for("auto", 100, 1) == "threads"
    assert backend_for("auto", 16, 2) == "processes"
    assert backend_for("threads", 16, 2) == "threads"
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    assert backend_for("auto", 1, 1) == "ray"
    assert backend_for("processes", 1, 1) == "processes"


def test_the_address_for_jobs_is_no_cluster(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "http://head:8265")
    with pytest.raises(
        UserError, match=r"RAY_ADDRESS=http://head:8265 is where jobs are submitted.* RAY_API_SERVER_ADDRESS"
    ):
        list(map_chunks(str, [1, 2], 2, "auto"))


@pytest.mark.slow
@pytest.mark.ray
def test_a_ray_of_our_own_lets_nobody_in_without_its_token():
    with ray_session.running(1):
        import ray

        address = ray.get_runtime_context().gcs_address
        join = [sys.executable, "-c", f"import ray; ray.init({address!r}, log_to_driver=False); print('joined')"]
        ours = subprocess.run(join, capture_output=True, text=True, timeout=120, check=False)
        stranger = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        theirs = subprocess.run(join, capture_output=True, text=True, timeout=120, check=False, env=stranger)
    assert "joined" in ours.stdout, ours.stderr
    assert "joined" not in theirs.stdout
    assert theirs.returncode != 0
