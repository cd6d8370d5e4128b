"""What a look takes grows with frames and atoms, and no more; the most different structures."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import molecule

from inspected import codes, copper, look, relabel, scaled, the
from models import random_potential
from pet_finetune.data.structure import Structure, atoms_to_structure
from pet_finetune.inspection import energy_checks, near_frames
from pet_finetune.inspection.inspect_data import inspect_data, request_of_files
from pet_finetune.inspection.inspected import dataset_of
from pet_finetune.inspection.inspection import Foundation, inspect_sets
from pet_finetune.inspection.near_frames import _farthest, most_different, neighbours, within
from pet_finetune.inspection.suggestion import _piece, estimate, load_of
from tiny_data import write_frames


@pytest.fixture
def compared(monkeypatch):
    """Counts the whole distances that are taken."""
    taken = []
    plain = near_frames._distances

    def counted(vectors, rows, others):
        taken.append(others.size)
        return plain(vectors, rows, others)

    monkeypatch.setattr(near_frames, "_distances", counted)
    return taken


def cloud(count, width=300, seed=0):
    """Fingerprints of thermal frames: no few axes hold all of them."""
    rng = np.random.default_rng(seed)
    spread = 1.0 / np.arange(1, width + 1)
    vectors = (rng.normal(size=(count, width)) * spread).astype(np.float32)
    return [SimpleNamespace(fingerprint=vector) for vector in vectors]


@pytest.mark.parametrize("count", [200, 2000])
def test_neighbours_cost_as_many_distances_as_there_are_frames(compared, count):
    pairs = list(neighbours(cloud(count), [0] * count, 3))
    assert len(pairs) > count
    assert sum(compared) <= 17 * count


def test_neighbours_are_near(compared):
    entries = cloud(400)
    vectors = np.array([entry.fingerprint for entry in entries])
    apart = np.linalg.norm(vectors[:, None] - vectors, axis=-1)
    nearest = np.sort(apart, axis=1)[:, 1].mean()
    found = [length for *_, length in neighbours(entries, [0] * 400, 1)]
    assert np.mean(found) < 1.1 * nearest < 0.7 * apart.mean()
    for one, two, length in neighbours(entries, [0] * 400, 2):
        assert length == pytest.approx(apart[one, two], rel=1e-5)


@pytest.mark.parametrize("count", [200, 2000])
def test_copies_are_found_by_few_distances(compared, count):
    entries = cloud(count)
    copies = {k: count + k for k in range(0, 20, 2)}
    entries += [SimpleNamespace(fingerprint=entries[k].fingerprint + 1e-5) for k in copies]
    found = {(one, two) for one, two, _ in within(entries, [0] * len(entries), 0.01)}
    assert found == {(k, count + n) for n, k in enumerate(copies)}
    assert sum(compared) < len(entries)


def test_a_copy_behind_many_that_look_alike_is_found():
    """More than the first candidates agree along the axes, and only one as a whole."""
    rng = np.random.default_rng(0)
    vectors = np.zeros((100, 200), dtype=np.float32)
    vectors[:, :8] = rng.normal(scale=1e-4, size=(100, 8))
    vectors[:, 8:] = rng.normal(scale=2e-3, size=(100, 192))
    spread = np.zeros((300, 200), dtype=np.float32)
    spread[:, :8] = 10.0 + rng.normal(size=(300, 8))
    vectors[99] = vectors[0]
    entries = [SimpleNamespace(fingerprint=v) for v in [*vectors, *spread]]
    assert {(0, 99)} == {pair[:2] for pair in within(entries, [0] * 400, 1e-3)}


def test_frames_with_other_keys_are_not_compared():
    entries = [SimpleNamespace(fingerprint=np.zeros(9, np.float32)) for _ in range(4)]
    assert {pair[:2] for pair in within(entries, [0, 1, 0, 1], 0.1)} == {(0, 2), (1, 3)}


def test_the_first_file_is_fitted_once(monkeypatch):
    fitted = []
    plain = energy_checks._levels_of
    monkeypatch.setattr(
        energy_checks, "_levels_of", lambda *args: fitted.append(args[0]) or plain(*args)
    )
    structures = copper(40)
    files = [replace(s, source=f"{k // 4}.xyz") for k, s in enumerate(structures)]
    assert "mixed-levels" not in codes(look(files))
    assert fitted == ["0.xyz"]


@pytest.fixture(scope="module")
def model():
    return random_potential()


def asked(monkeypatch, structures, model):
    """What is inspected with a foundation, and of how many structures that is asked."""
    from pet_finetune.inspection import foundation

    seen = []
    plain = foundation._predict

    def counted(model, target, entries):
        seen.extend(entries)
        return plain(model, target, entries)

    monkeypatch.setattr(foundation, "_predict", counted)
    known = Foundation(model, "energy", tuple(model.species), known_too=None)
    return inspect_sets({"train": structures}, "energy", {}, known), len(seen)


def test_a_model_is_not_asked_about_lengths_in_doubt(monkeypatch, model, molecules_of):
    structures = scaled(molecules_of("val"), length=0.1)
    inspection, count = asked(monkeypatch, structures, model)
    assert the(inspection, "length-unit").data["unit"] == "nm"
    assert count == 0


def test_one_frame_with_a_far_atom_is_named_and_the_others_are_looked_at(
    monkeypatch, model, molecules_of
):
    structures = molecules_of("val")[:12]
    positions = structures[5].positions.clone()
    positions[2, 0] = 1e7
    structures[5] = replace(structures[5], positions=positions)
    inspection, count = asked(monkeypatch, structures, model)
    found = the(inspection, "impossible-structure")
    assert (found.severity, found.where[0].numbers) == ("error", (structures[5].index,))
    assert "atom 2 lies" in found.what
    assert 0 < count <= 11


def test_dense_atoms_are_looked_at_within_a_short_reach():
    dense = scaled(copper(1), length=0.1)[0]
    (entry,) = dataset_of({"train": [dense]}, None).frames
    assert float(entry.nearest.max()) < 0.3


def test_a_piece_of_a_large_frame_is_measured(monkeypatch, model):
    """A frame of 512 atoms takes no more than one of 400 does."""
    from pet_finetune.inspection import suggestion as estimate_module

    small = next(s for s in copper(1))
    grid = torch.cartesian_prod(*[torch.arange(8.0)] * 3).double() * 2.6
    whole = replace(
        small, numbers=torch.full((512,), 6), positions=grid, cell=torch.eye(3).double() * 20.8
    )
    piece = _piece(whole, 400)
    assert piece.num_atoms == 400
    away = grid - grid[0]
    away -= 20.8 * torch.round(away / 20.8)
    chosen = {tuple(row) for row in piece.positions.tolist()}
    far = [a.norm() for a, row in zip(away, grid.tolist(), strict=True) if tuple(row) not in chosen]
    near = [a.norm() for a, row in zip(away, grid.tolist(), strict=True) if tuple(row) in chosen]
    assert max(near) <= min(far) + 1e-9
    sizes = []
    plain = estimate_module._measure
    monkeypatch.setattr(
        estimate_module,
        "_measure",
        lambda *args: sizes.append(int(args[3].num_atoms)) or plain(*args),
    )
    monkeypatch.setattr(estimate_module, "METHODS", {"full": estimate_module.METHODS["full"]})
    load = load_of([whole], [], model.cutoff)
    estimate(model, "energy", [whole], load, 1, forces=True, stress=True)
    assert sizes == [400]
    assert load.atoms == 512


def test_edges_of_large_sets_are_counted_on_a_sample(monkeypatch):
    from pet_finetune.inspection import suggestion as estimate_module

    looked = []
    plain = estimate_module.find_pairs
    monkeypatch.setattr(
        estimate_module, "find_pairs", lambda *a, **k: looked.append(len(a[0])) or plain(*a, **k)
    )
    structures = copper(40)
    one = load_of(structures, [], 4.0)
    assert sum(looked) == sum(s.num_atoms for s in structures)
    looked.clear()
    monkeypatch.setattr(estimate_module, "_SAMPLE_ATOMS", sum(s.num_atoms for s in structures) // 8)
    other = load_of(structures, [], 4.0)
    assert sum(looked) <= estimate_module._SAMPLE_ATOMS
    assert other.edges == pytest.approx(one.edges, rel=0.1)


def spoiled(structure, **changed):
    return replace(structure, **{k: torch.as_tensor(v).double() for k, v in changed.items()})


NASTY = {
    "two atoms at one place": lambda s: spoiled(s, positions=s.positions * 0.0),
    "two atoms all but at one place": lambda s: spoiled(
        s, positions=s.positions[:1] + 1e-9 * torch.arange(12.0).reshape(4, 3)
    ),
    "an atom far away": lambda s: spoiled(s, positions=s.positions + torch.eye(4, 3) * 1e9),
    "positions beyond any number": lambda s: spoiled(s, positions=s.positions * 1e300),
    "positions that are NaN": lambda s: spoiled(s, positions=s.positions * float("nan")),
    "a cell of 1e6 A": lambda s: spoiled(s, cell=np.eye(3) * 1e6),
    "a tiny cell": lambda s: spoiled(s, cell=np.eye(3) * 0.01),
    "a flat cell": lambda s: spoiled(s, cell=[[2, 0, 0], [4, 0, 0], [0, 0, 5]]),
    "a needle of a cell": lambda s: spoiled(s, cell=[[100, 0, 0], [99.999, 0.01, 0], [0, 0, 100]]),
    "a cell of NaN": lambda s: spoiled(s, cell=np.full((3, 3), np.nan)),
}


@pytest.mark.few(5)
@pytest.mark.parametrize("kind", NASTY)
def test_no_check_dies_of_what_it_should_find(kind, model, monkeypatch):
    """The frame is named by an error, with a foundation and without; the others are looked at."""
    structures = copper(12)
    structures[5] = NASTY[kind](structures[5])
    for inspection in (look(structures), asked(monkeypatch, structures, model)[0]):
        errors = [f for f in inspection.findings if f.severity == "error"]
        assert len(errors) <= 1
        named = [n for f in inspection.findings for frames in f.where for n in frames.numbers]
        assert 5 in named or kind == "a needle of a cell"
        assert not {0, 1, 2} & {n for f in errors for frames in f.where for n in frames.numbers}


@pytest.mark.parametrize("labels", [{"forces": 1e200}, {"energy": 1e300}, {"stress": 1e200}])
def test_absurd_labels_are_findings(labels, recwarn):
    structures = copper(12)
    (kind,) = labels
    name = {"energy": "energy"}.get(kind, f"energy/{kind}")
    structures[5] = relabel(structures[5], **{kind: structures[5].labels[name] * labels[kind]})
    look(structures)
    assert not [w for w in recwarn if "overflow" in str(w.message)]


def test_what_is_too_dense_for_the_cutoff_alone_is_an_error_too(tmp_path):
    """A single atom in a cell of 0.3 A: the look comes to an end and says so."""
    tiny = Atoms("C", cell=np.eye(3) * 0.3, pbc=True)
    tiny.info["energy"] = -1.0
    file = write_frames(tmp_path / "tiny.xyz", [tiny] * 3)
    inspection = inspect_data(request_of_files([str(file)]))
    assert "neighbours within" in the(inspection, "impossible-structure").what
    assert inspection.suggestion is not None


def test_frames_that_are_too_large_for_the_foundation_are_named(monkeypatch, model):
    from pet_finetune.inspection import foundation

    monkeypatch.setattr(foundation, "_MOST_NUMBERS", 1)
    inspection, count = asked(monkeypatch, copper(12), model)
    found = the(inspection, "not-compared")
    assert (found.severity, found.data["count"], count) == ("note", 12, 0)


def counted(monkeypatch, count):
    """How many times neighbours are sought, files fitted and pairs of frames compared."""
    from pet_finetune.inspection import inspected, near_frames, pair_model, scales

    calls = dict.fromkeys(("neighbours", "atoms fitted", "steps"), 0)

    def watch(module, name, key, size):
        plain = getattr(module, name)

        def called(*args, **kwargs):
            calls[key] += size(*args)
            return plain(*args, **kwargs)

        monkeypatch.setattr(module, name, called)

    for module in (pair_model, scales, inspected):
        watch(module, "find_pairs", "neighbours", lambda *args: 1)
    watch(pair_model, "_design", "atoms fitted", lambda entry, kinds: entry.size)
    watch(near_frames, "_step", "steps", lambda *args: 1)
    look(copper(count))
    monkeypatch.undo()
    return calls


def test_the_look_is_linear_in_frames(monkeypatch):
    """Counts, not seconds: each frame is looked at a fixed number of times, fits are bounded."""
    small, large = counted(monkeypatch, 60), counted(monkeypatch, 240)
    assert large["neighbours"] <= 4.2 * small["neighbours"]
    assert large["steps"] <= 4.5 * small["steps"]
    assert large["atoms fitted"] <= 120 * 4


def structures(frames: list[Atoms]) -> list[Structure]:
    return [atoms_to_structure(atoms, index, source="pool") for index, atoms in enumerate(frames)]


def dimers(symbols: str, lengths: list[float]) -> list[Atoms]:
    return [Atoms(symbols, [[0, 0, 0], [0, 0, length]]) for length in lengths]


def test_farthest_points_are_the_corners() -> None:
    near = np.random.default_rng(0).normal(size=(50, 2)) * 0.01
    corners = np.array([[5.0, 0], [0, 5.0], [-5.0, -5.0]])
    chosen = _farthest(np.vstack([near, corners]), 4)
    assert {50, 51, 52} < set(chosen)
    assert len(set(chosen)) == 4


def test_rare_geometries_are_kept() -> None:
    pool = structures(dimers("CO", [1.1 + 0.001 * k for k in range(40)] + [0.8, 2.0]))
    kept = [one.index for one in most_different(pool, 3)]
    assert {40, 41} < set(kept)
    assert kept == sorted(kept)


def test_each_composition_keeps_the_same_part() -> None:
    ethanol = [molecule("CH3CH2OH") for _ in range(20)]
    for seed, atoms in enumerate(ethanol):
        atoms.rattle(0.05, seed=seed)
    pool = structures([*ethanol, *dimers("HC", [1 + 0.1 * k for k in range(10)])])
    assert Counter(one.num_atoms for one in most_different(pool, 15)) == {9: 10, 2: 5}
    assert most_different(pool, 30) == pool


def test_never_more_than_wanted() -> None:
    symbols = ["HC", "HN", "HO", "HF", "CO", "CN", "NO", "OF", "CF", "NF"]
    pool = structures([atoms for pair in symbols for atoms in dimers(pair, [1.0, 1.1, 1.2])])
    for most in (1, 4, 10, 13, 29):
        kept = most_different(pool, most)
        assert len(kept) == most
        found = Counter(tuple(one.numbers.tolist()) for one in kept)
        assert len(found) == min(most, len(symbols))


def test_the_same_structure_twice_is_taken_once() -> None:
    pool = structures(dimers("CO", [1.1, 1.1, 1.1, 1.5, 1.9]))
    assert [one.index for one in most_different(pool, 3)][1:] == [3, 4]
