"""The published implementation's checkpoints: their names for our tensors, both ways.

Source: facebookresearch/NeuralCompression 0.3.1; both namings of CompressAI's hyper-latent model, before and since 1.2.7.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pipeline.errors import ArtifactError
from pipeline.models.codec import Codec, CodecConfig
from pipeline.models.labeler import Labeler, LabelerConfig

Architecture = CodecConfig | LabelerConfig

# Tensors of any size: empty until update()
TABLES = ("_offset", "_quantized_cdf", "_cdf_length", "scale_table")
# Counters of the reference's VQ layer, which nothing reads; our network has none
_CODES = "bottleneck_op.child.child"
COUNTERS = tuple(f"{_CODES}.{name}" for name in ("codebook_hits_0", "perplexities", "max_hits", "percentage_hits"))
_OLD_NAMES = (("matrices.", "_matrix"), ("biases.", "_bias"), ("factors.", "_factor"))


@dataclass(frozen=True)
class Imported:
    """A reference checkpoint under our names, and what export needs to write the same file again."""

    state: dict[str, Tensor]
    # Under the reference's names: tensors that our network lacks or holds differently
    extras: dict[str, Tensor]
    # Whether the names are CompressAI's before 1.2.7
    old_names: bool
    # Keys of other networks in a training checkpoint
    ignored: list[str]


def names(cfg: Architecture) -> dict[str, str]:
    """Our state-dict names -> the reference's (CompressAI 1.2.7 and later), for that architecture."""
    modules = _codec_modules(cfg) if isinstance(cfg, CodecConfig) else _labeler_modules(cfg)
    return {ours: _translate(ours, modules) for ours in _shapes(cfg)}


def import_state(file_state: Mapping[str, object], cfg: Architecture) -> Imported:
    """Our tensors from a reference checkpoint's.

    Takes a bare state dict or a training checkpoint's `state_dict`, whose names may begin with `model.`.
    Raises: ArtifactError naming every missing, unknown and misshapen key.
    """
    inner = file_state.get("state_dict", file_state)
    if not isinstance(inner, Mapping):
        raise ArtifactError(f"holds a {type(inner).__name__}, expected a state dict")
    theirs = {str(key): value for key, value in inner.items() if isinstance(value, Tensor)}
    ignored: list[str] = []
    if any(key.startswith("model.") for key in theirs):
        ignored = [key for key in theirs if not key.startswith("model.")]
        theirs = {key.removeprefix("model."): value for key, value in theirs.items() if key.startswith("model.")}
    old_names = any("_matrix" in key for key in theirs)
    theirs = {_new_name(key): value for key, value in theirs.items()}

    expected = _shapes(cfg)
    wanted = {their: (ours, _their_shape(ours, expected[ours])) for ours, their in names(cfg).items()}
    _check(theirs, wanted)
    state, extras = {}, {}
    for their, value in theirs.items():
        if their in wanted:
            ours, _ = wanted[their]
            state[ours] = value if _is_table(their) else value.reshape(expected[ours])
            if _is_table(their) and not value.numel():
                extras[their] = value
        else:
            extras[their] = value
    return Imported(state, extras, old_names, ignored)


def export_state(
    state: Mapping[str, Tensor], cfg: Architecture, extras: Mapping[str, Tensor], old_names: bool
) -> dict[str, Tensor]:
    """The reference's state dict from ours; `extras` as `import_state` gave them, or nothing."""
    theirs = {
        their: state[ours].reshape(_their_shape(ours, tuple(state[ours].shape))) for ours, their in names(cfg).items()
    }
    if isinstance(cfg, LabelerConfig):
        theirs |= dict(zip(COUNTERS, (torch.zeros(cfg.num_codes, dtype=torch.int64), *torch.zeros(3, 1)), strict=True))
    theirs |= extras
    return {
        _old_name(name) if old_names else name: value.clone(memory_format=torch.contiguous_format)
        for name, value in theirs.items()
    }


def _shapes(cfg: Architecture) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        module: nn.Module = Codec(cfg) if isinstance(cfg, CodecConfig) else Labeler(cfg)
    return {name: tuple(value.shape) for name, value in module.state_dict().items()}


