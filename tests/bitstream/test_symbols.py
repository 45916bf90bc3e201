"""Symbols of both latents in one stream."""

import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.bitstream import symbols
from pipeline.bitstream.symbols import SymbolCoder, Symbols
from pipeline.errors import BitstreamError
from pipeline.models.tables import MAX_SYMBOL, Tables

# -1, 0, 1 and the escape; 5 and the escape; -2 to 7 and the escape
ROWS = [[0, 1000, 60000, 65000, 65536], [0, 65535, 65536], [0, *range(6000, 66000, 6000), 65536]]
TABLES = Tables(ROWS, [len(row) for row in ROWS], [-1, 5, -2])


@pytest.fixture(params=["constriction", "plain"])
def coder(request) -> SymbolCoder:
    if request.param == "constriction" and not symbols.HAS_CONSTRICTION:
        pytest.skip("constriction is not installed")
    return SymbolCoder(TABLES, TABLES, plain=request.param == "plain")


def drawn(seed: int, spread: float) -> tuple[Symbols, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    z = (torch.randn(1, 3, 2, 3, generator=generator) * spread).round().int()
    y = (torch.randn(1, 4, 8, 12, generator=generator) * spread).round().int()
    indexes = torch.randint(0, 3, y.shape, generator=generator, dtype=torch.int32)
    return Symbols(z.clamp(-MAX_SYMBOL, MAX_SYMBOL), y.clamp(-MAX_SYMBOL, MAX_SYMBOL)), indexes


@pytest.mark.parametrize("spread", [0, 1, 30, 1e6])
def test_symbols_come_back_in_and_outside_of_their_tables(coder, spread):
    for seed in range(5):
        meant, indexes = drawn(seed, spread)
        stream = coder.encode(meant, indexes)
        assert coder.decode(stream, meant.z.shape, lambda z: indexes).equals(meant)  # noqa: B023


@pytest.mark.parametrize("value", [-MAX_SYMBOL, MAX_SYMBOL, -2, 2, 4, 6])
def test_symbols_beside_a_table_and_the_largest_come_back(coder, value):
    meant = Symbols(torch.full((1, 3, 1, 1), value).int(), torch.full((1, 3, 4, 4), value).int())
    indexes = torch.arange(3).reshape(1, 3, 1, 1).expand(1, 3, 4, 4).contiguous().int()
    stream = coder.encode(meant, indexes)
    assert coder.decode(stream, meant.z.shape, lambda z: indexes).equals(meant)


def test_the_plain_coder_makes_the_same_bytes():
    if not symbols.HAS_CONSTRICTION:
        pytest.skip("constriction is not installed")
    for seed in range(20):
        meant, indexes = drawn(seed, 3)
        streams = [SymbolCoder(TABLES, TABLES, plain).encode(meant, indexes) for plain in (False, True)]
        assert streams[0] == streams[1]


def test_a_stream_begins_from_the_checksum_of_its_symbols(coder):
    """Of certain symbols alone, it holds that and a one: 5 bytes."""
    meant = Symbols(torch.tensor([0, 5, 3]).int().reshape(1, 3, 1, 1)[:, :0], torch.zeros(1, 0, 4, 4).int())
    stream = coder.encode(meant, torch.zeros(1, 0, 4, 4).int())
    assert stream == zlib.crc32(b"").to_bytes(4, "little") + b"\1"


@pytest.mark.parametrize("at_once", [1, 7, 1000])
def test_places_are_grouped_by_table_and_keep_their_order_in_it(monkeypatch, at_once):
    monkeypatch.setattr(symbols, "SORTED_AT_ONCE", at_once)
    places = symbols.by_table(np.array([5, 0, 5, 2, 0, 5, 0, 0, 2], np.uint8))
    assert places.order.tolist() == [1, 4, 6, 7, 3, 8, 0, 2, 5]
    assert list(places.groups()) == [(0, 0, 4), (2, 4, 6), (5, 6, 9)]
    assert list(symbols.by_table(np.array([], np.uint8)).groups()) == []


def test_a_wrong_table_for_one_symbol_is_noticed(coder):
    """So is the same table at the wrong place: what a desynchronized decoder would do."""
    meant, indexes = drawn(1, 2)
    stream = coder.encode(meant, indexes)
    for at in range(0, indexes.numel(), 7):
        other = indexes.clone()
        other.view(-1)[at] = (other.view(-1)[at] + 1) % 3
        with pytest.raises(BitstreamError, match=r"not those that were encoded|a symbol of"):
            coder.decode(stream, meant.z.shape, lambda z: other)  # noqa: B023


def test_every_flipped_bit_is_noticed(coder):
    meant, indexes = drawn(2, 2)
    stream = coder.encode(meant, indexes)
    for bit in range(8 * len(stream)):
        damaged = bytearray(stream)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(BitstreamError):
            coder.decode(bytes(damaged), meant.z.shape, lambda z: indexes)


@settings(max_examples=300)
@given(stream=st.binary(max_size=80))
def test_any_bytes_are_refused_and_never_crash(stream):
    _, indexes = drawn(0, 1)
    for plain in (True, not symbols.HAS_CONSTRICTION):
        with pytest.raises(BitstreamError):
            SymbolCoder(TABLES, TABLES, plain).decode(stream, (1, 3, 2, 3), lambda z: indexes)


def test_a_stream_takes_what_its_probabilities_say(coder):
    """Plus the 32 bits of the checksum, and the rest of a word."""
    generator = torch.Generator().manual_seed(0)
    counts = torch.tensor(ROWS[2]).diff()
    y = torch.multinomial(counts[:-1].double(), 20_000, replacement=True, generator=generator) - 2
    meant = Symbols(torch.zeros(1, 0, 1, 1).int(), y.int().reshape(1, 1, 200, 100))
    stream = coder.encode(meant, torch.full((1, 1, 200, 100), 2).int())
    ideal = float(-(counts[y + 2].double() / 2**16).log2().sum())
    assert ideal / 8 < len(stream) < ideal / 8 + 4 + 4 + 1


def test_the_shortest_stream_passes_the_check_of_lengths_and_a_shorter_one_does_not(coder):
    """As many of the likeliest symbol as an image of 16 megapixels has."""
    z = torch.tensor([0, 5, 3]).int().reshape(1, 3, 1, 1).expand(1, 3, 64, 64).contiguous()
    meant = Symbols(z, torch.full((1, 1, 256, 256), 5).int())
    stream = coder.encode(meant, torch.ones(1, 1, 256, 256).int())
    coder.check_length(stream, z.shape, 256 * 256)
    with pytest.raises(BitstreamError, match="too short for its image"):
        coder.check_length(stream[: len(stream) // 2], z.shape, 256 * 256)


def test_an_escape_that_no_encoder_writes_is_refused(coder):
    stack = coder._stack(np.array([0, 1], np.uint32))
    stack.push_bits(1, 20)
    stack.push_bits(20, 5)
    with pytest.raises(BitstreamError, match="a symbol of 20 bits"):
        coder._z._pop_escape(stack, 3)
