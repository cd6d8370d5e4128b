"""Committees on disk: adapter folders, and the file that lists them."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pet_finetune.adapters.at_rest import Adapter, install
from pet_finetune.adapters.base_weights import content_digest, weights_fingerprint
from pet_finetune.adapters.inject import merged_copy
from pet_finetune.adapters.peft_files import read_adapter
from pet_finetune.errors import AdapterError, ConfigError, DataError
from pet_finetune.files import read_object, write_whole
from pet_finetune.keys import TargetSpec, main_energy
from pet_finetune.log import get_logger
from pet_finetune.model.potential import Potential

from .committee import Calibration, Committee

COMMITTEE_FILE = "committee.json"
_FORMAT = "pet-finetune committee"
_VERSION = 1
_DIGEST = "digest"

_logger = get_logger(__name__)

Adapters = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


def load_committee(base: Potential, adapters: Adapters, target: str | None = None) -> Committee:
    """The committee of several adapters of one base.

    Args:
        base: what the adapters were trained from; not changed.
        adapters: their folders, or the one folder of a run with ``finetune.ensemble``, which brings
            the calibration of the spread too.
        target: its energy, which all adapters must be for. Without it: the only one that they have
            in common, else ``energy``.

    Raises:
        AdapterError: fewer than two adapters, adapters of different bases or targets (both are
            named), or one that cannot be read.
        ConfigError: the adapters are for several energies and none is named.
    """
    return Committee(*committee_members(base, adapters, target))


def committee_members(
    base: Potential, adapters: Adapters, target: str | None = None
) -> tuple[Iterator[Potential], str, Calibration]:
    """The members of a committee as plain models of one energy, that energy and the calibration.

    Args:
        base: what the adapters were trained from; not changed.
        adapters: as for :func:`load_committee`.
        target: likewise.

    Returns:
        The members, made one at a time as they are asked for, and the rest.
    """
    calibration = Calibration()
    if isinstance(adapters, str | os.PathLike):
        folders, calibration = read_committee(adapters)
    else:
        folders = [Path(folder) for folder in adapters]
    if len(folders) < 2:
        raise AdapterError(
            f"adapters: a committee has at least two members, got {len(folders)}. "
            "For a single adapter use `adapter`."
        )
    read = [read_adapter(folder) for folder in folders]
    energy = _common_energy(read, base, target)
    left_out = dict.fromkeys([*base.targets, *(name for a in read for name in _targets(a, base))])
    left_out.pop(energy)
    if left_out:
        _logger.info("the committee is of '%s'; left out: %s", energy, ", ".join(left_out))
    return _members(base, read, energy), energy, calibration


def _members(base: Potential, adapters: Sequence[Adapter], energy: str) -> Iterator[Potential]:
    """The members as plain models of one energy, one at a time."""
    fingerprint = weights_fingerprint(base)
    for adapter in adapters:
        model = copy.deepcopy(base)
        install(model, adapter, fingerprint)
        model = merged_copy(model)
        for name in [name for name in model.targets if name != energy]:
            model.remove_target(name)
        yield model


def _targets(adapter: Adapter, base: Potential) -> dict[str, TargetSpec]:
    """Targets of an adapter; for one of PEFT, the model's first target."""
    specs = [target.spec for target in adapter.targets] or [next(iter(base.targets.values()))]
    return {spec.name: spec for spec in specs}


def _common_energy(adapters: Sequence[Adapter], base: Potential, wanted: str | None) -> str:
    """The energy of the committee; the adapters must agree on their base as well."""
    first, *others = adapters
    common = {name for name, spec in _targets(first, base).items() if spec.is_energy}
    for other in others:
        if None not in (first.fingerprint, other.fingerprint) and (
            first.fingerprint != other.fingerprint
        ):
            raise AdapterError(
                f"The adapters of a committee share one base, but {first.base_in_words} and "
                f"{other.base_in_words}. Leave one of them out."
            )
        common &= _targets(other, base).keys()
        if not common:
            ours, theirs = ("', '".join(_targets(a, base)) for a in (first, other))
            raise AdapterError(
                f"The adapters of a committee share an energy, but '{first.name}' is for "
                f"'{ours}' and '{other.name}' for '{theirs}'. Leave one of them out."
            )
    energies = ", ".join(sorted(common))
    if wanted is not None and wanted not in common:
        raise AdapterError(
            f"target: the adapters of this committee are for {energies or 'no energy'}, not "
            f"{wanted}."
        )
    energy = wanted or main_energy(common)
    if energy is None:
        raise ConfigError(
            f"target: the adapters of this committee are for {len(common)} energies "
            f"({energies or 'none'}); name the one to use."
        )
    return energy


def write_committee(folder: str | Path, members: Sequence[str], calibration: Calibration) -> Path:
    """Say in a folder which adapters below it are a committee."""
    path = Path(folder) / COMMITTEE_FILE
    content = {
        "format": _FORMAT,
        "version": _VERSION,
        "members": list(members),
        "factors": asdict(calibration),
    }
    content[_DIGEST] = content_digest({}, content)
    try:
        write_whole(path, json.dumps(content, indent=2) + "\n")
    except OSError as error:
        raise AdapterError(f"Cannot write '{path}': {error}.") from error
    return path


def read_committee(folder: str | os.PathLike[str]) -> tuple[list[Path], Calibration]:
    """The adapters and the calibration of a committee, by the folder of its run.

    Raises:
        AdapterError: there is no committee, or its file is damaged.
    """
    path = Path(folder) / COMMITTEE_FILE
    try:
        content: Any = read_object(path)
        if (content["format"], content["version"]) != (_FORMAT, _VERSION):
            raise ValueError(f"{content['format']} {content['version']}")
        stored = content.pop(_DIGEST, None)
        if stored not in (None, content_digest({}, content)):
            raise ValueError("it is not what was written: its checksum differs")
        factors = {kind: float(value) for kind, value in content["factors"].items()}
        return [path.parent / str(name) for name in content["members"]], Calibration(**factors)
    except FileNotFoundError as error:
        raise AdapterError(
            f"There is no committee in '{path.parent}': {COMMITTEE_FILE} is missing. Give the "
            "folder of a finished run with finetune.ensemble, or a list of adapter folders."
        ) from error
    except (DataError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise AdapterError(f"Cannot read the committee '{path}': {error}.") from error
