"""Checkpoints of the published implementation, in and out."""

import pickle
from functools import partial

import pytest
import torch

from pipeline.artifacts.artifact import publish
from pipeline.artifacts.manifest import Manifest
from pipeline.bitstream.codec import ImageCodec
from pipeline.errors import ArtifactError
from pipeline.models import reference, reference_keys, serialization
from pipeline.models.codec import Codec, CodecConfig
from pipeline.models.labeler import Labeler, LabelerConfig
from pipeline.registry import resolve
from tests.conftest import CONFIGS, assert_one_clear_line, illm_here, picture
from tests.models.test_networks import SMALL, SMALL_LABELER, SMALL_LIGHT, small_codec
from tests.system.test_pipeline import RUNS

CODEC_WORDS = ("channels=[4, 4, 6, 8, 12]", "latent_channels=8", "hyper_channels=6", "num_residual_blocks=1")
LABELER_WORDS = (
    "channels=4", "channel_multipliers=[1, 1, 2, 2]", "num_blocks=1", "embedding_channels=8", "code_dim=4", "num_codes=16",
)  # fmt: skip


def published(filled: bool = True, old_names: bool = False) -> dict[str, torch.Tensor]:
    """A small codec as the reference would save it."""
    torch.manual_seed(3)
    codec = Codec(SMALL)
    if filled:
        codec.update_tables()
    return reference_keys.export_state(codec.state_dict(), SMALL, {}, old_names)


def published_labeler() -> dict[str, torch.Tensor]:
    torch.manual_seed(4)
    state = reference_keys.export_state(Labeler(SMALL_LABELER).state_dict(), SMALL_LABELER, {}, False)
    state["bottleneck_op.child.child.codebook_hits_0"] += torch.arange(16)
    return state


def test_names_and_shapes_of_the_published_codec():
    with torch.device("meta"):
        state = Codec(CodecConfig()).state_dict()
        theirs = reference_keys.export_state(state, CodecConfig(), {}, False)
    assert len(theirs) == 163
    for name, shape in {
        "encoder.blocks.0.0.weight": (60, 3, 7, 7),
        "encoder.blocks.0.1.gamma": (1, 60, 1, 1),
        "encoder.blocks.4.0.weight": (960, 480, 3, 3),
        "encoder.blocks.5.weight": (220, 960, 3, 3),
        "decoder.block_0.0.gamma": (1, 220, 1, 1),
        "decoder.block_0.1.weight": (960, 220, 3, 3),
        "decoder.block_0.2.beta": (1, 960, 1, 1),
        "decoder.resid_blocks.8.sequence.3.weight": (960, 960, 3, 3),
        "decoder.resid_blocks.0.sequence.4.gamma": (1, 960, 1, 1),
        "decoder.blocks.0.0.weight": (960, 480, 3, 3),
        "decoder.blocks.3.0.weight": (120, 60, 3, 3),
        "decoder.blocks.4.weight": (3, 60, 7, 7),
        "hyper_analysis.2.weight": (320, 320, 5, 5),
        "hyper_synthesis_mean.4.weight": (220, 320, 3, 3),
        "hyper_synthesis_scale.0.weight": (320, 320, 5, 5),
        "hyper_bottleneck.matrices.0": (320, 3, 1),
        "hyper_bottleneck.biases.4": (320, 1, 1),
        "hyper_bottleneck.quantiles": (320, 1, 3),
        "latent_bottleneck.scale_bound": (1,),
    }.items():
        assert tuple(theirs[name].shape) == shape, name
    old = reference_keys.export_state(state, CodecConfig(), {}, True)
    assert {"hyper_bottleneck._matrix0", "hyper_bottleneck._bias4", "hyper_bottleneck._factor3"} <= old.keys()


