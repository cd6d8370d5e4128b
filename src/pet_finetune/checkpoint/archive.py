"""Checkpoint files opened without PyTorch's unpickler, and the potential made of their parts.

A file is the zip archive that ``torch.save`` writes. Inside are ``<root>/data.pkl`` (read by
:mod:`pet_finetune.checkpoint.safe_pickle`), one entry ``<root>/data/<key>`` for each storage, and
``<root>/byteorder``. Entries are stored uncompressed, which is also required here: a compressed
entry could unfold to more than memory holds.
"""

from __future__ import annotations

import os
import sys
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ValidationError
from torch import Tensor

from pet_finetune.config.run_options import ModelOptions
from pet_finetune.errors import CheckpointError, damage_explained
from pet_finetune.hub import find_model
from pet_finetune.keys import TargetSpec
from pet_finetune.model.potential import Potential

from .safe_pickle import Inert, StoredTensor, read_pickle

#: Bytes read at a time.
_CHUNK = 1 << 24

#: How files that are mistaken for a checkpoint begin, and what to do about each.
_NOT_AN_ARCHIVE: tuple[tuple[bytes, str], ...] = (
    (b"\x1f\x8b", "it is gzip-compressed; unpack it first (gunzip)"),
    (b"version https://git-lfs", "it is a Git LFS pointer, not the file; run 'git lfs pull'"),
    (b"<", "it is a web page or XML, probably a download that failed"),
    (b"\x80", "it is a bare pickle or the format of PyTorch before 1.6; re-save it there"),
)


