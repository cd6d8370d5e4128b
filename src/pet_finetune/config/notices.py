"""Remarks on valid options: what has no effect, what was assumed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pet_finetune.keys import direct_quantity

from .base import Section, is_ignored
from .data_contradictions import located_datasets
from .dataset import quantity_is_assumed
from .finetune import METHOD_KEYS
from .problems import Path, format_path
from .run_options import Options


def notices(options: Options, raw: Mapping[str, Any]) -> Iterator[str]:
    """Yield one line for each remark."""
    ignored = [format_path(path) for path in _ignored(options, ())]
    if ignored:
        yield f"accepted for metatrain's files, without effect here: {', '.join(ignored)}."
    yield from _unused_settings(options, raw)
    yield from _units(options, raw)
    yield from _quantities(options, raw)
    yield from _same_files(options)
    yield from _rehearsed_report(options)


def _ignored(value: Any, path: Path) -> Iterator[Path]:
    """Options that were given and have no effect."""
    if isinstance(value, Section):
        for name in type(value).model_fields:
            if name in value.model_fields_set and is_ignored(type(value).model_fields[name]):
                yield (*path, name)
            yield from _ignored(getattr(value, name), (*path, name))
    elif isinstance(value, dict):
        for name, item in value.items():
            yield from _ignored(item, (*path, name))
    elif isinstance(value, tuple):
        for index, item in enumerate(value):
            yield from _ignored(item, path if len(value) == 1 else (*path, index))


def _unused_settings(options: Options, raw: Mapping[str, Any]) -> Iterator[str]:
    training = options.training
    given = training.model_fields_set
    if "batch_size" in given and training.max_atoms_per_batch is not None:
        yield (
            "architecture.training.batch_size has no effect: max_atoms_per_batch "
            f"({training.max_atoms_per_batch}) fills the batches."
        )
    if training.min_atoms_per_batch and training.max_atoms_per_batch is None:
        yield (
            "architecture.training.min_atoms_per_batch has no effect without max_atoms_per_batch."
        )
    full = options.finetune.method == "full" and training.optimizer == "soap"
    if full and training.batch_size == 1 and "optimizer" not in given:
        yield (
            "architecture.training.batch_size is 1: in full, with so small batches, the default "
            "optimizer soap did worse than adamw. Give batches of 5 or more, or optimizer: adamw."
        )
    architecture = raw.get("architecture")
    model = architecture.get("model") if isinstance(architecture, Mapping) else None
    if options.finetune.read_from is not None and model:
        yield (
            "architecture.model has no effect: the model's shape comes from "
            f"{options.finetune.read_from}."
        )
    given = options.finetune.config.model_fields_set
    if options.finetune.method == "full" and given - METHOD_KEYS["full"]:
        yield "architecture.training.finetune.config has no effect: the method is full."
    if not options.is_finetuning and training.finetune.inherit_heads:
        yield (
            "architecture.training.finetune.inherit_heads has no effect: training is from scratch."
        )
    extra = [name for dataset in options.training_set for name in dataset.extra_data]
    if extra and not options.is_finetuning and not options.model.system_conditioning:
        yield (
            f"training_set.extra_data ({', '.join(sorted(set(extra)))}) has no effect: "
            "architecture.model.system_conditioning is false."
        )


def _units(options: Options, raw: Mapping[str, Any]) -> Iterator[str]:
    """Units that were assumed; metatrain would not convert, which comes to the same."""
    lengths: dict[str, None] = {}
    energies: dict[str, None] = {}
    for path, dataset in located_datasets(options, raw):
        written = _written(raw, path)
        systems = written.get("systems")
        if not (isinstance(systems, Mapping) and systems.get("length_unit")):
            lengths[format_path(path)] = None
        targets = written.get("targets")
        for name, target in dataset.targets.items():
            own = targets.get(name) if isinstance(targets, Mapping) else None
            if target.is_energy and not (isinstance(own, Mapping) and own.get("unit")):
                energies[format_path((*path, "targets", name))] = None
    if lengths:
        yield f"length_unit not given, taken as angstrom: {', '.join(lengths)}."
    if energies:
        yield f"unit not given, taken as eV: {', '.join(energies)}."


def _quantities(options: Options, raw: Mapping[str, Any]) -> Iterator[str]:
    """Targets that are energies because nothing says otherwise, as in metatrain."""
    assumed: dict[str, None] = {}
    for path, dataset in located_datasets(options, raw):
        targets = _written(raw, path).get("targets")
        for name in dataset.targets:
            own = targets.get(name) if isinstance(targets, Mapping) else None
            plain = own if isinstance(own, Mapping) else {}
            if direct_quantity(name) is None and quantity_is_assumed(name, plain):
                assumed[format_path((*path, "targets", name))] = None
    if assumed:
        yield (
            f"quantity not given, taken as energy as in metatrain: {', '.join(assumed)}. Forces "
            "and stress are read where they are asked for (`forces: on`)."
        )


def _written(raw: Mapping[str, Any], path: Path) -> Mapping[str, Any]:
    node: Any = raw
    for key in path:
        node = node[key]
    return node if isinstance(node, Mapping) else {}


def _same_files(options: Options) -> Iterator[str]:
    """Whole files that serve twice make errors look too small."""
    training = {d.systems.read_from for d in options.training_set if d.indices is None}
    for name in ("validation_set", "test_set"):
        chosen = getattr(options, name)
        if not isinstance(chosen, tuple):
            continue
        for dataset in chosen:
            if dataset.systems.read_from in training and dataset.indices is None:
                yield (
                    f"{name} reads {dataset.systems.read_from}, which is also trained on: its "
                    "errors will look too small."
                )


def _rehearsed_report(options: Options) -> Iterator[str]:
    """A report on structures that are replayed says nothing of others."""
    replay, retention = options.finetune.replay, options.finetune.retention
    if replay is None or not retention.wanted:
        return
    if replay.read_from is None and retention.read_from is None:
        same = "probe" in replay.structures
    else:
        files = [d.systems.read_from for d in (replay.read_from, retention.read_from) if d]
        same = len(files) == 2 and files[0] == files[1]
    if same:
        yield (
            "the forgetting report looks at the structures that are replayed: its errors will "
            "look too small."
        )