def test_names_and_shapes_of_the_published_labeler():
    with torch.device("meta"):
        theirs = reference_keys.export_state(Labeler(LabelerConfig()).state_dict(), LabelerConfig(), {}, False)
    assert len(theirs) == 282
    for name, shape in {
        "encoder.conv_in.weight": (64, 3, 3, 3),
        "encoder.down.0.downsample.conv.weight": (64, 64, 3, 3),
        "encoder.down.1.block.0.nin_shortcut.weight": (128, 64, 1, 1),
        "encoder.down.3.attn.1.xca.qkv.weight": (768, 256),
        "encoder.mid.1.xca.temperature": (1, 1, 1),
        "encoder.mid.1.norm.gamma": (1, 256, 1, 1),
        "encoder.norm_out.beta": (1, 256, 1, 1),
        "encoder.conv_out.bias": (256,),
        "decoder.up.3.attn.2.xca.proj.bias": (256,),
        "decoder.up.1.upsample.conv.weight": (128, 128, 3, 3),
        "decoder.up.0.block.2.norm2.gamma": (1, 64, 1, 1),
        "decoder.conv_out.weight": (3, 64, 3, 3),
        "bottleneck_op.input_conv.weight": (8, 256, 1, 1),
        "bottleneck_op.output_conv.weight": (256, 8, 1, 1),
        "bottleneck_op.child.child.codebooks.0": (1024, 8),
        "bottleneck_op.child.child.codebook_hits_0": (1024,),
    }.items():
        assert tuple(theirs[name].shape) == shape, name


@pytest.mark.parametrize("filled", [True, False], ids=["tables", "no-tables"])
@pytest.mark.parametrize("old_names", [True, False], ids=["old", "new"])
@pytest.mark.parametrize("wrapped", [True, False], ids=["training", "bare"])
def test_a_codec_goes_in_and_out_unchanged(tmp_path, filled, old_names, wrapped):
    theirs = published(filled, old_names)
    content = theirs
    if wrapped:
        content = {"state_dict": {f"model.{name}": value for name, value in theirs.items()}, "global_step": 7}
        content["state_dict"]["discriminator.weight"] = torch.zeros(2)
    torch.save(content, tmp_path / "their.ckpt")
    told = reference.import_file(tmp_path / "their.ckpt", "codec", tmp_path / "run", CODEC_WORDS)
    assert ("discriminator.weight" in told) == wrapped
    codec = serialization.load_codec(resolve.read(str(tmp_path / "run"), "codec"))
    coder = ImageCodec(codec)  # its tables are there in any case
    content, symbols = coder.encode(picture(0))
    assert coder.decode(content).symbols.equals(symbols)
    reference.export_file(resolve.read(str(tmp_path / "run"), "codec"), tmp_path / "back.ckpt", "as-imported")
    back = torch.load(tmp_path / "back.ckpt", weights_only=True)
    assert back.keys() == theirs.keys()
    for name, value in theirs.items():
        assert back[name].dtype == value.dtype, name
        assert torch.equal(back[name], value), name


def test_a_light_codec_is_not_exported(tmp_path):
    codec = small_codec(cfg=SMALL_LIGHT)
    save = partial(serialization.save_codec, codec=codec, cfg=codec.cfg)
    publish(tmp_path / "a", Manifest(kind="codec", stage="pretrain"), save)
    with pytest.raises(ArtifactError, match="transforms are light"):
        reference.export_file(resolve.read(str(tmp_path / "a"), "codec"), tmp_path / "x.ckpt", "as-imported")


def test_a_labeler_goes_in_and_out_unchanged(tmp_path):
    theirs = published_labeler()
    torch.save(theirs, tmp_path / "their.ckpt")
    words = ("import-reference", "their.ckpt", *LABELER_WORDS, "--kind", "labeler", "--output", "run")
    ended = illm_here(*words, cwd=tmp_path)
    assert ended.code == 0, ended.err
    labeler = serialization.load_labeler(resolve.read(str(tmp_path / "run"), "labeler"))
    assert torch.equal(labeler.codebook, theirs["bottleneck_op.child.child.codebooks.0"])
    ended = illm_here("export-reference", "run", "back.ckpt", cwd=tmp_path)
    assert ended.code == 0, ended.err
    back = torch.load(tmp_path / "back.ckpt", weights_only=True)
    assert back.keys() == theirs.keys()
    assert all(torch.equal(back[name], value) for name, value in theirs.items())
    (tmp_path / "back.ckpt").write_bytes(b"mine")
    assert_one_clear_line(illm_here("export-reference", "run", "back.ckpt", cwd=tmp_path), "exists already; --force")
    assert (tmp_path / "back.ckpt").read_bytes() == b"mine"
    assert illm_here("export-reference", "run", "back.ckpt", "--force", cwd=tmp_path).code == 0
    assert torch.load(tmp_path / "back.ckpt", weights_only=True).keys() == theirs.keys()
    (tmp_path / "their.ckpt").write_bytes(b"no checkpoint")  # the place is checked before it is read
    assert_one_clear_line(illm_here(*words, cwd=tmp_path), "run/artifact: exists already", "another --output")


