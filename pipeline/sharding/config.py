"""The keys of the shard stage's config."""

from typing import Annotated

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from pipeline.data.shards import Store
from pipeline.processes.pool import On
from pipeline.sharding.filters import Rules
from pipeline.sharding.sources import Source


class ShardConfig(Rules):
    """Which images become shards, and how."""

    source: str | list[Source]  # a folder, glob, archive, list, URL, shards; or samples://photos, inside packages
    validation_share: Annotated[float, Field(ge=0, lt=1)] = 0.02  # of images, chosen by content, kept from training
    test_share: Annotated[float, Field(ge=0, lt=1)] = 0.0  # likewise
    shard_mb: PositiveFloat = 256.0  # a tar is closed when it holds this much
    store: Store = "original"  # bytes as found, lossless webp, jpeg at quality 95, or decoded pixels
    max_file_mb: PositiveFloat = 256.0  # larger files are refused
    max_failed_share: Annotated[float, Field(ge=0, le=1)] = 0.05  # of URLs that cannot be fetched; more stop the stage
    workers: NonNegativeInt = 0  # processes or threads; 0: one per core
    spread: On = "auto"  # threads, ray, or what suits the amount of work
    piece: PositiveInt = 256  # images that a worker examines at a time

    def sources(self) -> list[Source]:
        return [Source(name="images", path=self.source)] if isinstance(self.source, str) else self.source
