import errno
import fcntl
import hashlib
import os
import zlib
from concurrent.futures import ThreadPoolExecutor

import pytest

from pipeline.errors import DataError
from pipeline.sharding.items import Item, read_item
from pipeline.storage import fetch
from tests.support.servers import serving

CONTENT = os.urandom(300_000)


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setattr(fetch, "FIRST_RETRY_S", 0.01)
    (tmp_path / "served").mkdir()
    (tmp_path / "served/file").write_bytes(CONTENT)
    with serving(tmp_path / "served") as running:
        yield running


def item(location: str, **changes: object) -> Item:
    return Item(location, "x", location, **changes)


def test_a_file_a_part_of_one_and_a_local_one_are_read(server, tmp_path):
    url = f"{server.url}/file"
    assert read_item(item(url), 10**6) == CONTENT
    assert read_item(item(url, offset=1000, size=77), 10**6) == CONTENT[1000:1077]
    assert read_item(item(str(tmp_path / "served/file"), offset=5, size=7), 10**6) == CONTENT[5:12]


def test_a_connection_that_breaks_is_taken_up_where_it_broke(server):
    server.break_after = 70_000
    assert read_item(item(f"{server.url}/file"), 10**6) == CONTENT
    assert server.requests["/file"] == 5
    assert server.bytes == len(CONTENT)  # nothing was sent twice


def test_a_server_without_ranges_sends_everything_again(server):
    server.ranges, server.break_after = False, 299_999
    with pytest.raises(DataError, match="cannot be fetched after 5 attempts"):
        read_item(item(f"{server.url}/file"), 10**6)
    server.break_after = None
    assert read_item(item(f"{server.url}/file"), 10**6) == CONTENT
    with pytest.raises(DataError, match="cannot send parts"):
        read_item(item(f"{server.url}/file", offset=3, size=5), 10**6)


def test_errors_that_pass_are_waited_out_and_others_are_told_at_once(server):
    server.errors["/file"] = 3
    assert read_item(item(f"{server.url}/file"), 10**6) == CONTENT
    with pytest.raises(DataError, match="answers 404"):
        read_item(item(f"{server.url}/nothing"), 10**6)
    assert server.requests["/nothing"] == 1
    server.errors["/file"] = 100
    with pytest.raises(DataError, match="after 5 attempts"):
        read_item(item(f"{server.url}/file"), 10**6)


def test_only_redirects_to_http_are_followed(server, tmp_path):
    server.redirects = {
        "/moved": f"{server.url}/file",
        "/local": f"file://{tmp_path}/served/file",
        "/circle": "/circle",
    }
    assert read_item(item(f"{server.url}/moved"), 10**6) == CONTENT
    with pytest.raises(DataError, match="redirects to another protocol"):
        read_item(item(f"{server.url}/local"), 10**6)
    assert server.requests["/local"] == 1
    with pytest.raises(DataError, match=r"cannot be fetched .*redirects"):
        read_item(item(f"{server.url}/circle"), 10**6)


def test_no_more_is_received_than_allowed(server):
    with pytest.raises(DataError, match="more than the 1000 bytes"):
        read_item(item(f"{server.url}/file"), 1000)


def test_a_download_goes_on_after_a_kill_and_is_verified(server, tmp_path):
    target, digest = tmp_path / "target", hashlib.sha256(CONTENT).hexdigest()
    target.with_name("target.part").write_bytes(CONTENT[:200_000])
    fetch.download(f"{server.url}/file", target, len(CONTENT), digest)
    assert target.read_bytes() == CONTENT
    assert server.bytes == 100_000
    target.unlink()
    target.with_name("target.part").write_bytes(b"something else" * 100)
    fetch.download(f"{server.url}/file", target, len(CONTENT), digest)
    assert target.read_bytes() == CONTENT
    with pytest.raises(DataError, match="not the 300000 bytes of the index"):
        fetch.download(f"{server.url}/file", tmp_path / "other", len(CONTENT), "0" * 64)


def test_without_locks_each_downloads_a_file_of_its_own(server, tmp_path, monkeypatch):
    def refused(*_: object) -> None:
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(fcntl, "flock", refused)
    server.break_after = 100_000
    target, digest = tmp_path / "target", hashlib.sha256(CONTENT).hexdigest()
    target.with_name("target.part").write_bytes(b"somebody else's")
    for _ in range(5):
        with ThreadPoolExecutor(6) as pool:
            jobs = [pool.submit(fetch.download, f"{server.url}/file", target, len(CONTENT), digest) for _ in range(6)]
            assert [job.result() for job in jobs] == [None] * 6
        assert target.read_bytes() == CONTENT
    assert {path.name for path in tmp_path.iterdir()} == {"served", "target", "target.part"}


def test_inflating_has_a_bound_and_damage_is_told(tmp_path):
    packer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    bomb = packer.compress(bytes(10**8)) + packer.flush()
    (tmp_path / "bomb").write_bytes(bomb)
    stored = item(str(tmp_path / "bomb"), size=len(bomb), deflated=True)
    with pytest.raises(DataError, match="more than the 1000000 bytes"):
        read_item(stored, 10**6)
    with pytest.raises(DataError, match="cut off"):
        read_item(item(str(tmp_path / "bomb"), size=len(bomb) - 5, deflated=True), 10**9)
    with pytest.raises(DataError, match="damaged in its archive"):
        read_item(item(str(tmp_path / "bomb"), offset=1, size=500, deflated=True), 10**9)
