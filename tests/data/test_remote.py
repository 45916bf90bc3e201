"""Shards that live on a server: read through the local cache as if they were here."""

import contextlib
import itertools
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from pipeline.artifacts.artifact import Artifact
from pipeline.data import loader
from pipeline.data.batch import BatchShard
from pipeline.data.loader import LoaderConfig
from pipeline.data.reader import ShardReader
from pipeline.errors import ArtifactError, DataError, UnreachableError
from pipeline.registry import resolve
from pipeline.sharding import sources
from pipeline.sharding.sources import Source
from pipeline.storage import cache, fetch
from tests.conftest import write_images
from tests.data.test_shards import make
from tests.support.ranks import free_port, wait_until
from tests.support.servers import serving


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("remote")
    make(write_images(folder / "photos", 24), folder / "served/run", shard_mb=0.06)
    return folder / "served/run"


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ILLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(fetch, "FIRST_RETRY_S", 0.01)
    monkeypatch.setattr(fetch, "MAX_RETRY_S", 0.05)


@pytest.fixture
def server(run_folder):
    with serving(run_folder.parent) as running:
        yield running


def crops(name: str, workers: int = 2, steps: int = 10, **options: object) -> torch.Tensor:
    cfg = LoaderConfig(**{"shards": name, "batch_size": 4, "crop_size": 64, "num_workers": workers} | options)
    reader = ShardReader(resolve.read(name, "shards"), "train", cfg.shard_cache_gb)
    stream = loader.batches(cfg, reader, 3, BatchShard(0, 4, 1), 0)
    return torch.cat([batch.x for batch in itertools.islice(stream, steps)])


def test_what_is_served_over_http_trains_like_what_is_here(server, run_folder):
    assert torch.equal(crops(f"{server.url}/run", shuffle_shards=2), crops(str(run_folder), shuffle_shards=2))
    sent = server.bytes
    assert torch.equal(crops(f"{server.url}/run/artifact"), crops(str(run_folder)))
    manifest = (run_folder / "artifact/manifest.json").stat().st_size
    assert server.bytes - sent <= manifest  # the rest was in the cache, which a restart finds again


def test_slow_and_failing_servers_are_waited_for(server, run_folder):
    server.break_after = 20_000
    for tar in (run_folder / "artifact").glob("*.tar"):
        server.errors[f"/run/artifact/{tar.name}"] = 2
    assert torch.equal(crops(f"{server.url}/run"), crops(str(run_folder)))


def kept(folder: Path) -> int:
    """Bytes of a cache's whole files."""
    total = 0
    for path in folder.glob("*"):
        with contextlib.suppress(FileNotFoundError):
            total += path.stat().st_size if path.suffix in (".tar", ".jsonl") else 0
    return total


def test_the_cache_keeps_to_its_bytes_and_training_goes_on(server, run_folder, tmp_path):
    sizes = [p.stat().st_size for p in (run_folder / "artifact").glob("train-*.tar")]
    bound = 3 * max(sizes)
    assert torch.equal(
        crops(f"{server.url}/run", shard_cache_gb=bound / 1e9, shuffle_shards=1),
        crops(str(run_folder), shuffle_shards=1),
    )
    # helpers may still be fetching what nobody will read: what has come just now is made room for at once
    wait_until(lambda: kept(tmp_path / "cache/shards") <= bound, "the cache outgrows its bytes", 20)
    assert sum(sizes) > 2 * bound
    with pytest.raises(DataError, match=r"more than data\.shard_cache_gb allows"):
        ShardReader(resolve.read(f"{server.url}/run", "shards"), "train", 1e-9)


