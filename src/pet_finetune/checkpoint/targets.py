"""The targets of a metatrain checkpoint: what each predicts, its baseline and its scale."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pet_finetune.checkpoint.archive import TorchArchive
from pet_finetune.checkpoint.safe_pickle import Inert, StoredTensor
from pet_finetune.checkpoint.tensormap import Block, read_tensor_map
from pet_finetune.errors import CheckpointError, UnitError
from pet_finetune.keys import TargetSpec
from pet_finetune.units import energy_to_ev

__all__ = ["StoredTarget", "usable_targets"]


@dataclass(frozen=True)
class StoredTarget:
    """A target in the package's units."""

    spec: TargetSpec
    #: ``[n_species]`` float64, eV; None when the file has no baseline for it.
    composition: Tensor | None
    scale: float


class _Unusable(Exception):
    """Why a target is left out; the rest of the checkpoint is read all the same."""


def usable_targets(
    archive: TorchArchive,
    described: Mapping[str, Inert],
    state: Mapping[str, Tensor],
    scales: Mapping[str, float],
    species: Sequence[int],
    zbl: bool,
    notices: list[str],
) -> list[StoredTarget]:
    """Convert those targets of a checkpoint that a :class:`Potential` can represent.

    :param described: metatrain's ``TargetInfo`` of each target.
    :param state: the upgraded state dict, with the buffers of baselines and scales.
    :param scales: factors of targets whose format kept them outside the buffers.
    :param species: atomic numbers, ascending.
    :param zbl: whether the model adds the ZBL repulsion (to energies in eV only).
    :param notices: one line is appended for each target that is left out or assumed about.
    :raises CheckpointError: if none is left; the message says why for each.
    """
    usable, reasons = [], []
    for name, info in described.items():
        try:
            usable.append(_convert(archive, name, info, state, scales, species, zbl, notices))
        except _Unusable as why:
            reasons.append(f"target '{name}' {why}")
    if not usable:
        raise CheckpointError(
            f"{archive.path}: the checkpoint has no target that can be used: "
            f"{'; '.join(reasons) or 'it has none at all'}."
        )
    notices.extend(f"Left out: {reason}." for reason in reasons)
    return usable


def _convert(
    archive: TorchArchive,
    name: str,
    info: Inert,
    state: Mapping[str, Tensor],
    scales: Mapping[str, float],
    species: Sequence[int],
    zbl: bool,
    notices: list[str],
) -> StoredTarget:
    block = _layout(archive, name, info)
    spec = _spec(name, info, block)
    factor = 1.0
    if spec.quantity == "energy":
        unit = str(info.get("unit") or "")
        if not unit:
            notices.append(f"Target '{name}' has no unit in the file; eV is assumed.")
        try:
            factor = energy_to_ev(unit or "eV")
        except UnitError as error:
            raise _Unusable(f"is in {unit!r}, which is no known unit of energy") from error
        if zbl and factor != 1.0:
            raise _Unusable(f"is in {unit!r}, and the ZBL repulsion is only added to eV")
    scale = scales[name] if name in scales else _scale(name, state)
    composition = _composition(name, state, spec, species)
    return StoredTarget(
        spec=spec,
        composition=None if composition is None else composition * factor,
        scale=scale * factor,
    )


def _layout(archive: TorchArchive, name: str, info: Inert) -> Block:
    """The one block that says which shape the target has."""
    layout = info.get("layout")
    stored = layout.state[0] if isinstance(layout, Inert) and layout.state else None
    if not isinstance(stored, StoredTensor):
        raise _Unusable("has no layout in the file")
    try:
        blocks = read_tensor_map(_bytes(archive.tensor(stored)))
    except ValueError as error:
        raise _Unusable(f"has a damaged layout ({error})") from error
    if len(blocks) != 1 or list(blocks[0].key) != ["_"]:
        raise _Unusable("is a spherical tensor or has several parts, which is not supported")
    return blocks[0]


_KINDS: Mapping[tuple[str, ...], Literal["scalar", "vector", "tensor"]] = {
    (): "scalar",
    ("xyz",): "vector",
    ("xyz_1", "xyz_2"): "tensor",
}


def _spec(name: str, info: Inert, block: Block) -> TargetSpec:
    kind = _KINDS.get(block.component_names)
    if kind is None or any(size != 3 for size in block.component_sizes):
        raise _Unusable(f"has the components {block.component_names}, which are not supported")
    if set(block.sample_names) - {"system", "atom"}:
        raise _Unusable("is a property of pairs of atoms, which is not supported")
    quantity = str(info.get("quantity") or "")
    outputs = block.num_properties * 3 ** len(block.component_names)
    if quantity == "energy" and outputs != 1:
        raise _Unusable(f"is an energy with {outputs} values; one is needed")
    return TargetSpec(
        name=name,
        quantity=quantity,
        unit="eV" if quantity == "energy" else str(info.get("unit") or ""),
        kind=kind,
        per_atom="atom" in block.sample_names,
        num_outputs=outputs,
        description=str(info.get("description") or ""),
        block=f"{name}___{block.key['_']}",
    )


def _scale(name: str, state: Mapping[str, Tensor]) -> float:
    """The one factor of a target; 1 where none was stored."""
    buffer = state.get(f"scaler.{name}_scaler_buffer")
    if buffer is None:
        return 1.0
    values = [float(v) for block in _blocks(buffer, "scales") for v in block.values.reshape(-1)]
    if not values or not all(math.isfinite(v) for v in values):
        raise _Unusable("has scales that are not numbers")
    if max(values) - min(values) > 1e-12 * max(map(abs, values)):
        raise _Unusable("has a scale for each element or component, which is not supported")
    return values[0]


def _composition(
    name: str, state: Mapping[str, Tensor], spec: TargetSpec, species: Sequence[int]
) -> Tensor | None:
    """Baselines per species in the target's unit, ``[n_species]`` float64."""
    buffer = state.get(f"additive_models.0.{name}_composition_buffer")
    if buffer is None:
        return None
    block = _blocks(buffer, "baselines")[0]
    if spec.num_outputs != 1:
        if not block.values.any():
            return None
        raise _Unusable("has baselines for each component, which is not supported")
    table = dict(zip(block.samples[:, 0].tolist(), block.values.reshape(-1).tolist(), strict=True))
    missing = [z for z in species if not math.isfinite(table.get(z, math.nan))]
    if missing:
        raise _Unusable(f"has no baseline for the elements {missing}")
    return torch.tensor([table[z] for z in species], dtype=torch.float64)


def _blocks(buffer: Tensor, what: str) -> list[Block]:
    try:
        blocks = read_tensor_map(_bytes(buffer))
    except ValueError as error:
        raise _Unusable(f"has damaged {what} ({error})") from error
    if not blocks:
        raise _Unusable(f"has no {what}")
    return blocks


def _bytes(buffer: Tensor) -> bytes:
    if buffer.dtype != torch.uint8 or buffer.dim() != 1:
        raise ValueError("it is not stored as bytes")
    return buffer.numpy().tobytes()
