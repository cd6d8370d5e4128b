"""What a run keeps of its foundation to the end: labels, reference weights, dimer curves.

Made once, before the first step, and written to ``kept.pt``, so that a run that goes on has the
very same, whatever has become of the foundation's file since.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

from pet_finetune.data.structure import Structure

from .dimers import DimerCurves


@dataclass(frozen=True)
class KeptRetention:
    """The retention set, labelled; the energies compared; epochs between two evaluations."""

    structures: tuple[Structure, ...]
    targets: tuple[str, ...]
    every: int


@dataclass(frozen=True)
class KeptReplay:
    """What is replayed, labelled for ``target``; its part of a step, and its weight."""

    structures: tuple[Structure, ...]
    target: str
    fraction: float
    weight: float


@dataclass(frozen=True)
class KeptAnchor:
    """Where the weights are held, how much each counts (None: all alike), and how strongly."""

    reference: dict[str, Tensor]
    importance: dict[str, Tensor] | None
    strength: float


@dataclass(frozen=True)
class KeptDimers:
    """The starting model's dimer curves of one energy."""

    target: str
    before: DimerCurves


@dataclass(frozen=True)
class Kept:
    """All of it; what a run does not have is None."""

    retention: KeptRetention | None = None
    replay: KeptReplay | None = None
    anchor: KeptAnchor | None = None
    dimers: KeptDimers | None = None

    def plain(self) -> dict[str, Any]:
        """As tensors and plain values, for a file."""
        return {name: None if part is None else _plain(part) for name, part in vars(self).items()}

    @classmethod
    def from_plain(cls, values: Mapping[str, Any]) -> Kept:
        """The opposite of :meth:`plain`."""
        made: dict[str, Any] = {}
        for name, kind in _KINDS.items():
            part = values[name]
            made[name] = None if part is None else kind(**_restored(part))
        return cls(**made)


_KINDS: dict[str, Any] = {
    "retention": KeptRetention,
    "replay": KeptReplay,
    "anchor": KeptAnchor,
    "dimers": KeptDimers,
}


def _plain(part: Any) -> dict[str, Any]:
    values = dict(vars(part))
    if "structures" in values:
        values["structures"] = _structures_plain(values["structures"])
    if "before" in values:
        values["before"] = dict(vars(values["before"]))
    return values


def _restored(values: Mapping[str, Any]) -> dict[str, Any]:
    restored = dict(values)
    if "structures" in restored:
        restored["structures"] = tuple(Structure(**one) for one in restored["structures"])
    if "before" in restored:
        restored["before"] = DimerCurves(**restored["before"])
    return restored


def _structures_plain(structures: Sequence[Structure]) -> list[dict[str, Any]]:
    names = [field.name for field in fields(Structure)]
    return [
        {**{name: getattr(s, name) for name in names}, "labels": dict(s.labels)} for s in structures
    ]
