"""Small random potentials and structures that tests of any layer share."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from ase import Atoms, units
from ase.build import bulk, molecule

from pet_finetune.adapters.adapter_config import AdapterConfig
from pet_finetune.adapters.base_weights import target_fingerprints
from pet_finetune.adapters.inject import inject, merged_copy
from pet_finetune.config.run_options import ModelOptions
from pet_finetune.keys import TargetSpec
from pet_finetune.model.potential import Potential
from pet_finetune.model.prediction import LastLayer, cholesky_of

SPECIES = (1, 6, 8, 14)
SMALL: dict[str, Any] = {
    "cutoff": 3.5,
    "d_pet": 8,
    "d_head": 6,
    "d_node": 12,
    "d_feedforward": 10,
    "num_heads": 2,
    "num_attention_layers": 1,
    "num_gnn_layers": 2,
}

#: Between them every kind of layer and option.
KINDS: dict[str, dict[str, Any]] = {
    "today": {"num_neighbors_adaptive": 4.0, "zbl": True, "num_attention_layers": 2},
    "first": {
        "featurizer_type": "residual",
        "transformer_type": "PostLN",
        "normalization": "LayerNorm",
        "activation": "SiLU",
        "cutoff_function": "Cosine",
        "d_node": 8,
    },
    "grid": {
        "num_neighbors_adaptive": 4.0,
        "adaptive_cutoff_method": "grid",
        "system_conditioning": True,
        "num_gnn_layers": 1,
    },
}

#: One configuration of an adapter for each method of adapting.
METHODS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True, "rank_pattern": {"w_in": 3}, "alpha_pattern": {"mlp.*": 7.0}},
    "dora": {"use_dora": True},
    "dora everywhere": {"use_dora": True, "use_rslora": True, "target_modules": "all-linear"},
    "lora of other ranks": {"rank_pattern": {"attention.output_linear": 1}},
    "prompt": {"num_prompts": 3},
}
#: The same for methods that round the base's weights, where "the base" is the rounded one and two
#: ways to compute agree to rounding errors of float64 instead of to the last bit.
QUANTISED: dict[str, dict[str, Any]] = {
    "qlora 4": {"quant_bits": 4, "target_modules": "all-linear"},
    "qlora 8": {"quant_bits": 8},
    "qdora 4": {"quant_bits": 4, "use_dora": True},
}


def random_potential(
    seed: int = 0,
    targets: Sequence[str] = ("energy",),
    dtype: torch.dtype = torch.float64,
    **hypers: Any,
) -> Potential:
    """A potential none of whose weights, baselines and scales is a default."""
    torch.manual_seed(seed)
    options = ModelOptions.model_validate({**SMALL, **hypers})
    model = Potential(options, SPECIES, [TargetSpec(name) for name in targets]).to(dtype)
    with torch.no_grad():
        for parameter in model.network.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    for index, name in enumerate(targets):
        model.composition.set(name, 5.0 * torch.randn(len(SPECIES), dtype=torch.float64))
        model.scale.set(name, 2.0 + index)
    return model.eval()


#: One target of each form, none of them an energy of structures.
PROPERTIES = (
    TargetSpec("gap", "gap", intensive=True),
    TargetSpec("dos", "", "1/eV", num_outputs=2),
    TargetSpec("charges", "charge", "e", per_atom=True),
    TargetSpec("dipole", "dipole", "D", "vector", num_outputs=3),
    TargetSpec("polarizability", "", "A^3", "tensor", num_outputs=9),
    TargetSpec("dipoles", "", "D", "vector", per_atom=True, num_outputs=6),
    TargetSpec("non_conservative_force", "force", "eV/A", "vector", per_atom=True, num_outputs=3),
    TargetSpec(
        "non_conservative_stress", "pressure", "eV/A^3", "tensor", num_outputs=9, per_volume=True
    ),
)


def property_potential(seed: int = 0, **hypers: Any) -> Potential:
    """A random potential with an energy and all :data:`PROPERTIES`."""
    model = random_potential(seed, **hypers)
    torch.manual_seed(seed + 1)
    for index, spec in enumerate(PROPERTIES):
        model.add_target(spec)
        model.scale.set(spec.name, 1.0 + 0.1 * index)
        columns = (spec.num_subtargets,) if spec.num_subtargets > 1 else ()
        if spec.rank == 0:
            baselines = torch.randn(len(SPECIES), *columns, dtype=torch.float64)
            model.composition.set(spec.name, baselines)
        if spec.per_atom:
            factors = 0.5 + torch.rand(len(SPECIES), spec.num_subtargets, dtype=torch.float64)
            model.scale.set_relative(spec.name, factors)
    return model.eval()


def with_last_layer(model: Potential, target: str = "energy", members: int = 3) -> Potential:
    """Give a model a random last-layer uncertainty (LLPR), in place."""
    width = model.network.last_layer_width
    draw = torch.Generator().manual_seed(7)
    features = torch.randn(5 * width, width, generator=draw, dtype=torch.float64)
    covariance = features.T @ features
    weights = torch.randn(members, width, generator=draw, dtype=torch.float64)
    fingerprint = target_fingerprints(model, [target])[target]
    model.set_uncertainty(
        target, LastLayer(covariance, cholesky_of(covariance), 1.7, weights, fingerprint)
    )
    return model


def trained_adapter(model: Potential, seed: int = 1, **config: Any) -> Potential:
    """Put an adapter into a model and move it, and the heads beside it, away from the start."""
    torch.manual_seed(seed)
    inject(model, AdapterConfig(**{"rank": 2, "alpha": 3.0, **config}))
    with torch.no_grad():
        for parameter in model.network.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    for target in config.get("targets", ("energy",)):
        model.composition.set(target, model.composition.get(target) + 0.5)
        model.scale.set(target, 1.1 * model.scale.get(target))
    return model.eval()


def starting_model(base: Potential, config: AdapterConfig) -> Potential:
    """What an adapter starts from, as a plain model: the base, rounded where it is quantised."""
    if config.quant_bits is None:
        return base
    fresh = copy.deepcopy(base)
    inject(fresh, config)
    return merged_copy(fresh)


def ethanol() -> Atoms:
    """A molecule, off its symmetric geometry."""
    atoms = molecule("CH3CH2OH")
    atoms.rattle(0.05, seed=1)
    return atoms


def crystal() -> Atoms:
    """A triclinic crystal of four atoms whose cell is smaller than the models' cutoff."""
    atoms = bulk("SiC", "zincblende", a=4.36) * (2, 1, 1)
    strain = np.eye(3) + 0.03 * np.random.default_rng(2).normal(size=(3, 3))
    atoms.set_cell(atoms.cell.array @ strain, scale_atoms=True)
    atoms.rattle(0.05, seed=2)
    return atoms


