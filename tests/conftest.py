"""Eight small images, and every stage once on the smoke configurations, shared by the tests that only read them."""

import contextlib
import io
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from filelock import FileLock
from hypothesis import settings
from PIL import Image

from pipeline import log

if TYPE_CHECKING:
    from tests.support.ranks import Zygote

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# Runs train with LPIPS where its weights are; tests are to do the same everywhere. `real_weights` finds those of the machine.
# Workers of pytest-xdist inherit what was changed.
REAL_TORCH_HOME = os.environ.setdefault("ILLM_TESTS_REAL_TORCH_HOME", os.environ.get("TORCH_HOME", ""))
os.environ["TORCH_HOME"] = str(Path(tempfile.gettempdir()) / "illm-tests-without-weights")
# The suite is about the CPU, also where there is a GPU: two processes cannot share one
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
# Another machine, or a busy one, is not slower by a bound that was chosen in advance
settings.register_profile("project", deadline=None)
settings.load_profile("project")
# Networks under test are tiny, and processes whose threads fight for two cores are several times slower
os.environ.setdefault("OMP_NUM_THREADS", "1")
# and the threads of those that have several do not spin while they wait for each other
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# What a shell without job control starts in its background ignores Ctrl-C, and so would every command under test
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# and what `nohup` starts ignores the end of its terminal
if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

