"""Writing a model as the TorchScript file that every engine with metatomic's interface reads."""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from metatomic.torch import AtomisticModel, ModelCapabilities, ModelMetadata, ModelOutput

from pet_finetune.errors import CheckpointError
from pet_finetune.files import check_room, replacing
from pet_finetune.keys import TargetSpec
from pet_finetune.model.potential import Potential

from .interface import ExportedPotential
from .targets import uncertainty_outputs

__all__ = ["interaction_range", "write_model"]

# Of the architecture.
_PAPER = "https://arxiv.org/abs/2305.19302"
_DESCRIPTION = (
    "A PET interatomic potential, written by pet-finetune. Energies in eV, lengths in angstrom."
)


def interaction_range(potential: Potential) -> float:
    """How far away an atom can lie that the energy of an atom depends on, Angstrom.

    Each GNN layer looks one cutoff further. The ``feedforward`` featurizer reads out messages that
    hold what the neighbour made of its own surroundings: one more; the radius of an adaptive cutoff
    depends on the surroundings of both atoms: one more. An engine that splits its box between
    processors hands each of them the atoms within this range. It is
    infinite with long-range features, as metatomic asks for: they see the whole structure.
    """
    hypers = potential.hypers
    if hypers.long_range.enable:
        return math.inf
    steps = hypers.num_gnn_layers
    steps += hypers.featurizer_type == "feedforward"
    steps += hypers.num_neighbors_adaptive is not None
    return float(max(steps * hypers.cutoff, potential.cutoff))


def write_model(
    path: Path,
    potentials: Sequence[Potential],
    outputs: Mapping[str, str],
    name: str,
    authors: Sequence[str] = (),
    card: Mapping[str, str] | None = None,
    check: Callable[[Path], None] | None = None,
    *,
    dtype: torch.dtype | None = None,
    calibration: float = 1.0,
) -> None:
    """Write a model in one step: the whole new file is there, or what was there before.

    Args:
        path: the file; its folder is made when missing.
        potentials: without adapters, on the CPU, in the floating type that the networks are to
            have; one, or the members of a committee. They are given up.
        outputs: as for :class:`ExportedPotential`.
        name: of the model.
        authors: of the model.
        card: what else the file says of itself.
        check: is shown the new file before it takes its place, and raises if it is wrong.
        dtype: floating type of what engines give and get; None for that of the networks.
        calibration: as for :class:`ExportedPotential`.

    Raises:
        CheckpointError: the file cannot be written.
    """
    first = potentials[0]
    metadata = ModelMetadata(
        name=name,
        description=_DESCRIPTION,
        authors=list(authors),
        references={"architecture": [_PAPER]},
        extra=dict(card or {}),
    )
    described = {output: _described(first.target(of)) for output, of in outputs.items()}
    for names in uncertainty_outputs(potentials, outputs):
        described |= {name: _described(first.target(outputs[of])) for of, name in names.items()}
    capabilities = ModelCapabilities(
        outputs=described,
        atomic_types=list(first.species),
        interaction_range=interaction_range(first),
        length_unit="angstrom",
        supported_devices=["cuda", "cpu"],
        dtype=str(dtype or first.dtype).removeprefix("torch."),
    )
    module = ExportedPotential([one.eval() for one in potentials], outputs, calibration)
    model = AtomisticModel(module.eval(), metadata, capabilities)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        check_room(path.parent, sum(t.nbytes for t in module.state_dict().values()))
        with replacing(path) as partial:
            with _no_extensions(), _written_by_python():
                model.save(str(partial))
            if check is not None:
                check(partial)
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or str(error).split("\n", 1)[0]
        raise CheckpointError(
            f"{path}: the model cannot be written ({reason}). An earlier file of "
            "this name is as it was. Check that the folder is writable and has space left."
        ) from error


def _described(spec: TargetSpec) -> ModelOutput:
    """What metatomic is told of an output."""
    try:
        empty = ModelOutput(unit=spec.unit)
    except (RuntimeError, ValueError):  # a unit of the user's own; engines convert none then
        empty = ModelOutput(unit="")
    description = spec.description or spec.form
    # Of atoms means that sums over them can be asked for as well.
    kind = "system" if spec.per_volume else "atom"
    return ModelOutput(unit=empty.unit, sample_kind=kind, description=description)


@contextlib.contextmanager
def _no_extensions() -> Iterator[None]:
    """Hide libraries loaded into torch, such as our kernels.

    metatomic writes down all that are loaded and wants them wherever the model runs; the exported
    network uses none.
    """
    loaded: set[str] = torch.ops.loaded_libraries
    hidden = set(loaded)
    loaded.clear()
    try:
        yield
    finally:
        loaded.update(hidden)


@contextlib.contextmanager
def _written_by_python() -> Iterator[None]:
    """Let torch make TorchScript files in memory, and Python write them.

    torch's own writer, in C++, ends the whole process where a write fails (a full disk, a quota,
    a limit of file sizes), and metatomic gives it nothing but a path.
    """
    save = torch.jit.save

    def through_memory(module: Any, file: str, _extra_files: dict[str, str] | None = None) -> None:
        content = io.BytesIO()
        save(module, content, _extra_files)
        Path(file).write_bytes(content.getbuffer())

    torch.jit.save = through_memory  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.jit.save = save