class TorchArchive:
    """A file written by ``torch.save``; use as a context manager."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Open the file of a path or an address and check it; nothing is unpickled yet.

        Raises:
            CheckpointError: if the file is missing, a folder, unreadable, damaged or of another
                kind; the message says which.
        """
        self.path = find_model(path)
        self._zip = _open_zip(self.path)
        try:
            with damage_explained(self.damaged):
                self._root = self._find_root()
                self._swap_bytes = self._byteorder() != sys.byteorder
        except CheckpointError:
            self._zip.close()
            raise

    def __enter__(self) -> TorchArchive:
        return self

    def __exit__(self, *exception: object) -> None:
        self._zip.close()

    def content(self) -> Any:
        """Read what was saved, with :class:`StoredTensor` in the place of tensors.

        Raises:
            CheckpointError: if the pickle is damaged or names anything not allowed.
        """
        return read_pickle(bytes(self._read(f"{self._root}/data.pkl")), str(self.path))

    def filled(self, content: Any) -> Any:
        """Result of :meth:`content` with the tensors in place of their records.

        Raises:
            CheckpointError: if one is missing or damaged, or it holds what is not plain.
        """
        if isinstance(content, StoredTensor):
            return self.tensor(content)
        if isinstance(content, dict):
            return {key: self.filled(value) for key, value in content.items()}
        if isinstance(content, list | tuple):
            return type(content)(self.filled(value) for value in content)
        if isinstance(content, Inert):
            raise self.damaged(f"it holds an object of type {content.name}")
        return content

    def tensor(self, stored: StoredTensor) -> torch.Tensor:
        """Read one tensor from the archive, on the CPU, with memory of its own.

        Raises:
            CheckpointError: if its storage is missing, too short or damaged.
        """
        extent = 1 + sum((n - 1) * step for n, step in zip(stored.size, stored.stride, strict=True))
        elements = 1
        for n in stored.size:
            elements *= n
        if elements == 0:
            return torch.empty(stored.size, dtype=stored.dtype)
        # The second condition: a stride of zero could repeat one number beyond all memory.
        if stored.offset + extent > stored.storage_size or elements > stored.storage_size:
            raise self.damaged(f"a tensor reaches beyond its storage {stored.key!r}")
        raw = self._read(f"{self._root}/data/{stored.key}")  # compared with its checksum
        itemsize = stored.dtype.itemsize
        if len(raw) != stored.storage_size * itemsize:
            raise self.damaged(f"storage {stored.key!r} has {len(raw)} bytes, which is not right")
        if self._swap_bytes:
            for start in range(itemsize // 2):
                end = itemsize - 1 - start
                raw[start::itemsize], raw[end::itemsize] = raw[end::itemsize], raw[start::itemsize]
        flat = torch.frombuffer(raw, dtype=stored.dtype)
        return flat.as_strided(stored.size, stored.stride, stored.offset).clone()

    def tensors(self, state: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """Read all tensors among the values of ``state``; other values are left out."""
        return {k: self.tensor(v) for k, v in state.items() if isinstance(v, StoredTensor)}

    def _find_root(self) -> str:
        names = self._zip.namelist()
        roots = [name.removesuffix("/data.pkl") for name in names if name.endswith("/data.pkl")]
        root = min(roots, key=len, default=None)
        folder = names[0].split("/")[0] if names else ""
        if any(n.startswith((f"{folder}/code/", f"{folder}/constants.pkl")) for n in names):
            raise CheckpointError(
                f"{self.path}: this is an exported model (TorchScript, as `export` and metatomic "
                "write it), made for simulation engines. Give the checkpoint (.ckpt) that it was "
                "exported from. ASE runs the file itself with metatomic_ase.MetatomicCalculator."
            )
        if root is None or "/" in root:
            raise CheckpointError(
                f"{self.path}: this zip archive is no checkpoint: it has no data.pkl inside. "
                "A checkpoint is one file, e.g. best_model.ckpt, written by pet-finetune or "
                "metatrain."
            )
        return root

    def _byteorder(self) -> str:
        name = f"{self._root}/byteorder"
        if name not in self._zip.NameToInfo:
            return "little"
        return bytes(self._read(name)).decode("ascii", "replace").strip()

    def _read(self, name: str) -> bytearray:
        info = self._zip.NameToInfo.get(name)
        if info is None:
            raise self.damaged(f"the entry {name!r} is missing")
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 0x1:
            raise self.damaged(f"the entry {name!r} is compressed, as PyTorch never writes it")
        if info.file_size > self.path.stat().st_size:
            raise self.damaged(f"the entry {name!r} claims to be longer than the file")
        buffer = bytearray(info.file_size)
        with damage_explained(self.damaged), self._zip.open(info) as entry:
            filled = 0
            while chunk := entry.read(_CHUNK):
                buffer[filled : filled + len(chunk)] = chunk
                filled += len(chunk)
        if filled != info.file_size:
            raise self.damaged(f"the entry {name!r} ends early")
        return buffer

    def damaged(self, why: str) -> CheckpointError:
        """The error to raise where what the file holds cannot be right."""
        return CheckpointError(
            f"{self.path}: the file is damaged or incomplete ({why}). Copy or download it again."
        )


def _open_zip(path: Path) -> zipfile.ZipFile:
    try:
        with path.open("rb") as file:
            start = file.read(64)
        if not start:
            raise CheckpointError(f"{path}: the file is empty. Copy or download it again.")
        return zipfile.ZipFile(path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error}).") from error
    except CheckpointError:
        raise
    except Exception as error:  # zipfile raises whatever a damaged directory leads to
        if start.startswith(b"PK\x03\x04"):
            raise CheckpointError(
                f"{path}: the file is damaged or incomplete (its end is missing or changed). "
                "Copy or download it again."
            ) from error
        why = next((text for magic, text in _NOT_AN_ARCHIVE if start.startswith(magic)), None)
        raise CheckpointError(
            f"{path}: not a checkpoint: {why or 'it is not a zip archive written by torch.save'}."
        ) from error


_DEEPEST = 30


def plain_value(
    value: Any,
    where: str,
    error: Callable[[str], Exception],
    keep: tuple[type, ...] = (),
    depth: int = 0,
) -> Any:
    """Return a copy of ``value`` made of built-in types only; paths become text.

    Args:
        value: anything.
        where: what the value is called, e.g. ``"training.optimizer"``.
        error: makes the exception that is raised for a value of another type.
        keep: further types that are passed through, e.g. tensors.
        depth: how deep in the whole value this one lies.
    """
    if value is None or type(value) in (bool, int, float, str, bytes) or isinstance(value, keep):
        return value
    if depth > _DEEPEST:
        raise error(f"{where} is nested more than {_DEEPEST} levels deep")
    if isinstance(value, Mapping):
        for key in value:
            if type(key) not in (str, int):
                raise error(f"{where} has the key {key!r}, which is neither text nor an integer")
        return {
            key: plain_value(item, f"{where}.{key}", error, keep, depth + 1)
            for key, item in value.items()
        }
    if isinstance(value, (list, tuple)):
        items = [
            plain_value(item, f"{where}[{index}]", error, keep, depth + 1)
            for index, item in enumerate(value)
        ]
        return tuple(items) if isinstance(value, tuple) else items
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    # numpy's numbers, and subclasses of the built-in ones.
    for kind in (bool, int, float, str):
        if isinstance(value, kind):
            return kind(value)
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        return plain_value(value.item(), where, error, keep, _DEEPEST)
    raise error(f"{where} is of type {type(value).__module__}.{type(value).__qualname__}")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint file, opened."""

    #: The potential, in eV and angstrom, on the CPU, in evaluation mode.
    model: Potential
    #: Who wrote the file.
    kind: Literal["pet-finetune", "metatrain"]
    #: Where the weights come from, as far as the file says.
    provenance: dict[str, Any]
    #: What is needed to resume the run that wrote the file; None where it cannot be resumed.
    training: dict[str, Any] | None
    path: Path
    #: What the user should know about the conversion, one line each; logged as well.
    notices: tuple[str, ...] = ()


def model_options(values: Mapping[str, Any], where: str) -> ModelOptions:
    """Check the hyperparameters found in a file."""
    try:
        return ModelOptions.model_validate(dict(values))
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}" for problem in error.errors()
        )
        raise CheckpointError(
            f"{where}: the hyperparameters in this file are not those of a PET this version "
            f"knows ({problems}). Update pet-finetune if the file is newer."
        ) from error


def build_potential(
    hypers: ModelOptions,
    species: Sequence[int],
    targets: Iterable[TargetSpec],
    network: Mapping[str, Tensor],
    *,
    composition: Mapping[str, Tensor],
    scale: Mapping[str, float | Tensor],
    relative: Mapping[str, Tensor] | None = None,
    radii: Tensor | None,
    where: str,
) -> Potential:
    """Build a potential and fill it; the global random state is left as it was.

    Args:
        hypers: sizes and kinds of the network's parts.
        species: atomic numbers, ascending.
        targets: what it predicts.
        network: the state dict of the network, names without prefix.
        composition: eV, ``[n_species]``, for each target that has a baseline.
        scale: factor for each target.
        relative: factors beside it for each element and value, of the targets that have some.
        radii: ZBL's covalent radii, ``[n_species]`` Å; None for ASE's table.
        where: what to call the file in messages.

    Raises:
        CheckpointError: if weights are missing, too many, or of another shape.
    """
    if any(not 1 <= z <= 150 for z in species) or len(set(species)) != len(species) or not species:
        raise CheckpointError(f"{where}: the list of chemical elements is damaged: {species}.")
    _check_sizes(hypers, network, where)
    with torch.random.fork_rng(devices=[]):
        try:
            model = Potential(hypers, species, targets)
        except (ValueError, KeyError, RuntimeError, ZeroDivisionError) as error:
            raise CheckpointError(f"{where}: no PET can be built from it ({error}).") from error
    floating = [weight.dtype for weight in network.values() if weight.is_floating_point()]
    if len(set(floating)) != 1:
        raise CheckpointError(
            f"{where}: the weights have {len(set(floating))} floating types "
            f"({', '.join(sorted(map(str, set(floating))))}), and one is needed."
        )
    model.to(floating[0])
    _check_names(model, network, where)
    try:
        model.network.load_state_dict(dict(network))
    except RuntimeError as error:
        reason = " ".join(str(error).split("\n\t", 1)[-1].split())
        raise CheckpointError(
            f"{where}: weights do not fit the hyperparameters in the file ({reason})."
        ) from error
    for name in model.targets:
        if name in composition:
            model.composition.set(name, composition[name])
        model.scale.set(name, scale.get(name, 1.0))
        model.scale.set_relative(name, (relative or {}).get(name))
    if model.zbl is not None and radii is not None:
        model.zbl.covalent_radii = radii.to(model.zbl.covalent_radii)
    return model.eval()


def _check_sizes(hypers: ModelOptions, network: Mapping[str, Tensor], where: str) -> None:
    """Refuse hyperparameters far beyond the weights before memory is taken for them."""
    widest = max((n for weight in network.values() for n in weight.shape), default=0)
    widths = (hypers.d_pet, hypers.d_node, hypers.d_head, hypers.d_feedforward)
    blocks = hypers.num_gnn_layers * hypers.num_attention_layers
    conditioning = max(hypers.max_charge, hypers.max_spin_multiplicity)
    if (
        max(widths) > widest
        or blocks > len(network)
        or (hypers.system_conditioning and conditioning > widest)
    ):
        raise CheckpointError(
            f"{where}: the weights in the file are fewer than its hyperparameters need."
        )


def _check_names(model: Potential, network: Mapping[str, Tensor], where: str) -> None:
    expected = model.network.state_dict().keys()
    for problem, names in (
        ("lacks weights", sorted(expected - network.keys())),
        ("has weights that no PET of its hyperparameters has", sorted(network.keys() - expected)),
    ):
        if names:
            more = f" and {len(names) - 4} more" if len(names) > 4 else ""
            raise CheckpointError(f"{where}: the file {problem}: {', '.join(names[:4])}{more}.")
