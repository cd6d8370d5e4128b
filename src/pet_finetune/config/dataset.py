"""Options of the data (``training_set`` and the others), and their short forms spelled out.

What spells them out takes what the YAML file holds and never raises: what it does not understand is
returned as it stands, so that validation reports it at its own place.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Tag, model_validator

from pet_finetune.errors import UnitError, did_you_mean
from pet_finetune.keys import base_name, direct_quantity
from pet_finetune.units import LENGTH_UNITS, is_energy_unit, length_to_angstrom

from .base import (
    Expects,
    Fraction,
    Ignored,
    OneOf,
    OptionalText,
    Section,
    element,
    ignored_field,
    mapping,
)
from .target import Reader, TargetOptions, expand_gradient


def _length_unit(value: Any) -> str:
    if value is None or value == "":
        return "angstrom"
    if not isinstance(value, str):
        raise ValueError
    try:
        length_to_angstrom(value)
    except UnitError:
        guess = did_you_mean(value, LENGTH_UNITS).lstrip()
        allowed = f"Allowed (case does not matter): {', '.join(LENGTH_UNITS)}."
        raise ValueError(f"{guess} {allowed}".lstrip()) from None
    return value


def _indices(value: Any) -> tuple[int, ...] | str:
    if isinstance(value, str) and value.strip():
        return value
    if not isinstance(value, (list, tuple)) or not value:
        raise ValueError
    if any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in value):
        raise ValueError
    if len(set(value)) != len(value):
        repeated = sorted({i for i in value if list(value).count(i) > 1})
        raise ValueError(f"Given more than once: {repeated}.")
    return tuple(value)


def _one_file(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        raise ValueError(
            "Several files are several data sets: `training_set: [{systems: a.xyz, targets: ...}, "
            "{systems: b.xyz, targets: ...}]`."
        )
    if not isinstance(value, str) or not value.strip():
        raise ValueError
    return value


LengthUnit = Annotated[str, Expects("a unit of length", _length_unit)]
Indices = Annotated[
    tuple[int, ...] | str,
    Expects(
        "a list of distinct frame numbers (from 0) or the path of a text file with one a line",
        _indices,
    ),
]


def _type(number: Any) -> int:
    if isinstance(number, bool) or not str(number).isdecimal():
        raise ValueError
    return int(number)


Types = Annotated[
    dict[int, str],
    Expects(
        "elements by number of the type, for instance {1: O, 2: H}",
        mapping(element, _type),
    ),
]


class SystemsOptions(Section):
    """Source of the structures."""

    short_forms = ("string",)

    read_from: Annotated[str, Expects("the path of one file", _one_file, {"type": "string"})]
    """Path of a file that ASE reads; may hold many frames."""
    reader: Reader = None
    length_unit: LengthUnit = "angstrom"
    """Unit of positions and cells in the file."""
    format: OptionalText = ""
    """ASE's name of the file's format (`ase info --formats` lists them); empty: guessed from name
    and content."""
    types: Types = {}
    """Elements by type of atom, for LAMMPS files without elements: `{1: O, 2: H}`."""
    unconverged: Annotated[Literal["drop", "error", "keep"], OneOf()] = "drop"
    """Frames whose self-consistent field did not converge according to the output: `drop`: left out
    and named in the log; `error`: the run stops; `keep`: trained on."""
    isolated_atoms: Annotated[Literal["leave_out", "train"], OneOf()] = "leave_out"
    """Frames of a single atom without neighbours in a file of larger structures
    (`config_type=IsolatedAtom`), and files of such frames next to other files: `leave_out`: not
    used, and the log offers their energies for the `atomic_baseline` of a model from scratch;
    `train`: trained on."""


ExtraName = Annotated[Literal["charge", "spin_multiplicity"], OneOf()]


class ExtraDataOptions(Section):
    """Source of the total charge or the spin multiplicity of the structures."""

    short_forms = ("string",)

    read_from: OptionalText = ""
    """Path of the file; empty means that of the structures."""
    key: OptionalText = ""
    """Name in the file; empty means the option's name."""
    reader: Reader = None
    quantity: Ignored = ignored_field("charges and spins are plain integers.")
    unit: Ignored = ignored_field("charges and spins are plain integers.")
    sample_kind: Ignored = ignored_field("there is one value for each structure.")
    type: Ignored = ignored_field("charges and spins are scalars.")
    num_subtargets: Ignored = ignored_field("there is one value for each structure.")
    description: Ignored = ignored_field("it is not kept.")


class DatasetOptions(Section):
    """One data set: structures, what to learn from them, and which frames.

    In a file also just a path, which means structures with a target ``energy``.
    """

    short_forms = ("string",)

    systems: SystemsOptions
    """The structures: a path, or the keys below."""
    targets: dict[str, TargetOptions]
    """Targets by name: a path, or the keys below."""
    extra_data: dict[ExtraName, ExtraDataOptions] = {}
    """`charge` and `spin_multiplicity` of the structures, for models conditioned on them: a path,
    or the keys below."""
    indices: Indices | None = None
    """Use only these frames of the file."""

    @model_validator(mode="before")
    @classmethod
    def _expand(cls, value: Any) -> Any:
        return expand_dataset(value)


