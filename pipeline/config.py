"""Loads a YAML file into a frozen, checked object; applies overrides; explains every mistake at once; flattens.

What a field means besides its value is an annotation on the field: `Input` and `Changeable`.
"""

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from pipeline import redaction, renamed_keys
from pipeline.errors import ConfigError


class Config(BaseModel):
    """Base of every config section: immutable, and unknown keys are mistakes, as are numbers that are not finite."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False, use_attribute_docstrings=True
    )


@dataclass(frozen=True)
class Input:
    """Marks a field that names what a stage reads: `codec: Annotated[str, Input("codec")]`.

    kind: of the artifact; "" for images. or_folder: a plain folder of images is accepted as well. when: the property of the
    config that says whether the input is read at all.
    """

    kind: str
    or_folder: bool = False
    when: str = ""


@dataclass(frozen=True)
class Changeable:
    """Marks a field that says how something is computed and not what: a run may be resumed with another value."""


M = TypeVar("M", Input, Changeable)

C = TypeVar("C", bound=Config)


def load(cls: type[C], path: Path | str, overrides: Sequence[str] = ()) -> C:
    """The config in `path` after `key=value` overrides, as a `cls`.

    Raises: ConfigError naming all problems, each with the nearest valid name where a key is unknown.
    """
    return parse(cls, read_yaml(Path(path)), overrides, str(path))


def parse(cls: type[C], values: dict[str, Any], overrides: Sequence[str], source: str) -> C:
    """Like `load`, from values instead of a file; `source` begins the message. Changes `values`."""
    problems = [problem for word in overrides if (problem := _override(values, word))]
    problems += [
        f"{key}: holds a password, token or signature, which would be recorded; give it in the environment or the store's own "
        "credentials file instead"
        for key, value in leaves("", values)
        if isinstance(value, str) and redaction.has_secret(value)
    ]
    try:
        config = cls.model_validate(values)
    except ValidationError as error:
        problems += [_explain(cls, dict(e)) for e in error.errors()]
    if problems:
        raise ConfigError(f"{source}: {len(problems)} problem(s)\n" + "\n".join(f"  {p}" for p in problems))
    return config


def read_yaml(path: Path, may_extend: bool = True, below: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The mapping in a YAML file, merged over the file its `extends:` key names (one level or more, relative).

    may_extend: False for files of others, which must not make us read arbitrary files. below: the files that extend this one.
    Raises: ConfigError.
    """
    if path.resolve() in [extending.resolve() for extending in below]:
        loop = " -> ".join(map(str, (*below, path)))
        raise ConfigError(f"{below[0]}: `extends:` forms a cycle, {loop}; remove one of them")
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeyLoader)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such config file (the reference ones are in configs/)") from None
    # A ValueError: a date such as 2024-31-12
    except (yaml.YAMLError, ValueError, IsADirectoryError) as error:
        raise ConfigError(f"{path}: not a YAML file: {' '.join(str(error).split())}") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}; name another config file") from None
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected `key: value` lines, found {type(values).__name__}")
    if may_extend and "extends" in values:
        values = _merge(read_yaml(path.parent / str(values.pop("extends")), True, (*below, path)), values)
    return values


def flatten(config: Config) -> dict[str, Any]:
    """Dotted key -> plain value, for trackers and for comparing two configs."""
    return dict(leaves("", config.model_dump(mode="json")))


def marked(config: Config, marker: type[M], prefix: str = "") -> Iterator[tuple[str, Any, M]]:
    """Dotted key, value and marker of every field that has such a marker; of a dictionary, each of its values."""
    for name, field in type(config).model_fields.items():
        value, key = getattr(config, name), f"{prefix}{name}"
        if isinstance(value, Config):
            yield from marked(value, marker, f"{key}.")
        for found in (mark for mark in field.metadata if isinstance(mark, marker)):
            if isinstance(value, dict):
                yield from ((f"{key}.{inner}", each, found) for inner, each in value.items())
            else:
                yield key, value, found


def inputs(config: Config) -> Iterator[tuple[str, Any, Input]]:
    """Dotted key, value and marker of everything that a stage with this config reads."""
    for key, value, marker in marked(config, Input):
        if value is not None and (not marker.when or getattr(config, marker.when)):
            yield key, value, marker


def changeable(config: Config) -> set[str]:
    """Dotted keys with which a run may be resumed although they differ."""
    return {key for key, _, _ in marked(config, Changeable)}


def at_default(config: Config, prefix: str = "") -> set[str]:
    """Dotted keys that have their default value. What an older version did not know yet, it did as by default."""
    found: set[str] = set()
    for name, field in type(config).model_fields.items():
        value, key = getattr(config, name), f"{prefix}{name}"
        if isinstance(value, Config):
            found |= at_default(value, f"{key}.")
        elif not field.is_required() and value == field.get_default(call_default_factory=True):
            found.add(key)
    return found


