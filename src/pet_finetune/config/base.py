"""The pieces all option sections are made of: the section itself and its checked value types.

Each value type carries the words an error message uses for it ("a positive integer"), so that
the message, the options reference and the check can never say different things.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal, get_args

from ase.data import chemical_symbols
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from pet_finetune.errors import did_you_mean

#: What stands in the place of a value that OmegaConf fills in.
_FILLED_IN = {"type": "string", "pattern": "\\$\\{"}


class Section(BaseModel):
    """A group of options. Unknown keys are errors and values cannot be changed after loading.

    The text below a field is its description: in the reference, the schema and messages.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=False, use_attribute_docstrings=True
    )
    #: JSON's names of what may stand in the place of the whole section, for its short forms.
    short_forms: ClassVar[tuple[str, ...]] = ()
    #: The option that a number or a text in the place of the section stands for.
    short_for: ClassVar[str] = ""

    @model_validator(mode="before")
    @classmethod
    def _spell_out(cls, value: Any) -> Any:
        bare = isinstance(value, (int, float, str)) and not isinstance(value, bool)
        return {cls.short_for: value} if cls.short_for and bare else value

    @classmethod
    def __pydantic_init_subclass__(cls, **_: Any) -> None:
        """Put descriptions on one line each."""
        for one in cls.model_fields.values():
            one.description = one.description and " ".join(one.description.split())

    @classmethod
    def __get_pydantic_json_schema__(
        cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        """The schema for editors: nothing under the name, and the short forms, count too."""
        reference = handler(core_schema)
        handler.resolve_ref_schema(reference)["type"] = ["object", "null", *cls.short_forms]
        return reference


def without_nulls(section: type[BaseModel], value: Any) -> Any:
    """Take out options of ``section`` that are null: a name with nothing under it in YAML."""
    if not isinstance(value, dict):
        return value
    known = section.model_fields
    return {key: item for key, item in value.items() if item is not None or key not in known}


@dataclass(frozen=True)
class Expects:
    """Annotation that replaces pydantic's own check of a field by ours.

    Attributes:
        phrase: completes "expected ..." in messages and is the type in the reference.
        convert: returns the accepted value or raises :class:`ValueError`; the text of the error, if
            any, is added to the message.
        json: JSON schema for editors, as far as it can say the same; empty allows anything.
    """

    phrase: str
    convert: Callable[[Any], Any]
    json: Mapping[str, Any] = field(default_factory=dict, compare=False)

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        """Build the plain validator pydantic runs for the annotated field."""
        return core_schema.no_info_plain_validator_function(self._validate)

    def __get_pydantic_json_schema__(
        self, core_schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        """The schema for editors; what OmegaConf fills in (``${...}``) is text until then."""
        return {"anyOf": [dict(self.json), _FILLED_IN]} if self.json else {}

    def _validate(self, value: Any) -> Any:
        try:
            return self.convert(value)
        except ValueError as why:
            raise PydanticCustomError(
                "expected", "{phrase}", {"phrase": self.phrase, "why": str(why)}
            ) from None


@dataclass(frozen=True)
class OneOf:
    """Annotation for a ``Literal`` field: the message lists the choices and the nearest one."""

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        """Build a validator from the choices of the annotated ``Literal``."""
        choices = get_args(source)

        def validate(value: Any) -> Any:
            if isinstance(value, bool) and "on" in choices:  # what YAML takes these words for
                value = "on" if value else "off"
            for choice in choices:
                if type(value) is type(choice) and value == choice:
                    return choice
            raise PydanticCustomError("one_of", "one of", {"choices": list(choices)})

        return core_schema.no_info_plain_validator_function(
            validate, metadata={"choices": list(choices)}
        )

    def __get_pydantic_json_schema__(
        self, core_schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        """The schema for editors."""
        choices = core_schema["metadata"]["choices"]
        return {"anyOf": [{"enum": choices}, _FILLED_IN]}


def integer(minimum: int | None = None) -> Callable[[Any], int]:
    """Build the check of an integer, by default of any size."""

    def convert(value: Any) -> int:
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError
        if minimum is not None and value < minimum:
            raise ValueError
        return value

    return convert


def real_number(
    least: float = -math.inf,
    *,
    above: float = -math.inf,
    below: float = math.inf,
) -> Callable[[Any], float]:
    """Build the check of a finite number with ``least <= x`` and ``above < x < below``."""

    def convert(value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError
        number = float(value)
        if not math.isfinite(number) or not (number >= least and above < number < below):
            raise ValueError
        return number

    return convert


def element(name: Any) -> str:
    """The symbol of the element that a symbol (any case) or an atomic number means.

    Raises:
        ValueError: it is no element; the text names the nearest symbol.
    """
    symbols = chemical_symbols[1:]
    if isinstance(name, bool):
        raise ValueError("YAML reads No as false; put nobelium in quotes.")
    if isinstance(name, int):
        if 1 <= name <= len(symbols):
            return chemical_symbols[name]
        raise ValueError(f"{name} is no atomic number (1 to {len(symbols)}).")
    text = str(name).strip().capitalize()
    if text in symbols:
        return text
    raise ValueError(f"{name!r} is no chemical element.{did_you_mean(text, symbols)}")


def _flag(value: Any) -> bool:
    """YAML 1.1 reads on/off and yes/no as booleans, but quoted ones arrive as text."""
    words = {"on": True, "off": False, "yes": True, "no": False, "true": True, "false": False}
    if isinstance(value, str) and value.casefold() in words:
        return words[value.casefold()]
    if not isinstance(value, bool):
        raise ValueError
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError
    return value


def _optional_text(value: Any) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ValueError
    return value


def listed(check: Callable[[Any], Any], *, empty: bool = True) -> Callable[[Any], tuple[Any, ...]]:
    """Build the check of a list, or of one thing without the list around it."""

    def convert(value: Any) -> tuple[Any, ...]:
        items = value if isinstance(value, (list, tuple)) else [value]
        if not items and not empty:
            raise ValueError
        return tuple(check(item) for item in items)

    return convert


def mapping(
    check: Callable[[Any], Any], key: Callable[[Any], Any] = str
) -> Callable[[Any], dict[Any, Any]]:
    """Build the check of a mapping, by those of its values and its keys."""

    def convert(value: Any) -> dict[Any, Any]:
        if not isinstance(value, Mapping):
            raise ValueError
        return {key(name): check(item) for name, item in value.items()}

    return convert


def only(allowed: str, why: str) -> Callable[[Any], str]:
    """Build the check of an option with one allowed value, with the reason."""

    def convert(value: Any) -> str:
        if value != allowed:
            raise ValueError(why)
        return allowed

    return convert


_INTEGER, _NUMBER = {"type": "integer"}, {"type": "number"}
_OPEN = {**_NUMBER, "exclusiveMinimum": 0}

PositiveInt = Annotated[int, Expects("a positive integer", integer(1), {**_INTEGER, "minimum": 1})]


AtomsOrAuto = Annotated[
    int | Literal["auto"],
    Expects(
        "a positive integer, or auto",
        lambda value: "auto" if value == "auto" else integer(1)(value),
        {"anyOf": [{"const": "auto"}, {**_INTEGER, "minimum": 1}]},
    ),
]
NonNegativeInt = Annotated[
    int, Expects("a non-negative integer", integer(0), {**_INTEGER, "minimum": 0})
]
Number = Annotated[float, Expects("a number", real_number(), _NUMBER)]
PositiveFloat = Annotated[float, Expects("a positive number", real_number(above=0.0), _OPEN)]
NonNegativeFloat = Annotated[
    float, Expects("a non-negative number", real_number(0.0), {**_NUMBER, "minimum": 0})
]
Fraction = Annotated[
    float,
    Expects(
        "a number from 0 up to, but not including, 1",
        real_number(0.0, below=1.0),
        {**_NUMBER, "minimum": 0, "exclusiveMaximum": 1},
    ),
]
OpenFraction = Annotated[
    float,
    Expects(
        "a number between 0 and 1, both excluded",
        real_number(above=0.0, below=1.0),
        {**_OPEN, "exclusiveMaximum": 1},
    ),
]
Share = Annotated[
    float,
    Expects(
        "a number above 0, at most 1",
        real_number(above=0.0, below=1.0 + 1e-12),
        {**_OPEN, "maximum": 1},
    ),
]
Flag = Annotated[
    bool,
    Expects("true or false", _flag, {"enum": [True, False, "on", "off", "yes", "no"]}),
]
Text = Annotated[str, Expects("text", _text, {"type": "string"})]
OptionalText = Annotated[str, Expects("text", _optional_text, {"type": ["string", "null"]})]
TextList = Annotated[
    tuple[str, ...],
    Expects("a name or a list of names", listed(_text), {"type": ["string", "array"]}),
]
Ignored = Annotated[Any, Expects("any value", lambda value: value)]

_IGNORED: dict[str, Any] = {"ignored": True}


def ignored_field(why: str) -> Any:
    """A metatrain option that is accepted and has no effect here; giving it makes a notice."""
    return Field(
        default=None, description=f"Accepted, no effect: {why}", json_schema_extra=_IGNORED
    )


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
