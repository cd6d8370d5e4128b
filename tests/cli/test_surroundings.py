"""Commands in surroundings that are not the usual ones: torch's modes, homes, caches, users."""

from __future__ import annotations

from pathlib import Path

import ase.io
import numpy as np
import pytest
import torch

from models import ethanol


@pytest.mark.slow
def test_commands_compute_the_same_in_inference_mode(here: Path, command):
    """A notebook calls what the commands call, maybe inside ``torch.inference_mode()``."""
    ase.io.write("ethanol.xyz", ethanol())

    def forces(folder: str) -> list[np.ndarray]:
        model = f"{folder}/best_model.ckpt"
        for words in (
            ("train", "options.yaml", "-o", folder),
            ("eval", model, "test.xyz", "-o", f"{folder}/predicted.xyz"),
            ("md", model, "ethanol.xyz", "-o", f"{folder}/md", "--steps", 4, "--seed", 1),
        ):
            answer = command(*words)
            assert answer.code == 0, answer.err
        files = (f"{folder}/predicted.xyz", f"{folder}/md/trajectory.xyz")
        return [frame.get_forces() for file in files for frame in ase.io.read(file, ":")]

    expected = forces("outside")
    with torch.inference_mode():
        found = forces("inside")
        assert command("inspect", "train.xyz", "-c", "base.ckpt").code == 0
    assert len(found) == len(expected) > 4
    for inside, outside in zip(found, expected, strict=True):
        np.testing.assert_allclose(inside, outside, atol=1e-4)
