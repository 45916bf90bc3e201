"""A team's set-up for real: `mlflow server` on PostgreSQL with a bucket, stages from several processes, a promotion."""

import json
import os
import shutil
import sqlite3
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pipeline.tracking.journal import undelivered
from tests.conftest import CONFIGS, illm, picture
from tests.support.ranks import wait_until
from tests.support.services import Server, bucket, postgres

pytestmark = [pytest.mark.slow, pytest.mark.server]


@pytest.fixture(scope="module")
def team(tmp_path_factory):
    """The server, and the environment of those who use it."""
    folder = tmp_path_factory.mktemp("team")
    with postgres() as database, bucket() as (place, keys):
        server = Server(folder, database, place, keys)
        server.start()
        yield server, keys | {"MLFLOW_TRACKING_URI": server.uri}
        server.kill()


def rows(server: Server, query: str, *values: object) -> list[tuple]:
    """What the server's own database holds."""
    import psycopg

    with psycopg.connect(server.database) as connection, connection.cursor() as cursor:
        cursor.execute(query, values)
        return cursor.fetchall()


def steps(server: Server, run_id: str, name: str) -> list[int]:
    query = "select step from metrics where run_uuid = %s and key = %s order by timestamp, step"
    return [row[0] for row in rows(server, query, run_id, name)]


def recorded(folder: Path) -> int:
    path = folder / "tracking.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_two_processes_write_while_the_server_stops_and_comes_back(team, zygote, smoke, tmp_path):
    server, env = team
    folder = tmp_path / "work"
    shutil.copytree(smoke / "runs/smoke/shard", folder / "runs/smoke/shard")
    common = ("fit.steps=300", "fit.log_every=2", "fit.validate_every=100", "fit.checkpoint_every=100")
    jobs = {
        stage: zygote.start(folder, stage, CONFIGS / f"{stage}.yaml", f"run=runs/{stage}", *common, **env)
        for stage in ("pretrain", "vqvae")
    }
    alive = lambda: all(job.running() for job in jobs.values())
    wait_until(lambda: all(recorded(folder / "runs" / s) > 25 for s in jobs) or not alive(), "no metrics")
    server.kill()
    at_kill = {stage: recorded(folder / "runs" / stage) for stage in jobs}
    wait_until(
        lambda: all(recorded(folder / "runs" / s) > n + 20 for s, n in at_kill.items()) or not alive(),
        "they wait for it",
    )
    server.start()
    for stage, job in jobs.items():
        assert job.wait() == [0], job.told()[-3000:]
        assert undelivered(folder / "runs" / stage) == 0
        run_id = (folder / "runs" / stage / "mlflow-run-id").read_text()
        assert steps(server, run_id, "train/loss") == list(range(2, 302, 2))
        assert rows(server, "select status from runs where run_uuid = %s", run_id) == [("FINISHED",)]
        assert rows(server, "select value from tags where run_uuid = %s and key = 'status'", run_id) == [("finished",)]
        assert rows(server, "select count(*) from params where run_uuid = %s and key = 'seed'", run_id) == [(1,)]
        inputs = rows(server, "select count(*) from inputs where destination_id = %s", run_id)
        assert inputs == [(1,)]
    import boto3

    store = boto3.client(
        "s3", endpoint_url=env["AWS_ENDPOINT_URL"], aws_access_key_id="test", aws_secret_access_key="test"
    )
    kept = {entry["Key"] for entry in store.list_objects_v2(Bucket="illm")["Contents"]}
    assert sum(key.endswith("artifact/weights.safetensors") for key in kept) == 2
    assert sum(key.endswith("provenance/attempt-001/packages.txt") for key in kept) == 2


def test_a_promotion_reaches_a_machine_that_has_only_the_server_and_works_on_without_it(team, smoke, tmp_path):
    server, env = team
    words = ("promote", CONFIGS / "promote.yaml", f"evaluation={smoke}/runs/smoke/evaluate", "name=team")
    first = illm(*words, f"run={tmp_path}/p1", "codec=pretrained", cwd=smoke, env=env)
    assert first.code == 0, first.err
    second = illm(*words, f"run={tmp_path}/p2", "--reason", "better", cwd=smoke, env=env)
    assert second.code == 0, second.err
    assert "previous is version 1" in second.out

    other = tmp_path / "other"
    other.mkdir()
    env = env | {"ILLM_CACHE": str(tmp_path / "cache")}  # another machine has a cache of its own
    from PIL import Image

    Image.fromarray(picture(3, 80, 70)).save(other / "photo.png")
    packed = illm("compress", "photo.png", "--codec", "models:/team@champion", cwd=other, env=env)
    assert packed.code == 0, packed.err
    tree = illm("lineage", "models:/team@champion", "--json", cwd=other, env=env)
    assert tree.code == 0, tree.err
    told = json.loads(tree.out)
    assert {parent["role"]: parent["state"] for parent in told["parents"]} == dict.fromkeys(
        ("codec", "labeler", "shards"), "manifest verified"
    )
    server.kill()
    try:
        back = illm("decompress", "photo.illm", "back.png", "--codec", "models:/team@champion", cwd=other, env=env)
        assert back.code == 0, back.err
        assert " as of " in back.err
        assert illm("lineage", "models:/team@champion", cwd=other, env=env).code == 0
        lost = illm("compress", "photo.png", "x.illm", "--codec", "models:/team@previous", cwd=other, env=env)
        assert lost.code == 2, lost.err
        assert "cannot be reached" in lost.err
    finally:
        server.start()
    rolled = illm("rollback", "team", "--reason", "test", cwd=other, env=env)
    assert rolled.out.startswith("team@champion is version 1 again"), rolled
    assert "better" in illm("history", "team", cwd=other, env=env).out


def test_of_two_promotions_at_once_on_the_server_one_wins(team, smoke, tmp_path):
    _, env = team
    words = ("promote", CONFIGS / "promote.yaml", f"evaluation={smoke}/runs/smoke/evaluate", "name=race")
    with ThreadPoolExecutor(2) as pool:
        told = list(
            pool.map(
                lambda codec: illm(*words, f"codec={codec}", f"run={tmp_path}/{codec}", cwd=smoke, env=env),
                ("pretrained", "fine-tuned"),
            )
        )
    codes = sorted(ended.code for ended in told)
    assert codes == [0, 4], told
    log = json.loads(illm("history", "race", "--json", cwd=smoke, env=env).out)
    assert [entry["end"] for entry in log] == ["done"]


def test_many_who_begin_at_once_on_a_new_file_do_not_break_it(zygote, smoke, tmp_path):
    folder = tmp_path / "work"
    shutil.copytree(smoke / "runs/smoke/shard", folder / "runs/smoke/shard")
    words = ("vqvae", CONFIGS / "vqvae.yaml", "fit.steps=30", "fit.log_every=1")
    jobs = [zygote.start(folder, *words, f"run=runs/v{i}", f"seed={i}") for i in range(6)]
    for job in jobs:
        assert job.wait() == [0], job.told()[-3000:]
    with sqlite3.connect(folder / "runs/mlflow.db") as db:
        assert db.execute(
            "select count(*), count(distinct run_uuid) from runs where status = 'FINISHED'"
        ).fetchone() == (6, 6)
        query = (
            "select run_uuid, count(*), count(distinct step) from metrics where key = 'train/loss' group by run_uuid"
        )
        assert [row[1:] for row in db.execute(query)] == [(30, 30)] * 6
    assert not any(undelivered(folder / f"runs/v{i}") for i in range(6))
    assert os.path.exists(folder / "runs/v0/provenance/attempt-001/config.yaml")
