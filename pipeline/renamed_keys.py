"""What keys of configurations were called in earlier versions, so that an old file gets an answer."""

from collections.abc import Mapping, Sequence
from typing import Any

# Old name -> new name: the longest dotted end that fits counts
RENAMED = {
    "engine.passes": "gradient_accumulation_steps",
    "engine.recompute": "activation_checkpointing",
    "decay": "schedule",
    "clip_norm": "max_grad_norm",
    "skip_spikes": "skip_grad_spikes",
    "crop": "crop_size",
    "validation_crop": "validation_crop_size",
    "validation_crops": "num_validation_crops",
    "resized_share": "random_resize_prob",
    "downscaled_share": "downscale_prob",
    "mixed_shards": "shuffle_shards",
    "cache_mb": "decoded_cache_mb",
    "workers": "num_workers",
    "spread": "backend",
    "piece": "chunk_size",
    "store": "format",
    "recipe": "known_dataset",
    "allow": "allow_list",
    "deny": "deny_list",
    "validation_share": "validation_fraction",
    "test_share": "test_fraction",
    "max_failed_share": "max_failed_fraction",
    "near_duplicates": "duplicate_distance",
    "min_colours": "min_colors",
    "commitment": "commitment_weight",
    "embedding": "codebook_weight",
    "labeler.embedding": "embedding_channels",
    "codes_from": "codebook_init",
    "reseed_every": "dead_code_every",
    "reseed_below": "dead_code_below",
    "reseed_until": "dead_code_until",
    "quantise_after": "quantize_after",
    "multipliers": "channel_multipliers",
    "blocks": "num_blocks",
    "residual_blocks": "num_residual_blocks",
    "discriminator_alone": "discriminator_warmup_steps",
    "max_bad_steps": "max_skipped_steps",
    "fit.profile": "profile_steps",
    "published": "published_results",
    "report_images": "report_mb",
    "worse_by_at_most": "max_regression",
    "worse_by_at_most_percent": "max_regression_percent",
    "new_bitstream": "allow_new_bitstream",
    "licence": "license",
    "stopping": "scheduler",
    "samples": "num_samples",
    "concurrent": "max_concurrent",
    "random_first": "num_startup_trials",
    "first": "grace_period",
    "factor": "reduction_factor",
    "every": "perturbation_interval",
    "replaced": "quantile",
}


def new_name(where: Sequence[str], names: Sequence[str]) -> str | None:
    """What the key at `where` is called now, if that is one of the names there."""
    ends = [".".join(where[start:]) for start in range(len(where))]
    # A section may stand alone, as that of a labeler does in its artifact
    alone = [old for old in RENAMED if old.rpartition(".")[2] == where[-1]]
    return next((RENAMED[old] for old in [*ends, *alone] if RENAMED.get(old) in names), None)


def renamed(values: Mapping[str, Any], names: Sequence[str], section: str) -> dict[str, Any]:
    """`values` under today's names, for files that earlier versions wrote and that must not be edited."""
    return {(new_name([section, str(key)], names) or key if key not in names else key): v for key, v in values.items()}
