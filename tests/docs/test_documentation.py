"""What the documentation says must be what the code does."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import yaml

from pet_finetune.cli import make_parser
from pet_finetune.config.load import load_options

REPOSITORY = Path(__file__).resolve().parents[2]
PAGES = [*sorted((REPOSITORY / "docs").glob("*.md")), REPOSITORY / "README.md"]

# The least a file of options must say; what a page shows is laid over it.
MINIMAL = {
    "architecture": {"name": "pet", "training": {"finetune": {"method": "lora"}}},
    "training_set": {
        "systems": {"read_from": "structures.xyz", "length_unit": "angstrom"},
        "targets": {"energy": {"key": "energy", "unit": "eV"}},
    },
    "validation_set": 0.1,
    "test_set": 0.1,
}


def yaml_blocks() -> Iterator[tuple[str, str]]:
    """Each YAML block of each page, with a name for the test's report."""
    for page in PAGES:
        if not page.is_file() or page.name == "options.md":
            continue
        blocks = re.findall(r"^```yaml\n(.*?)^```", page.read_text("utf-8"), re.S | re.M)
        for number, block in enumerate(blocks, 1):
            yield f"{page.name}-{number}", block


def overlay(base: dict, top: dict) -> dict:
    """``top`` over ``base``, section by section."""
    merged = dict(base)
    for key, value in top.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = overlay(merged[key], value) if both else value
    return merged


@pytest.mark.parametrize("block", [pytest.param(b, id=name) for name, b in yaml_blocks()])
def test_options_shown_are_accepted(
    block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shown = yaml.safe_load(block)
    # A page that names targets names all of them.
    base = {**MINIMAL, "training_set": {}} if "training_set" in shown else MINIMAL
    path = tmp_path / "options.yaml"
    path.write_text(yaml.safe_dump(overlay(base, shown)))
    three_files = "MODEL_TO_START_WITH" in block
    loaded = load_options(path, checkpoint=None if three_files else "foundation.ckpt")
    assert loaded.options.is_finetuning
    older = three_files or "LORA_RANK" in block
    assert [("older spelling" in notice) for notice in loaded.notices] == [True] * 3 * older


def commands() -> list[str]:
    """The commands of ours that the pages show."""
    pages = [page.read_text("utf-8") for page in PAGES if page.is_file()]
    pages = [re.sub(r"\\\n\s*", "", page) for page in pages]  # a line goes on after a backslash
    shown = (re.findall(r"^\$ pet-finetune (.*)$", page, re.M) for page in pages)
    return sorted({line for lines in shown for line in lines})


@pytest.mark.parametrize("line", commands())
def test_commands_shown_are_understood(line: str) -> None:
    assert make_parser().parse_args(shlex.split(line.partition(" > ")[0], comments=True)).run


def test_shipped_options_are_accepted_as_they_stand() -> None:
    loaded = load_options(REPOSITORY / "options.yaml")
    assert loaded.options.is_finetuning
    assert not loaded.notices


@cache
def strings_of_the_package() -> str:
    """All text constants in the package, adjacent literals joined as Python joins them."""
    texts = []
    for path in sorted((REPOSITORY / "src").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return "\n".join(texts)


def documented_messages() -> list[str]:
    """The messages that errors.md explains, in backticks at the start of its table rows, and
    those among the symptoms of troubleshooting.md.
    """
    docs = REPOSITORY / "docs"
    table = re.findall(r"^\| `([^`]+)` \|", (docs / "errors.md").read_text("utf-8"), re.M)
    symptoms = re.findall(r"\*\*`([^`]+)`\*\*", (docs / "troubleshooting.md").read_text("utf-8"))
    return [*table, *symptoms]


@pytest.mark.parametrize("message", documented_messages())
def test_messages_explained_exist(message: str) -> None:
    """Everything between the dots (the parts that vary) stands in the code word for word."""
    fixed = [part.strip() for part in message.split("…")]
    missing = [part for part in fixed if part and part not in strings_of_the_package()]
    assert not missing


def test_dependencies_are_explained() -> None:
    """Each library that pyproject.toml asks for has its row."""
    project = (REPOSITORY / "pyproject.toml").read_text("utf-8")
    section = project.split("\ndependencies = [", 1)[1].split("[project.scripts]", 1)[0]
    asked = set(re.findall(r'"([a-z][a-z-]*)[>=]', section))
    page = (REPOSITORY / "docs" / "dependencies.md").read_text("utf-8")
    explained = set(re.findall(r"[a-z][a-z-]+", page))
    assert {"torch", "vesin", "sphinx"} <= asked
    assert asked <= explained


def layers_of_the_map(text: str) -> list[set[str]]:
    """The modules of each row of the map in CONTRIBUTING.md, from the top."""
    rows = re.findall(r"^\| \d+ \| (`[^|]*`) \|", text, re.M)
    return [set(re.findall(r"`(\w+)`", row)) for row in rows]


def layers_of_the_contract(text: str) -> list[set[str]]:
    """The same of the import contract in pyproject.toml."""
    (block,) = re.findall(r"^layers = \[\n(.*?)^\]", text, re.S | re.M)
    return [set(re.findall(r"\w+", line)) for line in block.splitlines()]


def test_the_map_of_the_code_is_the_import_contract() -> None:
    text = (REPOSITORY / "CONTRIBUTING.md").read_text("utf-8")
    contract = layers_of_the_contract((REPOSITORY / "pyproject.toml").read_text("utf-8"))
    assert layers_of_the_map(text) == contract
    assert layers_of_the_map(text.replace("| `runs` |", "| `training` |")) != contract


@pytest.mark.parametrize("page", ["docs/where-changes-go.md", "CONTRIBUTING.md"])
def test_files_of_the_code_that_a_page_names_are_there(page: str) -> None:
    text = (REPOSITORY / page).read_text("utf-8")
    named = set(re.findall(r"`([\w./]+(?:\.py|/))`", text))
    places = [REPOSITORY, REPOSITORY / "src" / "pet_finetune"]
    missing = [name for name in named if not any((place / name).exists() for place in places)]
    assert named
    assert not missing
