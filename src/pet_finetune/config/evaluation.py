"""Options files of ``mtt eval``: data sets alone, without a run around them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any

from pet_finetune.errors import ConfigError

from .dataset import DatasetOptions
from .load import parse_options
from .problems import config_error
from .yaml_file import read_yaml_document

__all__ = ["EvaluationOptions", "is_evaluation", "load_evaluation"]

#: Stands in for targets that are not named: nothing about it is assumed or told.
_ANY = {"energy": {"unit": "eV", "forces": False, "stress": False}}


@dataclass(frozen=True)
class EvaluationOptions:
    """Data sets to compare a model with."""

    #: A set without ``targets`` has no labels to compare with: predictions only.
    datasets: tuple[DatasetOptions, ...]
    #: As of :class:`~.load.LoadedOptions`.
    notices: tuple[str, ...]


def is_evaluation(path: str | FilePath) -> bool:
    """Whether a YAML file holds data sets alone, as ``mtt eval`` takes them.

    Raises:
        ConfigError: the file cannot be read.
    """
    content = read_yaml_document(path)
    return isinstance(content, list) or ("systems" in content and "training_set" not in content)


def load_evaluation(path: str | FilePath, overrides: Sequence[str] = ()) -> EvaluationOptions:
    """Read and check an options file of ``mtt eval``.

    Args:
        path: a YAML file with one data set (``systems``, ``targets``...) or a list of them.
        overrides: ``key=value`` strings, e.g. ``targets.energy.key=REF_energy``.

    Raises:
        ConfigError: with one line for every problem, at its place in the file.
    """
    content = read_yaml_document(path, overrides)
    sets = content if isinstance(content, list) else [content]
    unlabelled = [isinstance(one, Mapping) and one.get("targets") is None for one in sets]
    full: list[Any] = [
        {**one, "targets": _ANY} if bare else one
        for one, bare in zip(sets, unlabelled, strict=True)
    ]
    try:
        loaded = parse_options(
            {"training_set": full if isinstance(content, list) else full[0]}, require_start=False
        )
    except ConfigError as error:
        raise config_error([_own(line) for line in error.problems], str(path)) from None
    datasets = tuple(
        dataset.model_copy(update={"targets": {}}) if bare else dataset
        for dataset, bare in zip(loaded.options.training_set, unlabelled, strict=True)
    )
    return EvaluationOptions(datasets, tuple(_own(line) for line in loaded.notices))


def _own(line: str) -> str:
    """A line without the name of the section that the sets were put into to be checked."""
    return re.sub(r"training_set(\.(?=\w)|(?=\[))", "", line).replace("training_set", "the set")
