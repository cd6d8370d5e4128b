"""The options reference: the schema written out as a Markdown page."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from .base import Expects, Section
from .options import Options
from .schema import is_nullable, section_in
from .yaml_file import is_ignored, to_plain

__all__ = ["OptionEntry", "option_entries", "options_reference"]

_INTRODUCTION = """\
# Options

All options of `options.yaml`, generated from the schema the program checks them with. The layout
is metatrain's. Options named in a path as `<name>` stand under a name of your choice, for targets
for instance; `[]` marks a list, which may be left away when it has one entry. Any option can be
set on the command line: `-r architecture.training.num_epochs=50`.

Besides the forms below, `training_set` and `systems` may be just a path, `forces`, `stress` and
`virial` just `on`, `off`, `auto` or a path, a loss just its type, `early_stopping` just its
patience, and `unfreeze` just its number of epochs.
"""
_IGNORED_HEADING = """
## Accepted without effect

metatrain's files may contain these; they are read and a notice says so.

| option | why |
|---|---|
"""
_DATA = ("training_set", "validation_set", "test_set")
#: Sections described once, though they occur in several places.
_SAME_AS = {
    "architecture.training.finetune.retention.read_from": "training_set",
    "architecture.training.finetune.replay.read_from": "training_set",
    "validation_set": "training_set",
    "test_set": "training_set",
}


@dataclass(frozen=True)
class OptionEntry:
    """One option of the schema."""

    #: Dotted name from the top of the file.
    name: str
    #: What values it takes, in words.
    type: str
    #: The value when it is left out, as in YAML; empty for a section or a required option.
    default: str
    #: What it does.
    meaning: str
    #: Whether it is accepted without effect.
    ignored: bool


def option_entries() -> list[OptionEntry]:
    """All options in the order of the schema, a section before what is in it."""
    return list(_entries(Options, "", {}))


def options_reference() -> str:
    """Return the reference page: a table for each part of the file, in Markdown."""
    parts: dict[str, list[str]] = {}
    ignored: list[str] = []
    for entry in option_entries():
        if entry.ignored:
            ignored.append(f"| `{entry.name}` | {entry.meaning.partition(': ')[2]} |")
            continue
        cells = (f"`{entry.name}`", entry.type, _code(entry.default), entry.meaning)
        row = " | ".join(cell.replace("|", "\\|") for cell in cells)
        parts.setdefault(_part_of(entry.name), []).append(f"| {row} |")
    tables = [_table(heading, rows) for heading, rows in parts.items()]
    return "\n".join([_INTRODUCTION, *tables]) + _IGNORED_HEADING + "\n".join(ignored) + "\n"


def _table(heading: str, rows: list[str]) -> str:
    head = "| option | type | default | meaning |\n|---|---|---|---|"
    return "\n".join([f"## {heading}\n", head, *rows, ""])


def _part_of(name: str) -> str:
    """The heading an option is listed under."""
    for prefix in ("architecture.training.finetune", "architecture.training", "architecture.model"):
        if name == prefix or name.startswith(f"{prefix}."):
            return prefix
    top = name.split(".")[0].removesuffix("[]")
    return "General" if "." not in name and top not in _DATA and top != "architecture" else top


def _entries(
    section: type[BaseModel], prefix: str, described: dict[type[BaseModel], str]
) -> Iterator[OptionEntry]:
    """The options of a section; ``described`` remembers sections that occur in several places."""
    for name, field in section.model_fields.items():
        path = f"{prefix}{name}"
        inner, held = section_in(field.annotation)
        if any(isinstance(part, Expects) for part in field.metadata):
            inner = None  # its phrase says all there is to know
        meaning = field.description or ""
        known = path not in _SAME_AS and inner is not None and described.get(inner, "")
        if known:
            meaning = f"{meaning} Keys as in `{known}`."
        yield OptionEntry(
            name=path,
            type=_type_words(section, name, field, path, inner is not None, held),
            default=_default_words(field, is_section=inner is not None),
            meaning=meaning,
            ignored=is_ignored(field),
        )
        if inner is not None and path not in _SAME_AS and not known:
            described[inner] = path
            below = {"": "", "[]": "[]", "<name>": ".<name>"}[held]
            yield from _entries(inner, f"{path}{below}.", described)


def _type_words(
    section: type[BaseModel], name: str, field: FieldInfo, path: str, is_section: bool, held: str
) -> str:
    if path in _SAME_AS:
        other = f"as `{_SAME_AS[path]}`"
        return f"a fraction, `{{indices: ...}}`, or {other}" if path in _DATA else other
    null = " or null" if is_nullable(section, (name,)) else ""
    if is_section:
        words = {"": "section", "[]": "section or list of sections", "<name>": "section by name"}
        choice = _words_of((field.annotation, *field.metadata))
        return words[held] + (f", or {choice}" if choice else "") + null
    choice = _words_of((field.annotation, *field.metadata))
    return choice + (f",{null}" if null and "," in choice else null)


def _words_of(types: tuple[Any, ...]) -> str:
    """The phrase of the first checked type found in the annotations."""
    for part in types:
        if isinstance(part, Expects):
            return part.phrase
    for part in types:
        origin = get_origin(part)
        if origin is Literal:
            return ", ".join(f"`{choice}`" for choice in get_args(part))
        if origin is dict:
            key, value = (_words_of((argument,)) for argument in get_args(part))
            return f"{{{key}: {value}}}" if value else ""
        if origin is Annotated:
            words = _words_of(get_args(part)[1:]) or _words_of(get_args(part)[:1])
        else:
            words = next(filter(None, (_words_of((one,)) for one in get_args(part))), "")
        if words:
            return words
    return ""


def _default_words(field: FieldInfo, *, is_section: bool) -> str:
    if field.is_required():
        return "required"
    default = field.default
    if isinstance(default, Section) or (is_section and not isinstance(default, (str, float))):
        return "" if default is not None else "null"
    return json.dumps(to_plain(default), ensure_ascii=False)


def _code(text: str) -> str:
    return text if text in ("", "required") else f"`{text}`"
