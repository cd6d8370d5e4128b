"""What messages advise exists: options of the command line and of options files."""

from __future__ import annotations

import argparse
import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import pet_finetune
from pet_finetune.cli import make_parser
from pet_finetune.config import problems
from pet_finetune.config.run_options import Options

PACKAGE = Path(pet_finetune.__file__).parent
_FLAG = re.compile(r"(?<![\w-])--[a-z][a-z-]*")
_SECTIONS = "architecture|training|finetune|training_set|validation_set|test_set|systems|targets"
_PATH = re.compile(rf"(?<![\w./])(?:{_SECTIONS})(?:\.(?:[a-z_]+|<\w+>))+(?![\w(/])")
_WRITTEN = re.compile(r"`([a-z_]+): [^`]*`")
#: Options of other programs that messages name, with what stands before them.
_FOREIGN = ("ase info --formats", "ase --formats", " --revision \0", "\0 --local-dir .")


def messages() -> Iterator[tuple[str, str]]:
    """All text of the package that is no docstring, with its place."""
    for file in sorted(PACKAGE.rglob("*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        nodes = list(ast.walk(tree))
        bodies = [node.body for node in nodes if isinstance(node, documented) and node.body]
        skipped = {id(body[0].value) for body in bodies if isinstance(body[0], ast.Expr)}
        skipped |= {id(p) for node in nodes if isinstance(node, ast.JoinedStr) for p in node.values}
        for node in nodes:
            place = f"{file.relative_to(PACKAGE)}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.JoinedStr):
                yield (
                    place,
                    "".join(p.value if isinstance(p, ast.Constant) else "\0" for p in node.values),
                )
            elif id(node) not in skipped and isinstance(node, ast.Constant):
                yield place, node.value if isinstance(node.value, str) else ""


def flags(parser: argparse.ArgumentParser) -> set[str]:
    """Every option of the command line and of its commands."""
    found: set[str] = set()
    for action in parser._actions:
        found.update(action.option_strings)
        if isinstance(action.choices, dict):
            for command in action.choices.values():
                found |= flags(command)
    return found


def named_flags(text: str) -> list[str]:
    for foreign in _FOREIGN:
        text = text.replace(foreign, "")
    return _FLAG.findall(re.sub(r"var\(--[\w-]+\)", "", text))  # a variable of CSS is no flag


def option_paths() -> list[str]:
    """Every option as a pattern, from the top of the file."""
    return [*problems.option_paths(Options)] + [
        f"{name}.{path}" for name in ("validation_set", "test_set") for path in _of_sets()
    ]


def _of_sets() -> list[str]:
    paths = problems.option_paths(Options)
    return [p.split(".", 1)[1] for p in paths if p.startswith("training_set.")]


def is_option(named: str, paths: list[str]) -> bool:
    """Whether a name is that of an option, from the top or from any section on."""
    own = named.split(".")
    for path in paths:
        parts = path.replace("[]", "").split(".")
        for start in range(len(parts) - len(own) + 1):
            tail = parts[start : start + len(own)]
            same = (a == b or "<" in a + b for a, b in zip(own, tail, strict=True))
            if own[0] == tail[0] and all(same):
                return True
    return False


def test_options_of_the_command_line_in_messages_exist() -> None:
    known = flags(make_parser())
    missing = [
        (place, flag)
        for place, text in messages()
        for flag in named_flags(text)
        if flag not in known
    ]
    assert not missing
    assert {"--energy-key", "--restart", "--no-check"} <= {
        flag for _, text in messages() for flag in named_flags(text)
    }


def test_options_of_files_in_messages_exist() -> None:
    paths = option_paths()
    missing = [
        (place, name)
        for place, text in messages()
        for name in _PATH.findall(text)
        if not is_option(name, paths)
    ]
    assert not missing


def test_keys_that_messages_tell_to_write_exist() -> None:
    known = {part for path in option_paths() for part in path.split(".")}
    missing = sorted(
        {
            (place, name)
            for place, text in messages()
            for name in _WRITTEN.findall(text)
            if name not in known
        }
    )
    assert not missing


@pytest.mark.parametrize(
    ("named", "exists"),
    [
        ("architecture.training.num_epochs", True),
        ("finetune.read_from", True),
        ("targets.energy.key", True),
        ("training_set.targets.<name>.forces", True),
        ("test_set.systems.length_unit", True),
        ("finetune.num_epochs", False),
        ("training.read_from", False),
    ],
)
def test_the_check_can_tell(named: str, exists: bool) -> None:
    assert is_option(named, option_paths()) == exists


def test_flags_are_found() -> None:
    assert named_flags("give --energy-key NAME; `ase info --formats` lists -c") == ["--energy-key"]
