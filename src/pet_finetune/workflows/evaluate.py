"""Errors of a finished model on labelled structures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from pet_finetune.adapters import load_adapter, merged_copy
from pet_finetune.checkpoint import load_checkpoint
from pet_finetune.config import DatasetOptions, Options
from pet_finetune.config.load import parse_options
from pet_finetune.data.loader import Loader
from pet_finetune.data.readers import read_structures
from pet_finetune.data.species import check_species
from pet_finetune.data.splits import make_splits
from pet_finetune.data.structure import Structure
from pet_finetune.errors import DataError
from pet_finetune.keys import forces_key, stress_key
from pet_finetune.log import get_logger
from pet_finetune.model import Potential
from pet_finetune.train import Metrics, evaluate

from .machine import choose_device
from .tables import error_table, show

_logger = get_logger(__name__)
_BATCH = 32  # structures


@dataclass(frozen=True)
class EvaluationResult:
    """Errors by data set and target."""

    errors: dict[str, dict[str, Metrics]]


def open_model(
    checkpoint: str | Path, adapter: str | Path | None, device: str, dtype: torch.dtype | None
) -> Potential:
    """A checkpoint, with an adapter merged where one is given, ready to predict."""
    model = load_checkpoint(checkpoint).model
    if adapter is not None:
        load_adapter(model, adapter)
        model = merged_copy(model)
    return model.to(device=choose_device(device), dtype=dtype or model.dtype).eval()


def evaluate_files(
    checkpoint: str | Path,
    files: Sequence[str | Path],
    *,
    adapter: str | Path | None = None,
    target: str = "energy",
    device: str = "auto",
) -> EvaluationResult:
    """Errors on whole files with energies, forces and stresses under ASE's names.

    Args:
        checkpoint: ours or metatrain's.
        files: anything ASE reads, in eV and Angstrom.
        adapter: folder of an adapter of this checkpoint.
        target: which energy of the model is compared.
        device: as in the options.
    """
    model = open_model(checkpoint, adapter, device, None)
    target = _the_target(model, target)
    sets = {}
    for file in files:
        options = _file_options(file, target)
        sets[str(file)] = read_structures(options)
    return _evaluate(model, sets, [target])


def evaluate_options(
    options: Options,
    checkpoint: str | Path,
    *,
    adapter: str | Path | None = None,
    seed: int | None = None,
) -> EvaluationResult:
    """Errors on the validation and test sets of an options file, or on the training set.

    The sets are drawn with the options' seed; a run's own sets are evaluated by giving the
    ``options.yaml`` of its folder, which names the seed.

    Args:
        options: checked options.
        checkpoint: ours or metatrain's.
        adapter: folder of an adapter of this checkpoint.
        seed: used where the options name none.
    """
    model = open_model(checkpoint, adapter, options.device, None)
    if options.seed is None and seed is None:
        _logger.warning("no seed in the options: sets drawn by fraction are not those of training")
    splits = make_splits(options, options.seed if options.seed is not None else seed or 0)
    sets = {"validation": splits.validation, "test": splits.test}
    sets = {name: structures for name, structures in sets.items() if structures}
    targets = [name for name in options.target_specs() if name in model.targets]
    if not targets:
        for name in options.target_specs():
            model.target(name)
    return _evaluate(model, sets or {"train": splits.train}, targets)


def _the_target(model: Potential, wanted: str) -> str:
    """The energy meant: the one named, or the only one there is."""
    if wanted not in model.targets and wanted == "energy" and len(model.targets) == 1:
        return next(iter(model.targets))
    return model.target(wanted).name


def _file_options(file: str | Path, target: str) -> DatasetOptions:
    section = {
        "systems": {"read_from": str(file)},
        "targets": {target: {"quantity": "energy", "key": "energy", "unit": "eV"}},
    }
    return parse_options({"training_set": section}, require_start=False).options.training_set[0]


def _evaluate(
    model: Potential, sets: Mapping[str, Sequence[Structure]], targets: list[str]
) -> EvaluationResult:
    errors = {}
    for name, structures in sets.items():
        if not structures:
            raise DataError(f"'{name}' holds no structures.")
        check_species(structures, model.species)
        loader = Loader(structures, model.cutoff, batch_size=_BATCH, dtype=model.dtype)
        wanted = {
            t: (forces_key(t) in loader.label_names, stress_key(t) in loader.label_names)
            for t in targets
        }
        errors[name] = evaluate(model, loader, wanted)
        title = f"{name} ({len(structures)} structures)"
        show(error_table({"error": errors[name]}, title=title))
    return EvaluationResult(errors)
