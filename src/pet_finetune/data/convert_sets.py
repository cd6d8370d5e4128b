"""``pet-finetune convert``: any data as a set that stays on disk, in a format of metatrain's."""

from __future__ import annotations

import io
import shutil
import zipfile
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase import Atoms

from pet_finetune.errors import DataError
from pet_finetune.files import check_file, check_new, replacing
from pet_finetune.locks import only_one
from pet_finetune.log import get_logger
from pet_finetune.terminal import Watch

from .ase_databases import count_rows, is_database
from .extxyz import read_extxyz
from .frame_files import read_file
from .metatrain_sets import VERSION, Folder, is_metatrain_set, zip_count
from .packing import FrameSource, identity_of, pack, set_frames
from .symbols import as_types
from .text import to_text

_logger = get_logger(__name__)
#: Bytes of text that are read together.
_TEXT = 1 << 23
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
    names = None if labels is None else sorted(labels)
    key = f"{identity_of(file)} {format} {sorted((types or {}).items())} {names} {VERSION}"
    frames, total = _frames_of(file, format, types)
    if target.suffix == ".zip":
        done = _convert_to_zip(file, target, key, frames, names, total)
    else:
        made = not (target / "ns.npy").exists()
        count = pack(target, key, str(source), frames, names=names, total=total)
        done = Converted(target, count, tuple(Folder(target).labels), made)
    if missing := sorted({*(names or ())} - {*done.labels}):
        _logger.warning("no frame of %s has %s as numbers", source, ", ".join(missing))
    return done


def _frames_of(
    file: Path, format: str, types: Mapping[int, str] | None
) -> tuple[FrameSource, int | None]:
    """Iterator over the frames of a file, and their number."""
    if is_metatrain_set(file):
        if file.is_dir():
            folder = Folder(file)
            return lambda first, done: _numbered(folder, first), len(folder)
        return set_frames(file), zip_count(file)
    if is_database(file):
        return set_frames(file), count_rows(file)
    if file.suffix.lower() in _XYZ and format in ("", "extxyz", "xyz"):
        plain = format == "xyz"
        return lambda begin, done: _xyz(file, begin, done, types, plain), None
    content = read_file(file, format, types)
    sound = [k for k in range(len(content.frames)) if k not in content.doubtful]
    if content.doubtful:
        _logger.warning("%s: %d frames of calculations that did not converge are left out", file,
                        len(content.doubtful))  # fmt: skip
    chosen = [content.frames[k] for k in sound]
    return lambda first, done: _numbered(chosen, first), len(chosen)


def _numbered(frames: Any, first: int) -> Iterator[tuple[int, Atoms]]:
    for number in range(first, len(frames)):
        yield number + 1, frames[number]


def _xyz(
    file: Path, begin: int, frame: int, types: Mapping[int, str] | None, plain: bool
) -> Iterator[tuple[int, Atoms]]:
    """The frames of extended xyz from a byte and a number on, each with the byte behind it."""
    elements = as_types(types or {})
    with file.open("rb") as stream:
        line = 0
        if begin:  # what was read before counts in messages
            for piece in iter(lambda: stream.read(min(_TEXT, begin - stream.tell())), b""):
                line += piece.count(b"\n")
        while True:
            start = stream.tell()
            raw, ends = _whole_frames(stream)
            if not raw.strip():
                return
            text = to_text(raw, str(file))
            frames = read_extxyz(text, str(file), elements, plain=plain, before=(frame, line))
            for number, atoms in enumerate(frames):
                yield start + (ends[number] if number < len(ends) else len(raw)), atoms
            line += raw.count(b"\n")
            frame += len(frames)


def _whole_frames(stream: io.BufferedReader) -> tuple[bytes, list[int]]:
    """Lines of as many whole frames as make up some megabytes, and where each frame ends.

    Where lines are no frames, all that is left is given, and reading it says what is wrong.
    """
    lines: list[bytes] = []
    ends: list[int] = []
    size = 0
    while size < _TEXT:
        head = stream.readline()
        if not head:
            break
        lines.append(head)
        size += len(head)
        if not head.strip():
            continue
        if not head.strip().isdigit():
            lines.append(stream.read())
            break
        body = list(islice(stream, int(head) + 1))
        lines += body
        size += sum(map(len, body))
        place = stream.tell()
        while (more := stream.readline()).lstrip()[:3] == b"VEC":
            lines.append(more)
            size += len(more)
            place = stream.tell()
        stream.seek(place)
        ends.append(size)
    return b"".join(lines), ends