def test_stages_take_what_was_imported_and_streams_keep_every_byte(smoke, tmp_path):
    for stage, kind, words in (("pretrain", "codec", CODEC_WORDS), ("vqvae", "labeler", LABELER_WORDS)):
        file = tmp_path / f"{stage}.ckpt"
        assert illm_here("export-reference", f"{RUNS}/{stage}", file, "--names", "old", cwd=smoke).code == 0
        ended = illm_here("import-reference", file, *words, "--kind", kind, "--output", tmp_path / stage, cwd=smoke)
        assert ended.code == 0, ended.err
    words = ("gan", CONFIGS / "gan.yaml", f"run={tmp_path / 'gan'}", "fit.steps=3", f"codec={tmp_path}/pretrain")
    ended = illm_here(*words, f"labeler={tmp_path}/vqvae", cwd=smoke)
    assert ended.code == 0, ended.err
    ours, theirs = (ImageCodec.load(name) for name in (f"{smoke / RUNS}/pretrain", str(tmp_path / "pretrain")))
    content = ours.compress(picture(2, 70, 90))
    assert theirs.compress(picture(2, 70, 90)) == content
    assert ImageCodec.load(str(tmp_path / "gan")).decompress(content).shape == (70, 90, 3)


def test_a_file_that_does_not_fit_names_every_key(tmp_path):
    theirs = published()
    del theirs["encoder.blocks.2.0.bias"]
    theirs["encoder.blocks.9.0.bias"] = torch.zeros(3)
    theirs["decoder.blocks.4.weight"] = torch.zeros(3, 4, 5, 5)
    torch.save(theirs, tmp_path / "their.ckpt")
    ended = illm_here("import-reference", "their.ckpt", *CODEC_WORDS, "--output", "run", cwd=tmp_path)
    assert_one_clear_line(
        ended, "3 problem(s)", "missing: encoder.blocks.2.0.bias (6,)", "unknown: encoder.blocks.9.0.bias",
        "misshapen: decoder.blocks.4.weight is (3, 4, 5, 5), expected (3, 4, 7, 7)",
    )  # fmt: skip
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["hyper_bottleneck._cdf_length", "latent_bottleneck._quantized_cdf"])
def test_tables_that_would_send_the_coder_out_of_bounds_are_refused(tmp_path, name):
    theirs = published()
    theirs[name] = theirs[name] + 10_000 if "length" in name else theirs[name][:5]
    torch.save(theirs, tmp_path / "their.ckpt")
    ended = illm_here("import-reference", "their.ckpt", *CODEC_WORDS, "--output", "run", cwd=tmp_path)
    assert_one_clear_line(ended, f"{name.split('.')[0]}'s tables do not belong together")


class Evil:
    def __reduce__(self):
        return (open, ("executed", "w"))


@pytest.mark.parametrize("content", ["pickle", "text", "list", "tensor"])
def test_what_is_no_state_dict_is_refused_and_nothing_is_executed(tmp_path, monkeypatch, content):
    from pipeline.errors import ArtifactError

    monkeypatch.chdir(tmp_path)
    file = tmp_path / "their.ckpt"
    if content == "pickle":
        file.write_bytes(pickle.dumps({"encoder": Evil()}))
    elif content == "text":
        file.write_text("not a checkpoint")
    else:
        torch.save([torch.zeros(1)] if content == "list" else torch.zeros(1), file)
    with pytest.raises(ArtifactError, match="state dict"):
        reference.import_file(file, "codec", tmp_path / "run", CODEC_WORDS)
    assert not (tmp_path / "executed").exists()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("filled", [True, False], ids=["tables", "no-tables"])
def test_scales_that_fixed_point_cannot_hold_are_told(tmp_path, filled):
    theirs = published(filled=filled)
    name = next(key for key in theirs if "hyper_synthesis_scale" in key and key.endswith("weight"))
    theirs[name] = theirs[name] * 1e9
    torch.save(theirs, tmp_path / "their.ckpt")
    ended = illm_here("import-reference", "their.ckpt", *CODEC_WORDS, "--output", "run", cwd=tmp_path)
    assert_one_clear_line(ended, "their.ckpt: weights of the hyper-synthesis of scales are too large for fixed point")
    assert not (tmp_path / "run").exists()
