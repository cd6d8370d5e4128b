"""Long-range features: the laws that hold with them, and what must know of them."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import laws
import numpy as np
import pytest
import torch
from ase import Atoms

from models import (
    KINDS,
    apart,
    crystal,
    ethanol,
    lone_atom,
    property_potential,
    random_potential,
    slab,
    trained_adapter,
    with_last_layer,
)

pytest.importorskip("torchpme", reason="torch-pme comes with the extra long-range")
from pet_finetune import PETCalculator
from pet_finetune.adapters.adapter_config import AdapterConfig
from pet_finetune.adapters.inject import inject
from pet_finetune.backends.choice import EAGER, using
from pet_finetune.checkpoint.native import save_checkpoint
from pet_finetune.checkpoint.opening import load_checkpoint
from pet_finetune.committee.committee import Committee
from pet_finetune.committee.llpr import with_uncertainty
from pet_finetune.data.labelled_batch import batch_from_atoms
from pet_finetune.data.structure import atoms_to_structure
from pet_finetune.errors import DataError, PetFinetuneError
from pet_finetune.export.export import export_model
from pet_finetune.graph import join_graphs
from pet_finetune.model.compiled import CompiledPredictions
from pet_finetune.model.inference import StaticEnergy
from pet_finetune.model.potential import Potential
from pet_finetune.training.extend import check_known

FRAMES = [ethanol(), crystal(), lone_atom(), apart()]
ON = {"long_range": {"enable": True}}
SHAPES = pytest.mark.parametrize("make", [ethanol, crystal], ids=lambda make: make.__name__)


@pytest.fixture(params=["today", "first"])
def model(request: pytest.FixtureRequest) -> Potential:
    return random_potential(**KINDS[request.param], **ON)


@SHAPES
@pytest.mark.parametrize("training", [False, True], ids=["P3M", "Ewald"])
def test_forces_are_finite_differences(model: Potential, make, training: bool) -> None:
    laws.forces_are_finite_differences(model.train(training), make())


@pytest.mark.parametrize("training", [False, True], ids=["P3M", "Ewald"])
def test_stress_is_finite_differences(model: Potential, training: bool) -> None:
    laws.stress_is_finite_differences(model.train(training), crystal())


def test_alone_equals_in_a_batch(model: Potential) -> None:
    laws.alone_equals_in_a_batch(model, FRAMES)
    laws.alone_equals_in_a_batch(model.train(), FRAMES)


@SHAPES
def test_permutation_changes_nothing(model: Potential, make) -> None:
    laws.permutation_changes_nothing(model, make())


def test_symmetries_to_the_accuracy_of_the_grid(model: Potential) -> None:
    laws.translation_changes_nothing(model, ethanol())
    laws.translation_changes_nothing(model, crystal(), 2e-3)
    laws.periodic_images_change_nothing(model, crystal(), 2e-3)
    laws.energy_is_extensive(model, crystal(), 2e-3)


def test_atoms_beyond_the_reach_of_the_layers_matter(model: Potential) -> None:
    """Two molecules far apart feel each other, and ever less with the distance."""
    one = ethanol()

    def pull(gap: float) -> torch.Tensor:
        other = one.copy()
        other.positions += [gap, 0, 0]
        return (laws.predict(model, [one + other]).forces[: len(one)] - alone).abs().max()

    alone = laws.predict(model, [one]).forces
    near, far = pull(30.0), pull(3000.0)
    assert 1e-5 < far * 10 < near


def test_an_empty_batch(model: Potential) -> None:
    empty = batch_from_atoms(ethanol(), model.cutoff).first(0)
    assert model.predict(empty, stress=True).forces.shape == (0, 3)


def test_adapters_and_files(model: Potential, tmp_path: Path) -> None:
    config = AdapterConfig(target_modules="all-linear")
    molecules = [ethanol(), apart()]  # crystals take another sum in training
    laws.injection_is_the_identity(model, molecules, config)
    laws.only_what_is_stated_trains(_injected(model, config), model, config)
    adapted = trained_adapter(copy.deepcopy(model), target_modules="all-linear")
    assert any("long_range_featurizer" in name for name in laws.adapter_tensors(adapted))
    laws.merged_equals_unmerged(adapted, model, FRAMES)
    laws.saving_loses_nothing(model, FRAMES, tmp_path)
    laws.saving_an_adapter_loses_nothing(adapted, model, FRAMES, tmp_path / "adapter")


def _injected(model: Potential, config: AdapterConfig) -> Potential:
    adapted = copy.deepcopy(model)
    inject(adapted, config)
    return adapted


def test_the_report_of_what_trains_names_them(model: Potential) -> None:
    from pet_finetune.adapters.inject import freeze, trainable_report
    from pet_finetune.training.optimizer import depth_of

    freeze(model, None)
    width = model.hypers.d_node
    assert trainable_report(model).groups["long_range_featurizer"] == 3 * width * (width + 1)
    assert depth_of("long_range_featurizer.charges_map.weight", model.network) == 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_other_ways_to_compute_agree(dtype: torch.dtype) -> None:
    """Kernels or not; lists of instructions and compiled graphs leave it to the modules."""
    model = random_potential(dtype=dtype, d_pet=16, d_node=16, d_head=16, d_feedforward=16, **ON)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-4
    found = laws.predict(model, FRAMES)
    with using(EAGER, model):
        laws.assert_close(found, laws.predict(model, FRAMES), tolerance)
    with using(EAGER, model), torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        rough = laws.predict(model.train(), FRAMES)
    exact = laws.predict(model, FRAMES)
    torch.testing.assert_close(rough.energy, exact.energy, rtol=0.1, atol=0.1)
    assert rough.forces.isfinite().all()
    model.eval()
    batch = batch_from_atoms(ethanol(), model.cutoff, dtype)
    assert StaticEnergy(model, "energy").predict(batch) is None
    assert CompiledPredictions(model).predict(batch, {"energy": (True, False)}) is None


def test_a_committee_and_a_last_layer_derive_the_whole_energy() -> None:
    """Members differ in layers after some that they share, and in the long-range features."""
    first = random_potential(**ON)
    members = [copy.deepcopy(first) for _ in range(2)]
    with torch.no_grad():
        members[1].network.gnn_layers[1].compress[0].weight += 0.3
        members[1].network.long_range_featurizer.charges_map.weight += 0.3
    batch = batch_from_atoms(FRAMES, first.cutoff)
    alone = [laws.predict_batch(member, batch) for member in members]
    committee = Committee(members, "energy")
    assert committee.one_pass
    assert committee._first.network.shared_layers is not None
    said = committee.predict(batch, "energy", forces=True, stress=True, spread=False)
    for name in ("energy", "forces", "stress"):
        mean = torch.stack([getattr(one, name) for one in alone]).mean(0)
        torch.testing.assert_close(getattr(said, name), mean, rtol=0, atol=1e-9)
    unsure = with_last_layer(random_potential(**ON))
    layer = unsure.uncertainty_of("energy")

    def of_members(frames: list[Atoms]):
        batch = batch_from_atoms(frames, unsure.cutoff)
        found = unsure.predict_targets(batch, {"energy": (True, True)}, features_of=["energy"])
        return with_uncertainty(unsure, batch, found["energy"], "energy", layer, True).members

    step, moved = 1e-4, []
    for sign in (1, -1):
        atoms = crystal()
        atoms.positions[1, 2] += sign * step
        moved.append(of_members([atoms]).energy[:, 0])
    expected = -(moved[0] - moved[1]) / (2 * step)
    torch.testing.assert_close(of_members([crystal()]).forces[:, 1, 2], expected, rtol=0, atol=1e-6)


def test_values_of_atoms_are_of_their_structure() -> None:
    """A property's parts see all atoms, and sum to it."""
    from metatensor.torch import sum_over_samples

    from pet_finetune.export.tensormaps import tensor_maps

    model = property_potential(**ON)
    given = [atoms_to_structure(frame, index) for index, frame in enumerate(FRAMES)]
    atomic = tensor_maps(model, given, {"dipole": "atom"})["dipole"]
    whole = tensor_maps(model, given, ["dipole"])["dipole"].block().values
    found = sum_over_samples(atomic, "atom").block().values
    torch.testing.assert_close(found, whole, rtol=0, atol=1e-10)


