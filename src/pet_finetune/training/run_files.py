"""Files of a run, written as it goes, with its provenance."""

from __future__ import annotations

import csv
import io
import json
import math
import platform
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import wraps
from pathlib import Path
from typing import Any, Concatenate, ParamSpec

import torch
from ase.data import chemical_symbols

from pet_finetune import processes
from pet_finetune.adapters.inject import TrainableReport, active_adapter
from pet_finetune.adapters.peft_files import save_adapter
from pet_finetune.checkpoint.archive import TorchArchive
from pet_finetune.checkpoint.native import save_checkpoint
from pet_finetune.committee.committee import Committee
from pet_finetune.config.run_options import Options
from pet_finetune.data.loader import Loader
from pet_finetune.data.predicted import Predicted
from pet_finetune.data.splits import Splits
from pet_finetune.data.structure import structures_fingerprint
from pet_finetune.data.structure_sets import find_species
from pet_finetune.device import versions
from pet_finetune.errors import CheckpointError, DataError, TrainingError
from pet_finetune.files import (
    make_writable,
    read_object,
    read_table,
    write_whole,
    writing_explained,
)
from pet_finetune.log import get_logger
from pet_finetune.model.potential import Potential

from .baselines import BaselineTable
from .metrics import PredictionRecorder, shown_unit, with_model
from .starting_model import Start
from .step import EpochRecord

_logger = get_logger(__name__)

BEST = "best_model.ckpt"
LAST = "last.ckpt"
ADAPTER = "adapter"
TABLE = "train.csv"
LOG = "train.log"
OPTIONS = "options.yaml"
SPLITS = "splits.json"
KEPT = "kept.pt"
DIMERS = "dimers"
RESULTS = "results.json"
ABOUT = "run.json"
PREDICTIONS = "predictions.npz"
REPORT = "report.html"
PROFILE = "profile.json"
TRACE = "profile_trace.json"

#: The rows of a ``train.csv``; cells that are empty there are absent.
Epochs = Sequence[Mapping[str, float]]

#: What a run that goes on in another folder takes with it.
_TAKEN_ALONG = (BEST, ADAPTER, TABLE, OPTIONS, SPLITS, KEPT, ABOUT, PREDICTIONS)


def columns_of(record: EpochRecord) -> dict[str, str]:
    """The cells of an epoch in ``train.csv``, by column."""
    row = {
        "epoch": str(record.epoch),
        "learning_rate": f"{record.learning_rate:.3e}",
        "loss": f"{record.loss:.6g}",
        "metric": f"{record.metric:.6g}",
        "best": str(int(record.best)),
        "seconds": f"{record.seconds:.3f}",
        "structures_per_second": f"{record.structures_per_second:.2f}",
    }
    row |= {f"train/{name}": f"{value:.6g}" for name, value in record.extra.items()}
    for prefix, group in (("train", record.train), ("validation", record.validation)):
        for target, metrics in group.items():
            for name, value in metrics.as_dict().items():
                row[f"{prefix}/{target}/{name}"] = f"{value:.6g}"
    return row | {name: f"{value:.6g}" for name, value in record.columns.items()}


_P = ParamSpec("_P")


def _by_the_first(
    write: Callable[Concatenate[RunFiles, _P], None],
) -> Callable[Concatenate[RunFiles, _P], None]:
    """A method that does nothing in processes that write no files."""

    @wraps(write)
    def written(files: RunFiles, /, *arguments: _P.args, **named: _P.kwargs) -> None:
        if files._writes:
            write(files, *arguments, **named)

    return written