def slab() -> Atoms:
    """Four atoms, periodic in two directions only."""
    atoms = Atoms("SiOCH", [[0, 0, 5], [1.5, 0.2, 5.5], [0.3, 1.6, 6], [1.2, 1.4, 7]])
    atoms.set_cell([[3.1, 0.2, 0], [0.1, 3.3, 0], [0, 0, 15]])
    atoms.pbc = (True, True, False)
    return atoms


def lone_atom() -> Atoms:
    """One atom without neighbours."""
    return Atoms("O", positions=[[0.3, 0.2, 0.1]])


def apart() -> Atoms:
    """A molecule, and one atom beyond the reach of everything."""
    return Atoms("OHHC", [[0, 0, 0], [0.8, 0.6, 0], [-0.8, 0.6, 0], [0, 0, 30]])


def all_structures() -> dict[str, Atoms]:
    """One of every kind."""
    made = (ethanol, crystal, slab, lone_atom, apart)
    return {make.__name__: make() for make in made}


def heat(atoms: Atoms, temperature: float) -> None:
    """Give the atoms Maxwell-Boltzmann momenta, always the same ones."""
    width = np.sqrt(atoms.get_masses() * units.kB * temperature)
    atoms.set_momenta(np.random.default_rng(0).normal(size=(len(atoms), 3)) * width[:, None])
