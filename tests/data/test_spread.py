import os
import subprocess
import sys

import pytest

from pipeline.errors import DataError
from pipeline.processes import ray_session
from pipeline.processes.pool import map_chunks


@pytest.mark.parametrize("on", ["threads", "ray"])
def test_every_piece_is_done_and_a_mistake_is_told(tmp_path, on):
    def work(piece: int) -> int:
        marker = tmp_path / "died"
        if on == "ray" and piece == 3 and not marker.exists():
            marker.touch()
            os._exit(1)  # a worker that dies once: its piece is done again
        if piece == 99:
            raise DataError("piece 99 is bad")
        return piece * piece

    assert sorted(map_chunks(work, range(10), 2, on)) == [(n, n * n) for n in range(10)]
    assert (tmp_path / "died").exists() == (on == "ray")
    with pytest.raises(DataError, match="piece 99 is bad"):
        list(map_chunks(work, [1, 99, 2], 2, on))
    assert list(map_chunks(work, [], 2, on)) == []


def test_little_work_starts_no_ray(monkeypatch):
    from pipeline.processes import pool as module

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    chosen = []
    monkeypatch.setattr(module, "_on_ray", lambda *words: chosen.append(words) or iter(()))
    list(map_chunks(len, ["x"] * 15, 2))
    list(map_chunks(len, ["x"] * 100, 1))
    assert not chosen
    list(map_chunks(len, ["x"] * 16, 2))
    assert len(chosen) == 1
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    list(map_chunks(len, ["x"], 1))
    assert len(chosen) == 2


@pytest.mark.slow
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
