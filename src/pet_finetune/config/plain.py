"""Options back into the plain values of a YAML file."""

from __future__ import annotations

from typing import Any

from pydantic.fields import FieldInfo

from .base import Section

__all__ = ["is_ignored", "to_plain"]


def is_ignored(field: FieldInfo) -> bool:
    """Whether the option is accepted for metatrain's sake and has no effect."""
    extra = field.json_schema_extra
    return isinstance(extra, dict) and bool(extra.get("ignored"))


def to_plain(value: Any) -> Any:
    """Sections as dictionaries, tuples as lists; options that are null anyway are left out."""
    if isinstance(value, Section):
        fields = type(value).model_fields
        given = {name: getattr(value, name) for name in fields if not is_ignored(fields[name])}
        return {
            name: to_plain(item)
            for name, item in given.items()
            if item is not None or fields[name].default is not None
        }
    if isinstance(value, dict):
        return {key: to_plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(item) for item in value]
    return value
