"""Sets of structures on disk, and the elements of sets."""

from __future__ import annotations

from itertools import chain

import numpy as np
import pytest
import torch
from ase.build import bulk, molecule

from pet_finetune.config.load import parse_options
from pet_finetune.data import metatrain_sets
from pet_finetune.data.epochs import in_blocks
from pet_finetune.data.frame_files import forget_files
from pet_finetune.data.loader import Loader
from pet_finetune.data.readers import read_structures
from pet_finetune.data.splits import load_splits, make_splits
from pet_finetune.data.structure import atoms_to_structure, structures_fingerprint
from pet_finetune.data.structure_sets import (
    OnDisk,
    check_species,
    evenly_spread,
    find_species,
    joined,
    label_names,
    sampled,
    taken,
)
from pet_finetune.errors import DataError, SpeciesError
from tiny_data import crystals, data_section, molecules, write_folder


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(metatrain_sets, "MOST_IN_MEMORY", 3)
    yield
    forget_files()


def dataset(path, **section):
    raw = {"training_set": {**data_section(str(path)), **section}}
    return parse_options(raw, require_start=False).options.training_set[0]


def both(path, monkeypatch, **section):
    """The structures of a set as they are read on disk, and in memory."""
    options = dataset(path, **section)
    on_disk = read_structures(options)
    with monkeypatch.context() as patch:
        patch.setattr(metatrain_sets, "MOST_IN_MEMORY", 10**6)
        forget_files()
        in_memory = read_structures(options)
    forget_files()
    assert isinstance(on_disk, OnDisk)
    assert isinstance(in_memory, list)
    return on_disk, in_memory


