"""What a run writes as text, broken in every way: an error of ours that names the file, or none.

``DAMAGED_FILES=1500 pytest tests/unit/test_broken_records.py`` tries as many of each kind.
"""

from __future__ import annotations

import copy
import json
import os
import random
import shutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from pet_finetune.adapters.peft_files import read_adapter
from pet_finetune.committee.committee import Calibration
from pet_finetune.committee.committee_files import read_committee, write_committee
from pet_finetune.config.load import load_options
from pet_finetune.config.named_run_options import NamedRun
from pet_finetune.data.splits import load_splits
from pet_finetune.errors import PetFinetuneError
from pet_finetune.report import figures
from pet_finetune.report.report_file import write_report
from pet_finetune.runs import newest_run
from pet_finetune.training.compare_runs import summarize
from pet_finetune.training.run_files import RunFiles
from unit.test_damage import mutated

#: Of those that write a report each time, a few of many.
COUNT, FEWER = int(os.environ.get("DAMAGED_FILES", "60")), 4
FIXTURE = Path(__file__).parents[1] / "fixtures" / "run-before-features"
ODD = (
    None,
    True,
    -1,
    0,
    1e400,
    float("nan"),
    3.5,
    "",
    "x",
    "1",
    [],
    {},
    [1, 2],
    {"a": 1},
    "\udc80",
)
NO_FILES = (b"", b"null", b"[]", b"3", b"[" * 100_000, b'{"a":' * 5000, b"\xff\xfe", bytes(99))
RESULTS = {
    "before": {"test": {"energy": {"energy_mae": 0.01, "forces_mae": 0.2}}},
    "after": {
        "validation": {"energy": {"energy_mae": 0.004, "forces_mae": 0.1}},
        "test": {"energy": {"energy_mae": 0.005, "forces_mae": 0.1, "forces_rmse": 0.2}},
        "retention": {"energy": {"energy_mae": 0.001, "forces_mae": 0.02}},
    },
    "parameters": {"trainable": 100, "total": 1000},
    "dimers": {"H-O": "repulsive"},
    "best_epoch": 1,
}
DIMERS = "pair,distance,before,after\n" + "".join(
    f"H-O,{0.5 + 0.1 * k},{3 - k},{2 - k}\n" for k in range(5)
)