def _check(theirs: Mapping[str, Tensor], wanted: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
    problems = [f"missing: {name} {shape}" for name, (_, shape) in wanted.items() if name not in theirs]
    problems += [f"unknown: {name}" for name in theirs if name not in wanted and name not in COUNTERS]
    problems += [
        f"misshapen: {name} is {tuple(theirs[name].shape)}, expected {shape}"
        for name, (_, shape) in wanted.items()
        if name in theirs and not _is_table(name) and tuple(theirs[name].shape) != shape
    ]
    problems += [
        f"misshapen: {model}'s tables do not belong together"
        for model in ("hyper_bottleneck", "latent_bottleneck")
        if not problems and f"{model}._quantized_cdf" in wanted and not _tables_fit(theirs, model)
    ]
    if problems:
        listed = "\n".join(f"  {problem}" for problem in problems)
        raise ArtifactError(f"does not fit the architecture; {len(problems)} problem(s):\n{listed}")


def _tables_fit(theirs: Mapping[str, Tensor], model: str) -> bool:
    """Whether a model's tables are all empty, or have a row per distribution: the entropy coder reads them unchecked."""
    cdf, lengths, offsets = (theirs[f"{model}.{name}"] for name in ("_quantized_cdf", "_cdf_length", "_offset"))
    rows = theirs[
        "hyper_bottleneck.quantiles" if model == "hyper_bottleneck" else "latent_bottleneck.scale_table"
    ].shape[0]
    if not cdf.numel():
        return not lengths.numel() and not offsets.numel()
    per_row = tuple(lengths.shape) == tuple(offsets.shape) == (rows,) and cdf.dim() == 2 and len(cdf) == rows
    return per_row and int(lengths.min()) > 0 and int(lengths.max()) <= cdf.shape[1]


def _is_table(name: str) -> bool:
    return name.endswith(TABLES)


def _their_shape(ours: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    # ChannelNorm's
    return (1, *shape) if ours.endswith((".scale", ".shift")) else shape


def _new_name(name: str) -> str:
    for new, old in _OLD_NAMES:
        name = re.sub(rf"^hyper_bottleneck\.{old}(\d)$", rf"hyper_bottleneck.{new}\1", name)
    return name


def _old_name(name: str) -> str:
    for new, old in _OLD_NAMES:
        name = name.replace(f"hyper_bottleneck.{new}", f"hyper_bottleneck.{old}")
    return name


def _translate(name: str, modules: Mapping[str, str]) -> str:
    """Our full name -> theirs: the longest module name that begins it, then the leaf."""
    parts = name.split(".")
    for cut in range(len(parts), 0, -1):
        if (their := modules.get(".".join(parts[:cut]))) is not None:
            leaf = ".".join(parts[cut:])
            leaf = {"scale": "gamma", "shift": "beta"}.get(leaf, leaf)
            return f"{their}.{leaf}" if leaf else their
    raise KeyError(name)


def _codec_modules(cfg: CodecConfig) -> dict[str, str]:
    """Our module names -> theirs."""
    halvings = len(cfg.channels) - 1
    named = {
        "hyper_entropy": "hyper_bottleneck",
        "entropy": "latent_bottleneck",
        f"analysis.{3 * halvings + 3}": f"encoder.blocks.{halvings + 1}",
        f"synthesis.up.{3 * halvings}": f"decoder.blocks.{halvings}",
    }
    for block in range(halvings + 1):
        for part in (0, 1):
            named[f"analysis.{3 * block + part}"] = f"encoder.blocks.{block}.{part}"
            if block < halvings:
                named[f"synthesis.up.{3 * block + part}"] = f"decoder.blocks.{block}.{part}"
    named |= {f"synthesis.head.{i}": f"decoder.block_0.{i}" for i in range(3)}
    for block in range(cfg.num_residual_blocks):
        for part in (0, 1, 3, 4):
            named[f"synthesis.residual.{block}.layers.{part}"] = f"decoder.resid_blocks.{block}.sequence.{part}"
    for network in ("hyper_analysis", "hyper_synthesis_mean", "hyper_synthesis_scale"):
        named |= {f"{network}.{i}": f"{network}.{i}" for i in (0, 2, 4)}
    return named


def _labeler_modules(cfg: LabelerConfig) -> dict[str, str]:
    """Our module names -> theirs."""
    last = len(cfg.channel_multipliers) - 1
    down = ["conv_in"]
    for level in range(last + 1):
        for block in range(cfg.num_blocks):
            down += [f"down.{level}.block.{block}"] + [f"down.{level}.attn.{block}"] * (level == last)
        down += [f"down.{level}.downsample"] * (level < last)
    up = ["conv_in", "mid.0", "mid.1", "mid.2"]
    for level in reversed(range(last + 1)):
        for block in range(cfg.num_blocks + 1):
            up += [f"up.{level}.block.{block}"] + [f"up.{level}.attn.{block}"] * (level == last)
        # The first is the interpolation
        up += ["", f"up.{level}.upsample.conv"] * (level > 0)
    down += ["mid.0", "mid.1", "mid.2", "norm_out", "", "conv_out"]
    up += ["norm_out", "", "conv_out"]
    named = {
        "to_code": "bottleneck_op.input_conv",
        "from_code": "bottleneck_op.output_conv",
        "codebook": f"{_CODES}.codebooks.0",
    }
    for network, layers in (("encoder", down), ("decoder", up)):
        for number, layer in enumerate(layers):
            ours, their = f"{network}.{number}", f"{network}.{layer}"
            named[ours] = their
            named |= {f"{ours}.shortcut": f"{their}.nin_shortcut"}
            named |= {f"{ours}.{part}": f"{their}.xca.{part}" for part in ("temperature", "qkv", "proj")}
            named |= {f"{ours}.{part}": f"{their}.{part}" for part in ("norm", "norm1", "norm2")}
    return named