class RunFiles:
    """Writes the files of one run; of several processes that train together, the first one does.

    Attributes:
        folder: as given; made where it does not exist.
        kept: whether it stays when the run has ended, so that messages name files in it.
        best, last: the best model so far, adapters merged; all that is needed to go on.
        adapter: the folder of the best adapter.
        base_name: what the model that the run started from is called.
        provenance: goes into every checkpoint.

    Raises:
        TrainingError: the folder cannot be written to.
    """

    def __init__(self, folder: Path, kept: bool = True) -> None:
        self.folder, self.kept = folder, kept
        self.best, self.last, self.adapter = folder / BEST, folder / LAST, folder / ADAPTER
        self.base_name = ""
        self.provenance: dict[str, Any] = {}
        self._writes = processes.first()
        if not self._writes:
            return
        make_writable(folder, TrainingError)

    @_by_the_first
    def check_free(self, options_file: str | Path = "") -> None:
        """Make sure that a new run overwrites neither an older one nor the user's options file."""
        if self.last.exists():
            raise TrainingError(
                f"The output folder '{self.folder}' holds a run already. Choose another with "
                f"-o FOLDER (folder=... in Python), or go on with it: --restart {self.folder}."
            )
        if self.best.exists() or (self.folder / TABLE).exists():
            raise TrainingError(
                f"The output folder '{self.folder}' holds a run already, which stopped before it "
                f"had saved a {LAST} to go on from. Choose another with -o FOLDER, or remove it."
            )
        own = self.folder / OPTIONS
        if options_file and own.exists() and own.resolve() == Path(options_file).resolve():
            raise TrainingError(
                f"The run would replace your options file '{options_file}' by its own copy: "
                f"choose another folder than '{self.folder}' with -o FOLDER."
            )

    @_by_the_first
    def start_over(self) -> None:
        """Remove what a run left that was killed before it could be gone on with."""
        with writing_explained(self.folder, TrainingError):
            for path in (self.folder / name for name in _TAKEN_ALONG):
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink(missing_ok=True)

    @_by_the_first
    def take_over(self, other: Path) -> None:
        """Copy what a run in the folder ``other`` has written so far, to go on with it here."""
        self.check_free()
        with writing_explained(self.folder, TrainingError):
            for path in (other / name for name in _TAKEN_ALONG):
                if path.is_dir():
                    shutil.copytree(path, self.folder / path.name, dirs_exist_ok=True)
                elif path.exists():
                    shutil.copy2(path, self.folder / path.name)

    @_by_the_first
    def keep_best(self, model: Potential, record: EpochRecord) -> None:
        """Write the best model and, where there is one, its adapter."""
        provenance = {**self.provenance, "epoch": record.epoch, "metric": record.metric}
        if active_adapter(model) is not None:
            save_adapter(model, self.adapter, self.base_name)
        save_checkpoint(self.best, model, provenance=provenance)

    @_by_the_first
    def keep_last(self, model: Potential, training: dict[str, Any]) -> None:
        """Write the state of the run."""
        save_checkpoint(self.last, model, provenance=self.provenance, training=training)

    @_by_the_first
    def write(self, name: str, content: str | bytes) -> None:
        """Write a file in one step: it is whole or as it was."""
        with writing_explained(self.folder, TrainingError):
            write_whole(self.folder / name, content)

    def tell(self, facts: Mapping[str, Any]) -> None:
        """Add facts to ``run.json``."""
        self.write(ABOUT, json.dumps({**self.about(), **facts}, indent=2) + "\n")

    def about(self) -> dict[str, Any]:
        """Content of ``run.json``; empty if it is missing or damaged."""
        with suppress(FileNotFoundError, DataError):
            return read_object(self.folder / ABOUT)
        return {}

    @_by_the_first
    def keep_predictions(
        self, recorder: PredictionRecorder, name: str, model: Potential | Committee
    ) -> None:
        """Store the predictions of the model ``before`` or ``after`` training for a set."""
        path, known = self.folder / PREDICTIONS, None
        if path.exists():
            try:
                known = Predicted.read(path)
            except DataError as error:  # no reason to lose what comes at the end of a run
                _logger.warning("%s They are left out.", error)
        self.write(PREDICTIONS, with_model(known, recorder, name, model).to_bytes())

    @_by_the_first
    def add_row(self, record: EpochRecord) -> None:
        """Add an epoch to ``train.csv``; the heading is written with the first."""
        row = columns_of(record)
        path = self.folder / TABLE
        with writing_explained(self.folder, TrainingError):
            heading = _heading(path)
            with path.open("a", newline="", encoding="utf-8") as stream:
                # Errors that are not computed after every epoch leave their cells empty.
                writer = csv.DictWriter(
                    stream, heading or row.keys(), extrasaction="ignore", lineterminator="\n"
                )
                if not heading:
                    writer.writeheader()
                writer.writerow(row)

    @_by_the_first
    def write_kept(self, content: dict[str, Any]) -> None:
        """Write what the run keeps of its foundation; tensors and plain values."""
        stream = io.BytesIO()  # torch's own writer ends in C++ where a disk is full
        torch.save(content, stream)
        self.write(KEPT, stream.getvalue())

    def read_kept(self) -> dict[str, Any]:
        """Read what :meth:`write_kept` wrote."""
        path = self.folder / KEPT
        try:
            with TorchArchive(path) as archive:
                content: dict[str, Any] = archive.filled(archive.content())
        except CheckpointError as error:
            raise TrainingError(
                f"'{path}', which holds what the run keeps of the model it started from, cannot be "
                f"read. Put it back beside {LAST}, or start a new run. {error}"
            ) from error
        return content

    @_by_the_first
    def drop_rows_after(self, epoch: int) -> None:
        """Forget rows of epochs that a resumed run will do again, and half-written ones.

        A table that is damaged is put aside: the run goes on without what it said.
        """
        path = self.folder / TABLE
        if not path.exists():
            return
        try:
            heading, rows = read_table(path)
        except DataError as error:
            aside = path.with_name(f"{path.name}.damaged")
            with writing_explained(self.folder, TrainingError):
                path.replace(aside)
            _logger.warning("%s It is now '%s'; a new table is begun.", error, aside)
            return
        kept = [row for row in rows if row and row[0].isdecimal() and int(row[0]) <= epoch]
        if not kept:
            path.unlink()
            return
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([heading, *kept])
        self.write(TABLE, text.getvalue())