def test_what_another_process_removes_from_the_cache_meanwhile_is_fetched_again(server, monkeypatch):
    """Tables as well as tars: a sample that is only not here must not be replaced by another one."""
    reader = ShardReader(resolve.read(f"{server.url}/run", "shards"), "train", 1)
    found, removed = reader.cache.path, set()

    def removing(name: str, *about: object) -> Path:
        path = found(name, *about)
        if name not in removed:
            removed.add(name)
            path.unlink()
        return path

    monkeypatch.setattr(reader.cache, "path", removing)
    assert len(reader.read(0)) > 100
    assert {Path(name).suffix for name in removed} == {".tar", ".jsonl"}


def test_a_server_that_is_gone_stops_training_and_no_other_sample_takes_the_place(run_folder, capsys, cli_log):
    with serving(run_folder.parent) as server:
        name = f"{server.url}/run"
        cfg = LoaderConfig(shards=name, batch_size=4, crop_size=64, num_workers=2, shuffle_shards=1)
        stream = loader.batches(cfg, ShardReader(resolve.read(name, "shards"), "train"), 3, BatchShard(0, 4, 1), 0)
        server.errors = {f"/run/artifact/{tar.name}": 1000 for tar in (run_folder / "artifact").glob("train-*.tar")}
        with pytest.raises(UnreachableError, match=r"train-\d+\.tar: cannot be fetched after 10 attempts"):
            next(stream)
    assert "unreadable sample" not in capsys.readouterr().err


def test_a_local_shard_that_is_gone_stops_training(run_folder, tmp_path):
    shutil.copytree(run_folder, tmp_path / "run")
    reader = ShardReader(resolve.read(str(tmp_path / "run"), "shards"), "train")
    for tar in (tmp_path / "run/artifact").glob("*.tar"):
        tar.unlink()
    cfg = LoaderConfig(shards="", batch_size=4, crop_size=64, num_workers=2)
    with pytest.raises(UnreachableError, match="cannot be read"):
        next(loader.batches(cfg, reader, 3, BatchShard(0, 4, 1), 0))


