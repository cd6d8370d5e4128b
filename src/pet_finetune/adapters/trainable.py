"""Which parameters train: choosing, counting, telling."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pet_finetune.errors import AdapterError
from pet_finetune.model import Potential

from .new_rows import ROWS


@dataclass(frozen=True)
class TrainableReport:
    """How many parameters train, in all and by kind.

    Attributes:
        trainable, total: counts.
        groups: counts of trained parameters by kind of module.
    """

    trainable: int
    total: int
    groups: dict[str, int]

    def __str__(self) -> str:
        share = 100.0 * self.trainable / max(self.total, 1)
        parts = ", ".join(f"{name} {count:,}" for name, count in self.groups.items())
        return f"{self.trainable:,} of {self.total:,} parameters train ({share:.1f} %): {parts}"


def freeze(model: Potential, train: Sequence[str] | None) -> None:
    """Let only the parameters train whose path in the network begins with one of ``train``.

    Args:
        model: changed in place.
        train: beginnings of paths; None lets every parameter train.

    Raises:
        AdapterError: nothing would train.
    """
    found = False
    for name, parameter in model.network.named_parameters():
        trains = train is None or name.startswith(tuple(train))
        parameter.requires_grad_(trains)
        found |= trains
    if not found:
        parts = ", ".join(name for name, _ in model.network.named_children())
        raise AdapterError(
            f"Nothing would train: no parameter begins with {', '.join(train or ())}. "
            f"The model's parts are {parts}."
        )


def _kind(name: str) -> str:
    """What a trained parameter is called in the report."""
    if name.endswith(f".{ROWS}"):
        return "embeddings of new elements"
    if ".adaption_" in name:
        return "prompts"
    return "adapters" if ".lora_" in name else name.split(".")[0]


def trainable_report(model: Potential) -> TrainableReport:
    """Count what trains."""
    groups: dict[str, int] = {}
    for name, parameter in model.network.named_parameters():
        if parameter.requires_grad:
            kind = _kind(name)
            groups[kind] = groups.get(kind, 0) + parameter.numel()
    return TrainableReport(sum(groups.values()), model.num_parameters(), groups)
