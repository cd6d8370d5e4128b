"""``pet-finetune convert``: any data as a set that stays on disk, in a format of metatrain's."""

from __future__ import annotations

import io
import math
import shutil
import zipfile
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase import Atoms

from pet_finetune.device import torchscript
from pet_finetune.errors import DataError
from pet_finetune.files import check_file, check_new, replacing
from pet_finetune.locks import only_one
from pet_finetune.log import get_logger
from pet_finetune.terminal import Watch

from .ase_databases import is_database
from .frame_blocks import FrameSource, stored, streamed, xyz
from .frame_files import read_file
from .metatrain_sets import VERSION, Folder, is_metatrain_set, zip_count
from .neighbors import NeighborList, edge_vectors
from .packing import identity_of, pack, set_frames
from .process_pool import in_order
from .stored import stored_neighbors

_logger = get_logger(__name__)
#: Structures that are written into a zip together.
_TOGETHER = 200
#: The columns of a neighbour list, as metatomic orders them.
_PAIR = ["first_atom", "second_atom", "cell_shift_a", "cell_shift_b", "cell_shift_c"]
_XYZ = (".xyz", ".extxyz")
#: Of files, which folders are not called like.
_ENDINGS = (*_XYZ, ".db", ".traj", ".json", ".aselmdb", ".h5", ".hdf5", ".npz", ".cif", ".pt")


@dataclass(frozen=True)
class Converted:
    """Result of a conversion.

    Attributes:
        path: the folder or zip.
        structures: how many it has.
        labels: the names of what it holds beside the structures.
        made: False where it was there already.
    """

    path: Path
    structures: int
    labels: tuple[str, ...]
    made: bool


def convert(
    source: str | Path,
    output: str | Path,
    *,
    format: str = "",
    types: Mapping[int, str] | None = None,
    labels: Collection[str] | None = None,
    neighbors: float | None = None,
    workers: int | None = 1,
) -> Converted:
    """Write the structures of a file as a set that stays on disk.

    Values keep their names and units. What was begun and stopped is gone on with, and what is there
    already is not made again.

    Args:
        source: any file that can be read; xyz, databases and metatrain's own sets are read piece by
            piece.
        output: a folder, which gets metatrain's memory-mapped arrays; or a name that ends with
            ``.zip``, for metatrain's ``DiskDataset``.
        format: ASE's name of the format, where the name of the file does not tell.
        types: elements by number of the type of atom.
        labels: names of the values that are kept; None for all.
        neighbors: cutoff of neighbour lists that are written too, in the unit of the positions.
        workers: processes that read and check; None for as many as there are cores, where that
            pays. The result is the same. With several a script needs
            ``if __name__ == "__main__":``, for they import it.

    Raises:
        DataError: the file cannot be read; the output holds something else, or cannot be written.
    """
    file, target = Path(source), Path(output)
    if not file.is_dir():
        check_file(file, "data file")
    if target.suffix != ".zip" and (target.suffix.lower() in _ENDINGS or target.is_file()):
        raise DataError(
            f"The output {str(output)!r} is to be a folder, or a file that ends with .zip: sets "
            "that stay on disk are written. For other formats there is `ase convert`."
        )
    if not target.exists():
        check_new(target, makes_folders=True)
    if neighbors is not None and not 0 < neighbors < math.inf:
        raise DataError(f"neighbors: a cutoff above 0, not {neighbors}.")
    names = None if labels is None else sorted(labels)
    with Watch(f"looking at {file}"):
        content = identity_of(file, whole=True)
    key = f"{content} {format} {sorted((types or {}).items())} {names} {neighbors} {VERSION}"
    frames = _frames_of(file, format, types)
    write = partial(pack, source=frames, names=names, cutoff=neighbors, workers=workers)
    if target.suffix == ".zip":
        done = _convert_to_zip(target, key, write, frames.workers(workers))
    else:
        made = not (target / "ns.npy").exists()
        count = write(target, key)
        done = Converted(target, count, tuple(Folder(target).labels), made)
    if missing := sorted({*(names or ())} - {*done.labels}):
        _logger.warning("no frame of %s has %s as numbers", source, ", ".join(missing))
    return done


