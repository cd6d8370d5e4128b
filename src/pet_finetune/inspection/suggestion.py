"""A method and options for the data at hand, in the units that were found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pet_finetune.config.target import expand_gradient
from pet_finetune.training.sets import default_batch_size, default_num_epochs

from .estimate import Estimate, Load, duration
from .evidence import NO_VIRIAL, PER_ATOM, VIRIAL
from .inspected import Finding

#: Drawn validation structures below which energies, one number each, are right by chance too often.
_FEW_VALIDATED = 5
#: Parameters beyond which optimiser and gradients of all weights are a burden.
_LARGE = 20_000_000
#: Structures below which only the heads have enough to go by.
_FEW = 10
#: Structures from which all weights may be worth their time: with 50 and 200 of ethanol LoRA has
#: the lower errors, with 780 full fine-tuning the lower energies (docs/choosing.md).
_MANY = 500
#: Structures from which a test set can be spared.
_SPARE = 40


@dataclass(frozen=True)
class Suggestion:
    """Options for the data at hand.

    Attributes:
        options: a whole file, as plain values.
        reasons: a line for each choice.
    """

    options: dict[str, Any]
    reasons: tuple[str, ...]


def suggest(
    training_set: Any,
    load: Load,
    *,
    checkpoint: str | None,
    parameters: int = 0,
    validation: Any = None,
    test: Any = None,
    unknown: Sequence[str] = (),
    outliers: bool = False,
    forced: bool = True,
    estimates: Sequence[Estimate] = (),
) -> Suggestion:
    """Choose method, batch and epochs.

    Args:
        training_set: the section of the options.
        load: how much there is to compute.
        checkpoint: what the run starts from; None trains from scratch.
        parameters: of the checkpoint.
        validation: a section of the options; None lets a fraction be drawn.
        test: likewise.
        unknown: symbols of elements that the checkpoint lacks.
        outliers: whether some labels are doubtful.
        forced: whether every structure has forces, where the options read any.
        estimates: of the methods.
    """
    reasons = []
    batch = default_batch_size(load.structures, load.atoms)
    steps = -(-load.structures // batch)
    epochs = default_num_epochs(steps)
    training: dict[str, Any] = {"batch_size": batch, "num_epochs": epochs}
    reasons.append(
        f"batch_size {batch}, num_epochs {epochs}: {steps} steps an epoch, {steps * epochs} in all"
    )
    if checkpoint is not None:
        finetune, why = _method(load, parameters)
        finetune["read_from"] = checkpoint
        if unknown:
            finetune["new_elements"] = "nearest"
            reasons.append(
                f"new_elements: nearest, because the checkpoint lacks {' '.join(unknown)}"
            )
        training["finetune"] = finetune
        reasons.insert(0, f"method {finetune['method']}: {why}")
    else:
        reasons.insert(
            0, "from scratch, because no checkpoint is given; with one (-c) far fewer data do"
        )
    if outliers:
        training["loss"] = "huber"
        reasons.append("loss: huber, because the energies of some frames are doubtful")
    chosen = [e for e in estimates if e.method == training.get("finetune", {}).get("method")]
    for one in chosen:
        reasons.append(f"about {duration(one.seconds * epochs)} on this machine")
    if validation is None:
        validation = 0.1
        reasons.append("validation_set 0.1: drawn from the file; name a separate set if the "
                       "frames are a trajectory")  # fmt: skip
        if load.structures // 10 < _FEW_VALIDATED and forced and _have_forces(training_set):
            training["best_model_metric"] = "forces_mae"
            reasons.append("best_model_metric: forces_mae, because the energy error of so few "
                           "validation structures is noisy")  # fmt: skip
        if test is None and load.structures >= _SPARE:
            test = 0.1
    options = {
        "seed": 0,
        "device": "auto",
        "base_precision": 32,
        "architecture": {"name": "pet", "training": training},
        "training_set": training_set,
        "validation_set": validation,
        "test_set": 0.0 if test is None else test,
    }
    return Suggestion(options, tuple(reasons))


def _have_forces(training_set: Any) -> bool:
    """Whether a section of the options, or one of a list, names forces to learn."""
    sections = training_set if isinstance(training_set, list) else [training_set]
    targets = [target for section in sections for target in section["targets"].values()]
    return any(target.get("forces", "off") not in ("off", False) for target in targets)


def _method(load: Load, parameters: int) -> tuple[dict[str, Any], str]:
    """The method with its settings, and why it is chosen."""
    if load.structures < _FEW:
        why = f"{load.structures} structures say too little to change more than the heads"
        return {"method": "heads"}, why
    if parameters > _LARGE:
        why = (
            f"the foundation is large ({parameters / 1e6:.0f} M parameters): an adapter takes a "
            "fraction of the memory, and what is stored is small"
        )
        return {"method": "lora"}, why
    if load.structures < _MANY:
        why = (
            "with so few structures its errors are as low as those of full fine-tuning, or "
            "lower, in less time; the adapter is a seventh of the size (docs/choosing.md)"
        )
        return {"method": "lora"}, why
    why = (
        "with so many structures it has the lowest errors in our comparison (docs/choosing.md),"
        " and the foundation is small; lora takes two thirds of the time and a seventh of the "
        "size"
    )
    return {"method": "full"}, why


def training_section(files: Sequence[str], target: Mapping[str, Any]) -> Any:
    """The section of files that are read alike, one or a list."""
    sections = [
        {
            "systems": {"read_from": file, "length_unit": "angstrom"},
            "targets": {"energy": {"quantity": "energy", **target}},
        }
        for file in files
    ]
    return sections[0] if len(sections) == 1 else sections


def with_found_units(section: Any, findings: Sequence[Finding]) -> Any:
    """A section with the names and units that were found, or questions that stop a run."""
    if isinstance(section, list):
        return [with_found_units(one, findings) for one in section]
    if not isinstance(section, dict) or not isinstance(section.get("systems"), dict):
        return section
    file = section["systems"].get("read_from")
    for finding in findings:
        if file not in {frames.file for frames in finding.where} or not finding.data:
            continue
        if finding.code == "length-unit":
            section["systems"]["length_unit"] = finding.data["unit"] or _question(["angstrom"])
        for target in section.get("targets", {}).values():
            if not isinstance(target, dict):
                continue
            if finding.code == "units":
                _write_units(target, finding.data)
            elif finding.code == "several-labels":
                kind, keys = finding.data["kind"], finding.data["keys"]
                place = target if kind == "energy" else _gradient(target, kind)
                place["key"] = _question(keys)
                if kind != "energy":
                    place["mode"] = "on"  # else a run would go on without
    return section


def _question(choices: Sequence[str]) -> str:
    """A value that no option takes, so that a run stops until one of them is chosen."""
    return f"{' or '.join(dict.fromkeys(choices))}?"


def _gradient(target: dict[str, Any], kind: str) -> dict[str, Any]:
    """The section of forces, stress or virial, in full, in the target."""
    given = expand_gradient(target.get(kind, "auto"))
    target[kind] = dict(given) if isinstance(given, Mapping) else {"mode": "auto"}
    found: dict[str, Any] = target[kind]
    return found


def _write_units(target: dict[str, Any], data: Mapping[str, Any]) -> None:
    """The units of a finding; a question where several explain the numbers as well."""
    if data.get("unit") and len({_key(one) for one in data["readings"]}) == 1:
        target["unit"] = data["unit"]  # which says it all
        return
    for quantity in data["units"]:
        units = list(dict.fromkeys(one[quantity] for one in data["readings"]))
        said = units[0] if len(units) == 1 else _question(units)
        if quantity == "energy":
            # No option multiplies by the number of atoms.
            target["unit"] = _question(units) if PER_ATOM in units else said
        elif quantity == "force":
            _gradient(target, "forces")["unit"] = said
        elif said == VIRIAL:
            stress = _gradient(target, "stress")
            target["virial"] = {"key": stress.get("key") or "stress", "mode": stress["mode"]}
            target["stress"] = "off"
        elif said == NO_VIRIAL:
            virial = _gradient(target, "virial")
            target["stress"] = {"key": virial.get("key") or "virial", "mode": virial["mode"]}
            target["virial"] = "off"
        else:
            used = "virial" if _gradient(dict(target), "stress")["mode"] == "off" else "stress"
            if used == "stress" or len(units) > 1:
                _gradient(target, used)["unit"] = said


def _key(units: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    return tuple(units.items())
