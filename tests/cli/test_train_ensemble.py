"""``finetune.ensemble``: committees trained in one run, stopped and gone on with, and refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from ase.io import read

from pet_finetune import PETCalculator
from pet_finetune.adapters.peft_files import read_adapter
from pet_finetune.checkpoint.opening import load_checkpoint
from pet_finetune.committee.committee_files import load_committee, read_committee
from tiny_data import options, write_options

MEMBERS = 2


def ensemble(**finetune):
    training = {
        "finetune": {"ensemble": MEMBERS, "config": {"rank": 2, "dropout": 0.2}, **finetune}
    }
    return options(training)


def adapters(folder):
    return [read_adapter(Path(folder, f"member_{k}", "adapter")).tensors for k in range(MEMBERS)]


def assert_same_adapters(one, other):
    for ours, theirs in zip(adapters(one), adapters(other), strict=True):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Where the run that was never stopped is kept; made by the first test that needs it."""
    return tmp_path_factory.mktemp("whole") / "run"


@pytest.fixture
def run(whole, here, train):
    """A folder ``run`` of a whole ensemble, and what training it printed."""
    if not whole.exists():
        answer = train(ensemble(), "-c", "base.ckpt")
        (here / "run" / "printed").write_text(answer.out)
        shutil.copytree(here / "run", whole)
    else:
        shutil.copytree(whole, here / "run")
    return here / "run"


def test_an_ensemble_leaves_its_members_and_what_they_say_together(run):
    folders, calibration = read_committee(run)
    assert folders == [run / f"member_{k}" / "adapter" for k in range(MEMBERS)]
    results = json.loads((run / "results.json").read_text())
    assert len(results["members"]) == MEMBERS
    for kind in ("energy", "forces"):
        found = results["calibration"][kind]
        assert found["factor"] == getattr(calibration, kind)
        assert 0.0 <= found["area_after"] <= 0.5
        assert len(found["expected"]) == len(found["before"]) == len(found["after"]) == 100
    forces = results["calibration"]["forces"]
    assert forces["area_after"] < forces["area_before"]
    errors = [member["test"]["energy"]["forces_rmse"] for member in results["members"]]
    # The error of a mean is no larger than the root mean square of the errors.
    mean = results["after"]["test"]["energy"]["forces_rmse"]
    assert mean <= np.sqrt(np.mean(np.square(errors))) * (1 + 1e-6)
    printed = (run / "printed").read_text()
    for words in ("member 1", "a member on average", "committee", "calibration of the spread"):
        assert words in printed
    assert "<svg" in (run / "calibration.svg").read_text()
    assert "calibration of the spread" in (run / "train.log").read_text()


def test_members_differ_in_data_and_seed_and_share_validation(run):
    first, second = (
        load_checkpoint(run / f"member_{k}" / "last.ckpt").provenance["data"] for k in (0, 1)
    )
    assert first["train"]["structures"] == second["train"]["structures"]
    assert first["train"]["fingerprint"] != second["train"]["fingerprint"]
    assert first["validation"] == second["validation"]
    splits = [(run / f"member_{k}" / "splits.json").read_text() for k in range(MEMBERS)]
    assert splits[0] == splits[1]
    one, other = adapters(run)
    assert all(not torch.equal(one[name], other[name]) for name in one)


def test_without_bootstrap_all_are_trained_on_all(here, train):
    train(ensemble(bootstrap=False), "-c", "base.ckpt")
    data = [load_checkpoint(f"run/member_{k}/last.ckpt").provenance["data"] for k in (0, 1)]
    assert data[0] == data[1]
    one, other = (read_adapter(f"run/member_{k}/adapter").tensors for k in (0, 1))
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_the_calculator_opens_the_run(run):
    atoms = read("test.xyz", 0)
    calc = PETCalculator("base.ckpt", adapters="run", device="cpu")
    _, calibration = read_committee(run)
    energies = calc.get_property("energy_ensemble", atoms)
    expected = calibration.energy * np.std(energies, ddof=1)
    assert calc.get_property("energy_uncertainty", atoms) == pytest.approx(expected)