def _frames_of(file: Path, format: str, types: Mapping[int, str] | None) -> FrameSource:
    """Source of the frames of a file."""
    if is_metatrain_set(file) and file.is_dir():
        return stored(file)
    if is_metatrain_set(file) or is_database(file):
        return set_frames(file)
    if file.suffix.lower() in _XYZ and format in ("", "extxyz", "xyz"):
        return xyz(file, types or {}, plain=format == "xyz")
    content = read_file(file, format, types)
    sound = [k for k in range(len(content.frames)) if k not in content.doubtful]
    if content.doubtful:
        _logger.warning("%s: %d frames of calculations that did not converge are left out", file,
                        len(content.doubtful))  # fmt: skip
    return streamed(str(file), partial(_numbered, [content.frames[k] for k in sound]), len(sound))


def _numbered(frames: Any, first: int) -> Iterator[tuple[int, Atoms]]:
    for number in range(first, len(frames)):
        yield number + 1, frames[number]


# The zip ----------------------------------------------------------------------------------------


def _convert_to_zip(
    target: Path, key: str, write: Callable[[Path, str], int], workers: int
) -> Converted:
    """Pack a folder next to the zip, and write the zip from it."""
    with only_one(target):
        if target.exists():
            with zipfile.ZipFile(target) as archive:
                about, names = archive.comment.decode(errors="replace"), archive.namelist()
            if about != key:
                raise DataError(f"{target} is there and holds something else. Remove it first.")
            entries = sorted(Path(name) for name in names if name.endswith(".mts"))
            labels = tuple(entry.stem for entry in entries if entry.parent == Path("0"))
            return Converted(target, zip_count(target), labels, made=False)
        aside = target.with_name(f"{target.name}.folder")
        count = write(aside, key)
        folder = Folder(aside)
        try:
            with replacing(target) as partial, zipfile.ZipFile(partial, "w") as archive:
                archive.comment = key.encode()
                _write_zip(archive, folder, workers)
        except OSError as error:
            raise DataError(f"Cannot write {target}: {error.strerror or error}.") from error
        shutil.rmtree(aside)
    return Converted(target, count, tuple(folder.labels), made=True)


def _write_zip(archive: zipfile.ZipFile, folder: Folder, workers: int) -> None:
    """Write one entry a structure; forces and stress are stored as gradients of the energy."""
    firsts = range(0, len(folder), _TOGETHER)
    with (
        Watch(f"writing {archive.filename}", "structures", len(folder)) as watch,
        closing(in_order(partial(_entries, folder.path), firsts, workers)) as found,
    ):
        for entries in found:
            for name, content in entries:
                archive.writestr(name, content)
                watch.step(name.endswith("/system.mta"))
        with archive.open("metadata/atom_counts.npy", "w") as entry:
            np.save(entry, folder.num_atoms)


@torchscript()
def _entries(path: Path, first: int) -> list[tuple[str, bytes]]:
    """Names and contents of the entries of some structures."""
    import metatomic.torch as metatomic

    folder, found = Folder(path), []
    for index in range(first, min(first + _TOGETHER, len(folder))):
        rows = folder.rows(index)
        cell = torch.zeros(3, 3, dtype=torch.float64)
        if folder.cells is not None:
            cell = torch.from_numpy(folder.cells[index].astype(np.float64))
        system = metatomic.System(
            torch.from_numpy(folder.numbers[rows].astype(np.int32)),
            torch.from_numpy(folder.positions[rows].astype(np.float64)),
            cell,
            (cell != 0).any(dim=1),
        )
        if folder.cutoff is not None:
            options = metatomic.NeighborListOptions(folder.cutoff, full_list=True, strict=True)
            pairs = stored_neighbors(folder, index)
            system.add_neighbor_list(options, neighbor_block(pairs, system.positions, cell))
        content = io.BytesIO()
        metatomic.save(content, system)
        found.append((f"{index}/system.mta", content.getvalue()))
        for name, one in _maps(folder, index, cell).items():
            content = io.BytesIO()
            np.save(content, one.save_buffer().numpy())
            found.append((f"{index}/{name}.mts", content.getvalue()))
    return found


