"""The comparison of methods writes options that the package accepts; nothing is trained here."""

import numpy as np
import pytest
import yaml
from ase import Atoms
from benchmarks.methods.jobs import Job
from benchmarks.methods.rows import METHODS
from benchmarks.methods.sets import SETS, split

from pet_finetune.config.load import load_options


def job_of(method, data="ethanol"):
    return Job(data, method, 1e-3, seed=7, epochs=20)


def read(job, folder):
    """The options of a run as the package reads them."""
    path = folder / "options.yaml"
    path.write_text(yaml.safe_dump(job.options(folder, folder / "foundation.ckpt")))
    return load_options(path).options


@pytest.mark.parametrize("method", METHODS)
def test_options_of_each_method_are_valid(method, tmp_path):
    options = read(job_of(method), tmp_path)
    assert options.seed == 7
    assert options.training.num_epochs == 20
    assert options.learning_rate() == 1e-3
    assert options.is_finetuning == (method != "scratch")


@pytest.mark.parametrize("data", SETS)
def test_stress_is_learned_where_there_is_some(data, tmp_path):
    options = read(job_of("full", data), tmp_path)
    target = options.training_set[0].targets["energy"]
    assert (target.stress.mode != "auto") == SETS[data].stress


def test_runs_have_names_of_their_own():
    jobs = [Job(d, m, r, s) for d in SETS for m in METHODS for r in (1e-3, 3e-3) for s in (1, 2)]
    assert len({job.name for job in jobs}) == len(jobs)


def test_no_part_has_a_near_copy_of_another():
    positions = np.random.default_rng(0).uniform(0, 5, (12, 4, 3))
    frames = [Atoms("C4", p + shift) for p in positions for shift in (0.0, 0.001 * np.eye(4, 3))]
    parts = split(frames, (12, 8), apart=0.05)
    pairs = [{index // 2 for index in part} for part in parts]
    assert [len(part) for part in parts] == [12, 8]
    assert not pairs[0] & pairs[1]
