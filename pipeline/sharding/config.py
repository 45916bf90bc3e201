"""The keys of the shard stage's config."""

from typing import Annotated

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, field_validator

from pipeline.config import Changeable, Input
from pipeline.data.shards import StoredFormat
from pipeline.processes.pool import Backend
from pipeline.sharding.filters import FilterConfig
from pipeline.sharding.sources import Source


class ShardConfig(FilterConfig):
    """Which images become shards, and how."""

    source: Annotated[str | list[Source], Input("")]
    """Where images come from: a folder, glob, archive, list, URL, shards, or samples://photos (inside installed
    packages)."""
    validation_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.02
    """Fraction of the images, chosen by content, that is kept for validation."""
    test_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Fraction of the images, chosen by content, that is kept for testing."""
    shard_mb: PositiveFloat = 256.0
    """Size of a shard in MB."""
    format: StoredFormat = "original"
    """What shards contain: the original bytes, lossless webp, jpeg at quality 95, or decoded pixels."""
    max_file_mb: PositiveFloat = 256.0
    """Largest file in MB; larger ones are rejected."""
    max_failed_fraction: Annotated[float, Field(ge=0, le=1)] = 0.05
    """Fraction of the URLs that may fail to download; more stop the stage."""
    num_workers: Annotated[NonNegativeInt, Changeable()] = 0
    """Number of worker processes or threads; 0: one per core."""
    backend: Annotated[Backend, Changeable()] = "auto"
    """Where chunks are processed: threads, processes, ray, or what suits the amount of work."""
    chunk_size: PositiveInt = 256
    """Number of images that a worker examines at a time."""

    @field_validator("source")
    @classmethod
    def names_differ(cls, source: str | list[Source]) -> str | list[Source]:
        names = [] if isinstance(source, str) else [each.name for each in source]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"several sources are named {', '.join(twice)}; give each a name of its own")
        return source

    def sources(self) -> list[Source]:
        return [Source(name="images", path=self.source)] if isinstance(self.source, str) else self.source
