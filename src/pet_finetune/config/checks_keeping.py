"""Contradictions in ``finetune.retention``, ``finetune.replay`` and ``finetune.anchor``."""

from __future__ import annotations

from collections.abc import Iterator

from .base import Section
from .checks_target import check_target
from .dataset import DatasetOptions
from .options import Options
from .problems import Path, Problem

__all__ = ["check_keeping"]

_FINETUNE: Path = ("architecture", "training", "finetune")


def check_keeping(options: Options) -> Iterator[Problem]:
    """Yield everything about keeping the foundation's knowledge that cannot be meant."""
    finetune = options.finetune
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