def places(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where something stands in a nested value."""
    children: Any = value.items() if isinstance(value, dict) else ()
    if isinstance(value, list):
        children = list(enumerate(value))[:3]
    for key, child in children:
        yield (*place, key)
        yield from places(child, (*place, key))


def changed(value: Any, generator: random.Random) -> Any:
    """A nested value with entries that are gone, of another type or of another name."""
    value = copy.deepcopy(value)
    for _ in range(generator.randint(1, 2)):
        *path, last = generator.choice(list(places(value)) or [("a",)])
        inner = value
        for key in path:
            inner = inner[key]
        how = generator.randrange(3)
        if how == 0 and last in (inner if isinstance(inner, dict) else ()):
            del inner[last]
        elif how == 1 and isinstance(inner, dict):
            inner[str(generator.choice(ODD))] = inner.pop(last, None)
        else:
            inner[last] = copy.deepcopy(generator.choice(ODD))
    return value


def broken(data: bytes, generator: random.Random, file: Path) -> bytes:
    """The content of a file, broken: its structure, its bytes, its encoding, or all of it."""
    how = generator.random()
    if how < 0.1:
        return generator.choice(NO_FILES)
    if how < 0.2:
        return data.decode().encode(generator.choice(["utf-16", "utf-32", "latin-1"]), "replace")
    if how < 0.4:
        return mutated(data, generator)
    if file.suffix == ".csv":
        rows = [line.split(",") for line in data.decode().splitlines()]
        row = generator.choice(rows)
        row[generator.randrange(len(row))] = str(generator.choice(["", "x", "nan", "1e999", '"']))
        rows.insert(generator.randrange(len(rows)), list(generator.choice(rows)))
        generator.choice(rows).append("7")
        return "\n".join(",".join(row) for row in rows).encode()
    if file.suffix == ".yaml":
        text: str = yaml.safe_dump(changed(yaml.safe_load(data), generator))
    else:
        content = changed(json.loads(data), generator)
        text = json.dumps({k: v for k, v in content.items() if k != "digest"})
    return text.encode("utf-8", "surrogatepass")


@dataclass(frozen=True)
class Kind:
    """A file of a run, who reads it, and whether damage stops the reader or is only warned of."""

    file: str
    read: Callable[[], object]
    stops: bool = True


def splits() -> object:
    return load_splits("run/splits.json", load_options("whole.yaml").options)


def report() -> object:
    return write_report("run", "page.html")


def summary() -> object:
    return summarize(NamedRun("a", {}, load_options("whole.yaml"), Path("run")))


KINDS = {
    "options": Kind("run/options.yaml", lambda: load_options("run/options.yaml")),
    "splits": Kind("run/splits.json", splits),
    "adapter": Kind("run/adapter/adapter_config.json", lambda: read_adapter("run/adapter")),
    "committee": Kind("run/committee.json", lambda: read_committee("run")),
    "run.json": Kind("run/run.json", lambda: RunFiles(Path("run")).tell({"a": 1}), False),
    "run.json, newest": Kind("run/run.json", lambda: newest_run(Path(), "last.ckpt"), False),
    "run.json, report": Kind("run/run.json", report, False),
    "results, report": Kind("run/results.json", report, False),
    "results, summary": Kind("run/results.json", summary, False),
    "table, report": Kind("run/train.csv", report, False),
    "table, summary": Kind("run/train.csv", summary, False),
    "table, resumed": Kind(
        "run/train.csv", lambda: RunFiles(Path("run")).drop_rows_after(1), False
    ),
    "dimers, report": Kind("run/dimers.csv", report, False),
    "options, report": Kind("run/options.yaml", report, False),
}


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with a run, all of whose files are there."""
    shutil.copytree(FIXTURE, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(figures, "available", lambda: False)
    Path("run/results.json").write_text(json.dumps(RESULTS))
    Path("run/dimers.csv").write_text(DIMERS)
    write_committee("run", ["member_0", "member_1"], Calibration())
    shutil.copy("run/options.yaml", "whole.yaml")
    return tmp_path


@pytest.mark.parametrize("name", KINDS)
def test_no_damage_escapes_as_the_error_of_a_library(here, name, capsys):
    kind, generator, refused = KINDS[name], random.Random(3), 0
    file = here / kind.file
    data = file.read_bytes()
    kind.read()  # whole, it is read
    escaped, unnamed = [], []
    count = COUNT // FEWER if kind.read is report else COUNT
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(count):
            file.write_bytes(broken(data, generator, file))
            try:
                kind.read()
            except PetFinetuneError as error:
                refused += 1
                unnamed += [] if file.name in str(error) or "adapter" in str(error) else [error]
            except Exception as error:  # noqa: BLE001 - what this test looks for
                escaped.append(repr(error)[:100])
            file.write_bytes(data)
    with capsys.disabled():
        if COUNT > 60:
            print(f"\n{name}: {refused} refused of {count}, {len(escaped)} escaped")
    assert escaped == []
    assert unnamed == []
    assert (refused > COUNT / 8) == kind.stops


def test_the_file_that_breaks_a_report_is_named_and_left_out(here, caplog):
    content = json.loads(Path("run/run.json").read_text())
    Path("run/run.json").write_text(json.dumps({**content, "versions": 3.5}))
    write_report("run", "page.html")
    assert "0.1" in Path("page.html").read_text()
    assert "damaged and left out of the report: 'run/run.json'" in caplog.text


def test_a_damaged_table_is_put_aside_and_the_run_goes_on(here, caplog):
    Path("run/train.csv").write_bytes(b"\xff\xfe\x00")
    RunFiles(Path("run")).drop_rows_after(1)
    assert not Path("run/train.csv").exists()
    assert Path("run/train.csv.damaged").read_bytes() == b"\xff\xfe\x00"
    assert "is damaged" in caplog.text
