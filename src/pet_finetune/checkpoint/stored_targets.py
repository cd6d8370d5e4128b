"""The targets of a metatrain checkpoint: what each predicts, its baseline and its scale.

metatrain keeps baselines, scales and the layout of each target as a ``TensorMap``: the bytes of an
``.mts`` file, a zip of ``keys.npy`` and, for each block, ``values.npy``, ``samples.npy``,
``properties.npy`` and ``components/<i>.npy``; labels are structured int32 arrays whose field names
are the label names (https://docs.metatensor.org/latest/core/reference/c/io.html).

These bytes come from a file nobody vouches for, so they are parsed here, with sizes checked,
rather than handed to metatensor's compiled library; that also leaves checkpoints readable with
whatever torch is installed, since the compiled library must match torch's version.
"""

from __future__ import annotations

import io
import math
import tokenize
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.lib import format as npy
from torch import Tensor

from pet_finetune.errors import CheckpointError, UnitError
from pet_finetune.keys import TargetSpec, base_name, direct_quantity
from pet_finetune.units import is_energy_unit, own_unit, to_own_unit

from .archive import TorchArchive
from .safe_pickle import Inert, StoredTensor


@dataclass(frozen=True)
class TensorBlock:
    """One block of a ``TensorMap``.

    Labels are kept as a tuple of names and an integer array ``[n_entries, n_names]``.
    """

    key: dict[str, int]
    #: ``[n_samples, *components, n_properties]``.
    values: np.ndarray[Any, Any]
    sample_names: tuple[str, ...]
    samples: np.ndarray[Any, Any]
    #: Names and lengths of the component axes.
    component_names: tuple[str, ...]
    component_sizes: tuple[int, ...]
    num_properties: int


