"""The keys of the shard stage's config."""

from typing import Annotated

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from pipeline.config import Changeable, Input
from pipeline.data.shards import StoredFormat
from pipeline.processes.pool import Backend
from pipeline.sharding.filters import FilterConfig
from pipeline.sharding.sources import Source


class ShardConfig(FilterConfig):
    """Which images become shards, and how."""

    source: Annotated[str | list[Source], Input("")]
    """A folder, glob, archive, list, URL, shards; or samples://photos, inside packages."""
    validation_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.02
    """Of images, chosen by content, kept from training."""
    test_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Likewise."""
    shard_mb: PositiveFloat = 256.0
    """A tar is closed when it holds this much."""
    format: StoredFormat = "original"
    """Bytes as found, lossless webp, jpeg at quality 95, or decoded pixels."""
    max_file_mb: PositiveFloat = 256.0
    """Larger files are refused."""
    max_failed_fraction: Annotated[float, Field(ge=0, le=1)] = 0.05
    """Of URLs that cannot be fetched; more stop the stage."""
    num_workers: Annotated[NonNegativeInt, Changeable()] = 0
    """Processes or threads; 0: one per core."""
    backend: Annotated[Backend, Changeable()] = "auto"
    """Where chunks are processed: threads, processes, ray, or what suits the amount of work."""
    chunk_size: PositiveInt = 256
    """Images that a worker examines at a time."""

    def sources(self) -> list[Source]:
        return [Source(name="images", path=self.source)] if isinstance(self.source, str) else self.source