def _heading(path: Path) -> list[str]:
    """The first line of a table; empty where there is none."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8", errors="replace") as stream:
        return next(csv.reader(stream), [])


def read_epochs(path: Path) -> Epochs:
    """Read the rows of a ``train.csv`` as numbers; empty cells and damaged rows are left out.

    Raises:
        FileNotFoundError: there is none.
        DataError: it cannot be read.
    """
    heading, rows = read_table(path)
    epochs = []
    for row in rows:
        with suppress(ValueError):
            epochs.append({name: float(c) for name, c in zip(heading, row, strict=True) if c})
    return [row for row in epochs if math.isfinite(row.get("epoch", math.nan))]


def sizes_of(folder: Path) -> dict[str, int]:
    """Sizes of what a run wrote for use, best model and adapter, bytes."""
    found = {}
    if (folder / BEST).exists():
        found[BEST] = (folder / BEST).stat().st_size
    if (folder / ADAPTER).is_dir():
        found[ADAPTER] = sum(path.stat().st_size for path in (folder / ADAPTER).iterdir())
    return found


def provenance_of(
    options: Options, start: Start, sets: Mapping[str, Loader], seed: int
) -> dict[str, Any]:
    """Provenance in every checkpoint of a run."""
    return {
        "parent": start.name,
        "parent_fingerprint": start.fingerprint,
        "new_elements": {
            chemical_symbols[new]: "random" if old is None else chemical_symbols[old]
            for new, old in start.new_species.items()
        },
        "parent_provenance": start.provenance,
        "options": {**options.resolved(), "seed": seed},
        "data": {
            name: {
                "structures": len(loader.structures),
                "fingerprint": structures_fingerprint(loader.structures),
            }
            for name, loader in sets.items()
        },
        "versions": versions(),
        "written": time.strftime("%Y-%m-%d %H:%M:%S"),
    }


def about_run(
    options: Options,
    provenance: Mapping[str, Any],
    splits: Splits,
    model: Potential,
    baselines: Sequence[BaselineTable],
    trainable: TrainableReport,
) -> dict[str, Any]:
    """Facts of a run before its first step, for ``run.json``."""
    left_out = ("options", "parent_provenance")
    pretraining = (provenance.get("parent_provenance") or {}).get("pretraining")
    return {
        **{key: value for key, value in provenance.items() if key not in left_out},
        **({} if pretraining is None else {"pretraining": pretraining}),
        "data": {
            name: {**of_set, "files": [part.file for part in splits.parts[name]]}
            for name, of_set in provenance["data"].items()
        },
        "data_species": [chemical_symbols[number] for number in find_species(splits.train)],
        "targets": {
            name: {"is_energy": spec.is_energy, "unit": spec.unit, "shown": shown_unit(spec)}
            for name, spec in model.targets.items()
            if name in options.target_specs()
        },
        "baseline_mode": options.baseline_mode(),
        "baselines": [
            {
                "target": table.target,
                "mode": table.mode,
                "unit": table.unit,
                "scale": table.scale,
                # JSON has no NaN: an element that is new to the model had no baseline.
                "rows": [
                    [symbol, atoms, None if math.isnan(before) else before, after]
                    for symbol, atoms, before, after in table.rows
                ],
            }
            for table in baselines
        ],
        "trainable": vars(trainable),
        "machine": {
            "device": _device_name(model.device),
            "threads": torch.get_num_threads(),
            "python": platform.python_version(),
            "system": platform.system(),
        },
    }


def _device_name(device: torch.device) -> str:
    """The kind of device, and what a GPU is called."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()
