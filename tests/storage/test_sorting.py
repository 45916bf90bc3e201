import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.storage import sorting
from pipeline.storage.sorting import SortedLines


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lines=st.lists(st.binary(max_size=8).filter(lambda line: b"\n" not in line), max_size=80), run=st.integers(1, 100)
)
def test_lines_come_back_sorted_however_small_the_files_are(tmp_path_factory, lines, run):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sorting, "RUN_BYTES", run)
        patch.setattr(sorting, "MERGED", 2)
        made = SortedLines(tmp_path_factory.mktemp("sorting") / "lines")
        for line in lines:
            made.add(line)
        # The line end is part of what is compared
        expected = sorted(line + b"\n" for line in lines)
        assert len(made) == len(lines)
        assert list(made) == expected
        assert list(made) == expected


def test_the_files_are_removed(tmp_path):
    made = SortedLines(tmp_path / "lines")
    made.add(b"a")
    assert list(made) == [b"a\n"]
    made.remove()
    assert list(tmp_path.iterdir()) == []
