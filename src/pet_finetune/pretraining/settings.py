"""What continued pre-training is told, and what its stages have found so far, in a folder."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from ase import Atoms

from pet_finetune.data.exact import write_exact
from pet_finetune.data.files import read_frames
from pet_finetune.data.fingerprint import structures_fingerprint
from pet_finetune.data.structure import atoms_to_structure
from pet_finetune.errors import ConfigError, RunError
from pet_finetune.files import replacing, write_whole
from pet_finetune.log import Watch

__all__ = ["DROPPED", "PretrainSettings", "Work"]

#: In the info of a frame that is not used: why.
DROPPED = "dropped"
_RECORD = "pretrain.json"
_Item = TypeVar("_Item")


@dataclass(frozen=True)
class PretrainSettings:
    """How the frames are found, labelled and trained on.

    Attributes:
        teacher: ``gfn2`` or ``gfn1`` (tblite), ``module:name`` of an ASE calculator, or a
            checkpoint.
        n: frames that the teacher labels.
        temperatures: of the molecular dynamics, K.
        epochs: passes over the labelled frames.
        batch_size: structures in a batch of the training.
        learning_rate: the highest one; None for the default of ``soap``.
        max_force: frames with a larger force on an atom are dropped, eV/Å.
        max_energy: so are those whose energy is higher than that of the frame they began from by
            more than this, eV/atom.
        target: the energy of the foundation that is trained; None for the only one, or ``energy``.
        device: ``auto``, ``cpu`` or ``cuda``.
        seed: of dynamics, displacements, sets and training.
    """

    teacher: str = "gfn2"
    n: int = 2000
    temperatures: tuple[float, ...] = (300.0, 600.0, 1000.0)
    epochs: int = 10
    batch_size: int = 10
    learning_rate: float | None = None
    max_force: float = 20.0
    max_energy: float = 1.0
    target: str | None = None
    device: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        whole = {"n": (self.n, 20), "epochs": (self.epochs, 1), "batch_size": (self.batch_size, 1)}
        for name, (value, least) in whole.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ConfigError(f"pretrain: {name} is a whole number from {least}, got {value}.")
        if not self.temperatures or not all(0 < t < 1e5 for t in self.temperatures):
            raise ConfigError(
                f"pretrain: temperatures are positive numbers in K, got {list(self.temperatures)}."
            )
        for name in ("max_force", "max_energy", "learning_rate"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"pretrain: {name} is a positive number, got {value}.")


class Work:
    """The folder that the stages keep what they found in; the same command goes on with it.

    Args:
        folder: made where it does not exist.
        settings: of the work.
        content: what else it is made from, by name: digests of the foundation and the structures.

    Raises:
        RunError: it holds the work of other settings.
    """

    def __init__(self, folder: Path, settings: PretrainSettings, content: dict[str, str]) -> None:
        self.folder = folder
        own = {**asdict(settings), "temperatures": list(settings.temperatures), **content}
        self.record: dict[str, Any] = {"made_from": own, "seconds": {}}
        file = folder / _RECORD
        if file.exists():
            found = json.loads(file.read_text(encoding="utf-8"))
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
                    made = make(item)
                    with replacing(file) as partial:
                        write_exact(partial, made)
                frames += read_frames(file)
                watch.step()
        return frames


def digest(frames: Sequence[Atoms]) -> str:
    """A name for the geometries of frames."""
    structures = (atoms_to_structure(atoms, i) for i, atoms in enumerate(frames))
    return hashlib.sha256(structures_fingerprint(structures).encode()).hexdigest()[:16]
