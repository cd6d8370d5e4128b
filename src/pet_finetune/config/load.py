"""Reading an options file: YAML, interpolations, overrides, checks. One error for all problems."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any

import yaml  # type: ignore[import-untyped, unused-ignore]
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import GrammarParseError, OmegaConfBaseException
from pydantic import ValidationError

from pet_finetune.errors import ConfigError

from .contradictions import check
from .data_contradictions import notices
from .dataset import DatasetOptions
from .problems import Path, Problem, config_error, problems_of
from .rewriting import apply_start, rewrite
from .run_options import Options


def read_yaml(path: str | FilePath, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Read a YAML file, apply ``key=value`` overrides, resolve ``${...}`` interpolations.

    Raises:
        ConfigError: if the file cannot be read, is no YAML (with the line), is no section of
            options, or an override or interpolation does not work.
    """
    tree = read_yaml_document(path, overrides)
    if isinstance(tree, list):
        raise ConfigError(f"{path}: expected options such as `training_set: ...`, got a list.")
    return tree


def read_yaml_document(
    path: str | FilePath, overrides: Sequence[str] = ()
) -> dict[str, Any] | list[Any]:
    """YAML file as by :func:`read_yaml`, with a list or a section at the top."""
    config = _load(path)
    problems = [problem for text in overrides if (problem := _override(config, text))]
    if problems:
        listed = "".join(f"\n  {problem}" for problem in problems)
        raise ConfigError(f"Overrides (-r):{listed}", problems)
    try:
        tree = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        where = f"{error.full_key}: " if error.full_key else ""
        raise ConfigError(f"{path}: {where}{_first_line(error)}.") from None
    if isinstance(tree, list):
        return tree
    assert isinstance(tree, dict)
    return {str(key): value for key, value in tree.items()}


def to_yaml(tree: dict[str, Any]) -> str:
    """Plain values as the text of a YAML file."""
    return OmegaConf.to_yaml(OmegaConf.create(tree))


def _load(path: str | FilePath) -> DictConfig | ListConfig:

    try:
        # The reader in C recurses, and a file of nothing but brackets ends the process.
        text = FilePath(path).read_text(encoding="utf-8")
        if re.match(r"\s*\d+\s*\n", text):  # YAML would read all of it, for minutes
            raise ConfigError(
                f"{path}: these are structures (XYZ), not options. Give an options file that names "
                "them (training_set); `pet-finetune inspect FILE --write-options options.yaml` "
                "writes one."
            )
        if text.count("[") + text.count("{") > 1000:
            _check_depth(text, path)
        config = OmegaConf.load(path)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such options file.{neighbours(FilePath(path))}") from None
    except OSError as error:
        reason = error.strerror or "is not a file of YAML options"
        raise ConfigError(f"{path}: cannot be read: {reason}.") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: is not a text file in UTF-8.") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}{_yaml_problem(error, FilePath(path))}") from None
    except GrammarParseError as error:
        raise ConfigError(
            f"{path}: an interpolation cannot be read: {_first_line(error)}. Write ${{name}}."
        ) from None
    except OmegaConfBaseException as error:
        raise ConfigError(f"{path}: {_first_line(error)}.") from None
    if not config:
        raise ConfigError(f"{path}: the file is empty. At least training_set must be given.")
    return config


def _check_depth(text: str, path: str | FilePath) -> None:
    depth = 0
    for letter in text:
        depth += (letter in "[{") - (letter in "]}")
        if depth > 1000:
            raise ConfigError(f"{path}: brackets within brackets, a thousand deep: no options.")


def parse_override(text: str) -> tuple[str, Any]:
    """Name and value of one ``key=value``, the value as YAML reads it.

    Raises:
        ConfigError: if it is none.
    """
    holder = OmegaConf.create({})
    assert isinstance(holder, DictConfig)
    key, equals, value = text.partition("=")
    problem = _override(holder, f"value={value}" if equals and key.strip() else text)
    if problem:
        raise ConfigError(f"Overrides (-r): {problem}", [problem])
    tree = OmegaConf.to_container(holder)
    assert isinstance(tree, dict)
    return key.strip(), tree["value"]


