"""The options reference: the schema as a Markdown page, and as a JSON schema for editors."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from pet_finetune.errors import ConfigError, did_you_mean

from .base import Expects, Section, is_ignored, to_plain
from .finetune import METHOD_SHORTHANDS
from .problems import is_nullable, section_in
from .run_options import Options

#: The JSON schema as it is shipped.
SCHEMA_FILE = Path(__file__).parents[1] / "options.schema.json"

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


def entries_below(branch: str) -> list[OptionEntry]:
    """An option and all that is below it, by its dotted name from the top of the file.

    Raises:
        ConfigError: there is no such option.
    """
    entries = option_entries()

    def plain(name: str) -> str:
        return name.replace("[]", "").replace(".<name>", "")

    wanted = plain(branch.strip("."))
    found = [
        entry
        for entry in entries
        if plain(entry.name) == wanted or plain(entry.name).startswith(f"{wanted}.")
    ]
    if not found:
        names = [plain(entry.name) for entry in entries]
        ends = [name for name in names if name.endswith(f".{wanted}")]
        near = f" Did you mean '{ends[0]}'?" if ends else did_you_mean(wanted, names)
        raise ConfigError(
            f"There is no option '{branch}'.{near} `pet-finetune options` lists all of them."
        )
    return found


def options_schema() -> dict[str, Any]:
    """The JSON schema of an options file, for editors.

    It allows what the program allows, short forms included, and leaves some checks to the program;
    older spellings are marked as unknown.
    """
    schema = _relaxed(Options.model_json_schema())
    properties = schema["properties"]
    dataset: dict[str, Any] = {"$ref": "#/$defs/DatasetOptions"}
    several: dict[str, Any] = {"anyOf": [dataset, {"type": "array", "items": dataset}]}
    indexed = {"$ref": "#/$defs/IndexedSet"}
    for name in _DATA:
        kinds = [several] if name == "training_set" else [{"type": "number"}, indexed, several]
        described = {"description": properties[name].get("description", "")}
        properties[name] = {"anyOf": kinds, **described}
    method = schema["$defs"]["FinetuneOptions"]["properties"]["method"]
    method["anyOf"][0]["enum"] += list(METHOD_SHORTHANDS)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Options of pet-finetune",
        **schema,
    }


def _relaxed(schema: Any) -> Any:
    """A schema without what only fills the screen, where a list of one may be left away."""
    if isinstance(schema, list):
        return [_relaxed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    relaxed: dict[str, Any] = {}
    for key, value in schema.items():
        # The second: of a section, all of its defaults once more.
        if key in ("title", "ignored") or (key == "default" and isinstance(value, dict)):
            continue
        if key == "description" and isinstance(value, str):
            relaxed[key] = " ".join(value.split())
        elif key in ("properties", "$defs"):
            relaxed[key] = {name: _relaxed(part) for name, part in value.items()}
        else:
            relaxed["anyOf" if key == "oneOf" else key] = _relaxed(value)
    if relaxed.get("type") == "array" and isinstance(relaxed.get("items"), dict):
        one = relaxed["items"]
        kept = {key: relaxed.pop(key) for key in ("description", "default") if key in relaxed}
        return {"anyOf": [one, relaxed], **kept}
    relaxed.pop("discriminator", None)
    return relaxed


def schema_line() -> str:
    """The comment by which editors find the schema of an options file."""
    return f"# yaml-language-server: $schema={SCHEMA_FILE}\n"


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
