"""Contradictions between the ways of training that can be combined, and between their numbers."""

from __future__ import annotations

from collections.abc import Iterator

from .options import Options
from .problems import Path, Problem
from .recipes import first_epoch

__all__ = ["check_recipes"]

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
