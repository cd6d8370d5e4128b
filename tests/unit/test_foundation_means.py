"""``scripts/foundation/symmetrize.py``: a model's own means as labels."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import ase.io
import numpy as np
import pytest
import torch

from models import crystal, ethanol, random_potential
from pet_finetune import PETCalculator
from pet_finetune.checkpoint.native import save_checkpoint


@pytest.fixture
def symmetrize(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., None]:
    """Run the script on ``structures.xyz`` with a model of random weights."""
    monkeypatch.chdir(tmp_path)
    save_checkpoint("model.ckpt", random_potential(dtype=torch.float32))
    script = repository / "scripts" / "foundation" / "symmetrize.py"

    def run(*options: str) -> None:
        given = ["symmetrize.py", "model.ckpt", "structures.xyz", "means.xyz", *options]
        monkeypatch.setattr(sys, "argv", given)
        runpy.run_path(str(script), run_name="__main__")

    return run


def test_labels_are_the_calculators_means_in_the_order_of_the_file(symmetrize) -> None:
    frames = [crystal(), ethanol(), ethanol()[:2], crystal(), ethanol()[3:]]
    ase.io.write("structures.xyz", frames)
    symmetrize("--every", "2", "--orientations", "12")
    found = ase.io.read("means.xyz", ":")
    assert [len(atoms) for atoms in found] == [len(atoms) for atoms in frames[::2]]
    for atoms, labelled in zip(frames[::2], found, strict=True):
        atoms.calc = PETCalculator("model.ckpt", dtype="float32", orientations=12)
        assert labelled.get_potential_energy() == pytest.approx(atoms.get_potential_energy())
        np.testing.assert_allclose(labelled.get_forces(), atoms.get_forces(), atol=1e-4)


def test_what_is_in_the_file_stays(symmetrize, capsys: pytest.CaptureFixture[str]) -> None:
    ase.io.write("structures.xyz", [ethanol()] * 2)
    symmetrize()
    kept = Path("means.xyz").read_bytes()
    capsys.readouterr()
    symmetrize()
    assert capsys.readouterr().out == ""
    assert Path("means.xyz").read_bytes() == kept
    ase.io.write("structures.xyz", [ethanol()] * 3)
    with pytest.raises(SystemExit):
        symmetrize()
    assert "ends within a part: remove it and begin again" in capsys.readouterr().err
