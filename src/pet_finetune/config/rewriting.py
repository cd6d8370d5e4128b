"""Rewriting of options before the checks: older and foreign spellings, ``-c``, the method.

Each function changes the raw options in place and adds to a :class:`Rewriting` one notice for
each older spelling, or a problem where it contradicts what today's spelling says.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from .finetune import METHOD_KEYS, METHOD_SHORTHANDS
from .problems import Path, Problem, format_path

_TRAINING: Path = ("architecture", "training")
_FINETUNE: Path = (*_TRAINING, "finetune")
_CONFIG: Path = (*_FINETUNE, "config")

#: Other names of today's options: where they stand, where these stand, the names, and whether a
#: notice says so. PEFT's names are welcome, not outdated.
_RENAMED: tuple[tuple[Path, Path, dict[str, str], bool], ...] = (
    (
        _TRAINING,
        _TRAINING,
        {
            "EPOCH_NUM": "num_epochs",
            "INITIAL_LR": "learning_rate",
            "STRUCTURAL_BATCH_SIZE": "batch_size",
            "fixed_composition_weights": "atomic_baseline",  # metatrain until 2025
        },
        True,
    ),
    (
        _TRAINING,
        (*_FINETUNE, "legacy_start"),
        {
            "MODEL_TO_START_WITH": "model",
            "ALL_SPECIES_PATH": "all_species",
            "SELF_CONTRIBUTIONS_PATH": "self_contributions",
        },
        True,
    ),
    (_CONFIG, _CONFIG, {"r": "rank", "lora_alpha": "alpha", "lora_dropout": "dropout"}, False),
)


@dataclass
class Rewriting:
    """Notices and problems of the rewriting."""

    raw: dict[str, Any]
    notices: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    def section(self, path: Path, *, create: bool = False) -> dict[str, Any] | None:
        """The section at ``path``, made if wanted; None if there is something else."""
        node: Any = self.raw
        for key in path:
            if not isinstance(node, dict):
                return None
            if node.get(key) is None:
                if not create:
                    return None
                node[key] = {}
            node = node[key]
        return node if isinstance(node, dict) else None

    def move(self, old: Path, new: Path, *, notice: bool = True) -> None:
        """Move a value to today's place; a problem if another value is already there."""
        source = self.section(old[:-1])
        if source is None or old[-1] not in source:
            return
        value = source.pop(old[-1])
        target = self.section(new[:-1], create=True)
        if target is None:
            return
        name = str(new[-1])
        if target.get(name) is not None and target[name] != value:
            self.problems.append(
                Problem(
                    old,
                    f"is {value!r}, but today's spelling {format_path(new)} is {target[name]!r}. "
                    "Keep only the latter.",
                )
            )
            return
        target[name] = value
        if notice:
            self.tell(old, new)

    def tell(self, old: Path, new: Path | str, remark: str = "") -> None:
        """Add the line that tells today's spelling."""
        today = new if isinstance(new, str) else format_path(new)
        self.notices.append(f"{format_path(old)} is an older spelling; today: {today}.{remark}")


def rewrite(raw: dict[str, Any]) -> Rewriting:
    """Rewrite all older spellings in ``raw``, which is changed."""
    rewriting = Rewriting(raw)
    steps: tuple[Callable[[Rewriting], None], ...] = (
        _architecture_name,
        _device,
        _lora_switch,
        _renamed,
        _first_factors,
        _per_atom,
    )
    for step in steps:
        step(rewriting)
    return rewriting


def _architecture_name(rewriting: Rewriting) -> None:
    """PET by its older names; of another architecture the name alone is told."""
    architecture = rewriting.section(("architecture",)) or {}
    name = architecture.get("name", "pet")
    if name in ("nativepet", "experimental.nativepet", "experimental.pet"):
        rewriting.notices.append(f"architecture.name: {name} is an older name; today: pet.")
        architecture["name"] = "pet"
    elif name == "llpr":
        rewriting.problems.append(
            Problem(
                ("architecture", "name"),
                "'llpr' wraps a trained model in metatrain. Here it is an option of fine-tuning "
                "(architecture: {name: pet, training: {finetune: {llpr: true}}}), or, for a model "
                "that is trained already, pf.add_uncertainty(model, training_set, validation_set) "
                "in Python.",
            )
        )
        rewriting.raw["architecture"] = {"name": "pet"}
    elif isinstance(name, str) and name != "pet":
        rewriting.raw["architecture"] = {"name": name}  # its options are not PET's


