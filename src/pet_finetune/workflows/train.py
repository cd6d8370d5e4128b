"""A training run from its options to its final table."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from pet_finetune.adapters import trainable_report
from pet_finetune.checkpoint import load_checkpoint
from pet_finetune.config import Options
from pet_finetune.data.charges import check_charges
from pet_finetune.data.fingerprint import structures_fingerprint
from pet_finetune.data.loader import Loader
from pet_finetune.data.species import check_species
from pet_finetune.data.splits import Splits, load_splits, make_splits
from pet_finetune.device import choose_device
from pet_finetune.errors import PetFinetuneError
from pet_finetune.keys import forces_key, stress_key
from pet_finetune.log import FILE_ONLY, get_logger, setup_logging
from pet_finetune.model import Potential
from pet_finetune.train import Trainer, TrainingResult, evaluate, prepare_baselines
from pet_finetune.train.loss import Objective
from pet_finetune.train.progress import RunDisplay
from pet_finetune.train.records import Callbacks, EpochRecord
from pet_finetune.train.run_files import LOG, OPTIONS, RESULTS, SPLITS, RunFiles

from .machine import choose_dtype, seed_everything, versions
from .resume import Errors, RunState, SavedRun, open_run, take_files
from .start import Start, check_targets, choose_trainable, start_model
from .tables import baseline_text, error_table, show, size_text

_logger = get_logger(__name__)
_LARGEST_BATCH = 64  # structures, for validation and evaluation


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
    before: Errors
    after: Errors


@dataclass(frozen=True)
class _Data:
    """Loaders of the three sets; validation falls back to the training set where it is empty."""

    splits: Splits
    train: Loader
    validation: Loader
    sets: dict[str, Loader]


@dataclass(frozen=True)
class _Run:
    """A run that is ready to train."""

    options: Options
    files: RunFiles
    data: _Data
    trainer: Trainer
    state: RunState


def train(
    options: Options,
    folder: str | Path,
    *,
    restart: str | Path | None = None,
    notices: Sequence[str] = (),
    source: str | Path = "",
) -> TrainOutcome:
    """Train as the options say; print the table of errors before and after.

    Args:
        options: checked options.
        folder: where the files of the run go.
        restart: a ``last.ckpt`` to go on from, exactly.
        notices: what reading the options had to say, for the log.
        source: the options file, which the run must not overwrite.

    Raises:
        PetFinetuneError: any bad input, with one clear message.
    """
    device = choose_device(options.device)
    files = RunFiles(Path(folder))
    if restart is None:
        files.check_free(source)
    setup_logging(file=files.folder / LOG)
    for notice in notices:
        _logger.warning(notice)
    try:
        saved = open_run(restart, options) if restart is not None else None
        run = _prepare(options, files, saved, device)
        result = _train(run)
        if result.finished:
            return _finish(run, result)
    except PetFinetuneError as error:
        # Whoever called shows it; the log is where one looks for it a week later.
        _logger.error("%s", error, extra=FILE_ONLY)
        raise
    _logger.warning(
        "interrupted; the state is saved. Go on with: %s",
        shlex.join(
            ["pet-finetune", "train", f"{files.folder / OPTIONS}", "--restart", f"{files.folder}"]
        ),
    )
    return TrainOutcome(files.folder, result, {}, {})


def _prepare(
    options: Options, files: RunFiles, saved: SavedRun | None, device: torch.device
) -> _Run:
    """Read everything, set the baselines, choose what trains."""
    check_targets(options)
    dtype = choose_dtype(options.base_precision)
    seed = seed_everything(saved.state.seed if saved else options.seed)
    _logger.info("seed %d, %s, %d bits", seed, device, options.base_precision)
    if saved:
        take_files(saved, files)
        splits = load_splits(files.folder / SPLITS, options)
    else:
        splits = make_splits(options, seed)
    start = saved.start() if saved else start_model(options, splits)
    model = start.model.to(device=device, dtype=dtype)
    structures = [*splits.train, *splits.validation, *splits.test]
    check_species(structures, model.species)
    if model.hypers.system_conditioning:
        check_charges(structures, model.hypers.max_charge, model.hypers.max_spin_multiplicity)
    data = _load(options, splits, model, seed, dtype)
    if not saved:
        choose_trainable(start, options)
        _log_baselines(options, start, data)
        splits.save(files.folder / SPLITS)
        files.write(OPTIONS, _options_of_run(options, seed))
    model.to(device=device, dtype=dtype)
    objectives = _objectives(options, model, data)
    files.base_name = start.name
    files.provenance = saved.provenance if saved else _provenance(options, start, data, seed)
    _logger.info("%s", trainable_report(model))
    rate = options.training.learning_rate
    if rate is None:
        rate = saved.state.learning_rate if saved else options.learning_rate()
    trainer = Trainer(model, objectives, data.train, data.validation, options.training, rate)
    if saved:
        trainer.load_state(saved.trainer)
        files.drop_rows_after(trainer.progress.epoch)
        _logger.info("going on after epoch %d", trainer.progress.epoch)
    state = (
        saved.state
        if saved
        else RunState(
            seed=seed,
            learning_rate=rate,
            baseline=options.baseline_mode(),
            before=_evaluate_all(options, model, data, trainer.wanted),
            name=start.name,
            fingerprint=start.fingerprint,
            inherited=start.inherited,
        )
    )
    return _Run(options, files, data, trainer, state)


def _options_of_run(options: Options, seed: int) -> str:
    """All options as a file that gives the same run again."""
    plain = {**options.resolved(), "seed": seed}
    if options.finetune.read_from is not None:
        # The checkpoint says what the model is like; what stands here would only confuse.
        del plain["architecture"]["model"]
    return OmegaConf.to_yaml(OmegaConf.create(plain))


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
) -> Errors:
    if not options.final_eval:
        return {}
    return {name: evaluate(model, loader, wanted) for name, loader in data.sets.items()}


def _train(run: _Run) -> TrainingResult:
    """Train with the display open and the files written as the run goes."""
    trainer, files = run.trainer, run.files
    options = trainer.options

    def save() -> None:
        files.keep_last(trainer.model, {"run": run.state.plain(), "trainer": trainer.state()})

    with RunDisplay(options.num_epochs, options.log_interval, trainer.progress.epoch) as display:

        def end_of_epoch(record: EpochRecord) -> None:
            files.add_row(record)
            display.epoch(record)

        trainer.callbacks = Callbacks(
            step=display.step, epoch=end_of_epoch, best=files.keep_best, save=save
        )
        return trainer.fit()


def _finish(run: _Run, result: TrainingResult) -> TrainOutcome:
    """Evaluate the best model, write ``results.json``, print the table."""
    files, before = run.files, run.state.before
    if result.stopped_early:
        _logger.info("stopped early: no improvement for a while")
    _logger.info("best model: epoch %d of %d, %s", result.best_epoch, result.epochs, files.best)
    after: Errors = {}
    if run.options.final_eval:
        model = run.trainer.model
        best = load_checkpoint(files.best).model.to(device=model.device, dtype=model.dtype)
        after = _evaluate_all(run.options, best, run.data, run.trainer.wanted)
        _show_results(run, after)
    content = {
        name: {
            key: {target: metrics.as_dict() for target, metrics in targets.items()}
            for key, targets in errors.items()
        }
        for name, errors in (("before", before), ("after", after))
    }
    files.write(RESULTS, json.dumps(content, indent=2) + "\n")
    return TrainOutcome(files.folder, result, before, after)


def _show_results(run: _Run, after: Errors) -> None:
    """Print the table of the set that says most, and put it into the log file."""
    shown = "test" if "test" in after else "validation" if "validation" in after else "train"
    finetuned = run.state.fingerprint is not None
    columns = {}
    if shown in run.state.before:
        name = "starting model" if finetuned else "untrained"
        columns[f"{name} (after {run.state.baseline})"] = run.state.before[shown]
    columns["fine-tuned" if finetuned else "trained"] = after[shown]
    notes = [f"{len(run.data.sets[shown].structures)} {shown} structures", *_sizes(run.files)]
    table = error_table(columns, notes, title=f"errors on the {shown} set")
    _logger.info("results\n%s", show(table), extra=FILE_ONLY)


def _sizes(files: RunFiles) -> list[str]:
    """Sizes of what the run wrote, for the table's foot."""
    sizes = [f"model: {files.best} ({size_text(files.best.stat().st_size)})"]
    if files.adapter.is_dir():
        total = sum(path.stat().st_size for path in files.adapter.iterdir())
        sizes.append(f"adapter: {files.adapter} ({size_text(total)})")
    return sizes
