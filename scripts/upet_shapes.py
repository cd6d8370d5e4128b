"""Models with the shapes of upet's, made by metatrain, and each command run with them.

    python scripts/upet_shapes.py make FOLDER [NAME...]    # needs metatrain, of any release since 2025.9
    python scripts/upet_shapes.py take FOLDER [NAME...]    # needs metatrain 2026.4 for the way back

No published file can be had everywhere, so these have what the published ones have: the sizes of upet 0.3.1's
documentation (XS and S whole, M to XL with the same structure at small widths), its numbers of elements, direct
heads, variants and the uncertainty around them, and random weights. ``make`` writes NAME.ckpt and what metatrain
predicts; ``take`` compares our predictions with that, runs info, inspect, eval, train (lora, full, heads), md and
export both ways, and prints a table.
"""  # noqa: E501

from __future__ import annotations

import contextlib
import copy
import inspect
import json
import os
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.emt import EMT
from ase.io import write

#: Width, GNN layers, attention layers, cutoff, neighbours, and neighbours of PET-MAD 1.6. Nodes are
#: four times as wide as edges and feed-forward layers twice, as the numbers of parameters in the
#: same documentation (4.5, 25.9, 109, 255, 730 million) show.
SIZES = {
    "xs": (128, 2, 1, 7.5, 8, 16),
    "s": (256, 3, 1, 8.0, 16, 24),
    "m": (384, 3, 2, 8.5, 24, 32),
    "l": (512, 4, 2, 9.0, 32, 32),
    "xl": (640, 5, 3, 10.0, 40, 40),
}
_NARROW = 32
_OLD = {
    "normalization": "LayerNorm", "activation": "SiLU", "transformer_type": "PostLN",
    "featurizer_type": "residual", "cutoff_function": "Cosine", "cutoff_width": 0.2,
}  # fmt: skip
_ORGANIC = [1, 5, 6, 7, 8, 9, 14, 15, 16, 17, 35, 53]
_DIRECT = ("non_conservative_forces", "non_conservative_stress")


@dataclass(frozen=True)
class Shape:
    """What one published model is like."""

    size: str
    species: list[int]
    direct: bool = True
    wrapped: bool = False
    whole: bool = False
    mad: bool = False
    variants: tuple[str, ...] = ()
    old: bool = False


_ALL = list(range(1, 103))
_MATERIALS = list(range(1, 90))
_SPICE = [1, 3, 5, 6, 7, 8, 9, 11, 12, 14, 15, 16, 17, 19, 20, 35, 53]
SHAPES = {
    "pet-mad-xs": Shape("xs", _ALL, wrapped=True, whole=True, mad=True),
    "pet-mad-s": Shape("s", _ALL, wrapped=True, whole=True, mad=True),
    "pet-mad-s-old": Shape("s", list(range(1, 86)), direct=False, wrapped=True, old=True),
    "pet-mad-m": Shape("m", _ALL, mad=True),
    "pet-omat-m": Shape("m", _MATERIALS),
    "pet-omat-l": Shape("l", _MATERIALS, variants=("energy/finetune",)),
    "pet-oam-xl": Shape("xl", _MATERIALS),
    "pet-spice-l": Shape("l", _SPICE, direct=False),
    "pet-omol-s": Shape("s", list(range(1, 84))),
    "pet-mols-s": Shape("s", _ORGANIC, direct=False, wrapped=True),
}


def structures(shape: Shape) -> list[Atoms]:
    """Small ones with labels of ASE's EMT, which is no serious theory."""
    rng = np.random.default_rng(0)
    frames = [molecule("CH3CH2OH") for _ in range(6)]
    if 29 in shape.species:
        frames += [bulk("Cu", cubic=True) for _ in range(4)]
    for atoms in frames:
        atoms.positions += 0.08 * rng.normal(size=atoms.positions.shape)
        atoms.calc = EMT()
        atoms.get_potential_energy()
        atoms.get_forces()
    return frames


def hypers(shape: Shape, known: dict[str, Any], width: int | None = None) -> dict[str, Any]:
    """The model's options, of those that this release of metatrain knows."""
    whole, gnn, attention, cutoff, neighbours, of_mad = SIZES[shape.size]
    width = width or (whole if shape.whole else _NARROW)
    wanted: dict[str, Any] = {
        "cutoff": cutoff, "d_pet": width, "d_node": 4 * width, "d_head": width,
        "d_feedforward": 2 * width, "num_heads": 8, "num_gnn_layers": gnn,
        "num_attention_layers": attention,
        "num_neighbors_adaptive": of_mad if shape.mad else neighbours,
        "adaptive_cutoff_method": "solver" if shape.mad else "grid",
    }  # fmt: skip
    if shape.old:
        wanted |= {"cutoff": 4.5, "num_gnn_layers": 2, "num_attention_layers": 2, **_OLD}
        wanted |= {"d_node": width, "num_neighbors_adaptive": None}
    return {**copy.deepcopy(known), **{k: v for k, v in wanted.items() if k in known}}


