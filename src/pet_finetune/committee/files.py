"""Committees on disk: adapter folders, and the file that says which belong together."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pet_finetune.adapters.adapter import Adapter, install
from pet_finetune.adapters.files import read_adapter
from pet_finetune.adapters.merge import merged_copy
from pet_finetune.errors import AdapterError, DataError
from pet_finetune.files import read_object, write_whole
from pet_finetune.model import Potential
from pet_finetune.model.fingerprint import content_digest, weights_fingerprint

from .committee import Calibration, Committee

COMMITTEE_FILE = "committee.json"
_FORMAT = "pet-finetune committee"
_VERSION = 1
_DIGEST = "digest"

Adapters = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


def load_committee(base: Potential, adapters: Adapters) -> Committee:
    """The committee of several adapters of one base.

    Args:
        base: what the adapters were trained from; not changed.
        adapters: their folders, or the one folder of a run with ``finetune.ensemble``, which brings
            the calibration of the spread too.

    Raises:
        AdapterError: fewer than two adapters, adapters of different bases or targets (both are
            named), or one that cannot be read.
    """
    return Committee(*committee_members(base, adapters))


def committee_members(
    base: Potential, adapters: Adapters
) -> tuple[Iterator[Potential], str, Calibration]:
    """The members of a committee as plain models, their energy and the calibration.

    Args:
        base: what the adapters were trained from; not changed.
        adapters: as for :func:`load_committee`.

    Returns:
        The members, made one at a time as they are asked for, and the rest.

    Raises:
        AdapterError: as :func:`load_committee`.
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
    target = _common_target(read, base)
    return _members(base, read), target, calibration


def _members(base: Potential, adapters: Sequence[Adapter]) -> Iterator[Potential]:
    """The members as plain models, one at a time."""
    fingerprint = weights_fingerprint(base)
    for adapter in adapters:
        model = copy.deepcopy(base)
        install(model, adapter, fingerprint)
        yield merged_copy(model)


def _common_target(adapters: Sequence[Adapter], base: Potential) -> str:
    """The energy that all adapters are for; they must agree on their base as well."""
    first, *others = adapters
    # What PEFT wrote names no target and is for the model's first.
    targets = [next(iter(base.targets)) if a.target is None else a.target.name for a in adapters]
    for other, target in zip(others, targets[1:], strict=True):
        if None not in (first.fingerprint, other.fingerprint) and (
            first.fingerprint != other.fingerprint
        ):
            raise AdapterError(
                f"The adapters of a committee share one base, but {_with_base(first)} and "
                f"{_with_base(other)}. Leave one of them out."
            )
        if target != targets[0]:
            raise AdapterError(
                f"The adapters of a committee share one target, but '{first.name}' is for "
                f"'{targets[0]}' and '{other.name}' for '{target}'. Leave one of them out."
            )
    return targets[0]


def _with_base(adapter: Adapter) -> str:
    return (
        f"'{adapter.name}' belongs to the base '{adapter.base_name or 'unnamed'}' "
        f"(fingerprint {str(adapter.fingerprint)[:12]})"
    )


def write_committee(folder: str | Path, members: Sequence[str], calibration: Calibration) -> Path:
    """Say in a folder which adapters below it are a committee.

    Args:
        folder: of the run.
        members: folders of the adapters, relative to it.
        calibration: of the spread.
    """
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
