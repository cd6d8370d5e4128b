"""Making a run ready: data, model, baselines, what trains."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from pet_finetune import processes
from pet_finetune.adapters.inject import trainable_report
from pet_finetune.backends.choice import choose_backend, use_backend
from pet_finetune.config.load import to_yaml
from pet_finetune.config.options_reference import schema_line
from pet_finetune.config.run_options import Options
from pet_finetune.config.training import TrainingOptions
from pet_finetune.data.frame_files import forget_files
from pet_finetune.data.loader import Loader
from pet_finetune.data.splits import Splits, load_splits, make_splits
from pet_finetune.data.structure_sets import joined, label_names
from pet_finetune.device import dtype_of_bits
from pet_finetune.errors import TrainingError
from pet_finetune.log import get_logger
from pet_finetune.model.potential import Potential
from pet_finetune.rng import seed_everything

from .baselines import BaselineTable, prepare_baselines
from .batch_memory import largest_batch
from .extend import ADVICE, check_known
from .feature import Feature, Plan
from .loggers import baseline_text, loggers
from .loss_features import NoisyLabels, RotationalAgreement, TrackedOffset
from .metrics import Errors
from .objectives import Objective, check_metric
from .resume import RunState, SavedRun, plain_errors, take_files
from .run_files import OPTIONS, SPLITS, RunFiles, about_run, provenance_of
from .sets import (
    BEFORE,
    RunData,
    evaluate_sets,
    load_data,
    objective_of,
    of_member,
    wanted_derivatives,
    with_chosen_sizes,
)
from .starting_model import (
    Start,
    check_targets,
    choose_trainable,
    foundation_of,
    rounding_told,
    start_model,
    with_stated_numbers,
)
from .trainer import Trainer
from .uncertainty import LastLayerUncertainty
from .weights import Averaging, SettledBaselines, Unfreezing

_logger = get_logger(__name__)


@dataclass(frozen=True)
class Run:
    """A run that is ready to train."""

    options: Options
    files: RunFiles
    data: RunData
    trainer: Trainer
    state: RunState


@dataclass(frozen=True)
class Rooms:
    """Parts of a run that come from rooms above training.

    Attributes:
        features: new instances of what takes part in every run.
        inspect: new instances of what looks at the data of a new run, where that is wanted.
        read: the three sets by a seed; says all that is wrong with the files at once.
        report: writes the report of the run in a folder.
        own: whether any of these are the caller's own, which other processes cannot be given.
        kept: whether the folder of the run stays when it has ended.
        start: options of a new run with the model that it starts from made ready.
    """

    features: Callable[[], Sequence[Feature]] = tuple
    inspect: Callable[[], Sequence[Feature]] = tuple
    read: Callable[[Options, int], Splits] = make_splits
    report: Callable[[Path], None] = lambda folder: None
    own: bool = False
    kept: bool = True
    start: Callable[[Options], Options] = lambda options: options


#: Training by itself.
NO_ROOMS = Rooms()


@dataclass(frozen=True)
class RunRequest:
    """Start of a run, in addition to its options and folder.

    Attributes:
        restart: a ``last.ckpt`` to go on from, exactly; of an ensemble that of any member.
        notices: what reading the options had to say, for the log.
        source: the options file, which the run must not overwrite.
        check: whether a new run inspects its data first.
        rooms: what other rooms bring into the run.
    """

    restart: str | Path | None = None
    notices: Sequence[str] = ()
    source: str | Path = ""
    check: bool = True
    rooms: Rooms = NO_ROOMS


def own_features(options: TrainingOptions) -> list[Feature]:
    """The features of this room that the options ask for."""
    features: list[Feature] = []
    if options.finetune.unfreeze is not None:
        features.append(Unfreezing())
    if options.rotational_consistency is not None:
        features.append(RotationalAgreement())
    if options.label_noise.energy or options.label_noise.forces:
        features.append(NoisyLabels())
    if options.track_energy_offset:
        features.append(TrackedOffset())
    if options.ema is not None or options.swa is not None:
        features.append(Averaging())
    if options.baselines_follow:
        features.append(SettledBaselines())  # before LLPR, which is of the model as it will be
    if options.finetune.llpr is not None:
        features.append(LastLayerUncertainty(options.finetune.llpr))
    return features


def prepare_run(
    options: Options,
    files: RunFiles,
    device: torch.device,
    rooms: Rooms,
    *,
    to_finish: bool = True,
    check: bool = False,
) -> Run:
    """Read everything for a new run, set the baselines, choose what trains.

    Args:
        options: checked options.
        files: of the run.
        device: where it trains.
        rooms: what other rooms bring into the run.
        to_finish: whether it will be trained to its end, and therefore evaluates the starting
            model and writes down what features keep of it.
        check: whether the data are inspected before anything is trained on them.
    """
    check_targets(options)
    stated = with_stated_numbers(options)
    seed = _seeded(options, options.seed, device)
    splits = (rooms.read if check else make_splits)(options, seed)
    _check_metric(options, splits)
    own_seed, trained_on = of_member(options, splits, seed)
    options = with_chosen_sizes(options, trained_on.train)
    start = start_model(options, splits)
    dtype = dtype_of_bits(options.base_precision)
    start.model.to(device=device, dtype=dtype)
    features = _features(options, rooms, files if to_finish else None)
    foundation = foundation_of(start, options) if start.fingerprint is not None else None
    plan = Plan(options, start, foundation, splits, trained_on.train, own_seed)
    looks = rooms.inspect() if check and processes.first() else ()
    for feature in [*looks, *features]:
        feature.check(plan)
    data = _loaded(options, splits, trained_on, start.model, own_seed)
    heads = [head for feature in features for head in feature.heads]
    baselines = _begin(stated, start, data, heads)
    start.model.to(device=device, dtype=dtype)
    objectives = _objectives(options, start.model, data)
    options = _filled(options, start.model, data, objectives)
    if processes.first():
        splits.save(files.folder / SPLITS)
    files.write(OPTIONS, options_of_run(options, seed))
    files.base_name, files.provenance = start.name, provenance_of(options, start, data.sets, seed)
    trainer = _trainer(options, start.model, data, objectives, features)
    trainable = trainable_report(start.model)
    _logger.info("%s", trainable)
    before: Errors = {}
    if to_finish:
        if start.fingerprint is not None:
            kept = {f.name: f.kept() for f in features if type(f).kept is not Feature.kept}
            files.write_kept(kept)
        facts = about_run(options, files.provenance, splits, start.model, baselines, trainable)
        files.tell(facts)
        if options.final_eval:
            model, wanted = start.model, trainer.wanted
            before = evaluate_sets(files, BEFORE, model, data, wanted, trainer.features)
            files.tell({BEFORE: plain_errors(before)})
    state = RunState(
        seed=seed,
        learning_rate=trainer.learning_rate,
        baseline=options.baseline_mode(),
        before=before,
        name=start.name,
        fingerprint=start.fingerprint,
        inherited=start.inherited,
        new_species=list(start.new_species),
        max_atoms=data.train.max_atoms_per_batch,
    )
    return Run(options, files, data, trainer, state)


def resume_run(files: RunFiles, saved: SavedRun, device: torch.device, rooms: Rooms) -> Run:
    """Read everything again for a run that goes on, and put its trainer where it was."""
    options = saved.options
    check_targets(options)
    seed = _seeded(options, saved.state.seed, device)
    take_files(saved, files)
    splits = load_splits(files.folder / SPLITS, options)
    _check_metric(options, splits)
    own_seed, trained_on = of_member(options, splits, seed)
    options = with_chosen_sizes(options, trained_on.train)
    start = saved.start()
    start.model.to(device=device, dtype=dtype_of_bits(options.base_precision))
    data = _loaded(options, splits, trained_on, start.model, own_seed)
    objectives = _objectives(options, start.model, data)
    options = _filled(options, start.model, data, objectives, saved.state.max_atoms)
    kept = files.read_kept() if saved.state.fingerprint else {}
    files.base_name, files.provenance = start.name, saved.provenance
    features = _features(options, rooms, files)
    trainer = _trainer(options, start.model, data, objectives, features, kept, saved)
    _logger.info("%s", trainable_report(start.model))
    files.drop_rows_after(trainer.progress.epoch)
    state = replace(saved.state, max_atoms=data.train.max_atoms_per_batch)
    return Run(options, files, data, trainer, state)


def _seeded(options: Options, seed: int | None, device: torch.device) -> int:
    """The seed of a run, the same in all processes, from which all generators start."""
    seed = seed_everything(processes.from_first(seed_everything(seed)))
    _logger.info("seed %d, %s, %d bits", seed, device, options.base_precision)
    return seed


def _features(options: Options, rooms: Rooms, files: RunFiles | None) -> list[Feature]:
    """All that takes part in a run; without files nothing is logged."""
    logged = () if files is None else loggers(options, files)
    return [*rooms.features(), *own_features(options.training), *logged]


def _loaded(
    options: Options,
    splits: Splits,
    trained_on: Splits,
    model: Potential,
    seed: int,
) -> RunData:
    """The loaders of structures, all of which the model has to know."""
    structures = joined([splits.train, splits.validation, splits.test])
    check_known(structures, model, ADVICE if options.is_finetuning else "")
    forget_files()
    data = load_data(options, trained_on, model, seed, model.dtype)
    # The input is valid, so compiling the operators now is worthwhile.
    use_backend(model, choose_backend(model.device))
    return data


def _filled(
    options: Options,
    model: Potential,
    data: RunData,
    objectives: Mapping[str, Objective],
    known: int | None = None,
) -> Options:
    """The options; ``max_atoms_per_batch: auto`` fills the loaders first, and sets the epochs."""
    if options.training.max_atoms_per_batch != "auto":
        return options
    most = known or largest_batch(model, data.train, objectives, options.training)
    data.fill(most)
    return with_chosen_sizes(options, data.train.structures, most)


def _objectives(options: Options, model: Potential, data: RunData) -> dict[str, Objective]:
    """What is trained of each target."""
    labels = label_names(data.train.structures)
    return {
        name: objective_of(options.training, model, name, labels) for name in options.target_specs()
    }


def _check_metric(options: Options, splits: Splits) -> None:
    """Make sure, as soon as the labels are read, that the best model can be told by them."""
    energies = [name for name, spec in options.target_specs().items() if spec.is_energy]
    labels = label_names(splits.validation or splits.train)
    wanted = wanted_derivatives(options, splits.train)
    check_metric(options.training.best_model_metric, labels, wanted, energies)


def _begin(
    options: Options, start: Start, data: RunData, heads: Sequence[str]
) -> list[BaselineTable]:
    """Choose what trains in a new run, set its baselines and log them."""
    training = data.train.sampled("baselines, scales and errors of the training set")
    with rounding_told(options, start.model, training):
        choose_trainable(start, options, heads)
    targets = list(options.target_specs())
    tables = prepare_baselines(
        options, start.model, training, targets, start.fresh, start.new_species
    )
    for table in tables:
        if table.rows:
            _logger.info("\n%s", baseline_text(table))
        _logger.info("scale of '%s': %.6g %s", table.target, table.scale, table.unit)
    return tables


def _trainer(
    options: Options,
    model: Potential,
    data: RunData,
    objectives: Mapping[str, Objective],
    features: Sequence[Feature],
    kept: Mapping[str, Any] | None = None,
    saved: SavedRun | None = None,
) -> Trainer:
    """The trainer, where a run that goes on left it."""
    rate = options.training.learning_rate
    if rate is None:
        rate = saved.state.learning_rate if saved else options.learning_rate()
    training = data.train.shared(processes.rank(), processes.size())
    _check_sizes(training, processes.size())
    trainer = Trainer(
        model,
        objectives,
        training,
        data.validation,
        options.training,
        rate,
        features=features,
        kept=kept,
    )
    if saved:
        trainer.load_state(saved.trainer)
        _logger.info("going on after epoch %d", trainer.progress.epoch)
    return trainer


def _check_sizes(training: Loader, size: int) -> None:
    """Make sure that there is something to do for every process."""
    mean = len(training.structures) / max(1, training.num_batches(0))
    if training.max_atoms_per_batch is None and (training.batch_size or 1) < size:
        raise TrainingError(
            f"batch_size {training.batch_size} on {size} processes: each needs a structure of "
            "every batch. The batch is that of all processes together: choose a larger one, or "
            "fewer processes."
        )
    if mean < 2 * size > 2:
        _logger.warning(
            "a batch has %.1f structures, for %d processes: some wait for others; larger batches "
            "(max_atoms_per_batch, batch_size) or fewer processes are better",
            mean,
            size,
        )


def options_of_run(options: Options, seed: int) -> str:
    """All options as a file that gives the same run again."""
    plain = {**options.resolved(), "seed": seed}
    if options.finetune.read_from is not None:
        # The checkpoint says what the model is like; what stands here would only confuse.
        del plain["architecture"]["model"]
    return schema_line() + to_yaml(plain)
