"""A stranger's entropy tables never reach a coder, which checks nothing."""

import pytest
import torch
from torch import Tensor

from pipeline.artifacts.artifact import Artifact, publish
from pipeline.artifacts.manifest import Manifest
from pipeline.bitstream import version1
from pipeline.bitstream.codec import ImageCodec
from pipeline.bitstream.latents import LatentCoder
from pipeline.errors import ArtifactError
from pipeline.models import serialization
from pipeline.models.codec import Codec, CodecConfig
from pipeline.models.tables import checked_tables
from tests.conftest import picture
from tests.models.test_networks import SMALL, small_codec

Y, Z = "entropy.", "hyper_entropy."


def at(value: object, *place: int):
    """Changes one element."""

    def change(tensor: Tensor) -> Tensor:
        changed = tensor.clone()
        changed[place] = value
        return changed

    return change


HOSTILE = {
    "a length of 0": (Y + "_cdf_length", at(0, 3)),
    "a length of 2: the escape alone, of frequency 65536": (Y + "_cdf_length", at(2, 3)),
    "a negative length": (Y + "_cdf_length", at(-1, 3)),
    "a length beyond the row": (Y + "_cdf_length", at(2**30, 3)),
    "too few rows of y": (Y + "_quantized_cdf", lambda t: t[:10].clone()),
    "too few rows of z": (Z + "_quantized_cdf", lambda t: t[:1].clone()),
    "too few lengths": (Z + "_cdf_length", lambda t: t[:1].clone()),
    "too few offsets": (Y + "_offset", lambda t: t[:1].clone()),
    "an empty table": (Y + "_quantized_cdf", lambda t: t[:, :0].clone()),
    "a flat table": (Y + "_quantized_cdf", lambda t: t.flatten()),
    "an unsorted row": (Z + "_quantized_cdf", at(0, 0, 2)),
    "a row of zeros": (Y + "_quantized_cdf", torch.zeros_like),
    "a row beyond 16 bits": (Y + "_quantized_cdf", lambda t: torch.full_like(t, 2**30)),
    "negative frequencies": (Y + "_quantized_cdf", lambda t: -t),
    "a row that starts late": (Y + "_quantized_cdf", at(1, 0, 0)),
    "a row that starts early": (Y + "_quantized_cdf", at(-1, 0, 0)),
    "a row that ends late": (Y + "_quantized_cdf", lambda t: torch.where(t == 2**16, 2**16 + 1, t)),
    "a huge offset": (Z + "_offset", at(2**30, 0)),
    "a scale table that is too long": (Y + "scale_table", lambda t: torch.linspace(0.1, 256, 5000)),
    "an empty scale table": (Y + "scale_table", lambda t: t[:0].clone()),
    "a scale table of NaN": (Y + "scale_table", lambda t: t * float("nan")),
    "a falling scale table": (Y + "scale_table", lambda t: t.flip(0)),
    "infinite means": ("hyper_synthesis_mean.4.bias", at(float("inf"), 0)),
    "scales of NaN": ("hyper_synthesis_scale.4.weight", at(float("nan"), 0, 0, 0, 0)),
    "quantiles of NaN": (Z + "quantiles", at(float("nan"), 0, 0, 1)),
    "weights of int64": ("analysis.0.weight", lambda t: t.to(torch.int64)),
    "tables of int64": (Y + "_quantized_cdf", lambda t: t.to(torch.int64)),
}


@pytest.fixture
def artifact(tmp_path):
    """Makes an artifact of a state of the small codec, sealed as if its maker meant it."""

    def make(state: dict[str, Tensor]) -> Artifact:
        def write(folder):
            from pipeline import config

            serialization.save_file({k: v.contiguous() for k, v in state.items()}, folder / serialization.WEIGHTS)
            (folder / serialization.MODEL).write_text(config.dump(SMALL))

        return publish(tmp_path / "artifact", Manifest(kind="codec", stage="pretrain"), write)

    return make


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_artifact_is_refused_when_it_is_loaded(artifact, name):
    key, change = HOSTILE[name]
    state = dict(small_codec().state_dict())
    state[key] = change(state[key])
    with pytest.raises(ArtifactError, match=r"weights\.safetensors") as refused:
        serialization.load_codec(artifact(state))
    assert key.split(".")[0] in str(refused.value)
    assert "\n" not in str(refused.value)


def test_what_we_write_is_accepted(artifact):
    codec = small_codec()
    loaded = serialization.load_codec(artifact(codec.state_dict()))
    assert ImageCodec(loaded).compress(picture(1)) == ImageCodec(codec).compress(picture(1))


def test_the_published_tables_are_accepted():
    codec = Codec(CodecConfig(channels=(4, 4, 4, 4, 4), num_residual_blocks=1))
    codec.update_tables()
    z, y = checked_tables(codec)
    assert len(z.rows) == 320
    assert len(y.rows) == 64
    # the narrowest Gaussian: frequencies 1, 65533, 1, 1
    assert y.rows[0][: y.lengths[0]] == [0, 1, 65534, 65535, 65536]
    assert version1.least_bits(y).min().item() == pytest.approx(6.6e-5, rel=0.01)


def test_tables_that_were_never_built_are_told():
    with pytest.raises(ValueError, match=r"entropy\.scale_table"):
        LatentCoder(Codec(SMALL), torch.device("cpu"))


def test_a_network_too_narrow_for_the_encoders_buffer_is_no_codec():
    """The encoder ends a stream with two words, into a buffer of one word per symbol."""
    with pytest.raises(ValueError, match="hyper_channels"):
        CodecConfig(hyper_channels=3)
