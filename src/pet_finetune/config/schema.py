"""Looking things up in the options schema: which keys a place allows, what an option means."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from .yaml_file import is_ignored

__all__ = [
    "allowed_keys",
    "describe",
    "is_nullable",
    "section_in",
    "sections_in",
    "where_it_belongs",
    "without_tags",
]


def without_tags(location: Sequence[str | int]) -> tuple[str | int, ...]:
    """A location of pydantic's without the tags (``#...``) of our unions."""
    return tuple(key for key in location if not (isinstance(key, str) and key.startswith("#")))


def _parts(annotation: Any) -> Iterator[Any]:
    """The types inside unions and ``Annotated``."""
    origin = get_origin(annotation)
    if origin is Annotated:
        yield from _parts(get_args(annotation)[0])
    elif origin in (Union, UnionType):
        for part in get_args(annotation):
            yield from _parts(part)
    else:
        yield annotation


def sections_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """The section classes a field can hold directly (not inside a list or mapping)."""
    for part in _parts(annotation):
        if isinstance(part, type) and issubclass(part, BaseModel):
            yield part


def section_in(annotation: Any) -> tuple[type[BaseModel] | None, str]:
    """The section class behind a field and how it is held: ``""``, ``"<name>"`` or ``"[]"``."""
    for part in _parts(annotation):
        if isinstance(part, type) and issubclass(part, BaseModel):
            return part, ""
    for part in _parts(annotation):
        if get_origin(part) is dict:
            return next(sections_in(get_args(part)[1]), None), "<name>"
    for part in _parts(annotation):
        if get_origin(part) is tuple:
            return next(sections_in(get_args(part)[0]), None), "[]"
    return None, ""


def _step(annotations: list[Any], key: str | int) -> list[Any]:
    """What the annotations hold under ``key``."""
    found: list[Any] = []
    for annotation in annotations:
        for part in _parts(annotation):
            if isinstance(part, type) and issubclass(part, BaseModel):
                if key in part.model_fields:
                    found.append(_whole(part.model_fields[str(key)]))
            elif get_origin(part) is dict:
                found.append(get_args(part)[1])
            elif get_origin(part) is tuple and isinstance(key, int):
                found.append(get_args(part)[0])
    return found


def _whole(field: FieldInfo) -> Any:
    return field.annotation


def _at(root: type[BaseModel], location: Sequence[str | int]) -> list[Any]:
    annotations: list[Any] = [root]
    for key in without_tags(location):
        annotations = _step(annotations, key)
    return annotations


def allowed_keys(root: type[BaseModel], location: Sequence[str | int]) -> list[str]:
    """Names of the options that may stand in the section at ``location``."""
    names: dict[str, None] = {}
    for annotation in _at(root, location):
        for section in sections_in(annotation):
            fields = section.model_fields
            names.update(dict.fromkeys(name for name in fields if not is_ignored(fields[name])))
    return list(names)


def is_nullable(root: type[BaseModel], location: Sequence[str | int]) -> bool:
    """Whether the option at ``location`` may be null."""
    return any(NoneType in _parts(annotation) for annotation in _at(root, location))


def describe(root: type[BaseModel], location: Sequence[str | int]) -> str:
    """The description of the option at ``location``."""
    if not location:
        return ""
    for annotation in _at(root, location[:-1]):
        for section in sections_in(annotation):
            field = section.model_fields.get(str(location[-1]))
            if field is not None and field.description:
                return field.description
    return ""


def where_it_belongs(root: type[BaseModel], name: str) -> str:
    """Dotted name of the option called ``name`` that stands nearest to the top.

    ``""`` if none is called so, or several as near.
    """
    found = [path for path, _ in _walk(root, "") if path.rsplit(".", 1)[-1] == name]
    depth = min((path.count(".") for path in found), default=0)
    nearest = [path for path in found if path.count(".") == depth]
    return nearest[0] if len(nearest) == 1 else ""


def _walk(section: type[BaseModel], prefix: str) -> Iterator[tuple[str, FieldInfo]]:
    for name, field in section.model_fields.items():
        path = f"{prefix}{name}"
        yield path, field
        inner, held = section_in(field.annotation)
        if inner is not None:
            yield from _walk(inner, f"{path}{held and ('.' + held if held != '[]' else '')}.")