def differences(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """One line per key on which two flat configs differ."""
    keys = [*ours, *(k for k in theirs if k not in ours)]
    absent = "(absent)"
    return [
        f"{k}: {theirs.get(k, absent)} there, {ours.get(k, absent)} now"
        for k in keys
        if ours.get(k, absent) != theirs.get(k, absent)
    ]


def dump(config: Config) -> str:
    """The whole resolved config as YAML."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


class _UniqueKeyLoader(yaml.SafeLoader):
    """PyYAML silently keeps the last of two equal keys; in a config that is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(k, deep=True) for k, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} appears twice", node.start_mark)
        return super().construct_mapping(node, deep)


def _merge(base: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    return dict(base) | {key: _replace(base.get(key), value) for key, value in over.items()}


def _replace(old: Any, value: Any) -> Any:
    """`value`, merged into `old` if both are sections of the same kind; an empty one empties it."""
    if (
        isinstance(old, dict)
        and isinstance(value, dict)
        and value
        and value.get("kind", old.get("kind")) == old.get("kind")
    ):
        return _merge(old, value)
    return value


def _override(values: dict[str, Any], word: str) -> str | None:
    """Sets one dotted key in place; returns what is wrong with the word, if anything."""
    key, equals, text = word.partition("=")
    if not equals or not key:
        return f"{word!r}: expected key=value, for example fit.steps=100"
    try:
        value = yaml.load(text, Loader=_UniqueKeyLoader)
    except (yaml.YAMLError, ValueError):
        value = text
    *parents, last = key.split(".")
    section = values
    for parent in parents:
        section = section.setdefault(parent, {})
        if not isinstance(section, dict):
            return f"{key}: {parent!r} holds a value, not a section"
    section[last] = _replace(section.get(last), value)
    return None


def leaves(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from leaves(f"{prefix}.{key}" if prefix else str(key), inner)
    else:
        yield prefix, json.dumps(value, default=str) if isinstance(value, list | dict) else value


def _explain(cls: type[Config], error: dict[str, Any]) -> str:
    where, kind, found = error["loc"], error["type"], error["input"]
    key = ".".join(str(part) for part in _without_tags(cls, where)) or "(whole file)"
    if kind == "extra_forbidden":
        if new := renamed_keys.new_name([str(part) for part in where], _names_at(cls, where[:-1])):
            return f"{key}: renamed to {new!r}"
        near = difflib.get_close_matches(str(where[-1]), _names_at(cls, where[:-1]), n=1)
        return f"{key}: unknown key" + (f"; did you mean {near[0]!r}?" if near else "")
    if kind == "missing":
        return f"{key}: required, but not given"
    message = error["msg"].removeprefix("Value error, ")
    if kind == "union_tag_not_found":
        return f"{key}: needs a `kind`"
    hint = " (YAML reads a bare no/off as false; quote it)" if found is False and kind != "bool_type" else ""
    shown = "" if isinstance(found, dict) else f", got {redaction.masked(repr(found))}"
    return f"{key}: {message[0].lower()}{message[1:]}{shown}{hint}"


def members(annotation: Any) -> list[type[Config]]:
    """The config classes an annotation can hold."""
    if isinstance(annotation, type) and issubclass(annotation, Config):
        return [annotation]
    if get_origin(annotation) is Annotated:
        return members(get_args(annotation)[0])
    if get_origin(annotation) is Union or get_args(annotation):
        return [member for part in get_args(annotation) for member in members(part)]
    return []


def kind_of(cls: type[Config]) -> str | None:
    field = cls.model_fields.get("kind")
    return get_args(field.annotation)[0] if field else None


def _walk(cls: type[Config], where: Sequence[Any]) -> Iterator[tuple[Any, list[type[Config]]]]:
    """Each part of an error's location with the classes that can stand there; union tags come with none."""
    options = [cls]
    for part in where:
        if len(options) > 1 and part in [kind_of(o) for o in options]:
            options = [o for o in options if kind_of(o) == part]
            yield part, []
            continue
        fields = [o.model_fields[part] for o in options if part in o.model_fields]
        if fields:
            options = [m for field in fields for m in members(field.annotation)]
        yield part, options


def _without_tags(cls: type[Config], where: Sequence[Any]) -> list[Any]:
    options, parts = [cls], []
    for part, after in _walk(cls, where):
        if after or not (len(options) > 1 and part in [kind_of(o) for o in options]):
            parts.append(part)
        options = after or options
    return parts


def _names_at(cls: type[Config], where: Sequence[Any]) -> list[str]:
    options = [cls]
    for part, after in _walk(cls, where):
        options = after or [o for o in options if kind_of(o) == part] or options
    return [name for option in options for name in option.model_fields]
