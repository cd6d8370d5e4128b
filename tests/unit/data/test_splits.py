"""Sets are disjoint, seeded, complete, and come back from their JSON file."""

from __future__ import annotations

import json
from itertools import chain

import numpy as np
import pytest
from ase.build import molecule
from ase.io import write

from pet_finetune.config.run_options import Options
from pet_finetune.data.splits import load_splits, make_splits
from pet_finetune.errors import DataError

SETS = ("train", "validation", "test")


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Files of 20 and 7 frames in the current folder."""
    monkeypatch.chdir(tmp_path)
    for name, count in (("train.xyz", 20), ("other.xyz", 7)):
        frames = []
        for k in range(count):
            atoms = molecule("H2O")
            atoms.rattle(0.1, seed=k + count)
            atoms.info["energy"] = float(k)
            frames.append(atoms)
        write(name, frames)
    return tmp_path


def options(**sets) -> Options:
    return Options.model_validate({"training_set": "train.xyz", **sets})


def frames(splits) -> dict[str, list[int]]:
    return {name: [s.index for s in getattr(splits, name)] for name in SETS}


def origins(splits, name) -> set[str]:
    return {s.source for s in getattr(splits, name)}


def test_fractions_are_disjoint_complete_and_sized(files):
    splits = make_splits(options(validation_set=0.1, test_set=0.25), seed=0)
    sets = frames(splits)
    assert {name: len(members) for name, members in sets.items()} == {
        "train": 13, "validation": 2, "test": 5,
    }  # fmt: skip
    assert sorted(chain(*sets.values())) == list(range(20))
    assert all(members == sorted(members) for members in sets.values())


def test_seeded(files):
    chosen = options(validation_set=0.3, test_set=0.3)
    assert frames(make_splits(chosen, 1)) == frames(make_splits(chosen, 1))
    assert frames(make_splits(chosen, 1)) != frames(make_splits(chosen, 2))


def test_validation_does_not_depend_on_the_test_fraction(files):
    one = make_splits(options(validation_set=0.2), seed=3)
    two = make_splits(options(validation_set=0.2, test_set=0.4), seed=3)
    assert frames(one)["validation"] == frames(two)["validation"]


def test_no_validation_and_no_test(files):
    splits = make_splits(options(validation_set=0.0), seed=3)
    assert frames(splits) == {"train": list(range(20)), "validation": [], "test": []}


def test_a_small_fraction_is_at_least_one_structure(files):
    splits = make_splits(options(training_set="other.xyz", validation_set=0.01), seed=3)
    assert len(splits.validation) == 1


def test_files_of_their_own(files):
    splits = make_splits(options(validation_set="other.xyz", test_set=["other.xyz"]), seed=0)
    assert frames(splits)["train"] == list(range(20))
    assert frames(splits)["validation"] == frames(splits)["test"] == list(range(7))
    assert origins(splits, "validation") == {"other.xyz"}


def test_indices_leave_the_training_set(files):
    chosen = options(validation_set={"indices": [5, 3]}, test_set={"indices": [0]})
    sets = frames(make_splits(chosen, seed=0))
    assert sets["validation"] == [5, 3]
    assert sets["test"] == [0]
    assert sets["train"] == [k for k in range(20) if k not in (0, 3, 5)]


def test_indices_from_a_file_and_a_fraction_of_the_rest(files):
    np.savetxt("validation.txt", [7, 8, 9], fmt="%d")
    chosen = options(validation_set={"indices": "validation.txt"}, test_set=0.5)
    sets = frames(make_splits(chosen, seed=0))
    assert sets["validation"] == [7, 8, 9]
    assert len(sets["test"]) == 9
    assert sorted(chain(*sets.values())) == list(range(20))


def test_training_indices(files):
    training = {"systems": "train.xyz", "targets": {"energy": {}}, "indices": [1, 2, 3, 4]}
    sets = frames(make_splits(options(training_set=training, validation_set=0.25), seed=0))
    assert sorted(sets["train"] + sets["validation"]) == [1, 2, 3, 4]
    assert len(sets["validation"]) == 1
    chosen = options(training_set=training, validation_set={"indices": [19]})
    assert frames(make_splits(chosen, seed=0)) == {
        "train": [1, 2, 3, 4], "validation": [19], "test": [],
    }  # fmt: skip


def test_several_training_files_are_split_each(files):
    splits = make_splits(
        options(training_set=["train.xyz", "other.xyz"], validation_set=0.3), seed=0
    )
    sources = [s.source for s in splits.validation]
    assert sources == ["train.xyz"] * 6 + ["other.xyz"] * 2
    assert [(p.file, p.number) for p in splits.parts["train"]] == [
        ("train.xyz", 0),
        ("other.xyz", 1),
    ]


def test_files_too_small_for_their_fractions_are_split_together(files):
    single = [{"systems": "train.xyz", "targets": {"energy": {}}, "indices": [k]}
              for k in range(10)]  # fmt: skip
    other = {"systems": "other.xyz", "targets": {"dipole": {"key": "energy"}}, "indices": [0, 1, 2]}
    chosen = options(training_set=[*single, other], validation_set=0.1, test_set=0.2)
    splits = make_splits(chosen, seed=0)
    numbers = {name: [(s.source, s.index) for s in getattr(splits, name)] for name in SETS}
    # The one of another target is in no set with them, and each target is validated.
    assert {name: len(found) for name, found in numbers.items()} == {
        "train": 8, "validation": 2, "test": 3,
    }  # fmt: skip
    assert len(set(chain(*numbers.values()))) == 13
    assert frames(splits) != frames(make_splits(chosen, seed=1))
    splits.save("splits.json")
    assert frames(load_splits("splits.json", chosen)) == frames(splits)


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        ({"validation_set": 0.5, "test_set": 0.49}, "none is left to train on"),
        ({"validation_set": {"indices": list(range(20))}}, "none is left to train on"),
        ({"validation_set": {"indices": [20]}}, "does not have frame 20"),
        (
            {"validation_set": {"indices": [1, 2]}, "test_set": {"indices": [2, 3]}},
            "both hold frame 2",
        ),
    ],
)
def test_splits_that_cannot_be(files, sets, message):
    with pytest.raises(DataError, match=message):
        make_splits(options(**sets), seed=0)


def test_training_and_validation_indices_overlap(files):
    training = {"systems": "train.xyz", "targets": {"energy": {}}, "indices": [1, 2, 3]}
    with pytest.raises(DataError, match=r"both hold frames 2, 3 of train\.xyz"):
        make_splits(options(training_set=training, validation_set={"indices": [3, 2]}), seed=0)


@pytest.mark.parametrize(
    "sets",
    [
        {"validation_set": 0.2, "test_set": 0.2},
        {"validation_set": {"indices": [9, 4]}, "test_set": "other.xyz"},
        {"training_set": ["train.xyz", "other.xyz"], "validation_set": 0.3},
    ],
)
def test_saved_and_loaded(files, sets):
    splits = make_splits(options(**sets), seed=5)
    splits.save("splits.json")
    again = load_splits("splits.json", options(**sets))
    assert again.parts == splits.parts
    assert frames(again) == frames(splits)
    for name in SETS:
        assert origins(again, name) == origins(splits, name)
    content = json.loads((files / "splits.json").read_text())
    assert content["sets"]["train"]["structures"] == len(splits.train)
    assert [path.name for path in files.glob("*.partial")] == []


def test_changed_data_are_noticed(files):
    chosen = options(validation_set=0.2)
    make_splits(chosen, seed=5).save("splits.json")
    text = (files / "train.xyz").read_text()
    (files / "train.xyz").write_text(text.replace("energy=7.0", "energy=7.5"))
    with pytest.raises(DataError, match=r"set is not the one .*train\.xyz"):
        load_splits("splits.json", chosen)


def test_removed_frames_are_noticed(files):
    chosen = options(validation_set=0.2)
    make_splits(chosen, seed=5).save("splits.json")
    lines = (files / "train.xyz").read_text().splitlines()
    (files / "train.xyz").write_text("\n".join(lines[:-5]) + "\n")
    with pytest.raises(DataError, match=r"cannot be restored.*does not have frame 19"):
        load_splits("splits.json", chosen)


@pytest.mark.parametrize("content", ["", "[1]", '{"format": "x"}', "\x00"])
def test_files_that_are_no_splits(files, content):
    (files / "splits.json").write_text(content)
    with pytest.raises(DataError, match=r"is no JSON|not a JSON object|not a file of splits"):
        load_splits("splits.json", options())


def test_missing_splits_file(files):
    with pytest.raises(DataError, match="does not exist"):
        load_splits("split.json", options())


def test_options_of_another_run(files):
    make_splits(options(validation_set="other.xyz"), seed=5).save("splits.json")
    with pytest.raises(DataError, match="data set 0 of validation_set"):
        load_splits("splits.json", options(validation_set=0.1))


def test_unwritable_place(files):
    splits = make_splits(options(), seed=5)
    with pytest.raises(DataError, match="Cannot write the splits to .*No such file"):
        splits.save(files / "nowhere" / "splits.json")
