"""What is packed for a machine without internet is all that a run imports, and fits."""

import os
import re
import subprocess
import sys
import tarfile
from importlib import metadata
from pathlib import Path

import pytest

from tests.benchmarks.gpu_day import pack
from tests.conftest import ROOT

# Brought by the machine
GIVEN = ("torch", "torchvision")
# A Python that finds only some of the installed packages
HIDE = """
import sys
class Without:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, *rest):
        return None if name.split(".")[0] in HIDDEN else self.finder.find_spec(name, *rest)
    def __getattr__(self, name):
        return getattr(self.finder, name)
sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
"""


def needs(names: tuple[str, ...]) -> set[str]:
    """These packages and all that they require."""
    found: set[str] = set()
    left = list(names)
    while left:
        name = pack.normal(left.pop())
        if name not in found:
            found.add(name)
            try:
                required = metadata.requires(name) or []
            except metadata.PackageNotFoundError:
                continue
            left += [re.split(r"[^\w.-]", line)[0] for line in required if "extra ==" not in line]
    return found


@pytest.fixture
def only_packed(tmp_path) -> dict[str, str]:
    """An environment in which Python finds what is packed, what torch brings, and this project."""
    there = {pack.normal(name) for name in pack.PACKAGES} | needs(GIVEN) | {"illm-pipeline"}
    owners = metadata.packages_distributions()
    hidden = {module for module, names in owners.items() if not there & {pack.normal(name) for name in names}}
    assert {"pytest", "ray", "hypothesis"} <= hidden
    (tmp_path / "hide").mkdir()
    (tmp_path / "hide/sitecustomize.py").write_text(f"HIDDEN = {hidden!r}\n{HIDE}")
    path = os.pathsep.join([str(tmp_path / "hide"), str(ROOT)])
    return os.environ | {"PYTHONPATH": path, "TINY": "1", "OUT": str(tmp_path), "PYTHONWARNINGS": "ignore"}


@pytest.mark.slow
@pytest.mark.long
def test_all_that_a_run_imports_is_packed(only_packed, tmp_path, images):
    def run(*words: object) -> None:
        command = [sys.executable, *map(str, words)]
        ended = subprocess.run(command, cwd=tmp_path, env=only_packed, capture_output=True, text=True, check=False)
        assert ended.returncode == 0, ended.stderr[-3000:]

    steps = "machine steps variants reference same batches numerics kernels training ranks zero photos"
    modules = [f"tests.benchmarks.gpu_day.{name}" for name in steps.split()]
    run("-c", f"import {', '.join(['tests.benchmarks.gpu_day.__main__', *modules, 'pipeline.stages.evaluate'])}")
    run("-m", "pipeline", "shard", ROOT / "configs/smoke/shard.yaml", "run=shard", f"source={images}")
    words = ("run=pretrain", "data.shards=shard", "fit.steps=2", "distortion.if_lpips_missing=skip")
    run("-m", "pipeline", "pretrain", ROOT / "configs/smoke/pretrain.yaml", *words)
    codecs = ("codecs={}", "codecs={small: pretrain}")
    run("-m", "pipeline", "evaluate", ROOT / "configs/smoke/evaluate.yaml", "run=evaluate", "images=shard", *codecs)


@pytest.mark.slow
def test_packages_are_unpacked_from_the_index_or_copied_from_here(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setenv("PIP_DEFAULT_TIMEOUT", "20")
    # one with a wheel; one of plain Python that is here, and has none
    try:
        left = pack.packages(tmp_path / "site", ["einops"])
    except pack.PackError as error:
        pytest.skip(f"pip cannot reach the index: {error}")
    if left or not (tmp_path / "site/einops/__init__.py").exists():
        pytest.skip("pip cannot reach the index")
    assert pack.copied("braceexpand", tmp_path / "site")
    assert (tmp_path / "site/braceexpand/__init__.py").exists() or (tmp_path / "site/braceexpand.py").exists()
    assert not pack.copied("numpy", tmp_path / "site")
    assert not pack.copied("no-such-package", tmp_path / "site")


def test_a_part_that_is_too_large_says_so(tmp_path, monkeypatch, capsys):
    (tmp_path / "site").mkdir()
    (tmp_path / "site/a.py").write_text("a = 1\n")
    pack.write(tmp_path / "part.tar.xz", {"site": tmp_path / "site", "torch_home/hub/checkpoints": None})
    assert "0.0 MiB" in capsys.readouterr().out
    with tarfile.open(tmp_path / "part.tar.xz") as tar:
        assert tar.getnames() == ["site", "site/a.py"]
    monkeypatch.setattr(pack, "LIMIT", 10)
    with pytest.raises(pack.PackError, match="at most 0 MiB fit"):
        pack.write(tmp_path / "part.tar.xz", {"site": tmp_path / "site"})
    assert not (tmp_path / "part.tar.xz").exists()


def test_mlflow_pages_and_tests_are_not_packed():
    for name in ("mlflow/server/js/build/static/a.js", "scipy/special/tests/test_a.py", "numpy/core/include/a.h"):
        assert pack.NOT_PACKED.search(name), name
    for name in (
        "mlflow/server/__init__.py",
        "torch_fidelity/metric_kid.py",
        "mlflow/tests.py",
        "numpy/testing/__init__.py",
    ):
        assert not pack.NOT_PACKED.search(name), name


def test_every_package_has_a_version(monkeypatch):
    known = {pack.normal(name) for name in pack.pins("pins.txt")}
    assert {name for name in pack.PACKAGES if pack.normal(name) not in known} == set()
    with pytest.raises(pack.PackError, match="no version in requirements/ of nowhere"):
        pack.packages(Path("unused"), ["nowhere"])