def test_training_differentiates_twice(model: Potential) -> None:
    """The gradient of a loss of forces and stress by a weight is a finite difference."""
    batch = batch_from_atoms([ethanol(), crystal()], model.cutoff)
    weight = model.train().network.long_range_featurizer.charges_map.weight

    def loss() -> torch.Tensor:
        found = model.predict(batch, stress=True, create_graph=True)
        return found.forces.square().sum() + 100 * found.stress.square().sum()

    (gradient,) = torch.autograd.grad(loss(), weight)
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            weight[2, 3] += sign * 1e-5
        values.append(loss().item())
        with torch.no_grad():
            weight[2, 3] -= sign * 1e-5
    assert (values[0] - values[1]) / 2e-5 == pytest.approx(gradient[2, 3].item(), rel=1e-5)


def test_without_the_library_one_line_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save_checkpoint(tmp_path / "model.ckpt", random_potential(**ON))
    monkeypatch.setattr("pet_finetune.installation.find_spec", lambda library: None)
    with pytest.raises(PetFinetuneError, match=r"pip install 'pet-finetune\[long-range\]'"):
        load_checkpoint(path)


def test_structures_of_other_periodicity_are_refused(model: Potential) -> None:
    with pytest.raises(DataError, match="periodic in one or two directions"):
        laws.predict(model, [ethanol(), slab()])
    frames = [atoms_to_structure(atoms, index) for index, atoms in enumerate((ethanol(), slab()))]
    with pytest.raises(DataError, match="(?s)frame 1.*It is so in 1 of 2 structures"):
        check_known(frames, model)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit.*")
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_the_exported_model_is_the_model(dtype: str, tmp_path: Path) -> None:
    from test_exported_models import assert_same_numbers, engine

    checkpoint = save_checkpoint(tmp_path / "model.ckpt", random_potential(**ON))
    outcome = export_model(checkpoint, tmp_path / "model.pt", dtype=dtype)
    assert math.isinf(outcome.interaction_range)  # so that no engine splits the box
    calculator = PETCalculator(checkpoint, device="cpu", dtype=dtype)
    tolerance = 1e-10 if dtype == "float64" else 1e-5
    with torch.jit.optimized_execution(False):
        assert_same_numbers(engine(tmp_path / "model.pt"), calculator, FRAMES, tolerance)


