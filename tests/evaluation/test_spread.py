"""Images spread over processes, kept one by one, and put together as if one process had measured them all."""

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest

from pipeline.bitstream.codec import ImageCodec
from pipeline.data.images import decode
from pipeline.errors import BitstreamError
from pipeline.evaluation import evaluator, spread
from pipeline.evaluation.held_out import HeldOut
from pipeline.evaluation.metric_table import METRICS
from pipeline.evaluation.spread import Work
from pipeline.stages.evaluate import StageConfig
from tests.conftest import write_images


@pytest.fixture
def work(smoke: Path, tmp_path: Path) -> Work:
    images = write_images(tmp_path / "images", 5)
    codec = str(smoke / "runs/smoke/pretrain")
    place = str(tmp_path / "measured")
    return Work((("ours", codec),), ("jpeg",), str(images), 5, place, threads=0, metrics=tuple(METRICS))


def without_times(rows):
    return [dataclasses.replace(row, encode_seconds=0, decode_seconds=0) for row in rows]


def test_processes_give_what_one_process_gives_and_interrupted_work_is_kept(work, tmp_path):
    for number in (3, 1):
        work(number)
    kept = {place: (place / "result.json").stat().st_mtime_ns for place in Path(work.folder).iterdir()}
    # what a killed process leaves
    (Path(work.folder) / "000000.77.tmp" / "files").mkdir(parents=True)
    results = spread.measure(work, 5, processes=2)
    assert {place: (place / "result.json").stat().st_mtime_ns for place in kept} == kept
    spread.collect(work, 5, tmp_path / "together")

    images = HeldOut(work.images, 5)
    codec = ImageCodec.load(work.codecs[0][1])
    alone = evaluator.measure({"ours": codec}, images, 5, tmp_path / "alone", ["jpeg"])
    assert without_times(results.measurements) == without_times(alone.measurements)
    assert [row.image for row in results.of("ours")] == [image for image, _ in images]
    files = sorted(path.relative_to(tmp_path / "alone") for path in (tmp_path / "alone").rglob("*.*"))
    assert len(files) == 5 * (2 + 3)
    assert all(
        (tmp_path / "together" / file).read_bytes() == (tmp_path / "alone" / file).read_bytes() for file in files
    )
    for model, parts in alone.features.items():
        for ours, theirs in zip(results.features[model], parts, strict=True):
            assert ours.keys() == theirs.keys()
            assert all(np.allclose(ours[kind], theirs[kind], rtol=1e-4, atol=1e-5) for kind in ours)


def test_what_is_not_wanted_is_not_measured(work):
    totals = spread.measure(dataclasses.replace(work, metrics=("vgg_fd_64", "bpp")), 5, processes=1).totals()["ours"]
    assert {name for name, value in totals.items() if value is not None} <= {"bpp", "psnr_db", "vgg_fd_64"}
    assert totals["bpp"] > 0
    assert totals["psnr_db"] > 0


def test_an_unknown_metric_is_told():
    with pytest.raises(ValueError, match=r"expected one of bpp, psnr_db, .*, found 'psnr'"):
        StageConfig(images="i", codecs={"a": "b"}, metrics=("psnr",))


def test_images_are_the_same_by_number_and_in_order(work, smoke):
    for images in (HeldOut(work.images, 4), HeldOut(str(smoke / "runs/smoke/shard"), 3)):
        in_order = list(images)
        assert len(in_order) == len(images) > 0
        for number, (name, pixels) in enumerate(in_order):
            again = images[number]
            assert again[0] == name
            assert np.array_equal(again[1], pixels)
        with pytest.raises(IndexError):
            images[len(images)]
    first = sorted(path for path in Path(work.images).rglob("*.png"))[0]
    assert np.array_equal(HeldOut(work.images, 4)[0][1], decode(first).pixels)


def test_a_failure_is_told_and_measured_again(work):
    spread.measure(work, 2, processes=1)
    place = Path(work.folder) / "000001"
    result = spread.read(place)
    shutil.rmtree(place)
    place.mkdir()
    spread.write(place, dataclasses.replace(result, failures=["b by ours: the file's latent is not the encoder's"]))
    with pytest.raises(BitstreamError, match=r"1 of 2 files do not hold what was encoded.*\n  b by ours"):
        spread.measure(work, 2, processes=1)
    assert not Path(work.folder).exists()


@pytest.mark.parametrize(
    ("wanted", "images", "cores", "expected"),
    [(None, 1, 8, 1), (None, 7, 8, 1), (None, 24, 8, 6), (None, 24, 2, 2), (None, 1000, 128, 16), (3, 1, 8, 3)],
)
def test_processes_are_as_many_as_there_is_work_for(wanted, images, cores, expected, monkeypatch):
    monkeypatch.setattr(spread.os, "sched_getaffinity", lambda _: range(cores))
    assert spread.num_processes(wanted, images) == expected
    assert spread.threads(expected) == (0 if expected == 1 else max(1, cores // expected))