def _device(rewriting: Rewriting) -> None:
    if rewriting.raw.get("device") in ("multi-gpu", "multi-cuda"):
        rewriting.notices.append(
            f"device: {rewriting.raw['device']} is not supported; one GPU is used (device: gpu)."
        )
        rewriting.raw["device"] = "gpu"


def _renamed(rewriting: Rewriting) -> None:
    """Move renamed options; empty ones are dropped."""
    for place, today, names, notice in _RENAMED:
        section = rewriting.section(place) or {}
        for old, new in names.items():
            if old in section and section[old] is None:
                del section[old]
            rewriting.move((*place, old), (*today, new), notice=notice)


def _lora_switch(rewriting: Rewriting) -> None:
    """``USE_LORA_PEFT``, ``LORA_RANK`` and ``LORA_ALPHA``; the latter two alone mean LoRA."""
    training = rewriting.section(_TRAINING)
    names = ("USE_LORA_PEFT", "LORA_RANK", "LORA_ALPHA")
    if training is None or not any(name in training for name in names):
        return
    given = {name for name in names if training.get(name) is not None}
    wanted = training.pop("USE_LORA_PEFT", None)
    if wanted is not None and not isinstance(wanted, bool):
        rewriting.problems.append(
            Problem((*_TRAINING, "USE_LORA_PEFT"), f"expected true or false, got {wanted!r}.")
        )
        wanted = None
    if wanted is None:
        wanted = bool(given & {"LORA_RANK", "LORA_ALPHA"})
        if not given:
            training.pop("LORA_RANK", None)
            training.pop("LORA_ALPHA", None)
            return
    method = "lora" if wanted else "full"
    finetune = rewriting.section(_FINETUNE, create=True)
    if finetune is None:
        return
    named = "USE_LORA_PEFT" if "USE_LORA_PEFT" in given else sorted(given)[0]
    if finetune.get("method") not in (None, method):
        rewriting.problems.append(
            Problem(
                (*_TRAINING, named),
                f"means method {method}, but today's spelling "
                f"{format_path((*_FINETUNE, 'method'))} is {finetune['method']!r}. "
                "Keep only the latter.",
            )
        )
    else:
        finetune["method"] = method
        rewriting.tell((*_TRAINING, named), f"{format_path((*_FINETUNE, 'method'))}: {method}")
    for old, new in (("LORA_RANK", "rank"), ("LORA_ALPHA", "alpha")):
        if wanted and training.get(old) is not None:
            rewriting.move((*_TRAINING, old), (*_CONFIG, new))
        elif training.pop(old, None) is not None:
            rewriting.notices.append(
                f"{format_path((*_TRAINING, old))} has no effect: USE_LORA_PEFT is false."
            )


def _first_factors(rewriting: Rewriting) -> None:
    """``init``, which once chose between LoRA's start, PiSSA's and OLoRA's."""
    config = rewriting.section(_CONFIG)
    for name in ("init", "init_lora_weights"):
        value = None if config is None else config.pop(name, None)
        if value not in (None, True, "default"):
            rewriting.problems.append(
                Problem(
                    (*_CONFIG, name),
                    f"is {value!r}, but factors start as LoRA's do (A random, B zero): PiSSA and "
                    "OLoRA brought no gain over it and are gone. Leave this out.",
                )
            )


def _per_atom(rewriting: Rewriting) -> None:
    for name in ("training_set", "validation_set", "test_set"):
        sets = rewriting.raw.get(name)
        listed = isinstance(sets, list)
        for index, dataset in enumerate(sets if isinstance(sets, list) else [sets]):
            targets = dataset.get("targets") if isinstance(dataset, dict) else None
            if not isinstance(targets, dict):
                continue
            where: Path = (name, index) if listed else (name,)
            for target_name, target in targets.items():
                if isinstance(target, dict):
                    _per_atom_of(rewriting, target, (*where, "targets", str(target_name)))


