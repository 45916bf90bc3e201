"""Which file `compress` and `decompress` write for which input, checked before any work is done."""

import io
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from PIL import Image

from pipeline.data import images
from pipeline.errors import UserError
from pipeline.storage import outputs
from pipeline.storage.outputs import OutputError

T = TypeVar("T")


@dataclass(frozen=True)
class Job:
    """A file to convert and the one to make of it. None: standard input, standard output."""

    source: Path | None
    target: Path | None

    @property
    def name(self) -> str:
        """What to call the source in messages."""
        return str(self.source or "standard input")


@dataclass(frozen=True)
class Direction:
    """What the two commands do differently.

    ending: in place of the source's suffix, where the output was not named. suffixes: what is taken from a folder.
    is_output: whether the second of two names is the output's. check_name: raises OutputError for a misleading one.
    """

    ending: str
    suffixes: Collection[str]
    is_output: Callable[[Path], bool]
    check_name: Callable[[Path], object]


def format_of(path: Path | None) -> str:
    """Pillow's name for the format that an image's suffix stands for; PNG for standard output, and pipes without one.

    Raises: OutputError if there is none that can be written.
    """
    if path is None or (not path.suffix and outputs.is_special(path)):
        return "PNG"
    name = Image.registered_extensions().get(path.suffix.lower(), "")
    try:
        Image.new("RGB", (1, 1)).save(io.BytesIO(), name)
    except (OSError, ValueError, KeyError):
        raise OutputError(
            f"{path}: no image format that can be written is called {path.suffix!r}; use .png, or -o {path}/ for a folder"
        ) from None
    return name


def _is_compressed(path: Path) -> bool:
    return path.suffix.lower() == ".illm"


def _refuse_image_name(path: Path) -> None:
    if path.suffix.lower() in Image.registered_extensions():
        raise OutputError(
            f"{path}: this names an image, but a compressed file is written; name it {path.with_suffix('.illm')}"
        )


# An image is never the output of `compress` by its place alone: a shell's `*.png` puts a second photo there just as well.
COMPRESS = Direction(".illm", images.SUFFIXES, _is_compressed, _refuse_image_name)
DECOMPRESS = Direction(".restored.png", (".illm",), lambda path: not _is_compressed(path), format_of)


def plan(direction: Direction, names: Sequence[str], output: str | None, force: bool) -> list[Job]:
    """One job per file. names: files, or a folder, or "-", and perhaps the output; output: a file, a folder or "-".

    Raises: UserError naming what is missing, what two files would both become, or what may not be written.
    """
    if output is None and len(names) == 2 and _is_output(direction, names[1]):
        names, output = names[:1], names[1]
    jobs = _jobs(direction, names, output)
    _refuse_equal_targets(jobs)
    inputs = {outputs.identity(job.source) for job in jobs if job.source}

    def check(job: Job) -> None:
        if job.target:
            direction.check_name(job.target)
        outputs.check(job.target, force, inputs)

    _all_of(check, jobs)
    return jobs


def _is_output(direction: Direction, name: str) -> bool:
    path = outputs.named(name)
    return path is None or outputs.is_special(path) or (direction.is_output(path) and not outputs.is_folder(path))


def _jobs(direction: Direction, names: Sequence[str], output: str | None) -> list[Job]:
    if list(names) == ["-"]:
        return [Job(None, _target(direction, None, Path("stdin"), output))]
    if len(names) == 1 and outputs.is_folder(folder := Path(names[0])):
        found = _inside(direction, folder)
        place = _folder(output, len(found))
        return [Job(path, _target(direction, path, path.relative_to(folder), place)) for path in found]
    _all_of(_check_source, names)
    place = _folder(output, len(names)) if len(names) > 1 else output
    return [Job(Path(name), _target(direction, Path(name), Path(Path(name).name), place)) for name in names]


def _target(direction: Direction, source: Path | None, inside: Path, output: str | None) -> Path | None:
    """Where the file made of `source` goes. inside: its place in an output folder."""
    if output is None:
        return source.with_suffix(direction.ending) if source else None
    path = outputs.named(output)
    if path is not None and (output.endswith("/") or outputs.is_folder(path)):
        return path / inside.with_suffix(direction.ending)
    return path


def _folder(output: str | None, count: int) -> str | None:
    """The output that several files have. Raises: OutputError if it is one file."""
    if output is None or output.endswith("/") or outputs.is_folder(Path(output)):
        return output
    if outputs.named(output) is None or Path(output).suffix or outputs.is_special(Path(output)):
        raise OutputError(f"{output}: {count} file(s) do not go into one; name a folder, as in -o compressed/")
    return f"{output}/"


def _inside(direction: Direction, folder: Path) -> list[Path]:
    """The files in a folder and its subfolders that have a known suffix and are not hidden, in a stable order."""
    paths = (path for path in sorted(folder.rglob("*")) if path.suffix.lower() in direction.suffixes)
    files = [path for path in paths if path.is_file() and not _is_hidden(path.relative_to(folder))]
    if not files:
        raise UserError(f"{folder}: holds no file that ends with {', '.join(sorted(direction.suffixes))}")
    return files


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _check_source(name: str) -> None:
    if name == "-":
        raise UserError("standard input cannot be one of several files; name it alone")
    try:
        Path(name).stat()
    except FileNotFoundError:
        raise UserError(f"{name}: no such file; an output is named with -o") from None
    except OSError as error:
        raise UserError(f"cannot read {name}: {error.strerror}; choose another file") from None
    if outputs.is_folder(Path(name)):
        raise UserError(f"{name}: is a folder; name it alone, or with -o to write there")


def _refuse_equal_targets(jobs: Sequence[Job]) -> None:
    made: dict[Path, Job] = {}
    for job in jobs:
        if job.target and (other := made.setdefault(job.target, job)) is not job:
            raise OutputError(
                f"{other.name} and {job.name} would both become {job.target}; convert one by itself, with -o"
            )


def _all_of(check: Callable[[T], None], items: Iterable[T]) -> None:
    """Raises: the first UserError that `check` raises, saying how many more items have one."""
    problems = []
    for item in items:
        try:
            check(item)
        except UserError as error:
            problems.append(error)
    if len(problems) > 1:
        raise type(problems[0])(f"{problems[0]} (and {len(problems) - 1} more)")
    if problems:
        raise problems[0]
