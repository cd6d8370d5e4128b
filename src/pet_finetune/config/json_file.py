"""JSON in, a plain dictionary out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pet_finetune.errors import ConfigError

from .yaml_file import neighbours

__all__ = ["read_json"]


def read_json(path: str | Path) -> dict[str, Any]:
    """Read a JSON object from a file.

    Raises:
        ConfigError: if the file cannot be read, is no JSON (with line and column), holds no object,
            or a name twice.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        found = neighbours(Path(path), (".json", ".yaml", ".yml"))
        raise ConfigError(f"{path}: no such file of runs.{found}") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror or error}.") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: is not a text file in UTF-8.") from None

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ConfigError(f"{path}: '{twice}' stands twice in one section. Rename one.")
        return dict(pairs)

    try:
        content = json.loads(text, object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"{path}, line {error.lineno}, column {error.colno}: is no JSON: {error.msg}. A comma "
            "after the last entry and comments are not allowed in JSON."
        ) from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected runs by name, {{...}}, got {type(content).__name__}.")
    return content