class IndexedSet(Section):
    """A validation or test set made of frames of the training file."""

    indices: Indices
    """Frame numbers in the training file, from 0, or a file holding them."""


def _kind_of_set(value: Any) -> str:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return "#fraction"
    if isinstance(value, IndexedSet) or (isinstance(value, Mapping) and set(value) == {"indices"}):
        return "#indices"
    return "#datasets"


#: A fraction of the training data, frames of the training file, or data sets of their own.
SetOptions = Annotated[
    Annotated[Fraction, Tag("#fraction")]
    | Annotated[IndexedSet, Tag("#indices")]
    | Annotated[tuple[DatasetOptions, ...], Tag("#datasets")],
    Discriminator(_kind_of_set),
]


def expand_datasets(value: Any) -> Any:
    """A data set, a path, or a list of either as a list of data sets."""
    return list(value) if isinstance(value, (list, tuple)) else [value]


def expand_set(value: Any) -> Any:
    """A validation or test set: a fraction and indices stay, all else becomes a list."""
    return expand_datasets(value) if _kind_of_set(value) == "#datasets" else value


def expand_dataset(value: Any) -> Any:
    """Expand a data set so that each target and each gradient has its own file and key."""
    if isinstance(value, str):
        value = {"systems": value, "targets": {"energy": {}}}
    if not isinstance(value, Mapping):
        return value
    full = dict(value)
    systems = full.get("systems")
    if isinstance(systems, (str, list)):  # what is wrong with a list is said of its place
        systems = full["systems"] = {"read_from": systems}
    source = systems.get("read_from") if isinstance(systems, Mapping) else None
    if isinstance(full.get("targets"), Mapping):
        full["targets"] = {
            name: _expand_target(name, target, source) for name, target in full["targets"].items()
        }
    if full.get("extra_data", ...) is None:
        del full["extra_data"]
    elif isinstance(full.get("extra_data"), Mapping):
        full["extra_data"] = {
            name: _inherit(extra, source, str(name)) for name, extra in full["extra_data"].items()
        }
    return full


def _expand_target(name: Any, target: Any, source: Any) -> Any:
    target = _inherit(target, source, str(name))
    if not isinstance(target, dict):
        return target
    # Only a target named or declared an energy has gradients by default, and a virial takes the
    # place of a stress that is not asked for by name. "energy/x" is a variant of the energy.
    _complete_direct(str(name), target)
    if target.get("reader", "") is None and target.get("quantity") == "energy":
        del target["quantity"]  # as metatrain writes it for all (options_restart.yaml)
    declared = base_name(str(name)) == "energy" or target.get("quantity") == "energy"
    _complete_quantity(str(name), target)
    energy = declared and target["quantity"] == "energy" and _is_one_number(target)
    virial = expand_gradient(target.get("virial"))
    virial_given = isinstance(virial, Mapping) and virial.get("mode", "on") != "off"
    defaults = {"forces": energy, "stress": energy and not virial_given, "virial": False}
    for label, default in defaults.items():
        gradient = expand_gradient(target.get(label, "auto" if default else "off"))
        target[label] = _inherit(gradient, target.get("read_from"), label)
    if target["quantity"] == "energy" and not target.get("unit"):
        target["unit"] = "eV"
    return target


def _complete_direct(name: str, target: dict[str, Any]) -> None:
    """Fill in what the name of a direct force or stress says: quantity, rows and type."""
    quantity = direct_quantity(name)
    if quantity is None:
        return
    forces = quantity == "force"
    same = {"forces", "force"} if forces else {"stress", "pressure"}
    if not target.get("quantity") or target["quantity"] in same:
        target["quantity"] = quantity
    if target.get("sample_kind") is None:
        target["sample_kind"] = "atom" if forces else "system"
    if target.get("type") is None:
        target["type"] = {"cartesian": {"rank": 1 if forces else 2}}


def quantity_is_assumed(name: str, target: Mapping[str, Any]) -> bool:
    """Whether a target counts as an energy by default, as in metatrain.

    One number for each structure is an energy there unless ``quantity`` says otherwise. A unit
    that no energy has speaks against it here.
    """
    given = target.get("quantity") is not None or base_name(name) == "energy"
    unit = target.get("unit")
    return not given and _is_one_number(target) and (not unit or is_energy_unit(unit))


def _complete_quantity(name: str, target: dict[str, Any]) -> None:
    """Fill in a missing quantity; an empty one is not an energy."""
    if quantity_is_assumed(name, target):
        target["quantity"] = "energy"
    elif not target.get("quantity"):
        target["quantity"] = "energy" if base_name(name) == "energy" else ""


def _is_one_number(target: Mapping[str, Any]) -> bool:
    given = (target.get("sample_kind"), target.get("type"), target.get("num_subtargets"))
    usual = zip(given, ("system", "scalar", 1), strict=True)
    return all(v is None or v == u for v, u in usual)


def _inherit(section: Any, source: Any, key: str) -> Any:
    """Fill in the file and the name in the file where they are not given."""
    if section is None:
        section = {}
    if isinstance(section, str):
        section = {"read_from": section}
    if not isinstance(section, Mapping):
        return section
    filled = dict(section)
    if not filled.get("read_from") and isinstance(source, str):
        filled["read_from"] = source
    if not filled.get("key"):
        filled["key"] = key
    return filled
