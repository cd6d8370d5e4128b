"""What a check has to say: what, where, why it matters, what to do."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from pet_finetune.data.structure import Structure, list_frames

Severity = Literal["error", "warning", "note"]

#: From the one that stops a run to the one that is only worth knowing.
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")


@dataclass(frozen=True)
class Frames:
    """Frames of one file, counted from 0; none means the file as a whole."""

    file: str
    numbers: tuple[int, ...] = ()

    def __str__(self) -> str:
        """The file, and the first of the frames."""
        if not self.numbers:
            return self.file
        return f"{self.file}: {list_frames(self.numbers)}"


@dataclass(frozen=True)
class Finding:
    """One thing that a user should know about the data.

    Attributes:
        severity: ``error`` (a run would break), ``warning`` (a run would likely be a waste) or
            ``note``.
        code: a stable name, for scripts.
        what: what was found, with its numbers.
        where: files and frames.
        why: what it does to a run.
        advice: what to do.
        data: the numbers, for scripts.
    """

    severity: Severity
    code: str
    what: str
    where: tuple[Frames, ...] = ()
    why: str = ""
    advice: str = ""
    data: dict[str, Any] | None = None

    @property
    def place(self) -> str:
        """Where, as text."""
        return "; ".join(map(str, self.where))

    @property
    def text(self) -> str:
        """All of it as one paragraph, for a log or an error."""
        place = f" ({self.place})" if self.where else ""
        more = " ".join(part for part in (self.why, self.advice) if part)
        return f"{self.code}: {self.what}{place}{f'. {more}' if more else ''}"

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "severity": self.severity,
            "code": self.code,
            "what": self.what,
            "where": [{"file": f.file, "frames": list(f.numbers)} for f in self.where],
            "why": self.why,
            "advice": self.advice,
            "data": self.data or {},
        }


def frames_of(structures: Iterable[Structure]) -> tuple[Frames, ...]:
    """The places of structures, by file."""
    numbers: dict[str, list[int]] = {}
    for structure in structures:
        numbers.setdefault(structure.source, []).append(structure.index)
    return tuple(Frames(file, tuple(sorted(set(own)))) for file, own in numbers.items())


def worst_first(findings: Iterable[Finding]) -> list[Finding]:
    """Errors, then warnings, then notes; otherwise in their order."""
    return sorted(findings, key=lambda finding: SEVERITIES.index(finding.severity))
