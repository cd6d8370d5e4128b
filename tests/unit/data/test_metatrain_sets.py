"""metatrain's memory-mapped folder and its zip, written by metatrain, read as they are."""

from __future__ import annotations

import zipfile

import numpy as np
import pytest
import torch
from ase import Atoms

from pet_finetune.config.load import parse_options
from pet_finetune.data.frame_files import forget_files, read_frames
from pet_finetune.data.readers import read_structures
from pet_finetune.errors import DataError
from tiny_data import crystals, data_section, molecules, write_folder


@pytest.fixture(autouse=True)
def _forget():
    yield
    forget_files()


def structures(path, key="energy"):
    raw = {"training_set": data_section(str(path), key=key)}
    return read_structures(parse_options(raw, require_start=False).options.training_set[0])


@pytest.mark.parametrize("frames", [molecules(4), crystals(3), molecules(3, names=("H2O",))])
def test_a_folder_is_read_with_its_labels(tmp_path, frames):
    found = structures(write_folder(tmp_path / "set", frames, "U0"), "U0")
    assert len(found) == len(frames)
    for one, frame in zip(found, frames, strict=True):
        assert one.numbers.tolist() == frame.numbers.tolist()
        assert one.pbc.tolist() == frame.pbc.tolist()
        np.testing.assert_allclose(one.positions, frame.positions, atol=1e-5)
        energy = frame.calc.results["energy"] + 1000.0
        assert float(one.labels["energy"]) == pytest.approx(energy, rel=1e-6)
        np.testing.assert_allclose(one.labels["energy/forces"], frame.get_forces(), atol=1e-4)
        assert ("energy/stress" in one.labels) == bool(frame.pbc.all())


def test_what_is_read_again_has_not_changed(tmp_path):
    folder = write_folder(tmp_path / "set", molecules(2))
    first = read_frames(folder)
    assert read_frames(folder) is first
    np.array([1.0, 2.0], "<f4").tofile(folder / "extra.bin")
    assert [frame.info["extra"] for frame in read_frames(folder)] == [1.0, 2.0]


def test_energies_with_too_few_digits_are_told(tmp_path, caplog):
    structures(write_folder(tmp_path / "set", crystals(2)))
    assert "is stored with 32 bits, in steps of 0.0004" in caplog.text


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda f: (f / "x.bin").write_bytes((f / "x.bin").read_bytes()[:-8]),
         r"x.bin has 178 bytes.*cut off.*last whole structure is number 2, counted from 0"),
        (lambda f: (f / "energy.bin").write_bytes(b"1234567"),
         r"energy.bin has 7 bytes, and 16 belong to 4 structures"),
        (lambda f: (f / "a.bin").unlink(), "misses 'a.bin'"),
        (lambda f: (f / "ns.npy").unlink(), "misses 'ns.npy'"),
        (lambda f: (f / "na.npy").write_bytes(b"nothing"), "cannot be read: "),
        (lambda f: np.save(f / "na.npy", np.arange(3)), "it has 3 numbers"),
    ],
)  # fmt: skip
def test_a_damaged_folder_is_told(tmp_path, harm, message):
    folder = write_folder(tmp_path / "set", molecules(4, names=("H2O", "NH3", "CO", "CH4")))
    size = (folder / "x.bin").stat().st_size
    harm(folder)
    with pytest.raises(DataError, match=message.replace("178", str(size - 8))):
        structures(folder)


def test_a_label_that_the_set_misses_is_told(tmp_path):
    with pytest.raises(DataError, match="U0"):
        structures(write_folder(tmp_path / "set", molecules(2)), "U0")


def test_a_zip_that_is_none_is_told(tmp_path):
    path = tmp_path / "set.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("1/system.mta", b"")
    with pytest.raises(DataError, match="no data set of metatrain's"):
        read_frames(path)
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(DataError, match="damaged or cut off"):
        read_frames(path)


def test_a_zip_of_metatrain_is_read_with_its_labels(tmp_path):
    diskdataset = pytest.importorskip("metatrain.utils.data.writers.diskdataset")
    from metatensor.torch import Labels, TensorBlock, TensorMap
    from metatomic.torch import systems_to_torch

    frames = [*molecules(2), *crystals(2)]
    writer = diskdataset.DiskDatasetWriter(tmp_path / "set.zip")
    for frame in frames:
        system = systems_to_torch(frame, dtype=torch.float64)
        energy = Labels(["energy"], torch.tensor([[0]]))
        block = TensorBlock(
            torch.tensor([[frame.calc.results["energy"]]], dtype=torch.float64),
            Labels(["system"], torch.tensor([[0]])), [], energy,
        )  # fmt: skip
        forces = torch.tensor(frame.get_forces()).unsqueeze(-1)
        rows = torch.tensor([[0, atom] for atom in range(len(frame))])
        xyz = Labels(["xyz"], torch.arange(3).reshape(-1, 1))
        gradient = TensorBlock(-forces, Labels(["sample", "atom"], rows), [xyz], energy)
        block.add_gradient("positions", gradient)
        if frame.pbc.all():
            strain = torch.tensor(frame.get_stress(voigt=False) * frame.get_volume())
            axes = [Labels([f"xyz_{k}"], torch.arange(3).reshape(-1, 1)) for k in (1, 2)]
            sample = Labels(["sample"], torch.tensor([[0]]))
            block.add_gradient("strain", TensorBlock(strain[None, ..., None], sample, axes, energy))
        writer.write([system], {"U0": TensorMap(Labels(["_"], torch.tensor([[0]])), [block])})
    writer.finish()
    for one, frame in zip(structures(tmp_path / "set.zip", "U0"), frames, strict=True):
        assert float(one.labels["energy"]) == frame.calc.results["energy"]
        np.testing.assert_allclose(one.positions, frame.positions)
        np.testing.assert_allclose(one.labels["energy/forces"], frame.get_forces())
        if frame.pbc.all():
            stress = frame.get_stress(voigt=False)
            np.testing.assert_allclose(one.labels["energy/stress"], stress, atol=1e-12)


def test_a_folder_of_metatrain_is_what_metatrain_reads(tmp_path):
    dataset = pytest.importorskip("metatrain.utils.data.dataset")
    folder = write_folder(tmp_path / "set", crystals(3))
    gradient = {"key": "forces"}, {"key": "stress"}
    target = {
        "key": "energy", "quantity": "energy", "unit": "eV", "sample_kind": "system",
        "num_subtargets": 1, "type": "scalar", "forces": gradient[0], "stress": gradient[1],
        "virial": False,
    }  # fmt: skip
    theirs = dataset.MemmapDataset(folder, {"energy": target})
    for one, other in zip(read_frames(folder), theirs, strict=False):
        assert isinstance(one, Atoms)
        np.testing.assert_array_equal(one.positions, other.system.positions.numpy())
        assert one.info["energy"] == float(other.energy.block().values)
        forces = -other.energy.block().gradient("positions").values[..., 0].numpy()
        np.testing.assert_array_equal(one.arrays["forces"], forces)