def read_tensor_map(buffer: bytes) -> list[TensorBlock]:
    """Read the blocks of a serialized ``TensorMap``; gradients are left out.

    Raises:
        ValueError: if the bytes are not a ``TensorMap``.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(buffer)) as archive:
            key_names, keys = _labels(archive, "keys.npy")
            return [
                _block(archive, index, dict(zip(key_names, map(int, key), strict=True)))
                for index, key in enumerate(keys)
            ]
    except (zipfile.BadZipFile, KeyError, EOFError, NotImplementedError) as error:
        raise ValueError(f"not a metatensor TensorMap: {error}") from error


def _block(archive: zipfile.ZipFile, index: int, key: dict[str, int]) -> TensorBlock:
    folder = f"blocks/{index}"
    sample_names, samples = _labels(archive, f"{folder}/samples.npy")
    components: list[tuple[tuple[str, ...], np.ndarray[Any, Any]]] = []
    while f"{folder}/components/{len(components)}.npy" in archive.NameToInfo:
        components.append(_labels(archive, f"{folder}/components/{len(components)}.npy"))
    _, properties = _labels(archive, f"{folder}/properties.npy")
    values = _array(archive, f"{folder}/values.npy")
    sizes = tuple(len(entries) for _, entries in components)
    if values.shape != (len(samples), *sizes, len(properties)):
        raise ValueError(f"the values of block {index} do not fit their labels")
    return TensorBlock(
        key=key,
        values=values,
        sample_names=sample_names,
        samples=samples,
        component_names=tuple(names[0] for names, _ in components),
        component_sizes=sizes,
        num_properties=len(properties),
    )


def _labels(archive: zipfile.ZipFile, name: str) -> tuple[tuple[str, ...], np.ndarray[Any, Any]]:
    table = _array(archive, name)
    names = table.dtype.names
    if names is None or table.ndim != 1:
        raise ValueError(f"{name} holds no labels")
    columns = [table[field].astype(np.int64) for field in names]
    return tuple(names), np.stack(columns, axis=1)


def _array(archive: zipfile.ZipFile, name: str) -> np.ndarray[Any, Any]:
    """Read one ``.npy`` entry, trusting its header only as far as the bytes go."""
    info = archive.getinfo(name)
    if info.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{name} is compressed")
    file = io.BytesIO(archive.read(info))
    version = npy.read_magic(file)
    read_header = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
    if version not in read_header:
        raise ValueError(f"{name} has npy version {version}")
    try:
        shape, fortran, dtype = read_header[version](file)
    except (SyntaxError, tokenize.TokenError, RecursionError, MemoryError) as error:
        raise ValueError(f"{name} has a damaged header") from error
    data = file.read()
    expected = math.prod(shape) * dtype.itemsize
    if dtype.hasobject or fortran or expected != len(data):
        raise ValueError(f"{name} does not hold what its header says")
    return np.frombuffer(data, dtype=dtype).reshape(shape)


@dataclass(frozen=True)
class StoredTarget:
    """A target in the package's units."""

    spec: TargetSpec
    #: ``[n_species]`` or ``[n_species, num_subtargets]`` float64; None when the file has no
    #: baseline for it.
    composition: Tensor | None
    scale: float
    #: ``[n_species, num_subtargets]`` float64, factors beside ``scale``; None where all are 1.
    relative: Tensor | None = None
    #: The target's unit in the file, in ours.
    factor: float = 1.0


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

    Args:
        archive: the opened file.
        described: metatrain's ``TargetInfo`` of each target.
        state: the upgraded state dict, with the buffers of baselines and scales.
        scales: factors of targets whose format kept them outside the buffers.
        species: atomic numbers, ascending.
        zbl: whether the model adds the ZBL repulsion (to energies in eV only).
        notices: one line is appended for each target that is left out or assumed about.

    Raises:
        CheckpointError: if none is left; the message says why for each.
    """
    usable, reasons = [], []

    def converted(name: str, info: Inert) -> StoredTarget:
        spec = _spec(name, info, _layout(archive, info))
        unit = str(info.get("unit") or "")
        if not unit and spec.unit:
            notices.append(f"Target '{name}' has no unit in the file; {spec.unit} is assumed.")
        try:
            factor = to_own_unit(spec.quantity, unit)
        except UnitError as error:
            quantity = spec.quantity
            raise _Unusable(f"is in {unit!r}, which is no known unit of {quantity}") from error
        if zbl and spec.quantity == "energy" and factor != 1.0:
            raise _Unusable(f"is in {unit!r}, and the ZBL repulsion is only added to eV")
        scale, relative = scales.get(name), None
        if scale is None:
            scale, relative = _scale(name, state, spec, len(species))
        composition = _composition(name, state, spec, species)
        composition = None if composition is None else composition * factor
        return StoredTarget(spec, composition, scale * factor, relative, factor)

    for name, info in described.items():
        try:
            usable.append(converted(name, info))
        except _Unusable as why:
            reasons.append(f"target '{name}' {why}")
    if not usable:
        raise CheckpointError(
            f"{archive.path}: the checkpoint has no target that can be used: "
            f"{'; '.join(reasons) or 'it has none at all'}."
        )
    notices.extend(f"Left out: {reason}." for reason in reasons)
    return usable


def _layout(archive: TorchArchive, info: Inert) -> TensorBlock:
    """The block that defines the shape of the target."""
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


def _spec(name: str, info: Inert, block: TensorBlock) -> TargetSpec:
    kind = _KINDS.get(block.component_names)
    if kind is None or any(size != 3 for size in block.component_sizes):
        raise _Unusable(f"has the components {block.component_names}, which are not supported")
    if set(block.sample_names) - {"system", "atom"}:
        raise _Unusable("is a property of pairs of atoms, which is not supported")
    outputs = block.num_properties * 3 ** len(block.component_names)
    per_atom, unit = "atom" in block.sample_names, str(info.get("unit") or "")
    # metatrain does not look at the quantity of a direct force or stress; its name decides.
    quantity = direct_quantity(name) or str(info.get("quantity") or "")
    # Of others metatrain writes "energy" where the user named none: read as in options, no unit of
    # vectors and spectra is converted. It adds ZBL to what is one energy for each atom, too.
    is_energy = outputs == 1 and (is_energy_unit(unit) if unit else not per_atom)
    if quantity == "energy" and not is_energy and base_name(name) != "energy":
        quantity = ""
    return TargetSpec(
        name=name,
        quantity=quantity,
        unit=own_unit(quantity, unit),
        kind=kind,
        per_atom=per_atom,
        num_outputs=outputs,
        description=str(info.get("description") or ""),
        block=f"{name}___{block.key['_']}",
        # metatrain divides by the volume under this name alone, not under its variants.
        per_volume=name == "non_conservative_stress",
    )


def _scale(
    name: str, state: Mapping[str, Tensor], spec: TargetSpec, num_species: int
) -> tuple[float, Tensor | None]:
    """The factor of a target, 1 where none was stored, and those of elements and subtargets."""
    buffer = state.get(f"scaler.{name}_scaler_buffer")
    if buffer is None:
        return 1.0, None
    stored = _blocks(buffer, "scales")[0].values
    values = torch.tensor(stored.tolist(), dtype=torch.float64)
    if not values.numel() or not bool(values.isfinite().all()):
        raise _Unusable("has scales that are not numbers")
    if values.dim() != 2 or values.shape[1] != spec.num_subtargets:
        raise _Unusable("has scales for other values than its own")
    if values.shape[0] not in (1, num_species):
        raise _Unusable("has scales for other elements than the model's")
    # Bit for bit where all are the same, as they are for energies.
    size = float(values.reshape(-1)[0])
    if float(values.max() - values.min()) <= 1e-12 * float(values.abs().max()):
        return size, None
    size = float(values.abs().mean())
    return size, (values / size).expand(num_species, -1).contiguous()


def _composition(
    name: str, state: Mapping[str, Tensor], spec: TargetSpec, species: Sequence[int]
) -> Tensor | None:
    """Baselines in the target's unit, ``[n_species]`` or ``[n_species, n_values]`` float64."""
    buffer = state.get(f"additive_models.0.{name}_composition_buffer")
    if buffer is None:
        return None
    block = _blocks(buffer, "baselines")[0]
    if spec.rank:
        if not block.values.any():
            return None
        raise _Unusable("has baselines for each component, which is not supported")
    rows = block.values.reshape(len(block.samples), -1).tolist()
    table = dict(zip(block.samples[:, 0].tolist(), rows, strict=True))
    missing = [z for z in species if not all(map(math.isfinite, table.get(z, [math.nan])))]
    if missing:
        raise _Unusable(f"has no baseline for the elements {missing}")
    values = torch.tensor([table[z] for z in species], dtype=torch.float64)
    return values.squeeze(1) if spec.num_subtargets == 1 else values


def _blocks(buffer: Tensor, what: str) -> list[TensorBlock]:
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