ROOT = Path(__file__).parent.parent
CONFIGS = ROOT / "configs" / "smoke"
# What commands under test get beside the test's own environment
ILLM = {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore", "PYTHONFAULTHANDLER": "1"}
# The environment before any test has changed it
PLAIN = os.environ | ILLM


def picture(seed: int, height: int = 96, width: int = 128) -> np.ndarray:
    """A smooth random color image, (height, width, 3) uint8."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    return np.asarray(small.resize((width, height), Image.Resampling.BICUBIC))


def write_images(folder: Path, count: int = 8, suffix: str = ".png") -> Path:
    """A folder of image files with a subfolder."""
    (folder / "more").mkdir(parents=True)
    for i in range(count):
        Image.fromarray(picture(50 + i, 180, 200)).save(folder / ("more" if i % 2 else ".") / f"image{i}{suffix}")
    return folder


# In which order files are given out to the workers of `make test`: whoever makes the smoke runs, what needs none of them and so
# is done meanwhile, what takes minutes, and then the rest.
FIRST = (
    "test_slurm",
    "test_pipeline",
    "test_shard",
    "test_parity",
    "test_loop",
    "test_remote",
    "test_filters",
    "test_store",
)
NEXT = (
    "test_sweeps",
    "test_engines",
    "test_ray_jobs",
    "test_team_server",
    "test_tracking_server",
    "test_promotion",
    "test_variants",
    "test_round_trip",
)
# Tests of these files may run on several workers at once. Those of any other file run on one, one after the other, and share
# what their file sets up.
APART = ("test_engines", "test_sweeps", "test_variants", "test_promotion", "test_tracking_server")


# `make quick` leaves out what starts processes or trains for seconds: what has one of these marks, uses one of these fixtures,
# calls one of these, or is in one of these files.
NOT_QUICK_MARKS = {
    "long", "slow", "dist", "slurm", "ray", "ray_jobs", "mlflow_server", "s3", "server", "deepspeed", "parity", "browser",
}  # fmt: skip
NOT_QUICK_FIXTURES = {"smoke", "zygote", "small_disk", "real_weights"}
NOT_QUICK_CALLS = {"illm", "subprocess"}
NOT_QUICK_FILES = (
    "test_round_trip",
    "test_initial",
    "test_hostile_names",
    "test_decode_limit",
    "test_shard",
    "test_pool",
    "test_remote",
    "test_aliases",
    "test_files",
    "test_boundaries",
    "test_filters",
    "test_store",
)


def pytest_itemcollected(item: pytest.Item) -> None:
    marks = {mark.name for mark in item.iter_markers()}
    fixtures = set(getattr(item, "fixturenames", ()))
    calls = set(item.function.__code__.co_names) if isinstance(item, pytest.Function) else set()
    if item.path.stem == "test_engines" and "zero" in getattr(getattr(item, "callspec", None), "id", ""):
        item.add_marker(pytest.mark.deepspeed)
    slow = marks & NOT_QUICK_MARKS or fixtures & NOT_QUICK_FIXTURES or calls & NOT_QUICK_CALLS
    if not (slow or item.path.stem in NOT_QUICK_FILES):
        item.add_marker(pytest.mark.quick)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    """Gives tests out by file. Marks (xdist_group) would say the same, but pytest-xdist 3.8 does not find them on pytest 9.2."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.split("::")[0]
            return nodeid if Path(file).stem in APART else file

    return ByFile(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {name: place for place, name in enumerate(FIRST + NEXT)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where copies of what is elsewhere are kept, in place of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ILLM_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield Path(os.environ["ILLM_CACHE"])


@pytest.fixture(scope="session", autouse=True)
def empty_stores(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    from tests.support.empty_store import copied

    end = copied(tmp_path_factory.mktemp("store") / "empty.db")
    yield
    end()


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """A folder that is made by one worker of pytest-xdist, while others wait for it, and then only read."""
    together = "PYTEST_XDIST_WORKER" in os.environ
    base = factory.getbasetemp().parent if together else factory.getbasetemp()
    with FileLock(base / f".{name}.lock"):
        if not (base / name).exists():
            scratch = Path(tempfile.mkdtemp(dir=base))
            make(scratch)
            scratch.rename(base / name)
    return base / name


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_once(tmp_path_factory, "images", lambda folder: write_images(folder / "photos")) / "photos"


@dataclass(frozen=True)
class Finished:
    """A command that ended."""

    code: int
    out: str
    err: str


def illm(
    *words: object, cwd: Path, env: dict[str, str] | None = None, limit: int = 300, cold: bool = False
) -> Finished:
    """Runs the command line in its own process, as a user would; cold: with a Python of its own, which takes seconds more."""
    environment = os.environ | ILLM | (env or {})
    if not cold:
        from tests.support.ranks import shared_zygote

        return shared_zygote().finish(words, cwd, environment, limit)
    command = subprocess.Popen(
        [sys.executable, "-m", "pipeline", *map(str, words)],
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = command.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(command.pid, signal.SIGABRT)  # each process says where its threads are
        out, err = command.communicate()
        pytest.fail(f"{words} took more than {limit} s\n{out}\n{err}")
    return Finished(command.returncode, out, err)


@pytest.fixture(scope="session", autouse=True)
def end_of_the_zygote() -> Iterator[None]:
    yield
    if ranks := sys.modules.get("tests.support.ranks"):
        ranks.close_shared_zygote()


@pytest.fixture
def zygote() -> "Iterator[Zygote]":
    """Starts commands that the test goes on beside; what still runs at its end is killed."""
    from tests.support.ranks import shared_zygote

    yield shared_zygote()
    shared_zygote().end_jobs()


def illm_here(*words: object, cwd: Path) -> Finished:
    """Like `illm`, within the test's own process: many times faster."""
    from pipeline.cli import app

    out, err, environment = io.StringIO(), io.StringIO(), dict(os.environ)
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        patch.chdir(cwd)
        patch.setattr(sys, "argv", ["illm", *map(str, words)])
        code = app.exit_code(app.app)
    os.environ.clear()  # mlflow leaves the store's address in it
    os.environ.update(environment)
    return Finished(code, out.getvalue(), err.getvalue())


def assert_one_clear_line(ended: Finished, *expected: str) -> None:
    """Exit code 2, no traceback, and each expected word in the message."""
    assert ended.code == 2, ended
    assert "Traceback" not in ended.err + ended.out
    message = ended.err.splitlines()[-1] if "problem(s)" not in ended.err else ended.err
    for word in expected:
        assert word in ended.err, (word, ended.err)
    assert message.strip()


@pytest.fixture(scope="session")
def smoke(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder in which `illm demo configs/smoke --run runs/smoke` has finished. Do not write into its runs."""

    def demo(folder: Path) -> None:
        ended = illm("demo", CONFIGS, "--run", "runs/smoke", "--data", images, cwd=folder, cold=True, limit=580)
        assert ended.code == 0, ended.err
        (folder / "output.txt").write_text(ended.out)
        (folder / "made-in.txt").write_text(str(folder))

    made = made_once(tmp_path_factory, "smoke-runs", demo)
    folder = tmp_path_factory.mktemp("smoke")
    shutil.copytree(made, folder, dirs_exist_ok=True)
    move_store(folder / "runs/mlflow.db", (made / "made-in.txt").read_text(), str(folder))
    return folder


def move_store(database: Path, before: str, after: str) -> None:
    """Writes a folder's new place over its old one, wherever MLflow's tables name it."""
    with contextlib.closing(sqlite3.connect(database)) as db, db:
        for (table,) in db.execute("select name from sqlite_master where type = 'table'").fetchall():
            for _, column, kind, *_ in db.execute(f"pragma table_info({table})").fetchall():
                if "CHAR" in kind or "TEXT" in kind:
                    query = f'update {table} set "{column}" = replace("{column}", ?1, ?2) where instr("{column}", ?1)'
                    db.execute(query, (before, after))


@pytest.fixture
def smoke_copy(smoke: Path, tmp_path: Path) -> Callable[..., Path]:
    """Copies some of the finished smoke runs into a working folder of one's own, to continue from or to damage."""

    def copy(*stages: str) -> Path:
        for stage in stages:
            shutil.copytree(smoke / "runs" / "smoke" / stage, tmp_path / "runs" / "smoke" / stage)
        return tmp_path

    return copy


@pytest.fixture
def cli_log(monkeypatch):
    """Messages of the log on standard error, as the command line prints them."""
    monkeypatch.setattr(log.logger, "handlers", [])
    log.install()


@pytest.fixture
def real_weights(monkeypatch) -> Callable[[str], Path]:
    """Makes the weights that this machine has those of the test; skips it if one that it asks for is missing."""
    from pipeline.models import pretrained

    if REAL_TORCH_HOME:
        monkeypatch.setenv("TORCH_HOME", REAL_TORCH_HOME)
    else:
        monkeypatch.delenv("TORCH_HOME")

    def find(name: str) -> Path:
        path = pretrained.find(name)
        return path or pytest.skip(f"needs the weights of {name}: illm fetch-weights")

    return find


@pytest.fixture
def restored_handlers():
    """Puts the handlers back that a stopped run leaves."""
    from pipeline.processes import signals

    before = {number: signal.getsignal(number) for number in signals.STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 100 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", folder], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", folder], check=True)
