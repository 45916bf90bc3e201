"""Packs what `make gpu-day` needs on a machine with torch and a GPU but without internet, in two parts of at most 60 MiB.

    python -m tests.benchmarks.gpu_day.pack [FOLDER]     # FOLDER: by default runs/gpu-pack

Part 1: packages for Python 3.12 on x86_64 Linux, at the versions of requirements/, unpacked; and the weights of LPIPS if they
are here. Part 2: shards of the run folder SHARDS and photos of the folder IMAGES, if given. The package index is the one that
pip is configured for.
"""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).parents[3]
MIB = 2**20
LIMIT = 60 * MIB
# What `illm`, training and the steps import, besides what torch and torchvision bring. tests/system/test_gpu_pack.py looks.
PACKAGES = tuple(
    [
        "accelerate",
        "aiohappyeyeballs",
        "aiohttp",
        "aiosignal",
        "alembic",
        "annotated-doc",
        "annotated-types",
        "attrs",
        "braceexpand",
        "cachetools",
        "certifi",
        "charset-normalizer",
        "click",
        "cloudpickle",
        "compressai",
        "constriction",
        "databricks-sdk",
        "DISTS-pytorch",
        "einops",
        "frozenlist",
        "gitdb",
        "GitPython",
        "google-auth",
        "graphene",
        "graphql-core",
        "graphql-relay",
        "huggingface_hub",
        "idna",
        "importlib_metadata",
        "Jinja2",
        "lpips",
        "Mako",
        "markdown-it-py",
        "mdurl",
        "mlflow",
        "mlflow-skinny",
        "mlflow-tracing",
        "multidict",
        "numpy",
        "nvidia-ml-py",
        "opentelemetry-api",
        "opentelemetry-proto",
        "opentelemetry-sdk",
        "opentelemetry-semantic-conventions",
        "packaging",
        "pandas",
        "pillow",
        "propcache",
        "protobuf",
        "psutil",
        "pydantic",
        "pydantic_core",
        "Pygments",
        "python-dateutil",
        "pytorch-msssim",
        "PyYAML",
        "requests",
        "rich",
        "safetensors",
        "scipy",
        "shellingham",
        "simplejpeg",
        "six",
        "smmap",
        "SQLAlchemy",
        "sqlparse",
        "torch-fidelity",
        "torch-geometric",
        "tqdm",
        "typer",
        "typing-inspection",
        "typing_extensions",
        "urllib3",
        "webdataset",
        "xxhash",
        "yarl",
        "zipp",
    ]
)
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
    with tempfile.TemporaryDirectory() as name:
        site = Path(name) / "site"
        left_out = packages(site, PACKAGES, optional())
        sizes = {path.name: size_of(path) for path in site.iterdir() if path.is_dir()}
        first = write(folder / "part1.tar.gz", {"site": site, "torch_home/hub/checkpoints": weights()}, sizes)
    given = {"shards": os.environ.get("SHARDS"), "photos": os.environ.get("IMAGES")}
    data = {name: Path(place) for name, place in given.items() if place}
    second = write(folder / "part2.tar.gz", data, {}) if data else 0
    for part, size in {"part1.tar.gz": first, "part2.tar.gz": second}.items():
        print(
            f"{folder / part}: {size / MIB:.1f} MiB"
            if size
            else f"{part}: not needed, neither SHARDS nor IMAGES is given"
        )
    if left_out:
        print(f"left out, since neither a wheel nor a copy is here: {', '.join(left_out)}")
    print(commands(folder, data))


def commands(folder: Path, data: dict[str, Path]) -> str:
    shards = "SHARDS=pack/shards " if "shards" in data else ""
    return f"""On the machine, in a checkout of this revision that has {folder} too:
  mkdir -p pack && for part in {folder}/part*.tar.gz; do tar -xzf "$part" -C pack; done
  export PYTHONPATH=$PWD/pack/site TORCH_HOME=$PWD/pack/torch_home PYTHONUNBUFFERED=1
  {shards}OUT=results REFERENCE=$PWD/pack/site python3 -m tests.benchmarks.gpu_day     # or some steps: 1 4
Then copy results/*.json to docs/bench here, and: make tables"""


def optional() -> tuple[str, ...]:
    return tuple(name for file in OPTIONAL for name in pins(file))


def pins(file: str) -> dict[str, str]:
    """Name -> NAME==VERSION, of a file in requirements."""
    lines = (ROOT / "requirements" / file).read_text(encoding="utf-8").splitlines()
    found = [line.split(";")[0].split("#")[0].strip() for line in lines]
    return {line.split("==")[0].split("[")[0]: line for line in found if "==" in line}


def packages(site: Path, needed: Sequence[str], wanted: Sequence[str]) -> list[str]:
    """Unpacks packages into `site`; returns those of `wanted` that could not be had.

    Raises: PackError naming a needed one that could not.
    """
    known = {normal(name): pin for file in ("pins.txt", *OPTIONAL) for name, pin in pins(file).items()}
    if unknown := [name for name in needed if normal(name) not in known]:
        raise PackError(f"no version in requirements/ of {', '.join(unknown)}")
    site.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as name:
        wheels = Path(name)
        missing = [] if download([known[normal(n)] for n in needed], wheels) else needed
        # one by one, so that those without a wheel are known
        missing = [n for n in (*missing, *wanted) if not download([known[normal(n)]], wheels)]
        for wheel in sorted(wheels.glob("*.whl")):
            unpack(wheel, site)
    left = [name for name in missing if not copied(name, site)]
    if lacking := [name for name in left if name in needed]:
        raise PackError(f"pip has no wheel of {', '.join(lacking)} for Python 3.12, or cannot reach its index")
    return left


def download(names: list[str], target: Path) -> bool:
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
    return subprocess.run([*words, *names], check=False, capture_output=True).returncode == 0


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


def weights() -> Path | None:
    """AlexNet's weights, which LPIPS takes, where torch keeps such files."""
    home = Path(os.environ.get("TORCH_HOME") or Path.home() / ".cache/torch")
    found = sorted((home / "hub/checkpoints").glob("alexnet*"))
    return found[0] if found else None


def write(target: Path, content: dict[str, Path | None] | dict[str, Path], sizes: dict[str, int]) -> int:
    """A tar of folders and files under names; returns its size. Raises: PackError if that is over the limit."""
    with tarfile.open(target, "w:gz") as tar:
        for name, path in content.items():
            if path is not None:
                tar.add(path, f"{name}/{path.name}" if path.is_file() else name)
    size = target.stat().st_size
    if size > LIMIT:
        largest = sorted(sizes, key=lambda name: -sizes[name])[:5]
        target.unlink()
        raise PackError(
            f"{target.name}: {size / MIB:.0f} MiB, at most {LIMIT // MIB} fit; the largest: {', '.join(largest) or content}"
        )
    return size


def size_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1] if sys.argv[1:] else "runs/gpu-pack"))
    except PackError as error:
        sys.exit(str(error))
