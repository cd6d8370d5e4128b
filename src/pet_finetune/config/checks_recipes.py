"""Contradictions between the ways of training that can be combined, and between their numbers."""

from __future__ import annotations

from collections.abc import Iterator

from .base import Section
from .checks_data import check_target
from .dataset import DatasetOptions
from .options import Options
from .problems import Path, Problem
from .recipes import first_epoch

__all__ = ["check_keeping", "check_recipes"]

_TRAINING: Path = ("architecture", "training")
_FINETUNE: Path = (*_TRAINING, "finetune")


def check_recipes(options: Options) -> Iterator[Problem]:
    """Yield everything about the course of training that cannot be meant."""
    yield from _check_averages(options)
    yield from _check_precision(options)
    yield from _check_loss_schedule(options)
    yield from _check_unfreeze(options)


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


def _check_start(options: Options, path: Path, start: float) -> Iterator[Problem]:
    """A part of the run must have an epoch left to it."""
    epochs = options.training.num_epochs
    if first_epoch(start, epochs) >= epochs:
        yield Problem(
            path,
            f"{start:g} of {epochs} epochs is after the start of the last one: it would never "
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
    unfreeze, epochs = options.finetune.unfreeze, options.training.num_epochs
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
            f"after {unfreeze.every} epochs, of {epochs}, is never: only the heads would train. "
            "Use a smaller number, or finetune.method heads.",
            also=((*_TRAINING, "num_epochs"),),
        )
    if unfreeze.stages is not None:
        if 0 not in unfreeze.stages:
            yield Problem((*path, "stages"), "nothing would train at first: name what starts at 0.")
        for epoch in unfreeze.stages:
            if epoch >= epochs:
                yield Problem(
                    (*path, "stages", str(epoch)),
                    f"the run has {epochs} epochs: this would never begin.",
                    also=((*_TRAINING, "num_epochs"),),
                )


def check_keeping(options: Options) -> Iterator[Problem]:
    """Yield everything about keeping the foundation's knowledge that cannot be meant."""
    finetune = options.finetune
    if finetune.pretrain is not None and finetune.read_from is None:
        yield Problem(
            (*_FINETUNE, "pretrain"),
            "trains a checkpoint further before the run, but none is given. Give it with -c or "
            "finetune.read_from, or remove the section.",
            also=((*_FINETUNE, "read_from"),),
        )
    replay, anchor, retention = finetune.replay, finetune.anchor, finetune.retention
    if retention.read_from is not None:
        yield from _check_data((*_FINETUNE, "retention", "read_from"), retention.read_from)
    if replay is not None:
        path: Path = (*_FINETUNE, "replay")
        if replay.read_from is not None:
            yield from _check_data((*path, "read_from"), replay.read_from)
            if _changed(replay, "structures"):
                yield Problem(
                    (*path, "structures"),
                    "these would be labelled by the foundation, but read_from gives data with "
                    "labels. Keep one of them.",
                    also=((*path, "read_from"),),
                )
        if replay.read_from is not None or "training" not in replay.structures:
            for key in _changed(replay, "copies", "rattle", "strain"):
                yield Problem(
                    (*path, key),
                    "only the training structures are distorted, and they are not replayed. "
                    "Remove it, or name `training` among the structures.",
                    also=((*path, "structures"), (*path, "read_from")),
                )
    for name, section in (("replay", replay), ("anchor", anchor)):
        if section is not None and not section.structures:
            yield Problem(
                (*_FINETUNE, name, "structures"), "empty; name `training`, `probe` or a file."
            )
    if anchor is not None and anchor.type == "ewc" and finetune.config.quant_bits is not None:
        yield Problem(
            (*_FINETUNE, "anchor", "type"),
            "ewc asks how the predictions depend on each weight of the base, and with quant_bits "
            "these are not there as numbers. Use l2sp, or remove quant_bits.",
            also=((*_FINETUNE, "config", "quant_bits"),),
        )
    if anchor is not None and anchor.type != "ewc":
        for key in _changed(anchor, "structures", "samples"):
            yield Problem(
                (*_FINETUNE, "anchor", key),
                f"belongs to type ewc, but the type is {anchor.type}. Remove it or change "
                "anchor.type.",
                also=((*_FINETUNE, "anchor", "type"),),
            )


def _changed(section: Section, *names: str) -> list[str]:
    """Those of the options that are not at their defaults, which files of runs spell out."""
    fields = type(section).model_fields
    return [name for name in names if getattr(section, name) != fields[name].default]


def _check_data(path: Path, dataset: DatasetOptions) -> Iterator[Problem]:
    """One energy, in a known unit."""
    if len(dataset.targets) != 1:
        yield Problem(
            (*path, "targets"),
            f"expected one target, the foundation's energy that these data have, got "
            f"{', '.join(dataset.targets) or 'none'}.",
        )
    for name, target in dataset.targets.items():
        yield from check_target((*path, "targets", name), name, target)
        if not target.is_energy:
            yield Problem(
                (*path, "targets", name),
                f"expected an energy, and its quantity is {target.quantity or 'not given'}. Set "
                "`quantity: energy`.",
            )
