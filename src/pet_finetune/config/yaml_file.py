"""YAML in, plain dictionaries out: OmegaConf's reading, overrides and interpolations."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped, unused-ignore]
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import GrammarParseError, OmegaConfBaseException

from pet_finetune.errors import ConfigError


def read_yaml(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
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
    path: str | Path, overrides: Sequence[str] = ()
) -> dict[str, Any] | list[Any]:
    """What :func:`read_yaml` reads, where a list is as good as a section."""
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


def _load(path: str | Path) -> DictConfig | ListConfig:

    try:
        # The reader in C recurses, and a file of nothing but brackets ends the process.
        text = Path(path).read_text(encoding="utf-8")
        if text.count("[") + text.count("{") > 1000:
            _check_depth(text, path)
        config = OmegaConf.load(path)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such options file.{neighbours(Path(path))}") from None
    except OSError as error:
        reason = error.strerror or "is not a file of YAML options"
        raise ConfigError(f"{path}: cannot be read: {reason}.") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: is not a text file in UTF-8.") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}{_yaml_problem(error, Path(path))}") from None
    except GrammarParseError as error:
        raise ConfigError(
            f"{path}: an interpolation cannot be read: {_first_line(error)}. Write ${{name}}."
        ) from None
    except OmegaConfBaseException as error:
        raise ConfigError(f"{path}: {_first_line(error)}.") from None
    if not config:
        raise ConfigError(f"{path}: the file is empty. At least training_set must be given.")
    return config


def _check_depth(text: str, path: str | Path) -> None:
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


def _yaml_problem(error: Exception, path: Path) -> str:
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


def neighbours(path: Path, endings: tuple[str, ...] = (".yaml", ".yml")) -> str:
    """A sentence with the files of such endings that are there instead."""
    try:
        found = sorted(p.name for p in path.parent.iterdir() if p.suffix in endings)
    except OSError:
        return f" The folder {path.parent} does not exist."
    return f" In that folder: {', '.join(found[:8])}." if found else ""


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
