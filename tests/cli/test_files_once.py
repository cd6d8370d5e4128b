"""However often a command needs a file, it is parsed once."""

from __future__ import annotations

import gzip
from collections import Counter
from pathlib import Path

import ase.io
import pytest

from pet_finetune.data import frame_files
from pet_finetune.data.text import Content
from tiny_data import data_section, molecules, options, write_frames, write_options


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each file was parsed."""
    counts: Counter[str] = Counter()
    plain = frame_files._parse

    def count(content: Content, *arguments):
        counts[content.file.name] += 1
        return plain(content, *arguments)

    monkeypatch.setattr(frame_files, "_parse", count)
    frame_files.forget_files()
    yield counts
    frame_files.forget_files()


@pytest.fixture
def data(here: Path) -> None:
    """The same frames in other formats, and a second file."""
    frames = molecules(10)
    (here / "train.xyz.gz").write_bytes(gzip.compress((here / "train.xyz").read_bytes()))
    ase.io.write(here / "train.db", frames)
    write_frames(here / "more.xyz", molecules(6, seed=2))


def once(parsed: Counter[str], *names: str) -> None:
    """Each of these was parsed, and nothing twice; the probe set of forgetting is no file of it."""
    assert {name: count for name, count in parsed.items() if name != "probe.xyz"} == dict.fromkeys(
        names, 1
    )


@pytest.mark.usefixtures("data")
@pytest.mark.parametrize("name", ["train.xyz", "train.xyz.gz", "train.db"])
@pytest.mark.parametrize("more", [[], ["-c", "base.ckpt"]])
def test_inspect(command, parsed, name, more):
    assert command("inspect", name, "--validation", "more.xyz", *more).code in (0, 1)
    once(parsed, name, "more.xyz")


@pytest.mark.usefixtures("data")
@pytest.mark.parametrize("name", ["train.xyz", "train.xyz.gz", "train.db"])
def test_eval(command, parsed, name):
    answer = command("eval", "base.ckpt", name, "more.xyz", "-o", "predicted.xyz")
    assert answer.code == 0, answer.err
    once(parsed, name, "more.xyz")


def sections(name: str) -> dict:
    """Options that name one file in all their sections, and another one twice."""
    parts = [range(2), range(2, 4), range(4, 6)]
    first, second, third = ({**data_section(name), "indices": list(part)} for part in parts)
    other = [{**data_section("more.xyz"), "indices": list(part)} for part in parts[:2]]
    return options(
        training_set=[first, other[0]], validation_set=[second, other[1]], test_set=third
    )


@pytest.mark.usefixtures("data")
@pytest.mark.parametrize("name", ["train.xyz", "train.xyz.gz", "train.db"])
@pytest.mark.parametrize("what", ["train", "inspect", "eval"])
def test_a_file_that_several_sections_name(command, here, parsed, name, what, stop):
    write_options(here / "mine.yaml", sections(name))
    stop(1)
    more = ["-o", "run"] if what == "train" else []
    answer = command(what, "mine.yaml", "-c", "base.ckpt", *more)
    assert answer.code in ((130,) if what == "train" else (0, 1)), answer.err
    once(parsed, name, "more.xyz")


@pytest.mark.parametrize("what", ["train", "inspect"])
def test_fractions_and_labels_of_another_file(command, here, parsed, what, stop):
    write_frames(here / "labels.xyz", molecules(10))
    content = options(validation_set=0.2, test_set=0.2)
    content["training_set"]["targets"]["energy"]["read_from"] = "labels.xyz"
    write_options(here / "mine.yaml", content)
    stop(1)
    more = ["-o", "run"] if what == "train" else []
    assert command(what, "mine.yaml", "-c", "base.ckpt", *more).code in (0, 1, 130)
    once(parsed, "train.xyz", "labels.xyz")
