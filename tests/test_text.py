import io
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.text import file_name, printable, reason


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a photo, größer.png", "a photo, größer.png"),
        ("\x1b[2Jgone\n.png", r"\x1b[2Jgone\n.png"),
        ("gnp.\u202etxt", r"gnp.\u202etxt"),
        (os.fsdecode(b"\xff.png"), r"\udcff.png"),
        ("nul\0", r"nul\x00"),
    ],
)
def test_what_a_terminal_would_obey_is_written_out(text, expected):
    assert printable(text) == expected


def test_a_reason_is_one_line_and_the_same_in_every_run():
    error = ValueError(f"cannot read {io.BytesIO()}\nat all, \x1b[1m{object()}: no")
    assert reason(error) == "cannot read at all, \\x1b[1m: no"
    assert reason(FileNotFoundError(2, "No such file or directory", "/secret")) == "No such file or directory"


@given(st.text(max_size=400))
def test_a_file_name_is_short_and_stays_in_its_folder(stem):
    name = file_name(stem)
    assert name.isprintable()
    assert not set(name) & set("/\\ %#?:")
    assert len(name.encode()) <= 200