def assert_same(one, other):
    assert (one.index, one.source, one.charge, one.spin) == (
        other.index, other.source, other.charge, other.spin
    )  # fmt: skip
    for name in ("numbers", "positions", "cell", "pbc"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name
    assert one.labels.keys() == other.labels.keys()
    for name, label in one.labels.items():
        torch.testing.assert_close(label, other.labels[name], rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    "section",
    [
        {},
        {"indices": [5, 1, 3, 0]},
        {"systems": {"read_from": "set", "length_unit": "bohr"},
         "targets": {"energy": {"key": "energy", "unit": "kcal/mol"}}},
    ],
)  # fmt: skip
@pytest.mark.parametrize("frames", [molecules(6), crystals(6), [*molecules(3), *crystals(3)]])
def test_structures_are_those_of_memory(tmp_path, monkeypatch, frames, section):
    monkeypatch.chdir(tmp_path)
    on_disk, in_memory = both(write_folder(tmp_path / "set", frames).name, monkeypatch, **section)
    assert len(on_disk) == len(in_memory)
    for one, other in zip(on_disk, in_memory, strict=True):
        assert_same(one, other)
    assert find_species(on_disk) == find_species(in_memory)
    assert label_names(on_disk) == label_names(in_memory)
    assert on_disk.num_atoms.tolist() == [s.num_atoms for s in in_memory]


def test_missing_labels_charges_and_virials(tmp_path, monkeypatch):
    frames = crystals(6)
    folder = write_folder(tmp_path / "set", frames)
    energies = np.fromfile(folder / "energy.bin", "<f4")
    energies[2] = np.nan
    energies.tofile(folder / "energy.bin")
    stress = np.fromfile(folder / "stress.bin", "<f4").reshape(-1, 9)
    stress[:3] = np.nan
    stress.tofile(folder / "stress.bin")
    np.arange(6, dtype="<f4").tofile(folder / "charge.bin")
    (stress + 1.0).tofile(folder / "virial.bin")
    on_disk, in_memory = both(folder, monkeypatch)
    for one, other in zip(on_disk, in_memory, strict=True):
        assert_same(one, other)
    assert [s.charge for s in on_disk] == list(range(6))
    assert sum("energy" in s.labels for s in on_disk) == 5
    assert on_disk.label_states("energy/stress").tolist() == [0, 0, 0, 2, 2, 2]


def test_weights_in_the_loss(tmp_path, monkeypatch):
    folder = write_folder(tmp_path / "set", molecules(6))
    atoms = int(np.load(folder / "na.npy")[-1])
    np.linspace(0.5, 3.0, 6).astype("<f4").tofile(folder / "config_weight.bin")
    np.linspace(0.1, 1.0, atoms).astype("<f4").tofile(folder / "w_forces.bin")
    forces = {"key": "forces", "weight_key": "w_forces"}
    targets = {"energy": {"key": "energy", "unit": "eV", "weight_key": "config_weight",
                          "forces": forces}}  # fmt: skip
    on_disk, in_memory = both(folder, monkeypatch, targets=targets)
    for one, other in zip(on_disk, in_memory, strict=True):
        assert_same(one, other)
    assert "energy/forces/weights" in on_disk.label_names
    assert label_names(on_disk) == label_names(in_memory)


def test_isolated_atoms_are_left_out_as_in_memory(tmp_path, monkeypatch):
    frames = [*molecules(4), *molecules(2, names=("H", "O"))]
    on_disk, in_memory = both(write_folder(tmp_path / "set", frames), monkeypatch)
    assert [s.index for s in on_disk] == [s.index for s in in_memory] == [0, 1, 2, 3]


def test_one_thing_wrong_in_one_structure_is_named(tmp_path):
    folder = write_folder(tmp_path / "set", molecules(6, names=("CH4",)))
    forces = np.fromfile(folder / "forces.bin", "<f4").reshape(6, -1)
    forces[4, 1] = np.nan
    forces.tofile(folder / "forces.bin")
    with pytest.raises(DataError, match=r"forces .*NaN or infinite"):
        read_structures(dataset(folder))
    forces[4] = 0.0
    forces.tofile(folder / "forces.bin")
    positions = np.fromfile(folder / "x.bin", "<f4").reshape(6, -1)
    positions[3, 2] = np.inf
    positions.tofile(folder / "x.bin")
    with pytest.raises(DataError, match=r"frame 3 of .* NaN or infinite"):
        read_structures(dataset(folder))


def test_what_few_structures_do_not_show_is_found_in_all(tmp_path, monkeypatch):
    """The frames that are judged as in memory are not those that are wrong."""
    monkeypatch.setattr("pet_finetune.data.stored._JUDGED", 2)
    folder = write_folder(tmp_path / "set", molecules(6, names=("CH4",)))
    forces = np.fromfile(folder / "forces.bin", "<f4").reshape(6, -1)
    energies = np.fromfile(folder / "energy.bin", "<f4")
    forces[4], energies[4] = np.nan, np.nan
    forces.tofile(folder / "forces.bin")
    energies.tofile(folder / "energy.bin")
    with pytest.raises(DataError, match=r"1 of 6 frames have neither .* first frame 4 of"):
        read_structures(dataset(folder))
    forces[4] = 0.0
    forces[4, 1] = np.inf
    forces.tofile(folder / "forces.bin")
    with pytest.raises(DataError, match=r"NaN or infinite in 1 of 6 frames, first in frame 4 of"):
        read_structures(dataset(folder))


def test_a_target_that_the_set_misses_is_named(tmp_path):
    folder = write_folder(tmp_path / "set", molecules(6))
    targets = {"energy": {"key": "U0", "unit": "eV"}}
    with pytest.raises(DataError, match="should be under 'U0'"):
        read_structures(dataset(folder, targets=targets))


def test_unknown_elements_are_named(tmp_path):
    structures = read_structures(dataset(write_folder(tmp_path / "set", molecules(6))))
    check_species(structures, [1, 6, 8])
    with pytest.raises(SpeciesError, match=r"C \(Z=6\): 3 atoms in 3 structures: frame 0 of"):
        check_species(structures, [1, 8])


def test_joined_sets_keep_their_order(tmp_path):
    on_disk = read_structures(dataset(write_folder(tmp_path / "set", molecules(6))))
    other = read_structures(dataset(write_folder(tmp_path / "other", crystals(5))))
    listed = list(other)
    whole = joined([on_disk, listed, other])
    assert isinstance(whole, OnDisk)
    expected = [*on_disk, *listed, *other]
    for one, structure in zip(whole, expected, strict=True):
        assert_same(one, structure)
    assert find_species(whole) == (1, 6, 8, 14)
    assert label_names(whole) == {"energy", "energy/forces", "energy/stress"}
    positions = np.array([12, 0, 7, 7])
    assert whole.places(positions) == (
        tuple(expected[k].index for k in positions),
        tuple(expected[k].source for k in positions),
    )
    for one, k in zip(taken(whole, positions), positions, strict=True):
        assert_same(one, expected[k])
    assert [s.index for s in whole[2:4]] == [2, 3]


def test_a_sample_has_rare_elements(tmp_path, monkeypatch):
    frames = molecules(300, names=("H2",))
    frames[217] = molecules(1, names=("NH3",))[0]
    structures = read_structures(dataset(write_folder(tmp_path / "set", frames)))
    part = structures.sample(20)
    assert part.species == (1, 7)
    assert len(part) < 300
    monkeypatch.setattr("pet_finetune.data.structure_sets.SAMPLE", 20)
    assert isinstance(sampled(structures, "a look"), list)
    assert evenly_spread(range(100), 3) == [0, 49, 99]
    assert evenly_spread([*range(100)], 3) == [*range(100)]  # what is in memory is not thinned out


def frames_of(batches):
    return [list(batch.frames) for batch in batches]


@pytest.mark.parametrize("sizes", [{"batch_size": 3}, {"max_atoms_per_batch": 20}])
def test_a_loader_gives_the_batches_of_memory(tmp_path, monkeypatch, sizes):
    on_disk, in_memory = both(
        write_folder(tmp_path / "set", [*molecules(5), *crystals(5)]), monkeypatch
    )
    settings = {"shuffle": True, "augment": True, "seed": 3, "dtype": torch.float64, **sizes}
    one, other = Loader(on_disk, 4.0, **settings), Loader(in_memory, 4.0, **settings)
    assert one.label_names == other.label_names
    for epoch in (0, 2):
        for mine, its in zip(one.epoch(epoch), other.epoch(epoch), strict=True):
            assert mine.frames == its.frames
            torch.testing.assert_close(mine.graph.edge_vectors, its.graph.edge_vectors)
            torch.testing.assert_close(mine.labels["energy/forces"], its.labels["energy/forces"])
    whole = list(one.epoch(1))
    assert frames_of(one.epoch(1, start_batch=2)) == frames_of(whole[2:])


@pytest.mark.parametrize("rotated", [False, True])
def test_processes_share_the_batches(tmp_path, rotated):
    """What the parts say of the whole is what is known of it, labels that are missing included."""
    folder = write_folder(tmp_path / "set", [*molecules(4), *crystals(4)])
    energies = np.fromfile(folder / "energy.bin", "<f4")
    energies[2] = np.nan
    energies.tofile(folder / "energy.bin")
    loader = Loader(
        read_structures(dataset(folder)), 4.0, batch_size=4, shuffle=True, augment=rotated, seed=1
    )
    listed = Loader(
        list(loader.structures), 4.0, batch_size=4, shuffle=True, augment=rotated, seed=1
    )
    for rank in (0, 1):
        shares = zip(loader.shared(rank, 2).epoch(0), listed.shared(rank, 2).epoch(0), strict=True)
        for one, other in shares:
            assert one.whole.frames == other.whole.frames
            assert one.whole.sources == other.whole.sources
            assert one.whole.known.keys() == other.whole.known.keys()
            for name, numbers in one.whole.known.items():
                assert numbers.tolist() == other.whole.known[name].tolist()
    parts = [list(loader.shared(rank, 2).epoch(0)) for rank in (0, 1)]
    for batch, first, second in zip(loader.epoch(0), *parts, strict=True):
        assert sorted(first.frames + second.frames) == sorted(batch.frames)


def test_each_process_prepares_its_share_alone(tmp_path, monkeypatch):
    loader = Loader(
        read_structures(dataset(write_folder(tmp_path / "set", molecules(8)))), 4.0, batch_size=8
    )
    calls = []
    real = metatrain_sets.Folder.rows
    monkeypatch.setattr(
        metatrain_sets.Folder, "rows", lambda self, row: calls.append(row) or real(self, row)
    )
    (part,) = loader.shared(0, 2).epoch(0)
    assert sorted(set(calls) - set(part.frames)) in ([], [0])  # one tells the shape of a label


def test_blocks_are_shuffled_well():
    count = 1024 * 200 + 77
    order = in_blocks(count, np.random.default_rng(0))
    assert sorted(order.tolist()) == list(range(count))
    # The first structures come from 64 places all over the set, and not in order.
    places = np.unique(order[:5000] // 1024)
    assert len(places) == 64
    assert places.max() > 150
    assert abs(np.corrcoef(np.arange(5000), order[:5000])[0, 1]) < 0.1


def options_of(path, **more):
    raw = {"training_set": data_section(str(path)), "validation_set": 0.2, "test_set": 0.1, **more}
    return parse_options(raw, require_start=False).options


def test_splits_are_those_of_memory_and_are_restored(tmp_path, monkeypatch):
    folder = write_folder(tmp_path / "set", molecules(20))
    options = options_of(folder)
    splits = make_splits(options, 5)
    splits.save(tmp_path / "splits.json")
    again = load_splits(tmp_path / "splits.json", options)
    with monkeypatch.context() as patch:
        patch.setattr(metatrain_sets, "MOST_IN_MEMORY", 100)
        forget_files()
        listed = make_splits(options, 5)
    for name in ("train", "validation", "test"):
        chosen = getattr(splits, name)
        assert isinstance(chosen, OnDisk)
        assert list(chosen.frames) == [s.index for s in getattr(listed, name)]
        assert getattr(again, name).frames == chosen.frames
    everything = list(chain(splits.train.frames, splits.validation.frames, splits.test.frames))
    assert sorted(everything) == list(range(20))


def test_a_set_that_has_changed_is_no_longer_the_same(tmp_path):
    folder = write_folder(tmp_path / "set", molecules(20))
    options = options_of(folder)
    splits = make_splits(options, 5)
    splits.save(tmp_path / "splits.json")
    forces = np.fromfile(folder / "forces.bin", "<f4")
    (2 * forces).tofile(folder / "forces.bin")
    forget_files()
    with pytest.raises(DataError, match="has changed since"):
        load_splits(tmp_path / "splits.json", options)


def test_the_fingerprint_counts_which_structures_there_are(tmp_path):
    structures = read_structures(dataset(write_folder(tmp_path / "set", molecules(8))))
    first = structures_fingerprint(structures)
    assert first == structures_fingerprint(structures[:])
    assert first != structures_fingerprint(structures[1:])


@pytest.fixture
def structures():
    frames = [molecule("H2O"), bulk("NaCl", "rocksalt", a=5.6), molecule("CH3Cl"), bulk("Cu")]
    return [atoms_to_structure(a, i, source="set.xyz") for i, a in enumerate(frames * 3)]


def test_species_that_occur(structures):
    assert find_species(structures) == (1, 6, 8, 11, 17, 29)


def test_all_known(structures):
    check_species(structures, (1, 6, 8, 11, 17, 29, 79))


def test_unknown_elements_by_symbol_count_and_frame(structures):
    with pytest.raises(SpeciesError) as error:
        check_species(structures, (1, 6, 8, 11))
    message = str(error.value)
    assert "Cl (Z=17): 6 atoms in 6 structures" in message
    assert "frame 1 of set.xyz; frame 2 of set.xyz" in message
    assert "and 1 more" in message
    assert "Cu (Z=29): 3 atoms in 3 structures" in message
    assert "The model knows: H C O Na." in message
