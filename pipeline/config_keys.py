"""The keys that a config class knows, for people: `illm describe CONFIG.yaml --keys`."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from pipeline.config import Changeable, Config, kind_of, members


@dataclass(frozen=True)
class Key:
    """One key of a config class, for people. default: as YAML, "" if it is required."""

    name: str
    type: str
    default: str
    about: str
    changeable: bool


def keys(cls: type[Config], prefix: str = "", given: Config | None = None) -> Iterator[Key]:
    """Every key that a config class knows, with those of its sections; of a choice between kinds, those of each.

    given: the section's own default, whose values are then the defaults of its keys.
    """
    for name, field in cls.model_fields.items():
        sections = members(field.annotation)
        parts = (
            get_args(field.annotation) if get_origin(field.annotation) in (Union, UnionType) else (field.annotation,)
        )
        others = [part for part in parts if part is not type(None) and _bare(part) not in sections]
        if others or not sections:
            default = "" if given is None and field.is_required() else _as_yaml(_default(field, given, name))
            is_changeable = any(isinstance(found, Changeable) for found in field.metadata)
            yield Key(f"{prefix}{name}", _type_name(field.annotation), default, field.description or "", is_changeable)
        own = None if given is None and field.is_required() else _default(field, given, name)
        for section in sections:
            kind = kind_of(section) if len(sections) > 1 else None
            yield from keys(
                section,
                f"{prefix}{name}{f'({kind})' if kind else ''}{'[]' if others else ''}.",
                own if type(own) is section else None,
            )


def _default(field: FieldInfo, given: Config | None, name: str) -> Any:
    return field.get_default(call_default_factory=True) if given is None else getattr(given, name)


def _bare(annotation: Any) -> Any:
    return get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation


def _as_yaml(value: Any) -> str:
    plain = value.model_dump(mode="json") if isinstance(value, Config) else value
    return json.dumps(plain, default=str)


def _type_name(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        return " | ".join(map(str, get_args(annotation)))
    if get_origin(annotation) is Annotated:
        return _type_name(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return " | ".join(_type_name(part) for part in get_args(annotation))
    if get_origin(annotation) is not None:
        return f"{get_origin(annotation).__name__}[{', '.join(map(_type_name, get_args(annotation)))}]"
    if annotation in (type(None), Ellipsis):
        return "null" if annotation is not Ellipsis else "..."
    return str(getattr(annotation, "__name__", annotation))
