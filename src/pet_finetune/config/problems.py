"""Problems in the options: what they are, and validation errors put into plain words."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from pet_finetune.errors import ConfigError, did_you_mean

from .schema import allowed_keys, describe, is_nullable, where_it_belongs, without_tags

Model = TypeVar("Model", bound=BaseModel)

__all__ = ["Path", "Problem", "config_error", "format_path", "problems_of", "visible_path"]

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
    """One thing wrong with the options."""

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
        """Whether the statement may be wrong because the option at ``path`` is."""
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
    """Where the user finds a location of pydantic's: without its marks and implied lists."""
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


def checked_section(section: type[Model], given: Mapping[str, Any], source: str) -> Model:
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