def _per_atom_of(rewriting: Rewriting, target: dict[str, Any], path: Path) -> None:
    per_atom = target.get("per_atom")
    if not isinstance(per_atom, bool):
        if "per_atom" in target:
            rewriting.problems.append(
                Problem((*path, "per_atom"), f"expected true or false, got {per_atom!r}.")
            )
            del target["per_atom"]
        return
    target.pop("per_atom")
    kind = "atom" if per_atom else "system"
    if target.get("sample_kind") not in (None, kind):
        rewriting.problems.append(
            Problem(
                (*path, "per_atom"),
                f"means sample_kind {kind}, but sample_kind is {target['sample_kind']!r}. "
                "Keep only the latter.",
            )
        )
        return
    target["sample_kind"] = kind
    rewriting.tell((*path, "per_atom"), f"sample_kind: {kind}")


_READ_FROM: Path = (*_FINETUNE, "read_from")
_METHOD: Path = (*_FINETUNE, "method")
_NEED_A_MODEL = ("replay", "anchor")


def apply_start(rewriting: Rewriting, checkpoint: str | None, *, require_start: bool) -> None:
    """Merge ``-c`` into ``finetune.read_from`` and settle the method.

    Args:
        rewriting: the raw options, changed in place, and where findings go.
        checkpoint: what the user gave with ``-c``.
        require_start: whether a method that needs a model to start from must have one.
    """
    finetune = rewriting.section(_FINETUNE, create=checkpoint is not None)
    if finetune is None:
        return
    _merge_checkpoint(rewriting, finetune, checkpoint)
    _spell_out(finetune)
    read_from = finetune.get("read_from")
    legacy = isinstance(finetune.get("legacy_start"), dict)
    if legacy and isinstance(read_from, str):
        source = "-c" if read_from == checkpoint else "finetune.read_from"
        rewriting.problems.append(
            Problem(
                (*_FINETUNE, "legacy_start"),
                "training cannot start from these files (MODEL_TO_START_WITH...) and from "
                f"{source} ({read_from}) at once. Remove one.",
            )
        )
    if finetune.get("method") is None:
        finetune["method"] = _choose_method(rewriting, finetune, checkpoint)
    starts = legacy or read_from is not None
    changing = [method for method in METHOD_KEYS if method != "full"]
    if starts or not require_start:
        return
    if finetune["method"] in changing:
        rewriting.problems.append(
            Problem(
                _METHOD,
                f"{finetune['method']} changes an existing model, but none is given. Give its "
                "checkpoint with -c or finetune.read_from, or remove the section to train from "
                "scratch.",
            )
        )
    for name in _NEED_A_MODEL:
        if finetune.get(name) is not None:
            rewriting.problems.append(
                Problem(
                    (*_FINETUNE, name),
                    "keeps what a model knew that training starts from, but none is given. "
                    "Give its checkpoint with -c or finetune.read_from, or remove the section.",
                )
            )


def _merge_checkpoint(
    rewriting: Rewriting, finetune: dict[str, Any], checkpoint: str | None
) -> None:
    if checkpoint is None:
        return
    given = finetune.get("read_from")
    if isinstance(given, str) and os.path.abspath(given) != os.path.abspath(checkpoint):
        rewriting.problems.append(
            Problem(
                _READ_FROM,
                f"is {given!r}, but -c gives {checkpoint!r}. Remove one of them.",
            )
        )
    finetune["read_from"] = checkpoint


def _spell_out(finetune: dict[str, Any]) -> None:
    """Expand the shorthand of a method into the method and its settings."""
    config = finetune.get("config") or {}
    method = finetune.get("method")
    if isinstance(method, str) and method in METHOD_SHORTHANDS and isinstance(config, dict):
        finetune["method"], settings = METHOD_SHORTHANDS[method]
        finetune["config"] = {**settings, **config}


def _choose_method(rewriting: Rewriting, finetune: dict[str, Any], checkpoint: str | None) -> str:
    """The method when none is named: what the settings belong to, else LoRA with ``-c``.

    A ``read_from`` in the file without a method means ``full``, as it does in metatrain.
    """
    config = finetune.get("config")
    keys = set(config) if isinstance(config, dict) else set()
    starts = checkpoint is not None or finetune.get("read_from") or finetune.get("legacy_start")
    if not starts and not keys:
        return "full"
    method = max(METHOD_KEYS, key=lambda name: len(keys & METHOD_KEYS[name]))
    if keys & METHOD_KEYS[method]:
        why = "its settings are given"
    elif checkpoint is not None:
        method, why = "lora", "the default with -c"
    else:
        method, why = "full", "as in metatrain; `method: lora` needs fewer data"
    rewriting.notices.append(f"architecture.training.finetune.method not given: {method} ({why}).")
    return method
