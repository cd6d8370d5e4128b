"""Reading an options file: YAML, interpolations, overrides, checks. One error for all problems."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any

from pydantic import ValidationError

from pet_finetune.errors import ConfigError

from .contradictions import check
from .dataset import DatasetOptions
from .notices import notices
from .problems import Path, Problem, config_error, problems_of
from .rewriting import apply_start, rewrite
from .run_options import Options
from .yaml_file import read_yaml, read_yaml_document

_DATA_SECTIONS = ("training_set", "validation_set", "test_set")
#: Stands in for a training set that is wrong, so that the rest can be checked.
_PLACEHOLDER = {"systems": {"read_from": "-"}, "targets": {"energy": {}}}


_START: Path = ("architecture", "training", "finetune", "read_from")


@dataclass(frozen=True)
class LoadedOptions:
    """Options, what there is to say about them, and what they were made from."""

    options: Options
    #: One line for each older spelling, assumption, or option without effect.
    notices: tuple[str, ...]
    #: The file after overrides and interpolations, before older spellings are rewritten.
    raw: dict[str, Any]


def load_options(
    path: str | FilePath,
    overrides: Sequence[str] = (),
    checkpoint: str | FilePath | None = None,
    *,
    require_start: bool = True,
) -> LoadedOptions:
    """Read and check an options file.

    Args:
        path: a YAML file in metatrain's layout.
        overrides: ``key=value`` strings, e.g. ``architecture.training.num_epochs=5``.
        checkpoint: model to start from (``-c``); sets ``finetune.read_from``.
        require_start: set to False where no new run is started (evaluation, restart): a method such
            as ``lora`` then needs no ``read_from``.

    Raises:
        ConfigError: if the file is missing or no YAML, or with one line for every problem.
    """
    raw = read_yaml(path, overrides)
    return parse_options(raw, checkpoint, require_start=require_start, source=str(path))


def parse_options(
    raw: Mapping[str, Any],
    checkpoint: str | FilePath | None = None,
    *,
    require_start: bool = True,
    source: str = "options",
) -> LoadedOptions:
    """Check options given as plain dictionaries and lists; else like :func:`load_options`.

    Args:
        raw: the options.
        checkpoint: as for :func:`load_options`.
        require_start: likewise.
        source: what the error message calls the options.
    """
    start = None if checkpoint is None else str(checkpoint)
    rewriting = rewrite(copy.deepcopy(dict(raw)))
    apply_start(rewriting, start, require_start=require_start)
    problems = list(rewriting.problems)
    tree = rewriting.raw
    options: Options | None = None
    blamed = [problem.path for problem in problems]
    try:
        options = Options.model_validate(tree)
    except ValidationError as error:
        found = problems_of(error, Options, tree)
        problems += found
        options, tree, removed = _without_wrong(tree, found)
        blamed += removed
    if options is not None:
        if not require_start and not options.is_finetuning:
            blamed.append(_START)  # where the run started is known to the run, not to the options
        problems += [
            problem
            for problem in check(options, tree)
            if not any(problem.rests_on(path) for path in blamed)
        ]
    if problems or options is None:
        raise config_error(problems, source)
    lines = (*rewriting.notices, *notices(options, tree))
    return LoadedOptions(options, lines, copy.deepcopy(dict(raw)))


def _without_wrong(
    tree: dict[str, Any], found: list[Problem]
) -> tuple[Options | None, dict[str, Any], list[Path]]:
    """Options without the wrong ones, to look for contradictions among the others.

    Returns:
        the options, what they were made from, and where something was taken out. First the wrong
        values alone are taken out; if that is not enough, whole data sets.
    """
    for whole_sets in (False, True):
        rest = copy.deepcopy(tree)
        removed: list[Path] = []
        for problem in found:
            path = problem.path
            if whole_sets and path and path[0] in _DATA_SECTIONS:
                path = path[:1]
            removed.append(_remove(rest, path))
        if ("training_set",) in removed:
            rest["training_set"] = copy.deepcopy(_PLACEHOLDER)
        try:
            return Options.model_validate(rest), rest, removed
        except ValidationError:
            continue
    return None, tree, []


def _remove(tree: dict[str, Any], path: Path) -> Path:
    """Delete the option at ``path``; if it is not there, the section it is missing from."""
    node: Any = tree
    for depth, key in enumerate(path[:-1]):
        try:
            node = node[key]
        except (KeyError, IndexError, TypeError):
            return _remove(tree, path[:depth])
    if not path or not isinstance(node, dict):
        return path
    if path[-1] not in node:
        return _remove(tree, path[:-1]) if len(path) > 1 else path
    if len(path) > 1 and path[-2] == "targets":
        node[path[-1]] = {}  # other options may name the target
    else:
        del node[path[-1]]
    return path


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