def neighbor_block(pairs: NeighborList, positions: torch.Tensor, cell: torch.Tensor) -> Any:
    """A neighbour list as a TensorBlock of metatomic's, with the type of the positions."""
    rows = torch.cat([pairs.centers[:, None], pairs.neighbors[:, None], pairs.shifts], dim=1)
    vectors = edge_vectors(positions, cell, pairs).unsqueeze(-1)
    return tensor_block(vectors, _PAIR, rows, "distance")


def tensor_block(values: torch.Tensor, names: list[str], samples: torch.Tensor, column: str) -> Any:
    """A TensorBlock; the axes between those of the samples and of the columns are Cartesian.

    Args:
        values: ``[n, 3..., k]``.
        names: of the columns of ``samples``.
        samples: ``[n, ...]``.
        column: name of the last axis.
    """
    from metatensor.torch import Labels, TensorBlock

    rank = values.dim() - 2
    axes = ["xyz"] if rank == 1 else [f"xyz_{index + 1}" for index in range(rank)]
    rows = Labels(names, samples.to(torch.int32))
    components = [Labels.range(axis, 3) for axis in axes]
    return TensorBlock(values, rows, components, Labels.range(column, values.shape[-1]))


def _maps(folder: Folder, index: int, cell: torch.Tensor) -> dict[str, Any]:
    """The labels of a structure as tensor maps; what it lacks is NaN."""
    rows = folder.rows(index)
    values = {
        name: (torch.from_numpy(np.array(one.array[rows if one.of_atoms else index], np.float64)),
               one.of_atoms)
        for name, one in folder.labels.items()
    }  # fmt: skip
    gradients: dict[str, torch.Tensor] = {}
    if "energy" in values:
        for name in ("forces", "stress"):
            if name in values and tuple(values[name][0].shape[-2:]) == (
                (rows.stop - rows.start, 3) if name == "forces" else (3, 3)
            ):
                gradients[name] = values.pop(name)[0]
    volume = float(torch.linalg.det(cell).abs())
    if not volume:
        gradients.pop("stress", None)
    return {
        name: _map(name, index, value, of_atoms, gradients if name == "energy" else {}, volume)
        for name, (value, of_atoms) in values.items()
    }


def _map(
    name: str,
    index: int,
    value: torch.Tensor,
    of_atoms: bool,
    gradients: Mapping[str, torch.Tensor],
    volume: float,
) -> Any:
    from metatensor.torch import Labels, TensorMap

    value = value if of_atoms else value.unsqueeze(0)
    inner = value.shape[1:]
    cartesian = 0
    while cartesian < len(inner) and inner[cartesian] == 3:
        cartesian += 1
    value = value.reshape(*value.shape[: 1 + cartesian], -1)
    if of_atoms:
        atoms = torch.arange(len(value))
        samples = torch.stack([torch.full_like(atoms, index), atoms], dim=1)
        block = tensor_block(value, ["system", "atom"], samples, name)
    else:
        block = tensor_block(value, ["system"], torch.tensor([[index]]), name)
    if "forces" in gradients:
        slopes = -gradients["forces"].unsqueeze(-1)
        atoms = torch.arange(len(slopes))
        table = torch.stack([torch.zeros_like(atoms), torch.full_like(atoms, index), atoms], dim=1)
        names = ["sample", "system", "atom"]
        block.add_gradient("positions", tensor_block(slopes, names, table, name))
    if "stress" in gradients:
        strain = volume * gradients["stress"].reshape(1, 3, 3, 1)
        block.add_gradient("strain", tensor_block(strain, ["sample"], torch.tensor([[0]]), name))
    return TensorMap(Labels.single(), [block])
