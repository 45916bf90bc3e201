import itertools

import numpy as np
import pytest
import torch

from pipeline.artifacts.artifact import Artifact
from pipeline.data import loader, transforms, windows
from pipeline.data.batch import Batch, BatchShard
from pipeline.data.loader import LoaderConfig
from pipeline.data.reader import ShardReader
from pipeline.errors import DataError
from pipeline.registry import resolve
from tests.conftest import write_images
from tests.data.test_shards import make


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    folder = tmp_path_factory.mktemp("loader")
    return make(write_images(folder / "photos", 12), folder / "artifact", shard_mb=0.06)


def config(**changes: object) -> LoaderConfig:
    return LoaderConfig(**{"shards": "x", "batch_size": 4, "crop_size": 64, "num_workers": 0} | changes)


def stream(
    shards: Artifact, cfg: LoaderConfig, steps: int, rank: int = 0, ranks: int = 1, start: int = 0
) -> list[Batch]:
    share = BatchShard.of(cfg.batch_size, rank, ranks)
    batches = loader.batches(cfg, ShardReader(shards, "train"), 7, share, start)
    return list(itertools.islice(batches, steps))


def test_two_ranks_and_workers_see_the_crops_of_one(shards):
    alone = stream(shards, config(), 6)
    pairs = zip(
        stream(shards, config(num_workers=2), 6, 0, 2), stream(shards, config(num_workers=1), 6, 1, 2), strict=True
    )
    for one, (first, second) in zip(alone, pairs, strict=True):
        assert torch.equal(one.x, torch.cat([first.x, second.x]))
        assert one.positions == first.positions + second.positions


def test_crops_of_jpeg_files_are_the_same_however_they_are_decoded(tmp_path, monkeypatch):
    shards = make(write_images(tmp_path / "photos", 12, ".jpg"), tmp_path / "artifact", shard_mb=0.02)
    parts: list[object] = []
    decode_part = windows.decode_part
    monkeypatch.setattr(windows, "decode_part", lambda *given: parts.append(decode_part(*given)) or parts[-1])

    def pixels(**changes: object) -> torch.Tensor:
        return torch.cat([batch.x for batch in stream(shards, config(batch_size=7, **changes), 12)])

    expected = pixels()
    assert len(parts) > 20
    if windows.partial_decoder() is not None:
        assert all(part is not None for part in parts)
    for changes in ({"num_workers": 3}, {"num_workers": 16}, {"decoded_cache_mb": 50}):
        assert torch.equal(pixels(**changes), expected)
    monkeypatch.setattr(windows, "partial_decoder", lambda: None)
    assert torch.equal(pixels(), expected)


def test_the_stream_resumes_at_any_position(shards):
    whole = stream(shards, config(), 8)
    later = stream(shards, config(decoded_cache_mb=1), 5, start=3 * 4)
    for a, b in zip(whole[3:], later, strict=True):
        assert torch.equal(a.x, b.x)


def test_fixed_crops_are_the_same_in_every_epoch_and_belong_to_their_image(shards):
    crops: dict[int, torch.Tensor] = {}
    batches = stream(shards, config(fixed_crops=True, random_resize_prob=1.0), 12)
    for batch in batches:
        for x, image in zip(batch.x, batch.images, strict=True):
            assert torch.equal(x, crops.setdefault(image, x))
    assert len(batches) * 4 > 2 * len(crops) > 4
    moving = stream(shards, config(random_resize_prob=1.0), 12)
    assert any(not torch.equal(x, crops[i]) for batch in moving for x, i in zip(batch.x, batch.images, strict=True))


def test_a_batch_splits_into_equal_parts_in_order(shards):
    batch = stream(shards, config(), 1)[0]
    first, second = batch.split(2)
    assert first.positions + second.positions == batch.positions
    assert first.images + second.images == batch.images
    assert torch.equal(torch.cat([first.x, second.x]), batch.x)


def test_another_seed_gives_other_crops(shards):
    reader = ShardReader(shards, "train")
    ours, theirs = (next(loader.batches(config(), reader, seed, BatchShard(0, 4, 1), 0)) for seed in (1, 2))
    assert not torch.equal(ours.x, theirs.x)


