"""What continued pre-training is told, and what its stages have found so far, in a folder."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from ase import Atoms

from pet_finetune.config.finetune_sections import PretrainOptions
from pet_finetune.data.ase_databases import write_exact
from pet_finetune.data.frame_files import read_frames
from pet_finetune.data.structure import atoms_to_structure, structures_fingerprint
from pet_finetune.errors import DataError, RunError
from pet_finetune.files import read_object, write_whole
from pet_finetune.progress import Watch

#: In the info of a frame that is not used: why.
DROPPED = "dropped"
_RECORD = "pretrain.json"
_Item = TypeVar("_Item")


class Work:
    """The folder that the stages keep what they found in; the same command goes on with it.

    Args:
        folder: made where it does not exist.
        settings: of the work.
        content: what else it is made from, by name: digests of the foundation and the structures.

    Raises:
        RunError: it holds the work of other settings.
        DataError: its record is damaged.
    """

    def __init__(self, folder: Path, settings: PretrainOptions, content: dict[str, str]) -> None:
        self.folder = folder
        own = {**settings.model_dump(mode="json"), **content}
        self.record: dict[str, Any] = {"made_from": own, "seconds": {}}
        file = folder / _RECORD
        if file.exists():
            found = read_object(file)
            made_from = found.get("made_from", {})
            changed = [name for name in own if made_from.get(name) != own[name]]
            if changed:
                told = ", ".join(f"{n}: {made_from.get(n)} -> {own[n]}" for n in changed)
                raise RunError(
                    f"The folder '{folder}' holds work begun from something else ({told}). Remove "
                    "it, name another one with --work, or repeat what it was begun with."
                )
            self.record = found
        folder.mkdir(parents=True, exist_ok=True)
        self.save()

    def save(self) -> None:
        """Write the record."""
        write_whole(self.folder / _RECORD, json.dumps(self.record, indent=2) + "\n")

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time that is spent inside to the stage's, also where it is interrupted."""
        wall, cpu = time.perf_counter(), time.process_time()
        try:
            yield
        finally:
            spent = self.record["seconds"].setdefault(name, {"wall": 0.0, "cpu": 0.0})
            spent["wall"] += time.perf_counter() - wall
            spent["cpu"] += time.process_time() - cpu
            self.save()

    def pieces(
        self,
        name: str,
        what: str,
        items: Sequence[_Item],
        make: Callable[[_Item], list[Atoms]],
    ) -> list[Atoms]:
        """Frames of each item, from a file of its own where it was made before.

        Args:
            name: of the folder of these files.
            what: what is done, for the progress.
            items: what frames are made from.
            make: one frame or more of an item; the same whenever it is asked.
        """
        place = self.folder / name
        place.mkdir(exist_ok=True)
        frames: list[Atoms] = []
        with Watch(what, "pieces", len(items)) as watch:
            for number, item in enumerate(items):
                file = place / f"{number:05d}.db"
                if not file.exists():
                    write_exact(file, make(item))
                try:
                    frames += read_frames(file)
                except DataError as error:
                    raise DataError(f"{error} Remove this file: it is made again.") from error
                watch.step()
        return frames


def digest(frames: Sequence[Atoms]) -> str:
    """A name for the geometries of frames."""
    structures = (atoms_to_structure(atoms, i) for i, atoms in enumerate(frames))
    return hashlib.sha256(structures_fingerprint(structures).encode()).hexdigest()[:16]
