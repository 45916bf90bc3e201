"""Scratch folders of many at once: nobody takes another's for a leftover."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pipeline.storage import disk


def test_many_may_have_scratch_folders_of_one_name_at_once(tmp_path):
    def work(number: int) -> str:
        with disk.scratch_folder(tmp_path / "plan") as scratch:
            (scratch / "a").write_text(str(number))
            return (scratch / "a").read_text()

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(work, range(400))) == [str(number) for number in range(400)]
    assert list(tmp_path.iterdir()) == []


def test_a_scratch_folder_that_was_swept_before_it_was_locked_is_made_again(tmp_path, monkeypatch):
    swept = []
    opened = os.open

    def after_the_broom(path: Path, *more: int) -> int:
        if not swept:
            swept.append(path)
            Path(path).rmdir()
        return opened(path, *more)

    monkeypatch.setattr(os, "open", after_the_broom)
    with disk.scratch_folder(tmp_path / "plan") as scratch:
        assert scratch.is_dir()
        assert scratch != swept[0]
