from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.bitstream.codec import ImageCodec
from pipeline.errors import BitstreamError, MetricError
from pipeline.evaluation import evaluator, metrics
from pipeline.evaluation.measurement import read_csv, write_csv
from pipeline.stages.evaluate import StageConfig
from tests.conftest import picture
from tests.models.test_networks import small_codec

# Metrics that need no weights
PLAIN = ("psnr_db", "ms_ssim")


def test_an_image_whose_file_does_not_hold_its_latent_fails_the_run_by_name(tmp_path):
    """This codec goes wrong where an image is bright: there its latents are beyond what can be coded."""
    network = small_codec()
    network.analysis = torch.nn.Conv2d(3, 8, 16, stride=16, bias=False)
    network.analysis.halo = 0
    torch.nn.init.constant_(network.analysis.weight, 2**16 / (3 * 16 * 16))
    images = {f"level-{level}": np.full((64, 64, 3), level, np.uint8) for level in (0, 100, 200, 255)}
    with pytest.raises(BitstreamError, match="2 of 4 files do not hold what was encoded") as failed:
        evaluator.measure({"ours": ImageCodec(network)}, images.items(), len(images), tmp_path, ["jpeg"], PLAIN)
    assert [name for name in images if f"{name} by ours" in str(failed.value)] == ["level-200", "level-255"]


def test_a_file_that_says_another_image_fails_the_run_by_name(tmp_path, monkeypatch):
    """A whole and valid file, for instance of a disk that mixes up blocks: only the encoder's latent can tell."""
    codec = ImageCodec(small_codec())
    another, write = codec.compress(picture(9)), Path.write_bytes
    swapped = lambda path, content: write(path, another if path.name == "b.illm" else content)
    monkeypatch.setattr(Path, "write_bytes", swapped)
    images = [("a", picture(1)), ("b", picture(2)), ("c", picture(3))]
    with pytest.raises(BitstreamError, match="1 of 3 files do not hold what was encoded") as failed:
        evaluator.measure({"ours": codec}, images, len(images), tmp_path, wanted=PLAIN)
    assert "b by ours: the file's latent is not the encoder's" in str(failed.value)


def test_the_encoders_latent_is_recorded_with_every_file(tmp_path):
    codec = ImageCodec(small_codec())
    results = evaluator.measure({"ours": codec}, [("a", picture(1)), ("b", picture(2))], 2, tmp_path, ["jpeg"], PLAIN)
    assert [row.latent for row in results.of("ours")] == [codec.encode(picture(n)).symbols.digest() for n in (1, 2)]
    assert [row.latent for row in results.of("jpeg")] == [None, None]
    write_csv(tmp_path / "table.csv", results.measurements)
    assert read_csv(tmp_path / "table.csv") == results.measurements


@pytest.mark.parametrize("name", ["original", "images", "jpeg", "vvc", ".", ".."])
def test_codecs_cannot_have_names_that_mean_something_else(name):
    with pytest.raises(ValueError, match="is the name of something else"):
        StageConfig(images="photos", codecs={name: "runs/x"})


def test_a_metric_that_is_not_what_it_says_stops_everything_before_a_file_is_written(tmp_path, monkeypatch):
    """In evaluations, comparisons and promotions alike."""
    right = metrics.psnr_db
    monkeypatch.setattr(metrics, "psnr_db", lambda ours, original: right(ours, original) + 1)
    with pytest.raises(MetricError, match="PSNR against its JPEG 10"):
        evaluator.measure({"ours": ImageCodec(small_codec())}, [("a", picture(1))], 1, tmp_path / "out", wanted=PLAIN)
    assert not (tmp_path / "out").exists()