def make(name: str, folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write the checkpoint of a shape and what metatrain predicts with it."""
    from importlib.metadata import version

    from metatrain.pet import PET
    from metatrain.utils.architectures import get_default_hypers
    from metatrain.utils.data import DatasetInfo
    from metatrain.utils.data.target_info import get_energy_target_info, get_generic_target_info
    from omegaconf import OmegaConf

    shape = SHAPES[name]
    torch.manual_seed(len(name))
    energy = OmegaConf.create({"quantity": "energy", "unit": "eV"})
    named = "target_name" in inspect.signature(get_energy_target_info).parameters  # since 2025.10
    infos = {
        target: get_energy_target_info(*([target] if named else []), energy, True, True)
        for target in ("energy", *shape.variants)
    }
    kinds = {_DIRECT[0]: (1, True, "force", "eV/A"), _DIRECT[1]: (2, False, "pressure", "eV/A^3")}
    for target, (rank, per_atom, quantity, unit) in kinds.items() if shape.direct else ():
        given = {
            "quantity": quantity, "unit": unit, "per_atom": per_atom, "num_subtargets": 1,
            "sample_kind": "atom" if per_atom else "system", "type": {"cartesian": {"rank": rank}},
        }  # fmt: skip
        infos[target] = get_generic_target_info(
            *([target] if named else []), OmegaConf.create(given)
        )
    info = DatasetInfo(length_unit="angstrom", atomic_types=shape.species, targets=infos)
    model = PET(hypers(shape, get_default_hypers("pet")["model"]), info).eval().to(dtype)
    content = _content(model, shape)
    torch.save(content, folder / f"{name}.ckpt")
    predicted = [_predicted(model, atoms, shape) for atoms in structures(shape)]
    facts = {
        "metatrain": version("metatrain"),
        "format": content.get("wrapped_model_checkpoint", content)["model_ckpt_version"],
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "predicted": predicted,
    }
    (folder / f"{name}.json").write_text(json.dumps(facts))
    print(name, facts["metatrain"], facts["format"], f"{facts['parameters']:,}", flush=True)


def _content(model: Any, shape: Shape) -> dict[str, Any]:
    """What metatrain's trainer writes after an epoch."""
    content = model.get_checkpoint()
    content.update(epoch=1, best_epoch=1, best_metric=0.5)
    if not shape.wrapped:
        return content
    try:
        from metatrain.llpr import LLPRUncertaintyModel
    except ImportError:  # before 2025.10 the wrapper was no architecture
        return content
    from metatrain.utils.architectures import get_default_hypers

    options = get_default_hypers("llpr")["model"]
    if "num_ensemble_members" in options:
        options["num_ensemble_members"] = {"energy": 4}
    wrapper = LLPRUncertaintyModel(options, model.dataset_info)
    wrapper.set_wrapped_model(model)
    with torch.no_grad():
        for key, value in wrapper.named_buffers():
            if not key.startswith("model.") and value.is_floating_point():
                torch.nn.init.eye_(value) if value.ndim == 2 else value.fill_(1.0)
    content = wrapper.get_checkpoint()
    content |= {"trainer_ckpt_version": 1, "train_hypers": {}, "best_metric": None}
    return content


def _predicted(model: Any, atoms: Atoms, shape: Shape) -> dict[str, Any]:
    """Energy and forces of metatrain's model, in its own precision."""
    from metatomic.torch import ModelOutput, systems_to_torch
    from metatrain.utils.neighbor_lists import get_system_with_neighbor_lists

    bare = Atoms(atoms.numbers, atoms.positions, cell=atoms.cell, pbc=atoms.pbc)
    dtype = next(model.parameters()).dtype
    system = systems_to_torch([bare], dtype=dtype, positions_requires_grad=True)[0]
    system = get_system_with_neighbor_lists(system, model.requested_neighbor_lists())
    outputs = {"energy": ModelOutput(quantity="energy", unit="eV", per_atom=False)}
    if shape.direct:
        outputs[_DIRECT[0]] = ModelOutput(quantity="force", unit="eV/A", per_atom=True)
    found = model([system], outputs)
    energy = found["energy"].block().values.sum()
    energy.backward()
    result = {"energy": float(energy), "forces": (-system.positions.grad).tolist()}
    if shape.direct:
        result["direct"] = found[_DIRECT[0]].block().values.squeeze(-1).tolist()
    return result


def take(name: str, folder: Path) -> dict[str, str]:
    """Run each command with a model; a row of the table."""
    shape, facts = SHAPES[name], json.loads((folder / f"{name}.json").read_text())
    work = folder / name
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    checkpoint, data = folder / f"{name}.ckpt", work / "data.xyz"
    frames = structures(shape)
    write(data, frames, format="extxyz")
    row = {"shape": name, "format": f"{facts['format']} ({facts['metatrain']})",
           "parameters": f"{facts['parameters'] / 1e6:.2f} M"}  # fmt: skip
    found = differences(checkpoint, frames, facts["predicted"])
    row["difference"] = ", ".join(f"{value:.0e}" for value in found.values())
    steps = {
        "info": ["info", checkpoint],
        "inspect": ["inspect", data, "-c", checkpoint, "--seconds", "5"],
        "eval": ["eval", checkpoint, data, "--target", "energy"],
        "md": ["md", checkpoint, data, "--index", "0", "--target", "energy", "--steps", "3",
               "--ensemble", "nve", "-o", work / "md"],
    }  # fmt: skip
    for method in ("lora", "full", "heads"):
        (work / f"{method}.yaml").write_text(_options(data, method))
        steps[method] = ["train", work / f"{method}.yaml", "-c", checkpoint, "-o", work / method]
    tuned = work / "lora" / "best_model.ckpt"
    steps["export .pt"] = ["export", tuned, "-o", work / "tuned.pt"]
    steps["export .ckpt"] = ["export", tuned, "-o", work / "tuned.ckpt"]
    for step, arguments in steps.items():
        row[step] = _run(work / f"{step.replace(' ', '')}.log", [str(one) for one in arguments])
    row["metatrain reads it"] = _way_back(tuned, work / "tuned.ckpt", frames[:2], shape)
    return row


def _options(data: Path, method: str) -> str:
    return f"""
architecture:
  name: pet
  training: {{num_epochs: 1, batch_size: 4, finetune: {{method: {method}}}}}
training_set:
  systems: {{read_from: {data}, length_unit: angstrom}}
  targets: {{energy: {{key: energy, unit: eV, forces: {{key: forces}}}}}}
validation_set: 0.2
test_set: 0.2
device: cpu
"""


def _run(log: Path, arguments: list[str]) -> str:
    """Run a command and say how it went."""
    from pet_finetune.cli import main
    from pet_finetune.log import setup_logging

    start = time.perf_counter()
    with log.open("w") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        try:
            status = main(["--debug", *arguments])
        except BaseException as error:  # noqa: BLE001 - all that can go wrong is what is looked for
            return f"{type(error).__name__}: {str(error).splitlines()[0][:150]}"
        finally:
            setup_logging("ERROR")
    return f"{time.perf_counter() - start:.0f} s" if status == 0 else f"status {status}"


def differences(
    checkpoint: Path, frames: list[Atoms], predicted: list[dict[str, Any]]
) -> dict[str, float]:
    """The largest differences to metatrain's energies, forces and direct forces."""
    from pet_finetune import PETCalculator

    most = {"energy": 0.0, "forces": 0.0}
    calculators = {"forces": PETCalculator(checkpoint, target="energy", device="cpu")}
    if "direct" in predicted[0]:
        calculators["direct"] = PETCalculator(
            checkpoint, target="energy", device="cpu", non_conservative="forces"
        )
    for atoms, expected in zip(frames, predicted, strict=True):
        for kind, calculator in calculators.items():
            found = calculator.get_property("forces", atoms)
            if kind == "direct":
                expected["direct"] = np.array(expected["direct"])
                expected["direct"] -= expected["direct"].mean(0)  # as calculators do
            most[kind] = max(
                most.get(kind, 0.0), float(np.abs(found - np.array(expected[kind])).max())
            )
            energy = calculator.get_property("energy", atoms)
            most["energy"] = max(most["energy"], abs(energy - expected["energy"]))
    return most


def _way_back(tuned: Path, exported: Path, frames: list[Atoms], shape: Shape) -> str:
    """The largest differences of metatrain's predictions with the exported file to ours."""
    from metatrain.utils.io import load_model

    from pet_finetune import PETCalculator

    if not exported.exists():
        return "no file"
    model = load_model(str(exported)).eval()
    calculator = PETCalculator(tuned, device="cpu")
    most = 0.0
    for atoms in frames:
        forces = _predicted(model, atoms, Shape(shape.size, shape.species, direct=False))["forces"]
        found = calculator.get_property("forces", atoms)
        most = max(most, float(np.abs(found - np.array(forces)).max()))
    return f"{most:.0e}"


def main() -> None:
    action, folder, *names = sys.argv[1:]
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    rows = []
    for name in names or list(SHAPES):
        if action == "make":
            make(name, place)
            continue
        rows.append(take(name, place))
        print(json.dumps(rows[-1], indent=1), flush=True)
    if rows:
        print("| " + " | ".join(rows[0]) + " |\n|" + "---|" * len(rows[0]))
        for row in rows:
            print("| " + " | ".join(row.values()) + " |")


if __name__ == "__main__":
    main()
