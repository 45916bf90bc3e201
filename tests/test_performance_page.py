"""Tables of benchmarks in the docs are those of the rows, and docs/performance.md says nothing else."""

import re

import pytest

from tests.benchmarks import tables

pytestmark = pytest.mark.quick
# Targets, the most that a GPU can do, sizes of the published networks' batches, and seconds for a step of the GPU day
ASKED = {"1.45", "2.0", "1.0", "1.5", "0.6", "989", "570", "20", "3", "16", "8", "256x256"}
FIGURE = re.compile(r"(?<![\w.#-])\d(?:[\d,]*\d)?(?:\.\d+)?(?![\w.]*\w)")


@pytest.mark.parametrize("page", tables.PAGES, ids=lambda page: page.name)
def test_tables_are_those_of_the_rows(page):
    text = page.read_text()
    assert tables.written(text) == text, "make tables"
    assert "<!-- rows: " in text


def test_figures_in_the_text_are_in_a_table():
    page = tables.PAGE.read_text()
    in_tables = set(FIGURE.findall(_tables(page)))
    text = re.sub(r"`[^`]*`|\]\([^)]*\)|\"[^\"]*\"", "", _text(page))
    assert {figure for figure in FIGURE.findall(text) if figure not in in_tables | ASKED} == set()


def _tables(page: str) -> str:
    return "\n".join(found.group() for found in tables.BETWEEN.finditer(page))


def _text(page: str) -> str:
    lines = tables.BETWEEN.sub("", page).splitlines()
    return "\n".join(line for line in lines if not line.startswith(("|", "    ")))


def test_a_new_machine_has_its_tables(tmp_path, monkeypatch):
    rows = [
        {
            "group": "steps",
            "name": "gan step, bf16, not deterministic",
            "ms": 20.0,
            "share_of_bound": 0.3,
            "peak_gb": 2.0,
        },
        {
            "group": "reference",
            "name": "gan step, bf16, published implementation",
            "ms": 120.0,
            "ours_ms": 24.0,
            "peak_gb": 4.0,
        },
        {"group": "variants", "name": "gan step, bf16, engine.compile", "failed": "out of memory"},
        {"group": "photos", "name": "compress", "left_out": "no photos"},
    ]
    about = {
        "hardware": "NVIDIA X9, driver 1",
        "versions": {"torch": "2"},
        "command": "make gpu-day",
        "date": "2026-12-01",
    }
    made = tables.machine([row | about for row in rows])
    assert "### NVIDIA X9\n" in made
    assert "NVIDIA X9, driver 1; torch 2; 2026-12-01; `make gpu-day`" in made
    assert "| speed, in parts of the published bf16 step's | at least 1.8 | 5 |" in made
    assert "| memory, in parts of the published step's | at most 0.6 | 0.5 |" in made
    assert "| share of the bf16 bound | at least 0.5 | 0.3 |" in made
    assert "| gan step, bf16 | 20 | 120 | 5 |" in made
    assert "| gan step, bf16, engine.compile | out of memory |" in made
    assert "| compress | no photos |" in made