def test_dynamics_with_a_calculator_conserves_the_energy() -> None:
    from ase import units
    from ase.md import VelocityVerlet

    from models import heat

    atoms = crystal()
    heat(atoms, 300.0)
    model = random_potential(**ON)
    for parameter in model.parameters():
        parameter.data *= 0.7  # soft enough for the time step
    atoms.calc = PETCalculator(model, device="cpu", skin=0.3)
    before = atoms.get_total_energy()
    VelocityVerlet(atoms, 0.25 * units.fs).run(40)
    moved = np.abs(atoms.positions - crystal().positions).max()
    assert abs(atoms.get_total_energy() - before) < 1e-3 < moved


def test_copies_of_positions_go_where_the_edges_go() -> None:
    """A batch that is rotated, cut or joined says the same of positions and edge vectors."""
    from pet_finetune.data.epochs import random_rotations
    from pet_finetune.graph import rotate_graphs
    from pet_finetune.model.inference import copies

    frames = [ethanol(), lone_atom(), apart()]  # no cells: an edge is a difference of positions
    batch = batch_from_atoms(frames, 3.5)
    turns = random_rotations(len(frames), torch.Generator().manual_seed(0), torch.float64)
    for made in (
        batch.first(2),
        join_graphs([batch, batch]),
        rotate_graphs(batch, turns),
        copies(batch, turns),
    ):
        across = made.positions[made.neighbors] - made.positions[made.centers]
        torch.testing.assert_close(across, made.edge_vectors, rtol=0, atol=1e-12)
