"""Short ways of writing options (a path for a section, ``on`` for a label) spelled out in full.

All functions take what the YAML file holds and never raise: what they do not understand is
returned as it stands, so that validation reports it at its own place.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pet_finetune.keys import base_name, direct_quantity
from pet_finetune.units import is_energy_unit

__all__ = [
    "expand_dataset",
    "expand_datasets",
    "expand_gradient",
    "expand_set",
    "expand_switch",
    "quantity_is_assumed",
]

_SWITCHES = {
    True: "on",
    False: "off",
    None: "off",
    "on": "on",
    "off": "off",
    "yes": "on",
    "no": "off",
    "true": "on",
    "false": "off",
    "auto": "auto",
}


def expand_gradient(value: Any) -> Any:
    """``on``, ``off``, ``auto`` or a path as the keys of a gradient section."""
    if value is None or isinstance(value, bool):
        return {"mode": _SWITCHES[value]}
    if isinstance(value, str):
        switch = _SWITCHES.get(value.casefold())
        return {"mode": switch} if switch else {"read_from": value}
    return value


def expand_switch(value: Any) -> Any:
    """``on``, ``off`` or a path as the keys of a section that has a ``mode`` and a file."""
    return expand_gradient(value) if isinstance(value, (bool, str)) else value


def expand_datasets(value: Any) -> Any:
    """A data set, a path, or a list of either as a list of data sets."""
    return list(value) if isinstance(value, (list, tuple)) else [value]


def expand_set(value: Any) -> Any:
    """A validation or test set: a fraction and indices stay, all else becomes a list."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return value
    if isinstance(value, Mapping) and set(value) == {"indices"}:
        return value
    return expand_datasets(value)


def expand_dataset(value: Any) -> Any:
    """One data set in full: every target knows its file and its key, and gradients their own."""
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
    declared = base_name(str(name)) == "energy" or target.get("quantity") == "energy"
    _complete_quantity(str(name), target)
    energy = declared and _is_one_energy(target)
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
    """Whether a target is an energy because nothing speaks against it, as metatrain has it.

    One number for each structure is an energy there unless ``quantity`` says otherwise. A unit
    that no energy has speaks against it here.
    """
    given = target.get("quantity") is not None or base_name(name) == "energy"
    unit = target.get("unit")
    return not given and _is_one_number(target) and (not unit or is_energy_unit(unit))


def _complete_quantity(name: str, target: dict[str, Any]) -> None:
    """Fill in the quantity where it is not given; an empty one is one that is no energy."""
    if quantity_is_assumed(name, target):
        target["quantity"] = "energy"
    elif not target.get("quantity"):
        target["quantity"] = "energy" if base_name(name) == "energy" else ""


def _is_one_energy(target: Mapping[str, Any]) -> bool:
    """Whether a target is one energy for each structure, as far as what is given says."""
    return target["quantity"] == "energy" and _is_one_number(target)


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
