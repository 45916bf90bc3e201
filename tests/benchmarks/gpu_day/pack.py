"""Packs what `make gpu-day` needs on a machine with torch and a GPU but without internet, in two parts of at most 60 MiB.

    python -m tests.benchmarks.gpu_day.pack [FOLDER]     # FOLDER: by default runs/gpu-pack

Both: packages for Python 3.12 on x86_64 Linux, at the versions of requirements/, unpacked; not those in HAVE="names". Part 1
also has the weights of LPIPS if they are here; part 2 the shards of the run folder SHARDS and the photos of the folder IMAGES,
if given. The package index is the one that pip is configured for.
"""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path

from safetensors.torch import save_file

from pipeline.models import pretrained

ROOT = Path(__file__).parents[3]
MIB = 2**20
LIMIT = 60 * MIB
# What `illm`, training and the steps import, besides what torch and torchvision bring; tests/system/test_gpu_pack.py looks
PACKAGES = (Path(__file__).parent / "packages.txt").read_text(encoding="utf-8").split()
# In part 2, for want of room
LARGE = ("scipy", "matplotlib", "fonttools", "kiwisolver", "contourpy", "plotly")
# Without these some steps leave rows out: ZeRO, and the published implementation
OPTIONAL = ("deepspeed.txt", "parity.txt")
# Wheels for Linux are marked with the C library that they need at least
PLATFORMS = (
    "manylinux2014_x86_64",
    "manylinux1_x86_64",
    *(f"manylinux_2_{n}_x86_64" for n in (5, 12, 17, 24, 26, 27, 28, 31, 34)),
)
# Of no use to training: MLflow's pages, and tests
NOT_PACKED = re.compile(r"mlflow/server/js/|/tests?/|\.pyi$|\.(c|cpp|pyx|h)$")


class PackError(Exception):
    """What could not be packed, in one line."""


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    had = {normal(name) for name in os.environ.get("HAVE", "").split()}
    names = [name for name in PACKAGES if normal(name) not in had]
    extra = [name for file in OPTIONAL for name in pins(file) if normal(name) not in had]
    first = [name for name in names if name not in LARGE]
    given = {"shards": os.environ.get("SHARDS"), "photos": os.environ.get("IMAGES")}
    data = {name: Path(place) for name, place in given.items() if place}
    with tempfile.TemporaryDirectory() as name:
        one, two = Path(name) / "1", Path(name) / "2"
        if lacking := packages(one, first):
            raise PackError(f"neither a wheel for Python 3.12 nor a copy here of {', '.join(lacking)}")
        left_out = packages(two, [name for name in names if name in LARGE] + extra)
        write(folder / "part1.tar.xz", {"site": one, "torch_home/hub/checkpoints": weights(Path(name))})
        write(folder / "part2.tar.xz", {"site": two, **data})
    if left_out:
        print(f"left out, neither a wheel nor a copy is here: {', '.join(left_out)}")
    print(commands(folder, data))


def commands(folder: Path, data: dict[str, Path]) -> str:
    shards = "SHARDS=pack/shards " if "shards" in data else ""
    return f"""On the machine, in a checkout of this revision that has {folder} too:
  mkdir -p pack && for part in {folder}/part*.tar.xz; do tar -xJf "$part" -C pack; done
  export PYTHONPATH=$PWD/pack/site TORCH_HOME=$PWD/pack/torch_home PYTHONUNBUFFERED=1
  {shards}OUT=results REFERENCE=$PWD/pack/site python3 -m tests.benchmarks.gpu_day     # or some steps: 1 4
Then copy results/*.json to docs/bench here, and: make tables"""


def pins(file: str) -> dict[str, str]:
    """Name -> NAME==VERSION, of a file in requirements."""
    lines = (ROOT / "requirements" / file).read_text(encoding="utf-8").splitlines()
    found = [line.split(";")[0].split("#")[0].strip() for line in lines]
    return {line.split("==")[0].split("[")[0]: line for line in found if "==" in line}


def packages(site: Path, names: Sequence[str]) -> list[str]:
    """Unpacks packages into `site`; returns those of which there is neither a wheel nor a copy here.

    Raises: PackError if requirements/ has no version of one.
    """
    known = {normal(name): pin for file in ("pins.txt", *OPTIONAL) for name, pin in pins(file).items()}
    if unknown := [name for name in names if normal(name) not in known]:
        raise PackError(f"no version in requirements/ of {', '.join(unknown)}")
    site.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as folder:
        missing = download([known[normal(name)] for name in names], Path(folder))
        for wheel in sorted(Path(folder).glob("*.whl")):
            unpack(wheel, site)
    return [pin for pin in missing if not copied(pin.split("==")[0], site)]


def download(pinned: list[str], target: Path) -> list[str]:
    """Wheels for the machine, from the index that pip is configured for; returns what has none."""
    words = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--only-binary=:all:",
        "--dest",
        str(target),
    ]
    words += ["--python-version", "3.12", "--implementation", "cp", *(f"--platform={name}" for name in PLATFORMS)]
    missing: list[str] = []
    while left := [name for name in pinned if name not in missing]:
        ended = subprocess.run([*words, *left], check=False, capture_output=True, text=True)
        if ended.returncode == 0:
            return missing
        # pip stops at the first one that it does not find
        found = re.search(r"No matching distribution found for (\S+)", ended.stderr)
        if not found or found[1] not in left:
            raise PackError(f"pip: {ended.stderr.strip().splitlines()[-1]}")
        missing.append(found[1])
    return missing


def unpack(wheel: Path, site: Path) -> None:
    with zipfile.ZipFile(wheel) as content:
        content.extractall(site, [name for name in content.namelist() if not NOT_PACKED.search(name)])
    # a wheel's folder for what is not a module of its own
    for inner in (*site.glob("*.data/purelib"), *site.glob("*.data/platlib")):
        shutil.copytree(inner, site, dirs_exist_ok=True)
    for data in site.glob("*.data"):
        shutil.rmtree(data)


def copied(name: str, site: Path) -> bool:
    """Copies a package of plain Python from this environment; some have no wheel anywhere."""
    try:
        files = metadata.files(name) or []
    except metadata.PackageNotFoundError:
        return False
    inside = [file for file in files if file.parts[0] not in ("..", "__pycache__") and file.suffix != ".pyc"]
    if not inside or any(file.suffix == ".so" for file in inside):
        return False
    for file in inside:
        if not NOT_PACKED.search(file.as_posix()):
            (site / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file.locate(), site / file)
    return True


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def weights(folder: Path) -> Path | None:
    """Writes the convolutions of AlexNet, which LPIPS takes, if its weights are where torch keeps such files."""
    found = pretrained.find("alexnet")
    if found is None:
        return None
    target = folder / pretrained.features_file("alexnet")
    save_file({name: value.contiguous() for name, value in pretrained.convolutions(found).items()}, target)
    return target


def write(target: Path, content: Mapping[str, Path | None]) -> None:
    """A tar of folders and files under names. Raises: PackError if it is over the limit."""
    with tarfile.open(target, "w:xz", preset=2) as tar:
        for name, path in content.items():
            if path is not None:
                tar.add(path, f"{name}/{path.name}" if path.is_file() else name)
    size = target.stat().st_size
    print(f"{target}: {size / MIB:.1f} MiB")
    if size > LIMIT:
        target.unlink()
        raise PackError(f'{target.name}: at most {LIMIT // MIB} MiB fit; HAVE="names" leaves out what the machine has')


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1] if sys.argv[1:] else "runs/gpu-pack"))
    except PackError as error:
        sys.exit(str(error))
