"""Options that are fine one by one and contradict each other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pet_finetune.errors import did_you_mean
from pet_finetune.installation import LONG_RANGE, QUANTIZATION, missing_extra

from .data_contradictions import check_data, check_keeping
from .finetune import METHOD_KEYS
from .problems import Path, Problem, format_path
from .run_options import Options
from .training import first_epoch

_MODEL: Path = ("architecture", "model")
_TRAINING: Path = ("architecture", "training")
_FINETUNE: Path = (*_TRAINING, "finetune")
#: Keys that metatrain's own options have under ``finetune.config``.
METATRAIN_KEYS = frozenset(
    {"rank", "alpha", "target_modules", "head_modules", "last_layer_modules"}
)


def check(options: Options, raw: dict[str, Any]) -> Iterator[Problem]:
    """Yield everything that cannot be meant.

    Args:
        options: options each of which is valid.
        raw: what they were made from, which tells given values from defaults.
    """
    yield from _check_model(options)
    yield from _check_batches(options)
    yield from _check_finetune(options, raw)
    yield from _check_baseline(options)
    yield from _check_target_names(options)
    yield from _check_loss(options)
    yield from _check_metric(options)
    yield from _check_averages(options)
    yield from _check_precision(options)
    yield from _check_loss_schedule(options)
    yield from _check_unfreeze(options)
    yield from check_data(options, raw)
    yield from check_keeping(options)


def _check_model(options: Options) -> Iterator[Problem]:
    model = options.model
    if model.d_pet % model.num_heads:
        yield Problem(
            (*_MODEL, "num_heads"),
            f"{model.num_heads} heads cannot share d_pet = {model.d_pet} equally. "
            f"Allowed: divisors of {model.d_pet}, for instance "
            f"{_largest_divisor(model.d_pet, model.num_heads)}.",
            also=((*_MODEL, "d_pet"),),
        )
    lacking = missing_extra(*LONG_RANGE) if model.long_range.enable else None
    if lacking is not None:
        yield Problem((*_MODEL, "long_range", "enable"), lacking)
    if model.cutoff_width > model.cutoff:
        yield Problem(
            (*_MODEL, "cutoff_width"),
            f"{model.cutoff_width:g} Å is wider than the cutoff, {model.cutoff:g} Å.",
            also=((*_MODEL, "cutoff"),),
        )


def _largest_divisor(number: int, limit: int) -> int:
    return max(d for d in range(1, min(number, limit) + 1) if number % d == 0)


def _check_batches(options: Options) -> Iterator[Problem]:
    training = options.training
    most, least = training.max_atoms_per_batch, training.min_atoms_per_batch
    if isinstance(most, int) and least > most:
        yield Problem(
            (*_TRAINING, "min_atoms_per_batch"),
            f"{least} is more than max_atoms_per_batch, {most}: no batch would be left.",
            also=((*_TRAINING, "max_atoms_per_batch"),),
        )


def _check_finetune(options: Options, raw: dict[str, Any]) -> Iterator[Problem]:
    method = options.finetune.method
    given = _given(raw, (*_FINETUNE, "config"))
    for key in sorted(given - METHOD_KEYS[method]):
        if method == "full" and key in METATRAIN_KEYS:
            continue  # a notice says that it has no effect, as it has none there
        owners = [owner for owner, keys in METHOD_KEYS.items() if key in keys]
        yield Problem(
            (*_FINETUNE, "config", key),
            f"belongs to method {' and '.join(owners)}, but the method is {method}. Remove it or "
            "change finetune.method.",
            also=((*_FINETUNE, "method"),),
        )
    missing = missing_extra(*QUANTIZATION)
    if options.finetune.config.quant_bits is not None and missing is not None:
        yield Problem((*_FINETUNE, "config", "quant_bits"), missing)
    if options.finetune.new_elements is not None and not options.is_finetuning:
        yield Problem(
            (*_FINETUNE, "new_elements"),
            "a model trained from scratch takes its elements from the data. Remove it, or give a "
            "checkpoint to start from with -c or finetune.read_from.",
            also=((*_FINETUNE, "read_from"), (*_FINETUNE, "legacy_start")),
        )
    yield from _check_ensemble(options)


def _check_ensemble(options: Options) -> Iterator[Problem]:
    finetune = options.finetune
    size, member = finetune.ensemble, finetune.member
    path: Path = (*_FINETUNE, "ensemble")
    if size is None:
        if member is not None:
            yield Problem(
                (*_FINETUNE, "member"),
                f"member {member} of what? Give finetune.ensemble, the number of members, or "
                "remove it.",
                also=(path,),
            )
        return
    if finetune.llpr is not None:
        yield Problem(
            (*_FINETUNE, "llpr"),
            "a committee has an uncertainty already, the spread of its members. Choose one of the "
            "two.",
            also=(path,),
        )
    if size < 2:
        yield Problem(
            path,
            f"a committee has at least 2 members, found {size}: one model has no spread. Use 4, or "
            "remove it.",
        )
    if finetune.method != "lora":
        yield Problem(
            path,
            f"its members are adapters of one foundation, but the method is {finetune.method}. Use "
            "method lora with a checkpoint to start from, or remove it.",
            also=((*_FINETUNE, "method"), (*_FINETUNE, "read_from")),
        )
    specs = options.target_specs()
    if len(specs) > 1 or not all(spec.is_energy for spec in specs.values()):
        yield Problem(
            path,
            f"a committee is of one energy, but the targets are {', '.join(specs)}. Keep one "
            "energy, or remove the ensemble: an adapter alone learns several, of any kind.",
            also=(("training_set",),),
        )
    if member is not None and member >= size:
        yield Problem(
            (*_FINETUNE, "member"),
            f"there is no member {member} of {size}: they are counted from 0 to {size - 1}.",
            also=(path,),
        )


def _check_baseline(options: Options) -> Iterator[Problem]:
    training = options.training
    mode = training.baseline.mode
    path: Path = (*_TRAINING, "baseline", "mode")
    others = (
        (*_FINETUNE, "read_from"),
        (*_FINETUNE, "legacy_start"),
        (*_TRAINING, "atomic_baseline"),
    )
    if mode in ("keep", "refit") and not options.is_finetuning:
        yield Problem(
            path,
            f"{mode} needs a model to start from, but training is from scratch. Use fit, or give "
            "a checkpoint with -c or finetune.read_from.",
            also=others,
        )
    if mode == "values" and not training.atomic_baseline:
        yield Problem(path, "values needs the numbers: give atomic_baseline.", also=others)
    if mode == "keep" and training.atomic_baseline:
        yield Problem(
            path,
            "keep contradicts atomic_baseline, which sets other values. Remove one of them.",
            also=others,
        )
    specs = options.target_specs()
    for name in training.stated_baselines:
        if name in specs and specs[name].rank > 0:
            yield Problem(
                (*_TRAINING, "atomic_baseline", name),
                f"the target is {specs[name].form}, and only scalars have a baseline per element: "
                "a vector or tensor that the element alone decides would not turn with the "
                "structure. Remove it.",
                also=(("training_set",),),
            )


def _check_target_names(options: Options) -> Iterator[Problem]:
    """Options that name targets must name targets of the data."""
    training = options.training
    named: dict[Path, Any] = {
        (*_TRAINING, "loss"): {} if isinstance(training.loss, str) else training.loss,
        (*_TRAINING, "atomic_baseline"): training.stated_baselines,
        (*_TRAINING, "fixed_scaling_weights"): training.stated_scales,
        (*_FINETUNE, "inherit_heads"): training.finetune.inherit_heads,
    }
    known = list(options.target_specs())
    unknown = "the data have no target of this name."
    found = [((*path, name), name, unknown) for path, names in named.items() for name in names]
    path: Path = (*_TRAINING, "per_structure_targets")
    found += [
        (path, name, f"the data have no target {name!r}.")
        for name in training.per_structure_targets
    ]
    for path, name, words in found:
        if name not in known:
            yield Problem(
                path,
                f"{words}{did_you_mean(name, known)} Targets: {', '.join(known)}.",
                also=(("training_set",),),
            )


def _check_loss(options: Options) -> Iterator[Problem]:
    if isinstance(options.training.loss, str):
        return
    specs = options.target_specs()
    for name, loss in options.training.loss.items():
        path: Path = (*_TRAINING, "loss", name)
        for keys in loss.repeated():
            yield Problem(path, f"{' and '.join(keys)} set the same loss. Keep one of them.")
        if loss.has_gradients and name in specs and not specs[name].is_energy:
            yield Problem(
                path,
                "only an energy has forces and stress; this target's quantity is "
                f"{specs[name].quantity or 'not given'}.",
                also=(("training_set",),),
            )
    weights = [
        weight
        for name, spec in specs.items()
        for loss in (options.training.loss_for(name),)
        for weight in (
            loss.weight,
            *((loss.forces_term().weight, loss.stress_term().weight) if spec.is_energy else ()),
        )
    ]
    if weights and not any(weights):
        yield Problem(
            (*_TRAINING, "loss"),
            "all weights are zero: nothing would be learned.",
            also=(("training_set",),),
        )


def _check_metric(options: Options) -> Iterator[Problem]:
    metric = options.training.best_model_metric
    targets = [target for dataset in options.training_set for target in dataset.targets.values()]
    path: Path = (*_TRAINING, "best_model_metric")
    if metric == "forces_mae" and not any(target.forces.wanted for target in targets):
        yield Problem(
            path,
            "forces_mae needs forces, but no target has them. Give `forces` in "
            f"{format_path(('training_set', 'targets'))}, or use mae_prod.",
            also=(("training_set",),),
        )
    if metric == "energy_mae" and not any(target.is_energy for target in targets):
        yield Problem(
            path,
            "energy_mae needs an energy, but no target is one. Use mae_prod.",
            also=(("training_set",),),
        )


def _given(raw: dict[str, Any], path: Path) -> set[str]:
    """Keys written in the section at ``path``."""
    node: Any = raw
    for key in path:
        node = node.get(key) if isinstance(node, dict) else None
    return set(node) if isinstance(node, dict) else set()


def _check_averages(options: Options) -> Iterator[Problem]:
    training = options.training
    if training.swa is None:
        return
    if training.ema is not None:
        yield Problem(
            (*_TRAINING, "swa"),
            "only one average of the weights can be validated and saved, and ema asks for "
            "another. Remove swa or ema.",
            also=((*_TRAINING, "ema"),),
        )
    yield from _check_start(options, (*_TRAINING, "swa", "start"), training.swa.start)


def _many(options: Options) -> str:
    """Number of epochs in words."""
    chosen = options.training.num_epochs is None
    return f"{options.training.epochs} epochs" + (
        ", the fewest where num_epochs is not given" if chosen else ""
    )


def _check_start(options: Options, path: Path, start: float) -> Iterator[Problem]:
    """A part of the run must have an epoch left to it."""
    epochs = options.training.epochs
    if first_epoch(start, epochs) >= epochs:
        yield Problem(
            path,
            f"{start:g} of {_many(options)} is after the start of the last one: it would never "
            f"begin. Allowed: up to {(epochs - 1) / epochs:.4g}.",
            also=((*_TRAINING, "num_epochs"),),
        )


def _check_precision(options: Options) -> Iterator[Problem]:
    if options.training.precision is not None and options.base_precision == 64:
        yield Problem(
            (*_TRAINING, "precision"),
            f"{options.training.precision} computes with fewer digits than float32, base_precision "
            "64 asks for more. Remove one of them.",
            also=(("base_precision",),),
        )


def _check_loss_schedule(options: Options) -> Iterator[Problem]:
    schedule = options.training.loss_schedule
    for index, stage in enumerate(schedule):
        path: Path = (*_TRAINING, "loss_schedule", index)
        if index and stage.start <= schedule[index - 1].start:
            yield Problem(
                (*path, "start"),
                f"{stage.start:g} is not after the start of the stage before it, "
                f"{schedule[index - 1].start:g}. Give the stages in the order of the run.",
            )
        yield from _check_start(options, (*path, "start"), stage.start)
        if not (stage.energy or stage.forces or stage.stress):
            yield Problem(path, "all factors are zero: nothing would be learned.")


def _check_unfreeze(options: Options) -> Iterator[Problem]:
    unfreeze, epochs = options.finetune.unfreeze, options.training.epochs
    if unfreeze is None:
        return
    path: Path = (*_FINETUNE, "unfreeze")
    start: Path = (*_FINETUNE, "read_from")
    method: Path = (*_FINETUNE, "method")
    if not options.is_finetuning:
        yield Problem(
            path,
            "the parts that are frozen at first must have been trained before, but training is "
            "from scratch. Remove it, or give a checkpoint with -c or finetune.read_from.",
            also=(start,),
        )
    elif options.finetune.method != "full":
        yield Problem(
            path,
            f"method {options.finetune.method} decides what trains for the whole run. Remove it, "
            "or set finetune.method to full.",
            also=(method,),
        )
    if (unfreeze.every is None) == (unfreeze.stages is None):
        yield Problem(path, "give either every or stages.")
        return
    if unfreeze.every is not None and unfreeze.every >= epochs:
        yield Problem(
            (*path, "every"),
            f"after {unfreeze.every} epochs, of {_many(options)}, is never: only the heads "
            "would train. Use a smaller number, or finetune.method heads.",
            also=((*_TRAINING, "num_epochs"),),
        )
    if unfreeze.stages is not None:
        if 0 not in unfreeze.stages:
            yield Problem((*path, "stages"), "nothing would train at first: name what starts at 0.")
        for epoch in unfreeze.stages:
            if epoch >= epochs:
                yield Problem(
                    (*path, "stages", str(epoch)),
                    f"the run has {_many(options)}: this would never begin.",
                    also=((*_TRAINING, "num_epochs"),),
                )
