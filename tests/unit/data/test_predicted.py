"""A labelled set and what models say of it, in a file and back."""

from __future__ import annotations

import numpy as np
import pytest

from pet_finetune.data.predicted import Predicted
from pet_finetune.errors import DataError
from reports import predicted
from tiny_data import label, molecules, structures_of


def test_nothing_is_lost_on_the_way_to_a_file(tmp_path):
    made = predicted()
    path = tmp_path / "predictions.npz"
    path.write_bytes(made.to_bytes())
    read = Predicted.read(path)
    assert (read.set_name, read.sources) == (made.set_name, made.sources)
    assert read.same_structures(made)
    assert read.where(3) == made.where(3) == "frame 3 of tiny.xyz"
    assert read.models.keys() == made.models.keys()
    groups = [(read.labels, made.labels), (read.baselines, made.baselines)]
    groups += [(read.models[name], made.models[name]) for name in made.models]
    for ours, theirs in groups:
        assert ours.keys() == theirs.keys()
        for name in ours:
            np.testing.assert_array_equal(ours[name], theirs[name])


def test_a_label_that_a_structure_lacks_is_not_a_number():
    frames = molecules(2)
    frames[1] = label(frames[1], forces=False)
    made = Predicted.of(structures_of(frames), "test")
    forces = made.labels["energy/forces"]
    first = int(made.sizes[0])
    assert np.isfinite(forces[:first]).all()
    assert np.isnan(forces[first:]).all()
    assert forces.shape == (len(made.numbers), 3)
    # Totals are large, and a float32 would lose what is between two of them.
    assert made.labels["energy"].dtype == np.float64


@pytest.mark.parametrize("content", [b"", b"no zip", b"PK\x03\x04 cut"])
def test_a_damaged_file_is_a_clear_error(tmp_path, content):
    path = tmp_path / "predictions.npz"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"predictions\.npz"):
        Predicted.read(path)


def test_a_damaged_character_is_damage(tmp_path):
    path = tmp_path / "predictions.npz"
    path.write_bytes(predicted().to_bytes())
    with np.load(path) as file:
        arrays = dict(file)
    # No character; alone, and in bytes of the other order, NumPy finds that out.
    arrays["sources"] = np.full(1, 0xFFFFFFFF, dtype=np.uint32).view(">U1")
    np.savez(path, **arrays)
    with pytest.raises(DataError, match=r"predictions.npz' holds no predictions.*damaged"):
        Predicted.read(path)
