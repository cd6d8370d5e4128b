"""A method and options for the size of the data, with the reasons."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .estimate import Estimate, Load

__all__ = ["Suggestion", "duration", "suggest", "training_section"]

#: Steps after which little more is learned from small sets (docs/methods-table.md has 150 to 600,
#: and 600 are still better than 150), and bounds on the epochs that make them up.
_STEPS, _FEWEST_EPOCHS, _MOST_EPOCHS = 3000, 20, 200
_LARGEST_BATCH, _ATOMS_OF_BATCH = 16, 1500
#: Parameters beyond which optimiser and gradients of all weights are a burden.
_LARGE = 20_000_000
#: Structures below which only the heads have enough to go by.
_FEW = 10
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
        estimates: of the methods.
    """
    reasons = []
    batch = _batch(load)
    steps = -(-load.structures // batch)
    epochs = max(_FEWEST_EPOCHS, min(_MOST_EPOCHS, -(-_STEPS // steps)))
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
        reasons.append("validation_set 0.1: drawn from the file; give a set of your own if frames "
                       "follow each other in time")  # fmt: skip
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


def _batch(load: Load) -> int:
    """Small enough for enough steps and for memory, large enough for a mean."""
    by_steps = max(1, load.structures // 20)
    by_atoms = max(1, int(_ATOMS_OF_BATCH * load.structures / max(1, load.atoms)))
    return min(_LARGEST_BATCH, by_steps, by_atoms)


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
        return {"method": "lora", "config": {"rank": 32, "alpha": 32.0}}, why
    why = (
        "the lowest errors in our comparison (docs/methods-table.md), and the foundation is small; "
        "lora is within 5 % on molecules and stores a fifteenth"
    )
    return {"method": "full"}, why


def duration(seconds: float) -> str:
    """Seconds as people say it."""
    if seconds < 100:
        return f"{seconds:.0f} seconds"
    if seconds < 6000:
        return f"{seconds / 60:.0f} minutes"
    return f"{seconds / 3600:.1f} hours"


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
