"""Where images come from: a folder tree, or the sample photos inside scikit-image and scikit-learn."""

import importlib.util
from pathlib import Path

from pipeline.errors import DataError

SAMPLES = "samples://photos"
SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp"}

# The colour photos these packages ship (of the stereo pair, one view).
_SAMPLE_PHOTOS = {
    "skimage": [
        "astronaut.png",
        "chelsea.png",
        "coffee.png",
        "hubble_deep_field.jpg",
        "motorcycle_left.png",
        "rocket.jpg",
    ],
    "sklearn": ["china.jpg", "flower.jpg"],
}
_SAMPLE_FOLDERS = {"skimage": "data", "sklearn": "datasets/images"}


def find_files(source: str) -> list[Path]:
    """Every file of a source, sorted; hidden files and folders are left out.

    Raises: DataError if there is no such folder, or no file in it.
    """
    if source == SAMPLES:
        return [path for package in _SAMPLE_PHOTOS for path in _sample_photos(package)]
    folder = Path(source)
    if not folder.is_dir():
        raise DataError(f"{source}: no such folder; expected a folder of images, or {SAMPLES}")
    files = [p for p in folder.rglob("*") if p.is_file() and not _hidden(p.relative_to(folder))]
    if not files:
        raise DataError(f"{source}: the folder holds no files; expected images ({', '.join(sorted(SUFFIXES))})")
    return sorted(files)


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _sample_photos(package: str) -> list[Path]:
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise DataError(f"{SAMPLES}: the package {package!r} is not installed; `pip install 'illm-pipeline[demo]'`")
    folder = Path(spec.origin).parent / _SAMPLE_FOLDERS[package]
    return [folder / name for name in _SAMPLE_PHOTOS[package]]
