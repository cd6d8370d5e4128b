"""Models as upet publishes them: their sizes, and what we predict with such models of metatrain."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from pet_finetune.config.run_options import ModelOptions
from pet_finetune.keys import TargetSpec
from pet_finetune.model.pet import PET

pytest.importorskip("metatrain", reason="metatrain comes with the test extra")
from scripts.upet_shapes import SHAPES, SIZES, differences, hypers, make, structures

#: Of upet 0.3.1's documentation, in millions.
PARAMETERS = {"xs": 4.5, "s": 25.9, "m": 109, "l": 255, "xl": 730}
DIRECT = (
    TargetSpec(
        "non_conservative_forces", "force", "eV/A", "vector", per_atom=True, num_outputs=3
    ),
    TargetSpec(
        "non_conservative_stress", "pressure", "eV/A^3", "tensor", num_outputs=9, per_volume=True
    ),
)  # fmt: skip


@pytest.mark.parametrize("size", PARAMETERS)
def test_the_sizes_are_those_of_upet(size: str) -> None:
    shape = next(shape for shape in SHAPES.values() if shape.size == size and not shape.old)
    options = ModelOptions.model_validate(
        hypers(shape, ModelOptions().model_dump(), SIZES[size][0])
    )
    with torch.device("meta"):
        model = PET(options, range(1, 103), [TargetSpec("energy"), *DIRECT])
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    assert millions == pytest.approx(PARAMETERS[size], rel=0.006)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pet-omat-l", "pet-mad-m", "pet-spice-l", "pet-mad-s-old"])
def test_predictions_are_metatrains(name: str, tmp_path: Path) -> None:
    make(name, tmp_path, torch.float64)
    predicted = json.loads((tmp_path / f"{name}.json").read_text())["predicted"]
    found = differences(tmp_path / f"{name}.ckpt", structures(SHAPES[name]), predicted)
    assert max(found.values()) < 1e-9, found
