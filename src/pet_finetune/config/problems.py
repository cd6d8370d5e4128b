"""Problems in the options, and validation errors as messages."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from pet_finetune.errors import ConfigError, did_you_mean

from .base import is_ignored


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
    """Annotation under ``key``."""
    found: list[Any] = []
    for annotation in annotations:
        for part in _parts(annotation):
            if isinstance(part, type) and issubclass(part, BaseModel):
                if key in part.model_fields:
                    found.append(part.model_fields[str(key)].annotation)
            elif get_origin(part) is dict:
                found.append(get_args(part)[1])
            elif get_origin(part) is tuple and isinstance(key, int):
                found.append(get_args(part)[0])
    return found


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
    found = [path for path in option_paths(root) if path.rsplit(".", 1)[-1] == name]
    depth = min((path.count(".") for path in found), default=0)
    nearest = [path for path in found if path.count(".") == depth]
    return nearest[0] if len(nearest) == 1 else ""


def option_paths(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Dotted names of all options below a section."""
    for name, field in section.model_fields.items():
        path = f"{prefix}{name}"
        yield path
        inner, held = section_in(field.annotation)
        if inner is not None:
            yield from option_paths(
                inner, f"{path}{held and ('.' + held if held != '[]' else '')}."
            )


SectionType = TypeVar("SectionType", bound=BaseModel)

#: Keys and list positions from the top of the file to an option.
Path = tuple[str | int, ...]

#: Names of the first PET code, where today's option is not quite the same or the value may differ.
_TODAY = {
    "R_CUT": "cutoff",
    "CUTOFF_DELTA": "cutoff_width",
    "N_GNN_LAYERS": "num_gnn_layers",
    "N_TRANS_LAYERS": "num_attention_layers",
    "TRANSFORMER_D_MODEL": "d_pet",
    "TRANSFORMER_N_HEAD": "num_heads",
    "TRANSFORMER_DIM_FEEDFORWARD": "d_feedforward",
    "HEAD_N_NEURONS": "d_head",
    "EPOCHS_WARMUP": "warmup_fraction",
}


@dataclass(frozen=True)
class Problem:
    """A problem of the options."""

    #: Where it is.
    path: Path
    #: What is wrong, what is allowed and what to do.
    text: str
    #: Other options the statement rests on; not shown in front of the text.
    also: tuple[Path, ...] = ()

    @property
    def line(self) -> str:
        """The line shown to the user."""
        return f"{format_path(self.path)}: {self.text}" if self.path else self.text

    def rests_on(self, path: Path) -> bool:
        """Whether the problem may only follow from another one at ``path``."""
        own = self.path[: len(path)] == path[: len(self.path)]
        return own or any(other[: len(path)] == path for other in self.also)


def format_path(path: Sequence[str | int]) -> str:
    """Write a path as one would in an override: ``training_set[1].systems.read_from``."""
    text = ""
    for key in path:
        if isinstance(key, int):
            text += f"[{key}]"
        else:
            text += f".{key}" if text else key
    return text


def config_error(problems: Iterable[Problem | str], source: str) -> ConfigError:
    """One error with a line for each problem."""
    lines = [problem.line if isinstance(problem, Problem) else problem for problem in problems]
    unique = list(dict.fromkeys(lines))
    if len(unique) == 1:
        return ConfigError(f"{source}: {unique[0]}", unique)
    listed = "\n".join(f"  {line}" for line in unique)
    return ConfigError(f"{source}: {len(unique)} problems\n{listed}", unique)


def visible_path(location: Sequence[str | int], raw: Any) -> Path:
    """Location of pydantic as a path in the user's file, without its marks and implied lists."""
    path: list[str | int] = []
    node = raw
    for key in without_tags(location):
        if key == "[key]":
            break
        if isinstance(key, int) and not isinstance(node, (list, tuple)):
            continue
        path.append(key)
        try:
            node = node[key]
        except (KeyError, IndexError, TypeError):
            node = None
    return tuple(path)


def problems_of(error: ValidationError, root: type[BaseModel], raw: Any) -> list[Problem]:
    """Translate pydantic's errors; ``raw`` is what the user wrote."""
    return [
        Problem(visible_path(one["loc"], raw), _words(one, root))
        for one in error.errors(include_url=False)
    ]


def check_kind(name: str, given: object, kind: type, called: str = "") -> None:
    """Refuse an argument that is no object of its class, such as a dictionary.

    Args:
        name: of the argument.
        given: by the caller.
        kind: the class.
        called: what callers call it, if not by its own name.

    Raises:
        ConfigError: with what to write.
    """
    if not isinstance(given, kind):
        called = called or kind.__name__
        raise ConfigError(f"{name}: expected a {called}(...), got {given!r}.")


def checked_section(
    section: type[SectionType], given: Mapping[str, Any], source: str
) -> SectionType:
    """A section of the options made from settings by their names.

    Args:
        section: its class.
        given: the settings.
        source: what was called with them.

    Raises:
        ConfigError: one line for each that is wrong.
    """
    try:
        return section.model_validate(dict(given))
    except ValidationError as error:
        raise config_error(problems_of(error, section, given), source) from None


def _words(one: ErrorDetails, root: type[BaseModel]) -> str:
    location, kind, value = one["loc"], one["type"], one["input"]
    context: dict[str, Any] = one.get("ctx", {})
    if kind == "extra_forbidden":
        return _unknown(location, root)
    if kind == "missing":
        return f"missing. {describe(root, location)}".rstrip()
    null = " or null" if is_nullable(root, location) else ""
    if kind == "expected":
        why = f" {context['why']}" if context["why"] else _unquote(value)
        return f"expected {context['phrase']}{null}, got {_shown(value)}.{why}"
    if kind == "one_of":
        choices = [str(choice) for choice in context["choices"]]
        guess = did_you_mean(value, choices) if isinstance(value, str) else ""
        return f"expected one of {', '.join(choices)}{null}, got {_shown(value)}.{guess}"
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        keys = allowed_keys(root, location)
        inside = f" ({', '.join(keys)})" if keys else ""
        return f"expected a section with keys{inside}{null}, got {_shown(value)}."
    if kind == "invalid_key" or location[-1:] == ("[key]",):
        return f"expected a name as key, got {_shown(value)}."
    if kind in ("tuple_type", "list_type"):
        return f"expected a list{null}, got {_shown(value)}."
    return f"not accepted: {one['msg']}, got {_shown(value)}."


def _unknown(location: Sequence[str | int], root: type[BaseModel]) -> str:
    name = str(location[-1])
    allowed = allowed_keys(root, location[:-1])
    listed = f" Allowed here: {', '.join(allowed)}."
    if name in _TODAY:
        return f"an option of the first PET code; today's is {_TODAY[name]!r}.{listed}"
    guess = did_you_mean(name, allowed)
    elsewhere = where_it_belongs(root, name)
    if not guess and elsewhere:
        guess = f" Did you mean {elsewhere}?"
    return f"unknown option.{guess}{listed}"


def _unquote(value: Any) -> str:
    """Quoted numbers are text to YAML; that is hard to see in a message."""
    if isinstance(value, str):
        try:
            float(value)
        except ValueError:
            return ""
        return " Write it without quotes."
    return ""


def _shown(value: Any) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        return f"a section ({', '.join(map(str, value))})" if value else "an empty section"
    if isinstance(value, (list, tuple)):
        text = f"[{', '.join(_shown(item) for item in value)}]"
        return text if len(text) <= 80 else f"a list of {len(value)}"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
