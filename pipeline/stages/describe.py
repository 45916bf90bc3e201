"""`illm describe`: what a configuration would do, without doing it."""

import json
import textwrap
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from pipeline import config, config_keys, stages
from pipeline.config import Config, Input
from pipeline.errors import ArtifactError, ConfigError
from pipeline.models import discriminator as discriminators
from pipeline.models import serialization
from pipeline.models.codec import LATENT_STRIDE, Codec, CodecConfig
from pipeline.models.discriminator import Discriminator
from pipeline.models.labeler import Labeler, LabelerConfig
from pipeline.registry import resolve

C = TypeVar("C", bound=Config)


def describe(path: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """Everything `illm describe` shows, as plain data.

    Raises: ConfigError if the file does not name its stage or does not fit it.
    """
    name = _stage_of(path)
    cfg = config.load(stages.get(name).StageConfig, path, overrides)
    flat = config.flatten(cfg)
    given = cfg.model_dump(exclude_unset=True, mode="json")
    networks = _Networks(path, cfg)
    return {
        "stage": name,
        "inputs": {key: flat[key] for key, _, _ in config.marked(cfg, Input) if flat[key] is not None},
        "outputs": stages.TABLE[name].output,
        "steps": flat.get("fit.steps"),
        "notes": networks.notes,
        "parameters": networks.parameters(),
        "multiply_adds_per_pixel": networks.multiply_adds(),
        "memory_gib": networks.memory_gib(),
        "defaults": {k: v for k, v in flat.items() if k not in dict(config.leaves("", given))},
    }


def _stage_of(path: Path) -> str:
    name = config.read_yaml(path).get("stage")
    if name not in stages.STAGES:
        raise ConfigError(f"{path}: needs a `stage:` key, one of {', '.join(stages.STAGES)}; found {name!r}")
    return str(name)


class _Networks:
    """The stage's networks, on PyTorch's meta device: shapes without memory."""

    def __init__(self, path: Path, cfg: Config):
        self.notes: list[str] = []
        self.cfg = cfg
        self.codec: Codec | None = None
        self.labeler: Labeler | None = None
        self.discriminator: Discriminator | None = None
        stage = config.flatten(cfg)["stage"]
        with torch.device("meta"):
            if stage in ("pretrain", "gan"):
                self.codec = Codec(self._architecture(path, "codec", "pretrain", CodecConfig))
            if stage == "vqvae" or (stage == "gan" and cfg.needs_labels):  # type: ignore[attr-defined]
                self.labeler = Labeler(self._architecture(path, "labeler", "vqvae", LabelerConfig))
            if self.codec is not None and stage == "gan" and cfg.adversarial_weight:  # type: ignore[attr-defined]
                num_labels = self.labeler.cfg.num_codes if self.labeler else 0
                wanted = cfg.discriminator  # type: ignore[attr-defined]
                self.discriminator = discriminators.build(wanted, num_labels, self.codec.cfg.latent_channels)
        self.parts: dict[str, nn.Module] = {}
        if self.codec is not None:
            self.parts |= {"encoder": self.codec.analysis, "decoder": self.codec.synthesis, "codec": self.codec}
        if self.discriminator is not None:
            self.parts["discriminator"] = self.discriminator
        if self.labeler is not None:
            self.parts["labeler"] = self.labeler

    def parameters(self) -> dict[str, int]:
        return {name: _count([part]) for name, part in self.parts.items()}

    def multiply_adds(self) -> dict[str, float]:
        """Forward, per image pixel; the labeler's as in labeling: its encoder."""
        x = torch.empty(1, 3, 256, 256, device="meta")
        calls: dict[str, Callable[[], object]] = {}
        if self.codec is not None:
            y = torch.empty(1, self.codec.cfg.latent_channels, 16, 16, device="meta")
            codec = self.codec
            calls |= {"encoder": lambda: codec.analysis(x), "decoder": lambda: codec.synthesis(y)}
            if (discriminator := self.discriminator) is not None:
                calls["discriminator"] = lambda: discriminator(x, y)
        if (labeler := self.labeler) is not None:
            calls["labeler"] = lambda: labeler.to_code(labeler.encoder(x))
        return {name: round(_flops(call) / 2 / 256**2, 1) for name, call in calls.items()}

    def memory_gib(self) -> dict[str, float]:
        """Estimate for one process that takes the whole batch in fp32: weights, gradients and Adam's moments; activations."""
        if not hasattr(self.cfg, "data"):
            return {}
        size, crop = self.cfg.data.batch_size, self.cfg.data.crop_size
        trained: list[nn.Module] = [m for m in (self.codec or self.labeler,) if m is not None]
        passes = [lambda: self._train_pass(torch.empty(size, 3, crop, crop, device="meta"))]
        if (codec := self.codec) is not None and (discriminator := self.discriminator) is not None:
            trained = [codec.synthesis, discriminator]
            grid = crop // LATENT_STRIDE
            y = torch.empty(size // 2, codec.cfg.latent_channels, grid, grid, device="meta")
            x = torch.empty(size, 3, crop, crop, device="meta")
            # The generator's pass through both networks, then the discriminator's own over both halves.
            passes = [lambda: discriminator(codec.synthesis(y), y), lambda: discriminator(x, torch.cat([y, y]))]
        weights = _count(m for m in (self.codec, self.labeler, self.discriminator) if m is not None)
        states = 4 * (weights + 3 * _count(trained))
        activations = max(_saved_bytes(call) for call in passes)
        return {"weights_and_states": round(states / 2**30, 3), "activations": round(activations / 2**30, 3)}

    def _train_pass(self, x: Tensor) -> Tensor:
        if self.labeler is not None:
            return self.labeler.decoder(self.labeler.from_code(self.labeler.to_code(self.labeler.encoder(x))))
        assert self.codec is not None
        y = self.codec.analysis(x)
        z = self.codec.hyper_analysis(y)
        return (
            self.codec.synthesis(y).sum()
            + (self.codec.hyper_synthesis_mean(z) + self.codec.hyper_synthesis_scale(z)).sum()
        )

    def _architecture(self, path: Path, role: Literal["codec", "labeler"], made_by: str, kind: type[C]) -> C:
        """The config's own architecture, or its input artifact's; if that does not exist yet, the one that the config
        beside this one would make."""
        own = getattr(self.cfg, role)
        if isinstance(own, kind):
            return own
        try:
            return serialization.model_config(resolve.read(own, role), kind)
        except ArtifactError:
            beside = path.parent / f"{made_by}.yaml"
        if not beside.is_file():
            self.notes.append(f"{role}: {own} is not there yet; its figures are the published architecture's")
            return kind()
        self.notes.append(f"{role}: {own} is not there yet; its figures follow {beside}")
        architecture: C = getattr(config.load(stages.get(made_by).StageConfig, beside), role)
        return architecture


def keys_of(path: Path) -> str:
    """Every key of the stage that a configuration is for: its type, its default, and what it does.

    Raises: ConfigError if the file does not name its stage.
    """
    lines = []
    for key in config_keys.keys(stages.get(_stage_of(path)).StageConfig):
        default = "required" if not key.default else f"default {key.default}"
        lines.append(f"{key.name}: {key.type}; {default}{'; changeable on resume' if key.changeable else ''}")
        lines += textwrap.wrap(key.about, 110, initial_indent="    ", subsequent_indent="    ")
    return "\n".join(lines)


def as_json(description: dict[str, Any]) -> str:
    """One JSON object."""
    return json.dumps(description, indent=1)


def as_text(description: dict[str, Any]) -> str:
    """For people: one line per fact."""
    lines = []
    for key, value in description.items():
        if isinstance(value, dict):
            width = max([32, *map(len, value)])
            lines += (
                [f"{key}:", *(f"  {name:{width}} {_readable(inner)}" for name, inner in value.items())] if value else []
            )
        elif value:
            lines.append(f"{key}: {'; '.join(value) if isinstance(value, list) else _readable(value)}")
    return "\n".join(lines)


def _readable(value: Any) -> str:
    return f"{value:,}".removesuffix(".0") if type(value) in (int, float) else str(value)


def _count(modules: Iterable[nn.Module]) -> int:
    return sum(p.numel() for module in modules for p in module.parameters())


def _flops(call: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        call()
    return counter.get_total_flops()


def _saved_bytes(call: Callable[[], object]) -> int:
    """Bytes that autograd keeps for the backward pass, parameters not counted."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            storage = tensor.untyped_storage()
            # The storage itself: its Python wrapper is a new one at every call
            kept[storage._cdata] = storage.nbytes()
            held.append(tensor)
        return tensor

    held: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call()
    return sum(kept.values())
