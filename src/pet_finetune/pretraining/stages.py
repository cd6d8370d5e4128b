"""The stages of continued pre-training, from the user's structures to a checkpoint."""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from ase import Atoms

from pet_finetune.adapters.base_weights import weights_fingerprint
from pet_finetune.calculator import PETCalculator
from pet_finetune.checkpoint.native import save_checkpoint
from pet_finetune.checkpoint.opening import load_checkpoint
from pet_finetune.config.finetune import PretrainOptions
from pet_finetune.config.load import parse_options
from pet_finetune.config.run_options import Options
from pet_finetune.data.ase_databases import write_exact
from pet_finetune.data.calculator_input import check_atoms
from pet_finetune.data.frame_files import forget_files, read_frames
from pet_finetune.data.splits import make_splits
from pet_finetune.data.structure import (
    DEFAULT_CHARGE_KEYS,
    DEFAULT_SPIN_KEYS,
    Structure,
    evenly_apart,
)
from pet_finetune.errors import DataError, PetFinetuneError, RunError, TrainingError
from pet_finetune.files import check_new, read_object, write_whole
from pet_finetune.installation import cache_folders
from pet_finetune.log import get_logger
from pet_finetune.model.potential import Potential
from pet_finetune.rng import Stream, seed_everything
from pet_finetune.runs import RunFolder
from pet_finetune.terminal import Watch
from pet_finetune.training.resume import plain_errors
from pet_finetune.training.run import train
from pet_finetune.training.run_files import BEST, LAST
from pet_finetune.training.step import TrainOutcome

from .exploration import DROPPED, NAME, Teacher, digest, explore, tasks_of, teacher_of

_RECORD = "pretrain.json"
_Item = TypeVar("_Item")


class Work:
    """Work folder of the stages; the same command continues with it."""

    def __init__(self, folder: Path, settings: PretrainOptions, content: dict[str, str]) -> None:
        self.folder = folder
        # Beside settings: digests of the foundation and the structures.
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
        except KeyboardInterrupt:
            _logger.warning(
                "What is done stays in %s: the same command goes on there.", self.folder
            )
            raise
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
        """Frames of each item, which ``make`` makes or a file of its own has from before."""
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


_logger = get_logger(__name__)
_PER_PIECE = 20  # frames that are labelled between two savings
_VALIDATION, _HELD_OUT = 0.05, 0.1
_FEWEST = 20
_SHOWN = 3  # names of dropped frames


@dataclass(frozen=True)
class PretrainResult:
    """Result of continued pre-training.

    Attributes:
        model: the best model; its energy is at the teacher's level.
        checkpoint: the file; None if removed.
        frames: numbers of labelled frames for training, for choosing the model, and held out.
        dropped: frames that were not used, by stage and reason.
        before, after: errors on the held-out frames, eV and Å, as in ``results.json``.
        seconds: of each stage, ``wall`` and ``cpu``.
    """

    model: Potential = field(repr=False)
    checkpoint: Path | None
    frames: dict[str, int]
    dropped: dict[str, dict[str, int]]
    before: dict[str, Any]
    after: dict[str, Any]
    seconds: dict[str, dict[str, float]]


def pretrain_model(
    checkpoint: str | Path,
    frames: Sequence[Atoms],
    output: str | Path,
    settings: PretrainOptions | None = None,
    work: str | Path | None = None,
    device: str = "auto",
) -> PretrainResult:
    """Train a foundation on frames of the user's system that a teacher labels.

    Each stage keeps what it found in a folder, and the same call goes on where it stopped. More
    on the arguments at :func:`pet_finetune.pretrain`.

    Raises:
        PetFinetuneError: bad input, or no frame that the teacher can label.
        KeyboardInterrupt: the training was interrupted; its state is saved.
    """
    settings = settings or PretrainOptions()
    output = Path(output)
    check_new(output)
    teacher = teacher_of(settings.teacher, device)
    foundation = load_checkpoint(checkpoint)
    model = foundation.model
    target = model.energy_target(settings.target)
    for number, atoms in enumerate(frames):
        try:
            check_atoms(atoms, model.species)
        except PetFinetuneError as error:
            raise type(error)(f"structure {number}: {error}") from error
    if not frames:
        raise DataError("There are no structures to start from.")
    content = {"foundation": weights_fingerprint(model)[:16], "structures": digest(frames)}
    folder = Path(work) if work is not None else output.with_suffix(".work")
    with RunFolder.take(folder):
        place = Work(folder, settings, content)
        with place.stage("explore"):
            found = _explored(
                place, frames, PETCalculator(checkpoint, target=target, device=device), settings
            )
        with place.stage("label"):
            labelled = _labelled(place, found, teacher, settings)
        with place.stage("train"):
            sizes = _write_sets(folder, labelled, settings)
            outcome = _trained(folder, checkpoint, target, settings, device)
        return _finish(place, outcome, teacher, sizes, output)


