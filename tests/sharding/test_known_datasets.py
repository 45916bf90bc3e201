import numpy as np
import pytest
from PIL import Image

from pipeline.errors import DataError
from pipeline.sharding import known_datasets, sources
from pipeline.sharding.known_datasets import DATASETS, DatasetSpec
from pipeline.sharding.sources import Source
from tests.conftest import picture


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Three images that are all of a data set called `three`."""
    import hashlib

    for i in range(3):
        Image.fromarray(picture(i)).save(tmp_path / f"three{i}.png")
    pixels = {f"three{i}": hashlib.sha256(picture(i).tobytes()).hexdigest()[:16] for i in range(3)}
    monkeypatch.setitem(DATASETS, "three", DatasetSpec("there", "free", 3, list(pixels), pixels))
    return tmp_path


def check(folder, name: str = "three", allow_missing: bool = False) -> None:
    items = sources.items(Source(name="x", path=str(folder)))
    assert len(list(known_datasets.checked(name, items, allow_missing))) == len(list(folder.iterdir()))


def test_a_whole_data_set_passes_in_any_lossless_form(folder, capsys, cli_log):
    check(folder)
    Image.open(folder / "three1.png").save(folder / "three1.bmp")
    (folder / "three1.png").unlink()
    check(folder)
    assert capsys.readouterr() == ("", "")


def test_what_is_missing_changed_or_too_much_is_named(folder, capsys, cli_log):
    (folder / "three2.png").unlink()
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(folder / "three0.png")
    Image.fromarray(picture(9)).save(folder / "mine.png")
    with pytest.raises(DataError) as told:
        check(folder)
    message = str(told.value)
    assert "1 of 3 are missing: three2" in message
    assert "1 are not part of it: mine" in message
    assert "1 are other images under the same name" in message
    assert "get it from there (free)" in message
    check(folder, allow_missing=True)
    assert "warning: known data set three" in capsys.readouterr().err


def test_counts_and_class_folders(tmp_path):
    Image.fromarray(picture(0)).save(tmp_path / "a.png")
    with pytest.raises(DataError, match=r"1 images, expected 250; get it from CLIC2020Professional_test\.zip"):
        check(tmp_path, "clic2020/professional-test")
    with pytest.raises(DataError, match=r"800 of 800 are missing: 0001, 0002, 0003, 0004, 0005, \.\.\."):
        check(tmp_path, "div2k/train")


def test_the_published_test_sets_have_their_published_sizes():
    assert DATASETS["clic2020/professional-test"].count + DATASETS["clic2020/mobile-test"].count == 428
    assert DATASETS["openimages-v6/valid"].count == 41_620
    assert len(set(DATASETS["kodak"].pixels.values())) == len(DATASETS["kodak"].names) == 24