def test_the_table_is_that_of_the_committee(run):
    """The errors of the table, found once more with the calculator."""
    committee = load_committee(load_checkpoint("base.ckpt").model, run)
    errors = []
    for atoms in read("test.xyz", ":"):
        calc = PETCalculator("base.ckpt", adapters="run", device="cpu")
        errors.append(calc.get_property("forces", atoms) - atoms.get_forces())
    results = json.loads((run / "results.json").read_text())
    found = results["after"]["test"]["energy"]["forces_mae"]
    assert found == pytest.approx(np.abs(np.concatenate(errors)).mean(), rel=1e-4)
    assert committee.size == MEMBERS


def test_one_member_by_itself_is_that_of_the_ensemble(run, here, command):
    content = yaml.safe_load((run / "options.yaml").read_text())
    content["architecture"]["training"]["finetune"]["member"] = 1
    write_options(here / "one.yaml", content)
    assert command("train", "one.yaml", "-o", "alone").code == 0
    alone, member = read_adapter("alone/adapter").tensors, adapters(run)[1]
    assert all(torch.equal(alone[name], member[name]) for name in member)


# Three batches an epoch, two epochs a member: within the first member, and at the end of an epoch
# of the second.
@pytest.mark.parametrize("steps", [2, 9])
def test_a_stopped_ensemble_goes_on_exactly(steps, run, command, stop):
    write_options(Path("mine.yaml"), ensemble())
    stop(steps)
    answer = command("train", "mine.yaml", "-c", "base.ckpt", "-o", "part")
    assert answer.code == 130
    assert "--restart part" in answer.err
    assert not Path("part/committee.json").exists()
    finished = [k for k in range(MEMBERS) if Path(f"part/member_{k}/results.json").exists()]
    before = {k: Path(f"part/member_{k}/train.csv").read_text() for k in finished}
    assert command("train", "part/options.yaml", "--restart", "part").code == 0
    assert_same_adapters("part", run)
    # The seconds of a finished member are those of its training: it was not trained again.
    assert {k: Path(f"part/member_{k}/train.csv").read_text() for k in finished} == before
    ours, theirs = (
        json.loads(Path(folder, "results.json").read_text()) for folder in ("part", run)
    )
    assert ours == theirs


def test_going_on_in_another_folder(run, command, stop):
    write_options(Path("mine.yaml"), ensemble())
    stop(8)
    command("train", "mine.yaml", "-c", "base.ckpt", "-o", "part")
    assert command("train", "part/options.yaml", "--restart", "part", "-o", "other").code == 0
    assert_same_adapters("other", run)
    assert not Path("part/committee.json").exists()


def test_a_member_that_left_nothing_to_go_on_from_begins_anew(run, command, stop):
    write_options(Path("mine.yaml"), ensemble())
    stop(9)
    command("train", "mine.yaml", "-c", "base.ckpt", "-o", "part")
    Path("part/member_1/last.ckpt").unlink()
    assert command("train", "part/options.yaml", "--restart", "part").code == 0
    assert_same_adapters("part", run)


def test_refusals(run, here, command):
    def refused(*arguments):
        answer = command("train", *arguments)
        assert answer.code not in (0, 130)
        return answer.err

    write_options(here / "mine.yaml", ensemble())
    write_options(here / "plain.yaml", options())
    content = ensemble(method="lora")
    write_options(here / "no_base.yaml", content)
    start = ("-c", "base.ckpt", "-o")
    assert "holds an ensemble already" in refused("mine.yaml", *start, "run")
    assert command("train", "plain.yaml", *start, "single").code == 0
    words = "of a single model, not a member of an ensemble"
    assert words in refused("run/options.yaml", "--restart", "single")
    words = "is of member 1 of an ensemble with bootstrap: true"
    assert words in refused("plain.yaml", "--restart", "run/member_1")
    assert "needs its foundation to the end" in refused("no_base.yaml", "--restart", "run")
