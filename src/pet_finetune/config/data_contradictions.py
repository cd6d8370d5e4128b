"""Contradictions of data: in a target, in and between sets, in what is replayed; and notices."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pet_finetune.errors import UnitError, did_you_mean
from pet_finetune.keys import TargetSpec, direct_quantity
from pet_finetune.units import to_own_unit

from .base import Section, is_ignored
from .dataset import DatasetOptions, IndexedSet, quantity_is_assumed
from .finetune import METHOD_KEYS
from .problems import Path, Problem, format_path
from .run_options import Options
from .target import GRADIENT_QUANTITIES, TargetOptions

_FINETUNE: Path = ("architecture", "training", "finetune")


def check_data(options: Options, raw: Mapping[str, Any]) -> Iterator[Problem]:
    """Yield everything about the data that cannot be meant."""
    specs = options.target_specs()
    for path, dataset in located_datasets(options, raw):
        if not dataset.targets:
            yield Problem((*path, "targets"), "empty; name at least one target, such as `energy`.")
        for name, target in dataset.targets.items():
            place: Path = (*path, "targets", name)
            yield from check_target(place, name, target)
            if name in specs:
                yield from _check_same(place, specs[name], target.spec(name))
            else:
                yield Problem(
                    place,
                    f"training_set has no such target.{did_you_mean(name, specs)} "
                    f"Targets: {', '.join(specs)}.",
                    also=(("training_set",),),
                )
    yield from _check_fractions(options)
    yield from _check_indices(options)


def located_datasets(
    options: Options, raw: Mapping[str, Any]
) -> Iterator[tuple[Path, DatasetOptions]]:
    """All data sets with the place where the user wrote them."""
    for name in ("training_set", "validation_set", "test_set"):
        chosen = getattr(options, name)
        if isinstance(chosen, (float, IndexedSet)):
            continue
        listed = isinstance(raw.get(name), (list, tuple))
        for index, dataset in enumerate(chosen):
            yield ((name, index) if listed else (name,)), dataset


def _check_same(path: Path, first: TargetSpec, own: TargetSpec) -> Iterator[Problem]:
    """A target of several training sets must be the same thing in all of them."""
    for what in ("quantity", "unit", "kind", "per_atom", "num_subtargets"):
        if getattr(first, what) != getattr(own, what):
            yield Problem(
                path,
                f"its {what} is {getattr(own, what)!r}, but {getattr(first, what)!r} "
                "where training_set first names the target. Use two names.",
            )


def _check_fractions(options: Options) -> Iterator[Problem]:
    validation, test = options.validation_set, options.test_set
    if validation == 0.0:
        yield Problem(
            ("validation_set",),
            "expected a number between 0 and 1, got 0. Without validation data no best model can "
            "be picked; 0.1 is common.",
        )
    if isinstance(validation, float) and isinstance(test, float) and validation + test >= 1.0:
        yield Problem(
            ("test_set",),
            f"validation_set ({validation:g}) and test_set ({test:g}) together leave nothing to "
            "train on.",
            also=(("validation_set",),),
        )


def _check_indices(options: Options) -> Iterator[Problem]:
    """Index lists point into the one training file and must not share frames."""
    held_out = {
        name: chosen.indices
        for name, chosen in (
            ("validation_set", options.validation_set),
            ("test_set", options.test_set),
        )
        if isinstance(chosen, IndexedSet)
    }
    if not held_out:
        return
    if len(options.training_set) > 1:
        for name in held_out:
            yield Problem(
                (name, "indices"),
                "which of the training files is meant is not clear. Give data sets with their "
                "own `systems` instead.",
                also=(("training_set",),),
            )
        return
    given = {"training_set": options.training_set[0].indices, **held_out}
    lists = {name: indices for name, indices in given.items() if isinstance(indices, tuple)}
    for position, later in enumerate(lists):
        for earlier in list(lists)[:position]:
            shared = sorted(set(lists[earlier]) & set(lists[later]))
            if shared:
                shown = ", ".join(map(str, shared[:5])) + (", ..." if len(shared) > 5 else "")
                yield Problem(
                    (later, "indices"),
                    f"frames {shown} are also in {format_path((earlier, 'indices'))}; a frame may "
                    "be in one set only.",
                    also=((earlier,),),
                )


def check_target(path: Path, name: str, target: TargetOptions) -> Iterator[Problem]:
    """Yield everything about one target that cannot be meant.

    Args:
        path: where the target stands.
        name: what it is called, which says much of a direct force or stress.
        target: its options.
    """
    wrong_form = list(_check_direct(path, name, target))
    yield from wrong_form
    problem = None if wrong_form else target.unit_problem()
    if problem:
        yield Problem((*path, "unit"), problem)
    for label, quantity in GRADIENT_QUANTITIES.items():
        try:
            to_own_unit(quantity, getattr(target, label).unit)
        except UnitError as why:
            yield Problem((*path, label, "unit"), str(why))
    if target.stress.required and target.virial.required:
        yield Problem(
            (*path, "virial"),
            "stress and virial are the same quantity in two forms. Set one of them to off.",
        )
    wanted = [label for label in ("forces", "stress", "virial") if getattr(target, label).wanted]
    if wanted and target.quantity != "energy":
        yield Problem(
            (*path, wanted[0]),
            "only an energy has forces, stress or virial; this target's quantity is "
            f"{target.quantity or 'not given'}. Set `quantity: energy`, or remove it.",
        )
    elif wanted and not target.is_energy:
        yield Problem(
            (*path, wanted[0]),
            "forces, stress and virial need one energy for each structure. Set "
            f"`{wanted[0]}: off`, or `sample_kind: system`, `type: scalar`, `num_subtargets: 1`.",
        )


def _check_direct(path: Path, name: str, target: TargetOptions) -> Iterator[Problem]:
    """A direct force or stress has the form its name says."""
    quantity = direct_quantity(name)
    if quantity is None:
        return
    kind, rank = ("atom", 1) if quantity == "force" else ("system", 2)
    what = "a vector for each atom" if quantity == "force" else "a 3x3 tensor for each structure"
    expected = {
        "quantity": (target.quantity == quantity, quantity),
        "sample_kind": (target.sample_kind == kind, kind),
        "type": (target.rank == rank, f"{{cartesian: {{rank: {rank}}}}}"),
        "num_subtargets": (target.num_subtargets == 1, "1"),
    }
    for key, (right, wanted) in expected.items():
        if not right:
            yield Problem(
                (*path, key),
                f"a target named {name} is {what}: remove it, or set `{key}: {wanted}`. For "
                "another property choose another name.",
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
        yield from _check_kept_data((*_FINETUNE, "retention", "read_from"), retention.read_from)
    if replay is not None:
        path: Path = (*_FINETUNE, "replay")
        if replay.read_from is not None:
            yield from _check_kept_data((*path, "read_from"), replay.read_from)
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
    """Options that differ from their defaults."""
    fields = type(section).model_fields
    return [name for name in names if getattr(section, name) != fields[name].default]


def _check_kept_data(path: Path, dataset: DatasetOptions) -> Iterator[Problem]:
    """Check that replayed data have one energy, in a known unit."""
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


def notices(options: Options, raw: Mapping[str, Any]) -> Iterator[str]:
    """Yield one line for each remark."""
    ignored = [format_path(path) for path in _ignored(options, ())]
    if ignored:
        yield f"accepted for metatrain's files, without effect here: {', '.join(ignored)}."
    yield from _unused_settings(options, raw)
    yield from _assumed(options, raw)
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
    usual = options.with_training(learning_rate=None).learning_rate()
    if "optimizer" not in given and options.learning_rate() < usual / 5:
        yield (
            f"architecture.training.learning_rate {options.learning_rate():g} is low for soap "
            f"(default: {usual:g}). metatrain's are for Adam: leave it out, or `optimizer: adamw`."
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


def _assumed(options: Options, raw: Mapping[str, Any]) -> Iterator[str]:
    """What was assumed as in metatrain, which would not convert units: those, quantities, signs."""
    lengths, energies, quantities = dict[str, None](), dict[str, None](), dict[str, None]()
    for path, dataset in located_datasets(options, raw):
        written = _section(raw, path)
        if not _section(written, ("systems",)).get("length_unit"):
            lengths[format_path(path)] = None
        for name, target in dataset.targets.items():
            own = _section(written, ("targets", name))
            place = format_path((*path, "targets", name))
            if target.is_energy and not own.get("unit"):
                energies[place] = None
            if target.forces.wanted and "grad" in target.forces.key.casefold():
                yield (
                    f"{place}.forces: {target.forces.key!r} is taken as forces, as in metatrain. "
                    "Of a gradient of the energy change the sign in the file."
                )
            if direct_quantity(name) is None and quantity_is_assumed(name, own):
                quantities[place] = None
    if lengths:
        yield f"length_unit not given, taken as angstrom: {', '.join(lengths)}."
    if energies:
        yield f"unit not given, taken as eV: {', '.join(energies)}."
    if quantities:
        yield (
            f"quantity not given, taken as energy as in metatrain: {', '.join(quantities)}. Forces "
            "and stress are read where they are asked for (`forces: on`)."
        )


def _section(raw: Any, path: Path) -> Mapping[str, Any]:
    """The user's section at a place; empty if there is none."""
    for key in path:
        try:
            raw = raw[key]
        except (KeyError, IndexError, TypeError):
            return {}
    return raw if isinstance(raw, Mapping) else {}


def _same_files(options: Options) -> Iterator[str]:
    """Notices for files that are used twice, which makes errors look too small."""
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
    """Notice that the forgetting report uses the replayed structures."""
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
