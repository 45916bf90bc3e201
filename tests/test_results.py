"""The page of results says what was measured."""

import json
import re

import pytest

from pipeline.evaluation.metric_table import format_value
from tests import results
from tests.benchmarks import calibrated, claim, discriminators, equal_quality, lpips_grid, pilots
from tests.conftest import ROOT

pytestmark = pytest.mark.quick


def test_something_was_measured():
    assert results.names()


def test_the_page_on_training_has_the_table_of_the_grid_of_lpips():
    assert lpips_grid.table() in (ROOT / "docs/training.md").read_text()


@pytest.mark.parametrize("name", results.names())
def test_the_page_has_the_table_of_each_set(name):
    assert results.table(name) in (ROOT / "docs/results.md").read_text()


def test_the_card_of_the_package_has_what_was_measured():
    assert results.table("kodak", all_codecs=False) in (ROOT / "pipeline/shipped/README.md").read_text()


def test_the_page_has_the_comparison_of_discriminators():
    assert claim.table(ROOT / claim.TABLE) in (ROOT / "docs/results.md").read_text()


def test_the_page_has_what_eight_bits_cost():
    assert results.eight_bits() in (ROOT / "docs/results.md").read_text()


def test_the_page_on_own_images_has_what_they_gave():
    assert results.own_images() in (ROOT / "docs/own-images.md").read_text()


@pytest.mark.parametrize("page", ["README.md", "docs/demo.md"])
def test_pages_have_the_table_that_the_demo_ended_with(page):
    text = (ROOT / page).read_text()
    for model, row in json.loads((results.HOME / "demo-totals.json").read_text()).items():
        values = (format_value(name, row[name]) for name in ("bpp", "psnr_db", "ms_ssim", "ssimulacra2"))
        assert re.search(rf"│ {model} *│ +{' │ +'.join(values)} │", text), model


@pytest.mark.parametrize(
    ("measured", "page"),
    [
        (pilots, "results.md"),
        (equal_quality, "engines.md"),
        (discriminators, "training.md"),
        (calibrated, "training.md"),
    ],
)
def test_the_pages_have_the_tables_of_short_trainings(measured, page):
    rows = json.loads((ROOT / measured.TARGET).read_text())
    assert measured.table(rows) in (ROOT / "docs" / page).read_text()