# The zip ----------------------------------------------------------------------------------------


def _convert_to_zip(
    file: Path,
    target: Path,
    key: str,
    frames: FrameSource,
    names: Collection[str] | None,
    total: int | None,
) -> Converted:
    """Pack a folder next to the zip, and write the zip from it."""
    with only_one(target):
        if target.exists():
            with zipfile.ZipFile(target) as archive:
                about = archive.comment.decode(errors="replace")
            if about != key:
                raise DataError(f"{target} is there and holds something else. Remove it first.")
            labels = tuple(sorted(_labels_in(target)))
            return Converted(target, zip_count(target), labels, made=False)
        aside = target.with_name(f"{target.name}.folder")
        count = pack(aside, key, str(file), frames, names=names, total=total)
        folder = Folder(aside)
        try:
            with replacing(target) as partial, zipfile.ZipFile(partial, "w") as archive:
                archive.comment = key.encode()
                _write_zip(archive, folder)
        except OSError as error:
            raise DataError(f"Cannot write {target}: {error.strerror or error}.") from error
        shutil.rmtree(aside)
    return Converted(target, count, tuple(folder.labels), made=True)


def _labels_in(target: Path) -> set[str]:
    with zipfile.ZipFile(target) as archive:
        parts = (name.partition("/") for name in archive.namelist())
        return {field.removesuffix(".mts") for first, _, field in parts
                if first == "0" and field.endswith(".mts")}  # fmt: skip


def _write_zip(archive: zipfile.ZipFile, folder: Folder) -> None:
    """Write one entry a structure; forces and stress are stored as gradients of the energy."""
    import metatomic.torch as metatomic

    with Watch(f"writing {archive.filename}", "structures", len(folder)) as watch:
        for index in range(len(folder)):
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
            with archive.open(f"{index}/system.mta", "w") as entry:
                metatomic.save(entry, system)
            for name, found in _maps(folder, index, cell).items():
                with archive.open(f"{index}/{name}.mts", "w") as entry:
                    np.save(entry, found.save_buffer().numpy())
            watch.step()
        with archive.open("metadata/atom_counts.npy", "w") as entry:
            np.save(entry, folder.num_atoms)


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
    from metatensor.torch import Labels, TensorBlock, TensorMap

    def axes(count: int, letter: str = "xyz") -> list[Any]:
        several = count > 1
        return [Labels.range(f"{letter}_{k + 1}" if several else letter, 3) for k in range(count)]

    value = value if of_atoms else value.unsqueeze(0)
    inner = value.shape[1:]
    cartesian = 0
    while cartesian < len(inner) and inner[cartesian] == 3:
        cartesian += 1
    value = value.reshape(*value.shape[: 1 + cartesian], -1)
    atoms = torch.arange(len(value), dtype=torch.int32)
    samples = Labels(["system"], torch.tensor([[index]], dtype=torch.int32))
    if of_atoms:
        system = torch.full_like(atoms, index)
        samples = Labels(["system", "atom"], torch.stack([system, atoms], dim=1))
    properties = Labels.range("energy" if name == "energy" else name, value.shape[-1])
    block = TensorBlock(value, samples, axes(cartesian), properties)
    if "forces" in gradients:
        forces = gradients["forces"]
        count = torch.arange(len(forces), dtype=torch.int32)
        table = torch.stack([torch.zeros_like(count), torch.full_like(count, index), count], dim=1)
        block.add_gradient(
            "positions",
            TensorBlock(-forces.unsqueeze(-1), Labels(["sample", "system", "atom"], table),
                        [Labels.range("xyz", 3)], properties),
        )  # fmt: skip
    if "stress" in gradients:
        strain = volume * gradients["stress"].reshape(1, 3, 3, 1)
        only = Labels(["sample"], torch.tensor([[0]], dtype=torch.int32))
        block.add_gradient("strain", TensorBlock(strain, only, axes(2), properties))
    return TensorMap(Labels.single(), [block])