def _override(config: DictConfig | ListConfig, text: str) -> str | None:
    """Apply one override; return what is wrong with it, if anything."""
    key, equals, value = text.partition("=")
    key = key.strip()
    if not equals or not key:
        return f"{text!r}: expected key=value, e.g. architecture.training.num_epochs=5."
    try:
        parsed = OmegaConf.from_dotlist([f"value={value}"])
        OmegaConf.update(config, key, parsed._get_node("value"), force_add=True)
    except yaml.YAMLError:
        return f"{text!r}: the value is no YAML. Quote it if it is text."
    except (OmegaConfBaseException, IndexError, TypeError, ValueError) as error:
        return f"{text!r}: {_first_line(error)}."
    return None


def _yaml_problem(error: Exception, path: FilePath) -> str:
    """Place and cause of a YAML error, continuing a sentence that starts with the file."""
    if not isinstance(error, yaml.MarkedYAMLError):
        return f": is no YAML: {_first_line(error)}."
    mark = error.problem_mark or error.context_mark
    what = error.problem or error.context or "cannot be parsed"
    if mark is None:
        return f": is no YAML: {what}."
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    line = lines[mark.line] if mark.line < len(lines) else ""
    tabbed = "\t" in line[: len(line) - len(line.lstrip())]
    hint = " Indent with spaces, not tabs." if tabbed else ""
    return f", line {mark.line + 1}, column {mark.column + 1}: is no YAML: {what}.{hint}"


def neighbours(path: FilePath, endings: tuple[str, ...] = (".yaml", ".yml")) -> str:
    """A sentence with the files of such endings that are there instead."""
    try:
        found = sorted(p.name for p in path.parent.iterdir() if p.suffix in endings)
    except OSError:
        return f" The folder {path.parent} does not exist."
    return f" In that folder: {', '.join(found[:8])}." if found else ""


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


_DATA_SECTIONS = ("training_set", "validation_set", "test_set")

#: Stands in for a training set that is wrong, so that the rest can be checked.
_PLACEHOLDER = {"systems": {"read_from": "-"}, "targets": {"energy": {}}}

_START: Path = ("architecture", "training", "finetune", "read_from")


@dataclass(frozen=True)
class LoadedOptions:
    """Options with their notices and sources."""

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


def is_evaluation(path: str | FilePath) -> bool:
    """Whether a YAML file holds data sets alone, as ``mtt eval`` takes them.

    Raises:
        ConfigError: the file cannot be read.
    """
    content = read_yaml_document(path)
    return isinstance(content, list) or ("systems" in content and "training_set" not in content)


def load_evaluation(
    path: str | FilePath, overrides: Sequence[str] = ()
) -> tuple[tuple[DatasetOptions, ...], list[str]]:
    """The data sets of an options file of ``mtt eval``, checked, and notices.

    A set without ``targets`` has no labels to compare with: predictions only.

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
    # Whether the model reads charges is not known here.
    raw = {
        "training_set": full if isinstance(content, list) else full[0],
        "architecture": {"model": {"system_conditioning": True}},
    }
    try:
        loaded = parse_options(raw, require_start=False)
    except ConfigError as error:
        raise config_error([_own(line) for line in error.problems], str(path)) from None
    datasets = tuple(
        dataset.model_copy(update={"targets": {}}) if bare else dataset
        for dataset, bare in zip(loaded.options.training_set, unlabelled, strict=True)
    )
    return datasets, [_own(line) for line in loaded.notices]


def _own(line: str) -> str:
    """A line without the name of the section that the sets were put into to be checked."""
    return re.sub(r"training_set(\.(?=\w)|(?=\[))", "", line).replace("training_set", "the set")