def test_crops_are_floats_between_zero_and_one(shards):
    x = stream(shards, config(), 1)[0].to(torch.device("cpu"), torch.channels_last).x
    assert x.shape == (4, 3, 64, 64)
    assert x.dtype == torch.float32
    assert 0 <= x.min() < x.max() <= 1


def test_a_batch_that_does_not_split_evenly_is_refused():
    with pytest.raises(DataError, match="multiple of 4"):
        BatchShard.of(6, 0, 2, multiple=2)


def damaged(shards: Artifact, tmp_path, every: int) -> ShardReader:
    """A reader of a copy in which every nth training sample has a changed byte."""
    import shutil

    shutil.copytree(shards.path, tmp_path / "copy")
    reader = ShardReader(Artifact(tmp_path / "copy", shards.manifest), "train")
    for number in range(0, len(reader), every):
        shard, sample = reader.sample(number)
        path = tmp_path / "copy" / shard.file
        content = bytearray(path.read_bytes())
        content[sample.offset + 60] ^= 255
        path.chmod(0o644)
        path.write_bytes(content)
    return reader


def test_an_unreadable_sample_is_replaced_and_named(shards, tmp_path, capsys, cli_log):
    reader = damaged(shards, tmp_path, every=4)
    batches = loader.batches(config(), reader, 0, BatchShard(0, 4, 1), 0)
    assert all(len(batch.x) == 4 for batch in itertools.islice(batches, 6))
    told = capsys.readouterr().err
    assert told.count("skipping unreadable sample") == len(range(0, len(reader), 4))
    assert reader.sample(0)[1].source in told


@pytest.mark.parametrize(("every", "bound"), [(2, 1), (1, 100)])
def test_too_many_unreadable_samples_stop_the_stage(shards, tmp_path, every, bound):
    reader = damaged(shards, tmp_path, every)
    batches = loader.batches(config(max_bad_samples=bound), reader, 0, BatchShard(0, 4, 1), 0)
    with pytest.raises(DataError, match=r"unreadable samples \(data.max_bad_samples"):
        list(itertools.islice(batches, 20))


def test_the_cache_keeps_to_its_bytes():
    cache = loader.DecodedCache(max_bytes=1000)
    for i in range(5):
        cache.put((i, 1), np.zeros((10, 10, 3), np.uint8))
    assert cache.bytes == 900
    assert cache.get((1, 1)) is None
    assert cache.get((4, 1)) is not None


def test_validation_crops_are_spread_over_the_images(shards):
    reader = ShardReader(shards, "valid")
    crops = loader.validation_crops(config(num_validation_crops=4 * len(reader)), reader)
    assert crops.shape == (4 * len(reader), 3, 64, 64)
    empty = ShardReader(shards, "test")
    with pytest.raises(DataError, match="no validation images"):
        loader.validation_crops(config(), empty)


def test_reading_back_an_artifact_of_shards_does_not_hash_the_tars(shards):
    assert not any(name.endswith(".tar") for name in resolve.read(str(shards.path), "shards").manifest.files)


def test_pixels_travel_as_bytes_and_become_the_same_floats_as_on_the_host(shards):
    batch = stream(shards, config(), 1)[0]
    assert batch.x.dtype == torch.uint8
    placed = batch.to(torch.device("cpu"), torch.channels_last)
    assert placed.x.is_contiguous(memory_format=torch.channels_last)
    assert np.array_equal(placed.x.numpy(), batch.x.numpy().astype(np.float32) / np.float32(255))
    again = placed.to(torch.device("cpu"), torch.channels_last)
    assert torch.equal(again.x, placed.x)
    every = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, -1)
    assert torch.equal(transforms.to_float(every), torch.tensor(every).float().div_(255).permute(0, 3, 1, 2))


def test_a_batch_that_does_not_fit_into_memory_is_refused():
    cfg = config(batch_size=10**8)
    with pytest.raises(DataError, match=r"data.batch_size is 100000000: .* need 12,288.0 GB, but .* GB are free"):
        loader.check_memory(cfg, BatchShard.of(cfg.batch_size, 0, 1))
    loader.check_memory(config(), BatchShard.of(4, 0, 1))
