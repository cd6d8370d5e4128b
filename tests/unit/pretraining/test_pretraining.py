"""Continued pre-training: exploring, labelling, training, and going on with it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk
from ase.calculators.calculator import Calculator
from ase.calculators.emt import EMT
from ase.calculators.lj import LennardJones

from logs import logging_as_it_was
from models import ethanol, random_potential
from pet_finetune import installation
from pet_finetune.calculator import PETCalculator
from pet_finetune.checkpoint.native import save_checkpoint
from pet_finetune.checkpoint.opening import load_checkpoint
from pet_finetune.config.finetune import PretrainOptions
from pet_finetune.config.problems import checked_section
from pet_finetune.data.frame_files import read_frames
from pet_finetune.errors import ConfigError, DataError, RunError, SpeciesError
from pet_finetune.pretraining.exploration import NAME, Task, Teacher, explore, tasks_of, teacher_of
from pet_finetune.pretraining.stages import DROPPED, PretrainResult, Work, pretrain_model

#: For import by path.
module = __name__


class Stubborn(Calculator):
    """Lennard-Jones that stops once, when it has computed some frames."""

    implemented_properties = ["energy", "forces"]  # noqa: RUF012
    left = 10**9

    def calculate(self, atoms=None, properties=None, system_changes=None) -> None:
        Stubborn.left -= 1
        if Stubborn.left == 0:
            raise KeyboardInterrupt
        super().calculate(atoms, properties, system_changes)
        self.results = LennardJonesOf(atoms)


def LennardJonesOf(atoms: Atoms) -> dict:
    copy = Atoms(atoms.numbers, atoms.positions, calculator=LennardJones(sigma=0.8, epsilon=0.5))
    return {"energy": copy.get_potential_energy(), "forces": copy.get_forces()}


@pytest.fixture(autouse=True)
def _logging():
    with logging_as_it_was():
        yield


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base") / "base.ckpt"
    model = random_potential(dtype=torch.float32)
    model.scale.set("energy", 0.02)
    save_checkpoint(path, model)
    return path


def moved(count: int) -> list[Atoms]:
    frames = [ethanol() for _ in range(count)]
    for number, atoms in enumerate(frames):
        atoms.rattle(0.03, seed=number)
    return frames


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"n": 3}, "n: expected an integer of at least 20, got 3"),
        ({"temperatures": ()}, "temperatures: expected a positive"),
        ({"max_force": -1.0}, "max_force: expected a positive number"),
    ],
)
def test_settings_that_cannot_be(given, words) -> None:
    with pytest.raises(ConfigError, match=words):
        checked_section(PretrainOptions, given, "pretrain")


def test_pieces_are_made_once(tmp_path: Path) -> None:
    asked = []

    def make(item: int) -> list[Atoms]:
        asked.append(item)
        return [Atoms("H", [[item, 0, 0]], info={NAME: str(item)})]

    for _ in range(2):
        work = Work(tmp_path, PretrainOptions(), {"structures": "a"})
        frames = work.pieces("some", "making", [4, 5], make)
        assert [atoms.positions[0, 0] for atoms in frames] == [4, 5]
        assert [atoms.info[NAME] for atoms in frames] == ["4", "5"]
    assert asked == [4, 5]
    (tmp_path / "some" / "00001.db").write_bytes(b"")
    with pytest.raises(DataError, match="00001.db is empty.*Remove this file: it is made again"):
        work.pieces("some", "making", [4, 5], make)


def test_a_folder_of_other_settings_is_refused(tmp_path: Path) -> None:
    Work(tmp_path, PretrainOptions(n=100), {"structures": "a"})
    with pytest.raises(RunError, match="n: 100 -> 200"):
        Work(tmp_path, PretrainOptions(n=200), {"structures": "a"})


def test_a_damaged_record_is_named(tmp_path: Path) -> None:
    (tmp_path / "pretrain.json").write_text("{")
    with pytest.raises(DataError, match=r"pretrain\.json' is damaged"):
        Work(tmp_path, PretrainOptions(), {})


def test_where_a_stage_is_stopped_time_counts_and_the_way_on_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    work = Work(tmp_path, PretrainOptions(), {})
    with pytest.raises(KeyboardInterrupt), work.stage("label"):
        raise KeyboardInterrupt
    found = json.loads((tmp_path / "pretrain.json").read_text())
    assert found["seconds"]["label"]["wall"] >= 0
    assert f"stays in {tmp_path}: the same command goes on" in caplog.text


@pytest.mark.parametrize("n", [60, 200, 2000])
def test_about_as_many_frames_are_planned_as_are_wanted(n: int) -> None:
    tasks = tasks_of(moved(4), PretrainOptions(n=n))
    assert sum(task.count for task in tasks) == pytest.approx(n, rel=0.2)
    assert {task.kind for task in tasks} == {"given", "dynamics", "displaced", "pairs"}
    assert {task.temperature for task in tasks if task.kind == "dynamics"} == {300, 600}


def test_nothing_is_explored_where_enough_frames_are_given() -> None:
    tasks = tasks_of(moved(30), PretrainOptions(n=30))
    assert [(task.kind, task.start, task.count) for task in tasks] == [
        ("given", 0, 25),
        ("given", 25, 5),
        ("pairs", 0, 0),
    ]


@pytest.mark.parametrize(
    "task",
    [
        Task("given", 2, count=2),
        Task("dynamics", 3, start=1, count=2, temperature=300.0),
        Task("displaced", 4, start=1, count=2),
        Task("pairs", 5),
    ],
    ids=lambda task: task.kind,
)
def test_a_task_gives_the_same_frames_again(task: Task, base: Path) -> None:
    settings = PretrainOptions(max_force=1e3, max_energy=1e3)
    one, two = (explore(task, moved(2), PETCalculator(base), settings) for _ in range(2))
    assert len(one) == (task.count or 84)
    assert len({atoms.info[NAME] for atoms in one}) == len(one)
    assert not any(DROPPED in atoms.info for atoms in one)
    for first, second in zip(one, two, strict=True):
        assert np.allclose(first.positions, second.positions, atol=1e-6)
    if task.kind != "pairs":
        assert not np.allclose(one[0].positions, one[1].positions, atol=1e-3)


def test_cells_are_strained(base: Path) -> None:
    start = bulk("Si", cubic=True)
    frames = explore(Task("displaced", 0, count=3), [start], PETCalculator(base), PretrainOptions())
    assert len({round(atoms.get_volume(), 3) for atoms in frames}) == 3


def reasons(frames: list[Atoms], start: Atoms, base: Path, **settings) -> list[str]:
    found = explore(frames, [start], PETCalculator(base), PretrainOptions(**settings))
    return [atoms.info.get(DROPPED, "") for atoms in found]


def test_what_leaves_the_sane_region_is_named(base: Path) -> None:
    task = Task("displaced", 0, count=2)
    assert reasons(task, ethanol(), base, max_force=1e-6) == ["force too large"] * 2
    assert reasons(task, ethanol(), base, max_energy=1e-12, max_force=1e3).count("") < 2
    close = Atoms("CHH", [[0, 0, 0], [0.05, 0, 0], [0, 0, 1.1]])
    apart = Atoms("CHH", [[0, 0, 0], [1.1, 0, 0], [0, 0, 4.0]])
    free = {"max_force": 1e9, "max_energy": 1e9}
    assert "atoms too close" in reasons(task, close, base, **free)
    assert reasons(task, apart, base, **free) == ["flown apart"] * 2


def test_dynamics_ends_where_it_breaks(base: Path) -> None:
    task = Task("dynamics", 0, count=5, temperature=300.0)
    assert reasons(task, ethanol(), base, max_force=1e-6) == ["force too large"]


def test_a_teacher_that_is_none() -> None:
    with pytest.raises(ConfigError, match=r"'gfn3' is not one of .* Did you mean 'gfn2'"):
        teacher_of("gfn3")
    with pytest.raises(ConfigError, match="has no 'EMTT'"):
        teacher_of("ase.calculators.emt:EMTT")
    with pytest.raises(ConfigError, match="cannot be imported"):
        teacher_of("no_such_module:EMT")
    with pytest.raises(ConfigError, match=r"cannot be made \(TypeError: "):
        teacher_of("os:system")
    with pytest.raises(ConfigError, match="no ASE calculator"):
        teacher_of("builtins:dict")


def test_tblite_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installation, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"GFN2-xTB needs the library tblite.*\[xtb\]"):
        teacher_of("gfn2")


def test_a_calculator_by_its_path() -> None:
    atoms = bulk("Cu") * (2, 2, 2)
    atoms.rattle(0.1, seed=0)
    found = teacher_of("ase.calculators.emt:EMT").label(atoms, 100.0)
    atoms.calc = EMT()
    assert found.get_potential_energy() == pytest.approx(atoms.get_potential_energy())
    assert np.allclose(found.get_forces(), atoms.get_forces())
    assert np.allclose(found.get_stress(), atoms.get_stress())


def test_what_a_teacher_cannot_label_is_named(base: Path) -> None:
    emt = teacher_of("ase.calculators.emt:EMT")
    silicon = bulk("Si", cubic=True)
    assert emt.label(silicon, 100.0).info[DROPPED].startswith("not computed (NotImplementedError")
    assert emt.label(ethanol(), 1e-6).info[DROPPED] == "force too large"
    model = teacher_of(str(base))
    assert model.label(bulk("Cu"), 100.0).info[DROPPED] == "element not known: Cu"
    assert DROPPED not in model.label(ethanol(), 1e6).info


def test_low_cells_are_repeated_and_one_copy_is_given_back() -> None:
    atoms = bulk("Cu", cubic=True)
    atoms.rattle(0.1, seed=0)
    seen = []

    def calculator(whole: Atoms) -> EMT:
        seen.append(len(whole))
        return EMT()

    plain = Teacher("EMT", calculator).label(atoms, 100.0)
    repeated = Teacher("EMT", calculator, least_height=6.0).label(atoms, 100.0)
    assert seen == [4, 32]
    assert repeated.get_potential_energy() == pytest.approx(plain.get_potential_energy())
    assert np.allclose(repeated.get_forces(), plain.get_forces())
    assert np.allclose(repeated.get_stress(), plain.get_stress())


def test_tight_binding() -> None:
    pytest.importorskip("tblite")
    found = teacher_of("gfn2").label(ethanol(), 100.0)
    assert found.get_potential_energy() == pytest.approx(-310.0, abs=10.0)
    radical = teacher_of("gfn1").label(Atoms("CH", [[0, 0, 0], [0, 0, 1.1]]), 100.0)
    assert DROPPED not in radical.info
    one, three = (Atoms("O2", [[0, 0, 0], [0, 0, 1.2]], info={"spin": s}) for s in (1, 3))
    singlet, triplet = (teacher_of("gfn2").label(a, 100.0) for a in (one, three))
    assert abs(triplet.get_potential_energy() - singlet.get_potential_energy()) > 0.05
    assert "element not known: Fr" in teacher_of("gfn2").label(Atoms("Fr"), 1.0).info[DROPPED]


def few(**settings) -> PretrainOptions:
    given = {
        "n": 30,
        "epochs": 4,
        "learning_rate": 5e-3,
        "max_force": 1e3,
        "max_energy": 1e3,
        "temperatures": (300.0,),
    }
    return PretrainOptions(**{"teacher": f"{module}:Stubborn", **given, **settings})


@pytest.fixture(scope="module")
def whole(base: Path, tmp_path_factory: pytest.TempPathFactory) -> PretrainResult:
    """A run that nothing interrupted."""
    with logging_as_it_was():
        output = tmp_path_factory.mktemp("whole") / "pretrained.ckpt"
        return pretrain_model(base, moved(3), output, few())


@pytest.mark.slow
def test_from_structures_to_a_checkpoint(base: Path, whole: PretrainResult) -> None:
    result, output = whole, whole.checkpoint
    made = load_checkpoint(output)
    assert list(made.model.targets) == ["energy"]
    learned = made.provenance["pretraining"]
    assert learned["teacher"] == f"{module}:Stubborn"
    assert learned["gain"].startswith("held-out energy")
    assert learned["seconds"] > 0
    assert sum(result.frames.values()) >= 20
    start = load_checkpoint(base).model.parameters()
    pairs = list(zip(start, made.model.parameters(), strict=True))
    assert sum(not torch.equal(one, two) for one, two in pairs) > len(pairs) / 2
    held_out = read_frames(output.with_suffix(".work") / "test.db")
    off = [PETCalculator(output).get_forces(a) - a.get_forces() for a in held_out]
    error = np.abs(np.concatenate(off)).mean()
    assert result.after["energy"]["forces_mae"] == pytest.approx(error, rel=1e-3)
    assert set(result.seconds) == {"explore", "label", "train"}
    with pytest.raises(DataError, match="exists and is not overwritten"):
        pretrain_model(base, moved(3), output, few())


@pytest.mark.slow
def test_interrupted_while_labelling_it_goes_on_to_the_same_end(
    base: Path, whole: PretrainResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Stubborn, "left", 25)  # the first piece of twenty is done
    with pytest.raises(KeyboardInterrupt):
        pretrain_model(base, moved(3), tmp_path / "two.ckpt", few())
    assert not (tmp_path / "two.ckpt").exists()
    made = sorted(path.name for path in (tmp_path / "two.work/labelled").iterdir())
    assert made == ["00000.db"]
    monkeypatch.setattr(Stubborn, "left", 10**9)
    again = pretrain_model(base, moved(3), tmp_path / "two.ckpt", few())
    for one, two in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.allclose(one, two, atol=1e-5)


def test_none_left_says_what_to_do(base: Path, tmp_path: Path) -> None:
    settings = few(teacher="ase.calculators.emt:EMT")
    frames = [bulk("Si", cubic=True) * (2, 1, 1)]
    with pytest.raises(DataError, match=r"EMT could label .*NotImplementedError.*--teacher"):
        pretrain_model(base, frames, tmp_path / "out.ckpt", settings)


def test_structures_the_foundation_does_not_know(base: Path, tmp_path: Path) -> None:
    with pytest.raises(SpeciesError, match=r"structure 1: .*does not know Cu"):
        pretrain_model(base, [ethanol(), bulk("Cu")], tmp_path / "out.ckpt", few())
