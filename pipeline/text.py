"""Names and errors that come with the data, in the form in which they may be printed, stored or used as file names."""

import re
from datetime import UTC, datetime

_OBJECT = re.compile(r"\s*<[^<>]* at 0x[0-9a-fA-F]+>")
# Characters of a file name's stem; at most 4 bytes each, and file systems take 255 bytes
_LONGEST = 50


def printable(text: str) -> str:
    r"""The text with control, format and surrogate characters written out, such as `\x1b`; others as they are."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def reason(error: BaseException) -> str:
    """What an error says, printable, on one line, and the same in every run: without the addresses of objects."""
    if isinstance(error, OSError) and error.strerror:
        return printable(error.strerror)
    # requests wraps urllib3's error, which says what happened in its `reason`
    inner = getattr(error.args[0], "reason", None) if error.args else None
    if isinstance(inner, Exception):
        error = inner
    return printable(" ".join(_OBJECT.sub("", str(error)).split()))


def file_name(stem: str) -> str:
    """A name that every file system, manifest and store takes: letters, digits, `_`, `.` and `-`, and not too long."""
    return re.sub(r"[^\w.-]+", "_", stem)[:_LONGEST]


def timestamp() -> str:
    """Now, in UTC: 2026-11-26T15:30:00+00:00."""
    return datetime.now(UTC).isoformat(timespec="seconds")
