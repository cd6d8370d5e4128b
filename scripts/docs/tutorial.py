"""Run the commands of docs/tutorial.md, and put their real output and figures into the page.

    python scripts/docs/tutorial.py            # run, change nothing
    python scripts/docs/tutorial.py --write    # and write outputs and figures

A ``console`` block of the page holds one or more commands, each a line that starts with ``$`` (and
those after a backslash), and the output of the last one. A comment before a block says what of the
output the page shows: ``<!-- output: first 20 -->``, ``last 12``, ``from TEXT`` (from the line that
holds the text), or ``none``. A comment ``<!-- figure: run/dimers.svg as tutorial-dimers.svg -->``
names a file that a command has made and the figure of the documentation that it becomes.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
PAGE = REPOSITORY / "docs" / "tutorial.md"
FIGURES = REPOSITORY / "docs" / "figures"
BLOCK = re.compile(r"(?:<!-- output: (?P<shown>.*?) -->\n)?```console\n(?P<text>.*?)```", re.S)
FIGURE = re.compile(r"<!-- figure: (?P<made>\S+) as (?P<name>\S+) -->")
# What differs from run to run and tells a reader nothing.
DATES = re.compile(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d (INFO|WARNING) +", re.M)
#: Where the package lies here, which the page leaves out.
PLACE = re.compile(r"(?<=\$schema=)\S*(?=/pet_finetune/)")
WIDTH = "96"
# The commands of the environment that runs this, whether or not it is on the path.
COMMANDS = 'pet-finetune() { "$PYTHON" -m pet_finetune "$@"; }; ase() { "$PYTHON" -m ase "$@"; }; '


@dataclass(frozen=True)
class Block:
    """Commands of the page and what of their output is shown."""

    commands: list[str]
    shown: str


def blocks(page: str) -> list[Block]:
    """All blocks of a page in their order."""
    return [Block(_commands(m["text"]), m["shown"] or "none") for m in BLOCK.finditer(page)]


def _commands(text: str) -> list[str]:
    """The lines after ``$``, with those that a backslash joins to them."""
    joined = re.sub(r"\\\n\s*", "", text)
    return [line[2:] for line in joined.splitlines() if line.startswith("$ ")]


def run(block: Block, folder: Path) -> str:
    """Run the commands of a block; returns the output of the last one.

    Raises:
        SystemExit: a command failed.
    """
    environment = {**os.environ, "PYTHON": sys.executable, "COLUMNS": WIDTH, "TERM": "dumb"}
    output = ""
    for command in block.commands:
        done = subprocess.run(
            ["bash", "-c", COMMANDS + command],
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        output = PLACE.sub("...", done.stdout)
        if done.returncode:
            raise SystemExit(f"failed: {command}\n{output}")
    return output


def excerpt(output: str, shown: str) -> list[str]:
    """The lines of an output that the page shows."""
    lines = [line.rstrip() for line in DATES.sub("", output).splitlines()]
    word, _, rest = shown.partition(" ")
    if word == "none":
        return []
    if word == "first":
        return lines[: int(rest)]
    if word == "last":
        return lines[-int(rest) :]
    if word == "from":
        return lines[next(i for i, line in enumerate(lines) if rest in line) :]
    raise SystemExit(f"{PAGE.name}: '{shown}' is not one of first N, last N, from TEXT, none.")


def work_folder(parent: Path) -> Path:
    """A folder to run in, inside one that has what the repository ships."""
    for name in ("datasets", "checkpoints"):
        (parent / name).symlink_to(REPOSITORY / name)
    folder = parent / "tutorial"
    folder.mkdir()
    return folder


def run_page(page: str, folder: Path) -> list[str]:
    """Run all blocks; returns the new text of each."""
    texts = []
    for block, match in zip(blocks(page), BLOCK.finditer(page), strict=True):
        output = run(block, folder)
        written = re.match(r"(?:\$ (?:.*\\\n)*.*\n)+", match["text"])
        kept = written[0] if written else ""
        texts.append(kept + "".join(f"{line}\n" for line in excerpt(output, block.shown)))
        print(f"$ {block.commands[-1] if block.commands else ''}", flush=True)
    return texts


def main() -> None:
    """Run the page; with ``--write`` put outputs and figures into the documentation."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    page = PAGE.read_text()
    with tempfile.TemporaryDirectory() as parent:
        folder = work_folder(Path(parent))
        texts = iter(run_page(page, folder))
        if arguments.write:
            for figure in FIGURE.finditer(page):
                shutil.copy(folder / figure["made"], FIGURES / figure["name"])
    if arguments.write:

        def filled(match: re.Match[str]) -> str:
            shown = f"<!-- output: {match['shown']} -->\n" if match["shown"] else ""
            return f"{shown}```console\n{next(texts)}```"

        PAGE.write_text(BLOCK.sub(filled, page))


if __name__ == "__main__":
    main()
