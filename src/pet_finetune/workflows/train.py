"""A training run from its options to its final table."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from pet_finetune.adapters import trainable_report
from pet_finetune.checkpoint import Checkpoint, load_checkpoint
from pet_finetune.config import Options
from pet_finetune.data.fingerprint import structures_fingerprint
from pet_finetune.data.loader import Loader
from pet_finetune.data.species import check_species
from pet_finetune.data.splits import Splits, load_splits, make_splits
from pet_finetune.errors import TrainingError
from pet_finetune.keys import forces_key, stress_key
from pet_finetune.log import get_logger, setup_logging
from pet_finetune.model import Potential
from pet_finetune.train import Metrics, Trainer, TrainingResult, evaluate, prepare_baselines
from pet_finetune.train.loss import Objective
from pet_finetune.train.progress import RunDisplay
from pet_finetune.train.run_files import RunFiles
from pet_finetune.train.trainer import Callbacks, EpochRecord

from .machine import choose_device, choose_dtype, seed_everything, versions
from .start import Start, choose_trainable, start_model
from .tables import baseline_text, error_table, show

_logger = get_logger(__name__)
_LARGEST_BATCH = 64  # structures, for validation and evaluation
SPLITS, RESULTS, OPTIONS = "splits.json", "results.json", "options.yaml"


@dataclass(frozen=True)
class TrainOutcome:
    """What a run gave.

    Attributes:
        folder: its files.
        result: how it ended.
        before, after: errors of the starting model and the best one, by set and target; empty
            for an interrupted run, or without ``final_eval``.
    """

    folder: Path
    result: TrainingResult
    before: dict[str, dict[str, Metrics]]
    after: dict[str, dict[str, Metrics]]


@dataclass(frozen=True)
class _Data:
    """Loaders of the three sets; validation falls back to the training set where it is empty."""

    splits: Splits
    train: Loader
    validation: Loader
    sets: dict[str, Loader]


def train(
    options: Options,
    folder: str | Path,
    *,
    restart: str | Path | None = None,
    notices: Sequence[str] = (),
    source: str = "",
) -> TrainOutcome:
    """Train as the options say; print the table of errors before and after.

    Args:
        options: checked options.
        folder: where the files of the run go.
        restart: a ``last.ckpt`` to go on from, exactly.
        notices: what reading the options had to say, for the log.
        source: the options file, for the hint after an interrupt.

    Raises:
        PetFinetuneError: any bad input, with one clear message.
    """
    folder = Path(folder)
    device, dtype = choose_device(options.device), choose_dtype(options.base_precision)
    resumed = load_checkpoint(restart, keep_adapter=True) if restart is not None else None
    saved = _saved_run(resumed)
    seed = seed_everything(saved["seed"] if saved else options.seed)
    splits = load_splits(folder / SPLITS, options) if saved else make_splits(options, seed)
    files = RunFiles(folder, "", {})
    setup_logging(file=folder / "train.log")
    for notice in notices:
        _logger.warning(notice)
    start = _resume_start(resumed, saved) if resumed and saved else start_model(options, splits)
    model = start.model.to(device=device, dtype=dtype)
    check_species([*splits.train, *splits.validation, *splits.test], model.species)
    data = _load(options, splits, model, seed, dtype)
    if not saved:
        choose_trainable(start, options)
        _log_baselines(options, start, data)
    else:
        _choose_again(model, saved)
    model.to(device=device, dtype=dtype)
    objectives = _objectives(options, model, data)
    files.base_name, files.provenance = start.name, _provenance(options, start, data, seed)
    if not saved:
        splits.save(folder / SPLITS)
        OmegaConf.save({**options.resolved(), "seed": seed}, folder / OPTIONS)
    _logger.info("%s", trainable_report(model))
    wanted = {name: (o.forces, o.stress) for name, o in objectives.items()}
    before = saved["before"] if saved else _evaluate_all(options, model, data, wanted)
    trainer = Trainer(
        model, objectives, data.train, data.validation, options.training, options.learning_rate()
    )
    if saved:
        trainer.load_state(saved["trainer"])
        files.drop_rows_after(trainer.progress.epoch)
        _logger.info("going on after epoch %d", trainer.progress.epoch)
    result = _run(trainer, files, {"seed": seed, "before": _plain(before)}, start)
    if not result.finished:
        hint = f"pet-finetune train {source or folder / OPTIONS} --restart {files.last}"
        _logger.warning("interrupted; the state is saved. Go on with: %s", hint)
        return TrainOutcome(folder, result, {}, {})
    return _finish(options, files, data, wanted, before, result, device, dtype)


def _saved_run(resumed: Checkpoint | None) -> dict[str, Any] | None:
    """The part of a checkpoint that a run goes on from."""
    if resumed is None:
        return None
    if resumed.training is None:
        raise TrainingError(
            f"{resumed.path} holds a model but no run to go on with. Give the run's last.ckpt to "
            f"--restart, or start a new run from this model with -c {resumed.path}."
        )
    training = dict(resumed.training)
    training["before"] = {
        name: {target: Metrics(target, state) for target, state in targets.items()}
        for name, targets in training["before"].items()
    }
    return training


def _resume_start(resumed: Checkpoint, saved: dict[str, Any]) -> Start:
    provenance = resumed.provenance.get("parent_provenance", {})
    return Start(
        resumed.model, saved["name"], saved["fingerprint"], provenance, (), saved["inherited"]
    )


def _choose_again(model: Potential, saved: dict[str, Any]) -> None:
    """Let the same parameters train as in the run that is resumed."""
    trained = set(saved["trainer"]["trained"])
    for name, parameter in model.network.named_parameters():
        parameter.requires_grad_(name in trained)


def _load(
    options: Options, splits: Splits, model: Potential, seed: int, dtype: torch.dtype
) -> _Data:
    training = options.training
    train_loader = Loader(
        splits.train,
        model.cutoff,
        batch_size=None if training.max_atoms_per_batch else training.batch_size,
        max_atoms_per_batch=training.max_atoms_per_batch,
        min_atoms_per_batch=training.min_atoms_per_batch,
        shuffle=True,
        augment=training.rotational_augmentation,
        seed=seed,
        dtype=dtype,
    )
    sets = {"train": train_loader.view()}
    for name, structures in (("validation", splits.validation), ("test", splits.test)):
        if structures:
            sets[name] = Loader(
                structures,
                model.cutoff,
                batch_size=None if training.max_atoms_per_batch else _evaluation_batch(options),
                max_atoms_per_batch=training.max_atoms_per_batch,
                dtype=dtype,
            )
    if "validation" not in sets:
        _logger.warning("no validation structures: the training set picks the best model")
    _logger.info(
        "structures: %s",
        ", ".join(f"{len(loader.structures)} {name}" for name, loader in sets.items()),
    )
    return _Data(splits, train_loader, sets.get("validation", sets["train"]), sets)


def _evaluation_batch(options: Options) -> int:
    return min(_LARGEST_BATCH, 2 * options.training.batch_size)


def _log_baselines(options: Options, start: Start, data: _Data) -> None:
    targets = list(options.target_specs())
    for table in prepare_baselines(options, start.model, data.train, targets, start.fresh):
        _logger.info("\n%s", baseline_text(table))
        _logger.info("scale of '%s': %.6g eV", table.target, table.scale)


def _objectives(options: Options, model: Potential, data: _Data) -> dict[str, Objective]:
    labels = data.train.label_names
    objectives = {}
    for name in options.target_specs():
        loss = options.training.loss_for(name)
        objectives[name] = Objective(
            target=name,
            loss=loss,
            forces=forces_key(name) in labels and loss.forces_term().weight > 0,
            stress=stress_key(name) in labels and loss.stress_term().weight > 0,
            scale=float(model.scale.get(name)),
            per_atom=name not in options.training.per_structure_targets,
        )
    return objectives


def _provenance(options: Options, start: Start, data: _Data, seed: int) -> dict[str, Any]:
    return {
        "parent": start.name,
        "parent_fingerprint": start.fingerprint,
        "parent_provenance": start.provenance,
        "options": {**options.resolved(), "seed": seed},
        "data": {
            name: {
                "structures": len(loader.structures),
                "fingerprint": structures_fingerprint(loader.structures),
            }
            for name, loader in data.sets.items()
        },
        "versions": versions(),
        "written": time.strftime("%Y-%m-%d %H:%M:%S"),
    }


def _evaluate_all(
    options: Options, model: Potential, data: _Data, wanted: dict[str, tuple[bool, bool]]
) -> dict[str, dict[str, Metrics]]:
    if not options.final_eval:
        return {}
    return {name: evaluate(model, loader, wanted) for name, loader in data.sets.items()}


def _plain(errors: dict[str, dict[str, Metrics]]) -> dict[str, dict[str, dict[str, list[float]]]]:
    return {
        name: {target: metrics.state() for target, metrics in targets.items()}
        for name, targets in errors.items()
    }


def _run(trainer: Trainer, files: RunFiles, saved: dict[str, Any], start: Start) -> TrainingResult:
    """Train with the display open and the files written as the run goes."""
    options = trainer.options

    def save() -> None:
        files.keep_last(
            trainer.model,
            {
                **saved,
                "trainer": trainer.state(),
                "name": start.name,
                "fingerprint": start.fingerprint,
                "inherited": start.inherited,
            },
        )

    with RunDisplay(options.num_epochs, options.log_interval, trainer.progress.epoch) as display:

        def end_of_epoch(record: EpochRecord) -> None:
            files.add_row(record)
            display.epoch(record)

        trainer.callbacks = Callbacks(
            step=display.step, epoch=end_of_epoch, best=files.keep_best, save=save
        )
        return trainer.fit()


def _finish(
    options: Options,
    files: RunFiles,
    data: _Data,
    wanted: dict[str, tuple[bool, bool]],
    before: dict[str, dict[str, Metrics]],
    result: TrainingResult,
    device: torch.device,
    dtype: torch.dtype,
) -> TrainOutcome:
    """Evaluate the best model, write ``results.json``, print the table."""
    if result.stopped_early:
        _logger.info("stopped early: no improvement for a while")
    _logger.info("best model: epoch %d of %d, %s", result.best_epoch, result.epochs, files.best)
    after: dict[str, dict[str, Metrics]] = {}
    if options.final_eval:
        best = load_checkpoint(files.best).model.to(device=device, dtype=dtype)
        after = _evaluate_all(options, best, data, wanted)
        shown = "test" if "test" in after else "validation" if "validation" in after else "train"
        name = "starting model" if options.is_finetuning else "untrained"
        columns = {f"{name} (after {options.baseline_mode()})": before[shown]}
        columns["fine-tuned" if options.is_finetuning else "trained"] = after[shown]
        notes = [f"{len(data.sets[shown].structures)} {shown} structures", *_sizes(files)]
        table = error_table(columns, notes, title=f"errors on the {shown} set")
        _logger.info("results\n%s", show(table))
    content = {
        name: {
            key: {target: metrics.as_dict() for target, metrics in targets.items()}
            for key, targets in errors.items()
        }
        for name, errors in (("before", before), ("after", after))
    }
    path = files.folder / RESULTS
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, path)
    return TrainOutcome(files.folder, result, before, after)


def _sizes(files: RunFiles) -> list[str]:
    """Sizes of what the run wrote, for the table's foot."""
    sizes = [f"model: {files.best} ({files.best.stat().st_size / 1e6:.1f} MB)"]
    if files.adapter.is_dir():
        total = sum(path.stat().st_size for path in files.adapter.iterdir())
        sizes.append(f"adapter: {files.adapter} ({total / 1e6:.2f} MB)")
    return sizes
