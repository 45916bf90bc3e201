"""Files that earlier revisions wrote, of both versions, decode to what was encoded then.

Their codec is a random one of 30,000 weights. digests.json: `Symbols.digest` of each file, as its encoder said it.
"""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

from pipeline.bitstream import symbols
from pipeline.bitstream.codec import ImageCodec
from pipeline.bitstream.symbols import SymbolCoder
from pipeline.models.tables import checked_tables
from tests.bitstream import fuzz
from tests.conftest import ROOT, illm_here

spec = importlib.util.spec_from_file_location("reference_decoder", ROOT / "docs" / "reference_decoder.py")
reference_decoder = importlib.util.module_from_spec(spec)
spec.loader.exec_module(reference_decoder)

GOLDEN = Path(__file__).parent / "golden"
DIGESTS = json.loads((GOLDEN / "digests.json").read_text())


@pytest.fixture(scope="module")
def codec() -> ImageCodec:
    return ImageCodec.load(str(GOLDEN / "codec"))


def test_every_file_has_a_digest():
    assert DIGESTS.keys() == {path.name for path in GOLDEN.glob("*.illm")}


@pytest.mark.parametrize("name", DIGESTS)
@pytest.mark.parametrize("plain", [False, True], ids=["constriction", "plain"])
def test_it_decodes_to_what_was_encoded(codec, monkeypatch, name, plain):
    if plain:
        monkeypatch.setattr(codec.latents, "coder", SymbolCoder(*checked_tables(codec.codec), plain=True))
    elif not symbols.HAS_CONSTRICTION:
        pytest.skip("constriction is not installed")
    assert codec.decode((GOLDEN / name).read_bytes()).symbols.digest() == DIGESTS[name]


@pytest.mark.parametrize("name", [name for name in DIGESTS if name.startswith("version2")])
def test_the_decoder_of_the_specification_agrees(name):
    """It shares no line with ours, and knows nothing but the stored integers."""
    assert reference_decoder.decode((GOLDEN / name).read_bytes(), GOLDEN / "codec").hex() == DIGESTS[name]


@pytest.mark.parametrize("seed", range(3))
def test_the_decoder_of_the_specification_agrees_on_any_symbols(codec, seed):
    """Symbols far outside of their tables, and sizes that are no multiples of 64."""
    content = fuzz.restreamed(codec, np.random.default_rng(seed))
    assert reference_decoder.decode(content, GOLDEN / "codec").hex() == codec.decode(content).symbols.digest()


def test_an_old_file_is_read_with_a_warning(tmp_path):
    ended = illm_here(
        "decompress", GOLDEN / "version1.illm", tmp_path / "a.png", "--codec", GOLDEN / "codec", cwd=tmp_path
    )
    assert ended.code == 0
    assert "a file of format version 1: it may decode to garbage on another machine" in ended.err


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("version1.illm", "version 1"),
        ("version2-gray.illm", "2, gray"),
        ("version2-transparent.illm", "2, transparent"),
    ],
)
def test_inspect_tells_the_version_and_what_is_in_it(tmp_path, name, told):
    assert f"{told}\n" in illm_here("inspect", GOLDEN / name, cwd=tmp_path).out