def test_ranks_of_a_node_fetch_each_shard_once(server):
    readers = [ShardReader(resolve.read(f"{server.url}/run", "shards"), "train") for _ in range(4)]
    threads = [threading.Thread(target=lambda r=r: [r.read(n) for n in range(len(r))]) for r in readers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    tars = {path: count for path, count in server.requests.items() if path.endswith(".tar")}
    assert len(tars) == len(readers[0].shards)
    assert set(tars.values()) == {1}


def test_shards_of_the_next_group_come_before_they_are_needed(server):
    name = f"{server.url}/run"
    cfg = LoaderConfig(shards=name, batch_size=4, crop_size=64, num_workers=1, shuffle_shards=2)
    reader = ShardReader(resolve.read(name, "shards"), "train")
    samples = loader.Crops(cfg, reader, 3)
    samples.look_ahead(range(4))
    wanted = {reader.shards[s].file for group in (0, 1) for s in samples.order.streams[0].shards_of(0, group)}
    assert len(wanted) == 4
    wait_until(lambda: {p.rsplit("/")[-1] for p in server.requests if p.endswith(".tar")} == wanted, "the shards")


def test_with_parts_a_node_fetches_its_own_shards_only(run_folder, tmp_path, monkeypatch):
    """Two nodes with two processes each, 40 steps: some epochs. Their crops are those of one process with local shards."""
    reader = ShardReader(resolve.read(str(run_folder), "shards"), "train")
    options = {"batch_size": 8, "crop_size": 64, "num_workers": 1, "shuffle_shards": 2, "shard_parts": 2}

    def stream(name: str, rank: int, ranks: int) -> torch.Tensor:
        cfg = LoaderConfig(shards=name, **options)
        shards = ShardReader(resolve.read(name, "shards"), "train")
        batches = loader.batches(cfg, shards, 3, BatchShard.of(8, rank, ranks), 0)
        return torch.stack([batch.x for batch in itertools.islice(batches, 40)])

    by_rank, fetched = [], []
    for node in range(2):
        monkeypatch.setenv("ILLM_CACHE", str(tmp_path / f"node-{node}"))
        with serving(run_folder.parent) as server:
            by_rank += [stream(f"{server.url}/run", 2 * node + process, 4) for process in range(2)]
            fetched.append({path.rsplit("/")[-1] for path in server.requests if "train-" in path})
    files = [{name for s in reader.shards[node::2] for name in (s.file, s.table)} for node in range(2)]
    assert fetched == files
    assert len(files[0]) > 2
    assert torch.equal(torch.cat(by_rank, dim=1), stream(str(run_folder), 0, 1))


def test_a_shard_that_is_not_the_listed_one_is_never_used(run_folder, tmp_path):
    shutil.copytree(run_folder, tmp_path / "served/run")
    tar = next((tmp_path / "served/run/artifact").glob("train-*.tar"))
    tar.chmod(0o644)
    content = bytearray(tar.read_bytes())
    content[700] ^= 1
    tar.write_bytes(content)
    with serving(tmp_path / "served") as server:
        reader = ShardReader(resolve.read(f"{server.url}/run", "shards"), "train")
        place = [shard.file for shard in reader.shards].index(tar.name)
        with pytest.raises(DataError, match="are not the"):
            reader.read(int(reader._starts[place]))
        assert server.requests[f"/run/artifact/{tar.name}"] == 2
        with pytest.raises(ArtifactError, match="expected an artifact there"):
            resolve.read(f"{server.url}/elsewhere", "shards")
        manifest = tmp_path / "served/run/artifact/manifest.json"
        manifest.write_text(manifest.read_text().replace('"index.json"', '"../../index.json"'))
        with pytest.raises(ArtifactError, match="outside its folder"):
            resolve.read(f"{server.url}/run", "shards")


@pytest.fixture
def bucket(monkeypatch):
    """The URL of an empty bucket of an S3 server."""
    pytest.importorskip("s3fs", reason="needs requirements/s3.txt")
    pytest.importorskip("moto", reason="needs requirements/s3.txt")
    port = free_port()
    served = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    import fsspec
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    store = fsspec.filesystem("s3")

    def made() -> bool:
        try:
            store.mkdir("bucket")
        except OSError:
            return False
        return True

    wait_until(made, "the S3 server")
    yield "s3://bucket"
    served.kill()
    served.wait()
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.mark.s3
def test_images_and_shards_on_an_object_store(bucket, run_folder, tmp_path):
    import fsspec

    store = fsspec.filesystem("s3")
    store.put(str(run_folder), f"{bucket}/run", recursive=True)
    assert torch.equal(crops(f"{bucket}/run"), crops(str(run_folder)))
    photos = write_images(tmp_path / "photos", 12)
    store.put(str(photos), f"{bucket}/photos", recursive=True)
    there, here = make(f"{bucket}/photos", tmp_path / "there"), make(str(photos), tmp_path / "here")
    assert digests(there) == digests(here)
    again = make(f"{bucket}/run/artifact/*.tar", tmp_path / "again")
    assert len(digests(again)) == 24


def digests(made: Artifact) -> set[str]:
    return {sample.sha256 for split in ("train", "valid") for sample, _ in ShardReader(made, split).first(1000)}


def test_the_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    assert cache.home() == tmp_path / "cache"
    monkeypatch.delenv("ILLM_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.home() == tmp_path / "illm"


@pytest.mark.s3
def test_a_store_that_refuses_us_is_told_in_one_line(monkeypatch, tmp_path):
    s3fs = pytest.importorskip("s3fs", reason="needs requirements/s3.txt")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    s3fs.S3FileSystem.clear_instance_cache()
    for place in ("s3://bucket/photos", "s3://bucket/*.png", "s3://bucket/list.csv", "s3://bucket/photos.tar"):
        with pytest.raises(DataError, match=r"(?i)credentials"):
            list(sources.items(Source(name="x", path=place)))
    s3fs.S3FileSystem.clear_instance_cache()
