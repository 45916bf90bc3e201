import pytest

from pipeline import config, renamed_keys, stages
from pipeline.errors import ConfigError
from pipeline.models.labeler import LabelerConfig
from tests.conftest import ROOT


@pytest.mark.parametrize(
    ("stage", "word", "answer"),
    [
        ("gan", "engine.passes=2", "engine.passes: renamed to 'gradient_accumulation_steps'"),
        ("gan", "data.crop=128", "data.crop: renamed to 'crop_size'"),
        ("gan", "generator_optimizer.decay=cosine", "generator_optimizer.decay: renamed to 'schedule'"),
        ("vqvae", "embedding=2", "embedding: renamed to 'codebook_weight'"),
        ("vqvae", "labeler.embedding=2", "labeler.embedding: renamed to 'embedding_channels'"),
        ("shard", "spread=ray", "spread: renamed to 'backend'"),
        ("promote", "against_champion={psnr_db: {worse_by_at_most: 1}}", "renamed to 'max_regression'"),
        ("sweep", "stopping={kind: none}", "stopping: renamed to 'scheduler'"),
    ],
)
def test_an_old_key_is_answered_with_the_new_one(stage, word, answer):
    path = ROOT / ("configs/sweep/smoke.yaml" if stage == "sweep" else f"configs/smoke/{stage}.yaml")
    with pytest.raises(ConfigError) as told:
        config.load(stages.get(stage).StageConfig, path, [word])
    assert answer in str(told.value)


def test_an_artifact_made_before_is_read_under_todays_names():
    old = {"channels": 4, "multipliers": [1, 1, 2, 2], "blocks": 1, "embedding": 8, "code_dim": 4, "num_codes": 16}
    new = renamed_keys.renamed(old, tuple(LabelerConfig.model_fields), "labeler")
    assert LabelerConfig.model_validate(new).embedding_channels == 8
    assert renamed_keys.renamed(new, tuple(LabelerConfig.model_fields), "labeler") == new
    assert renamed_keys.renamed({1: 2}, tuple(LabelerConfig.model_fields), "labeler") == {1: 2}