def pretrained(options: Options) -> Options:
    """Options of a run that starts from the result of ``finetune.pretrain``.

    What it gives is kept in the cache under a name made of settings, structures and weights, and
    found there by the next run.
    """
    finetune = options.finetune
    settings, start = finetune.pretrain, finetune.read_from
    if settings is None or start is None:
        return options
    seed = seed_everything(options.seed)
    frames = [_atoms(structure) for structure in make_splits(options, seed).train]
    made_from = [settings.model_dump(mode="json"), digest(frames)]
    made_from.append(weights_fingerprint(load_checkpoint(start).model))
    key = hashlib.sha256(json.dumps(made_from).encode()).hexdigest()[:16]
    place = cache_folders()[-1] / "pretrained"
    place.mkdir(parents=True, exist_ok=True)
    output = place / f"{Path(start).stem}-{key}.ckpt"
    if output.exists():
        _logger.info("pre-trained on this system before: %s", output)
    else:
        pretrain_model(start, frames, output, settings, device=options.device)
    changed = options.with_finetune(read_from=str(output), pretrain=None)
    return changed.model_copy(update={"seed": seed})


def _atoms(structure: Structure) -> Atoms:
    """A structure as ASE has it, with its charge and spin."""
    return Atoms(
        structure.numbers.numpy(),
        structure.positions.numpy(),
        cell=structure.cell.numpy(),
        pbc=structure.pbc.numpy(),
        info={DEFAULT_CHARGE_KEYS[0]: structure.charge, DEFAULT_SPIN_KEYS[0]: structure.spin},
    )


def _explored(
    work: Work,
    frames: Sequence[Atoms],
    calculator: PETCalculator,
    settings: PretrainOptions,
) -> list[Atoms]:
    """Frames of the sane region."""
    frames = [frames[one] for one in evenly_apart(len(frames), settings.n)]
    tasks = tasks_of(frames, settings)
    _logger.info(
        "exploring from %d structures at %s K: %d trajectories, displaced frames, close pairs",
        len(frames),
        ", ".join(f"{t:g}" for t in settings.temperatures),
        sum(task.kind == "dynamics" for task in tasks),
    )
    found = work.pieces(
        "explored", "exploring", tasks, lambda task: explore(task, frames, calculator, settings)
    )
    kept = _kept(work, "explore", found)
    if not kept:
        raise DataError(
            "No frame stayed in the sane region: the foundation does not hold this system "
            "together. Lower the temperatures, or raise max_force and max_energy."
        )
    _logger.info("explored %d frames", len(kept))
    return kept


def _labelled(
    work: Work, frames: Sequence[Atoms], teacher: Teacher, settings: PretrainOptions
) -> list[Atoms]:
    """The frames that the teacher could label."""
    pieces = [frames[at : at + _PER_PIECE] for at in range(0, len(frames), _PER_PIECE)]
    found = work.pieces(
        "labelled",
        f"labelling with {teacher.name}",
        pieces,
        lambda piece: [teacher.label(atoms, settings.max_force) for atoms in piece],
    )
    kept = _kept(work, "label", found)
    if len(kept) < _FEWEST:
        reasons = work.record[DROPPED]["label"]
        told = "; ".join(f"{count} {reason}" for reason, count in reasons.items())
        raise DataError(
            f"{teacher.name} could label {len(kept)} of {len(found)} frames, and {_FEWEST} are "
            f"needed ({told}). Name a teacher that knows this system with --teacher (an ASE "
            "calculator, module:name, or a larger checkpoint), or fine-tune without this step."
        )
    _logger.info("%s labelled %d frames", teacher.name, len(kept))
    return kept


