"""Named data sets: where to get them, what should be there, and a check of what is.

Counts of CLIC2020 and the OpenImages validation set are those that published evaluations used; the rest is from the
data sets' own pages.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from pipeline.data.images import SUFFIXES, decode
from pipeline.errors import DataError
from pipeline.log import logger
from pipeline.sharding.items import Item, read_item

# SHA-256 of the RGB pixels, row by row, of Kodak's images: its first 16 hex digits
_KODAK = """
a002107433535944 ae5a495df4ec40e0 234e61f585503f2a e88e788fca00e6c7 ed3d1ee770909d3b 7f45158999fa297d
4e3664bf6fe865b4 889c3740e4ed54ca f8453140e63a4230 fabe11b5c4f02839 ab4dd9bf8431e717 f412db2168e59994
875703d56fb9396f 2bd5029ee75ac169 b5353e7511277009 ed21745fd32fce95 566bc866664e9b06 3475af71066f3ca8
7956408ef24222d3 666ce8f2db5566a1 2d6902daf7c4486b f430842120c108b6 81992a83592267e6 e3e3ccc3e795b82a
"""

# Names in a message
_SHOWN = 5


@dataclass(frozen=True)
class DatasetSpec:
    """A data set's part.

    count: images, if it is fixed. names: stems of their files, if they are. pixels: stem -> digest of its pixels.
    folders: every image has to be in a folder of its class.
    """

    where: str
    terms: str
    count: int | None = None
    names: Sequence[str] = ()
    pixels: dict[str, str] = field(default_factory=dict)
    folders: bool = False


def _numbers(first: int, last: int, pattern: str = "{:04d}") -> list[str]:
    return [pattern.format(number) for number in range(first, last + 1)]


_CLIC = "CLIC2020{} in data.vision.ee.ethz.ch/cvl/clic, or TensorFlow Datasets' `clic`"
_OPEN = "storage.googleapis.com/openimages/web/download.html, or s3://open-images-dataset/{}"
_CC_BY = "CC BY 2.0, by photo"
DATASETS = {
    "kodak": DatasetSpec(
        "r0k.us/graphics/kodak",
        "released for unrestricted use",
        24,
        _numbers(1, 24, "kodim{:02d}"),
        dict(zip(_numbers(1, 24, "kodim{:02d}"), _KODAK.split(), strict=True)),
    ),
    "div2k/train": DatasetSpec("DIV2K_train_HR.zip in data.vision.ee.ethz.ch/cvl/DIV2K", "research only", 800, _numbers(1, 800)),
    "div2k/valid": DatasetSpec("DIV2K_valid_HR.zip in data.vision.ee.ethz.ch/cvl/DIV2K", "research only", 100, _numbers(801, 900)),
    "clic2020/professional-train": DatasetSpec(_CLIC.format("Professional_train.zip"), "Unsplash license", 585),
    "clic2020/professional-valid": DatasetSpec(_CLIC.format("Professional_valid.zip"), "Unsplash license", 41),
    "clic2020/professional-test": DatasetSpec(_CLIC.format("Professional_test.zip"), "Unsplash license", 250),
    "clic2020/mobile-train": DatasetSpec(_CLIC.format("Mobile_train.zip"), "as given by CLIC", 1048),
    "clic2020/mobile-valid": DatasetSpec(_CLIC.format("Mobile_valid.zip"), "as given by CLIC", 61),
    "clic2020/mobile-test": DatasetSpec(_CLIC.format("Mobile_test.zip"), "as given by CLIC", 178),
    "openimages-v6/train": DatasetSpec(_OPEN.format("train"), _CC_BY, 9_011_219),
    "openimages-v6/valid": DatasetSpec(_OPEN.format("validation"), _CC_BY, 41_620),
    "openimages-v6/test": DatasetSpec(_OPEN.format("test"), _CC_BY, 125_436),
    "imagenet/train": DatasetSpec("image-net.org, after registration", "research only", 1_281_167, folders=True),
    "imagenet/valid": DatasetSpec("image-net.org, after registration", "research only", 50_000),
    "class-folders": DatasetSpec("any data set of one folder per class", "", folders=True),
}  # fmt: skip


def checked(name: str, items: Iterable[Item], allow_missing: bool) -> Iterator[Item]:
    """The items of a source, compared with what a known data set has; warns of a difference if `allow_missing`.

    Raises: DataError after the last item if something is missing or another image, unless `allow_missing`.
    """
    known = DATASETS[name]
    names, found = frozenset(known.names), set[str]()
    count, flat, others, changed = 0, _Some(), _Some(), _Some()
    for item in items:
        yield item
        path = PurePosixPath(item.name)
        if path.suffix.lower() not in SUFFIXES:
            continue
        count += 1
        if known.folders and len(path.parts) < 2:
            flat.add(item.name)
        if names and path.stem not in names:
            others.add(path.stem)
        elif names:
            found.add(path.stem)
        if _differs(item, known):
            changed.add(item.name)
    problems = []
    if missing := [stem for stem in known.names if stem not in found]:
        problems.append(f"{len(missing)} of {len(names)} are missing: {_listed(missing)}")
    elif known.count is not None and count != known.count:
        problems.append(f"{count} images, expected {known.count}")
    for some, words in (
        (flat, "images are in no class folder"),
        (others, "are not part of it"),
        (changed, "are other images under the same name"),
    ):
        if some.count:
            problems.append(f"{some.count} {words}: {_listed(some.first)}")
    if not problems:
        return
    message = f"known data set {name}: {'; '.join(problems)}; get it from {known.where} ({known.terms})"
    if not allow_missing:
        raise DataError(f"{message}; or accept it with allow_missing: true")
    logger.warning(message)


def _differs(item: Item, known: DatasetSpec) -> bool:
    expected = known.pixels.get(PurePosixPath(item.name).stem)
    if expected is None:
        return False
    try:
        pixels = decode(read_item(item, 2**26)).pixels
    except DataError:
        return True
    return not hashlib.sha256(pixels.tobytes()).hexdigest().startswith(expected)


@dataclass
class _Some:
    """How many names were added, and the first of them, each once."""

    count: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, name: str) -> None:
        self.count += 1
        if len(self.first) <= _SHOWN and name not in self.first:
            self.first.append(name)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