def _kept(work: Work, stage: str, frames: Sequence[Atoms]) -> list[Atoms]:
    """Frames that were not dropped; those that were are counted and named."""
    names: dict[str, list[str]] = {}
    for atoms in frames:
        if DROPPED in atoms.info:
            names.setdefault(atoms.info[DROPPED], []).append(str(atoms.info[NAME]))
    for reason, some in names.items():
        more = ", ..." if len(some) > _SHOWN else ""
        shown = ", ".join(some[:_SHOWN])
        _logger.warning("dropped %d frames, %s: %s%s", len(some), reason, shown, more)
    counts = dict(Counter(reason for reason, some in names.items() for _ in some))
    work.record.setdefault(DROPPED, {})[stage] = counts
    return [atoms for atoms in frames if DROPPED not in atoms.info]


def _write_sets(folder: Path, frames: Sequence[Atoms], settings: PretrainOptions) -> dict[str, int]:
    """Files of the frames to train on, to pick the best model by, and held out; their sizes."""
    rng = np.random.default_rng([settings.seed, Stream.EXPLORATION])
    order = rng.permutation(len(frames)).tolist()
    cuts = [max(1, round(part * len(frames))) for part in (_VALIDATION, _HELD_OUT)]
    sets = {
        "validation": order[: cuts[0]],
        "test": order[cuts[0] : sum(cuts)],
        "training": order[sum(cuts) :],
    }
    for name, members in sets.items():
        file = folder / f"{name}.db"
        if not file.exists():
            write_exact(file, [frames[one] for one in sorted(members)])
    return {name: len(members) for name, members in sets.items()}


def _trained(
    folder: Path, checkpoint: str | Path, target: str, settings: PretrainOptions, device: str
) -> TrainOutcome:
    """Train the foundation in full, or continue that training."""
    targets = {target: {"quantity": "energy", "key": "energy", "unit": "eV"}}
    sets = {
        f"{name}_set": {
            "systems": {
                "read_from": str((folder / f"{name}.db").absolute()),
                "length_unit": "angstrom",
                "isolated_atoms": "train",
            },
            "targets": targets,
        }
        for name in ("training", "validation", "test")
    }
    training = {
        "batch_size": settings.batch_size,
        "num_epochs": settings.epochs,
        "optimizer": "soap",
        "checkpoint_interval": 1,
        "learning_rate": settings.learning_rate,
        "loss": "huber",
        "finetune": {"method": "full", "retention": "off"},
    }
    whole = {"seed": settings.seed, "device": device, "architecture": {"training": training}}
    loaded = parse_options({**whole, **sets}, checkpoint, source="pretrain")
    place = folder / "train"
    forget_files()
    last = place / LAST
    outcome = train(loaded.options, place, restart=last if last.exists() else None, check=False)
    if not outcome.result.finished:
        raise KeyboardInterrupt
    return outcome


def _finish(
    work: Work, outcome: TrainOutcome, teacher: Teacher, sizes: dict[str, int], output: Path
) -> PretrainResult:
    """Write the checkpoint with its provenance, and a summary."""
    if not outcome.after:
        raise TrainingError(f"The training in '{outcome.folder}' gave no errors.")
    before = plain_errors(outcome.before).get("test", {})
    after = plain_errors(outcome.after).get("test", {})
    work.record |= {"frames": sizes, "before": before, "after": after, "teacher": teacher.name}
    work.save()
    best = load_checkpoint(outcome.folder / BEST)
    seconds = work.record["seconds"]
    kept = {name: work.record[name] for name in ("made_from", "teacher", "frames", DROPPED)}
    kept["gain"] = _gain(before, after)
    kept["seconds"] = sum(time["wall"] for time in seconds.values())
    save_checkpoint(output, best.model, provenance={**best.provenance, "pretraining": kept})
    spent = ", ".join(f"{name} {time['wall'] / 60:.1f} min" for name, time in seconds.items())
    _logger.info(
        "%s learned from %d frames of %s (%s): %s", output, sizes["training"], teacher.name,
        spent, kept["gain"],
    )  # fmt: skip
    return PretrainResult(best.model, output, sizes, work.record[DROPPED], before, after, seconds)


def _gain(before: dict[str, Any], after: dict[str, Any]) -> str:
    """Text on the errors of the held-out frames before and after."""
    parts = []
    for target, errors in after.items():
        for kind, unit in (("energy", "meV/atom"), ("forces", "meV/A")):
            new = errors.get(f"{kind}_mae")
            if new is not None:
                old = before.get(target, {}).get(f"{kind}_mae", float("nan"))
                parts.append(f"{kind} {1e3 * old:.1f} -> {1e3 * new:.1f} {unit}")
    return "held-out " + ", ".join(parts)
