"""Every exception the package raises on purpose, and the spelling helper their messages use.

A user who catches :class:`PetFinetuneError` catches all of them. A message says what is wrong,
where, what is allowed and what to do; the command line prints it without a traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager


class PetFinetuneError(Exception):
    """Base class of all errors that this package raises on purpose."""


class ConfigError(PetFinetuneError):
    """The options are wrong; holds one line for each problem in :attr:`problems`."""

    def __init__(self, message: str, problems: Iterable[str] = ()) -> None:
        super().__init__(message)
        self.problems: tuple[str, ...] = tuple(problems) or (message,)


class DataError(PetFinetuneError):
    """A data file is missing, unreadable, empty, or holds labels that cannot be used."""


class UnitError(PetFinetuneError):
    """A unit is unknown or cannot be converted to the requested unit."""


class CheckpointError(PetFinetuneError):
    """A checkpoint is missing, damaged, unsafe, or of another kind than expected."""


class AdapterError(PetFinetuneError):
    """An adapter cannot be injected, merged, saved, or does not belong to this base."""


class RunError(PetFinetuneError):
    """The folder of a run is in use, cannot be written to, or cannot be told from others."""


class TrainingError(PetFinetuneError):
    """Training cannot start or cannot go on."""


class DynamicsError(PetFinetuneError):
    """A simulation cannot start or cannot go on."""


class SpeciesError(PetFinetuneError):
    """A structure contains a chemical element that the model does not know."""


@contextmanager
def damage_explained(explain: Callable[[str], PetFinetuneError]) -> Iterator[None]:
    """Turn whatever a damaged file makes a library raise into the error that ``explain`` makes.

    For the border where a file becomes values, and nowhere else: zip, pickle, JSON, NumPy and the
    code that builds from what they gave raise two dozen kinds between them, and each list of kinds
    was found to lack one. Errors of ours pass as they are.
    """
    try:
        yield
    except PetFinetuneError:
        raise
    except Exception as error:
        first = (str(error).strip().splitlines() or ["no reason given"])[0]
        raise explain(f"{type(error).__name__}: {first[:200].rstrip('.')}") from error


def did_you_mean(name: str, allowed: Iterable[str]) -> str:
    """Suggest the valid name nearest to ``name``.

    Returns:
        ``" Did you mean 'x'?"`` (with the leading space, so it can be appended to a sentence), or
        ``""`` when nothing is near.
    """
    by_folded: dict[str, str] = {}
    for candidate in allowed:
        by_folded.setdefault(candidate.casefold(), candidate)
    near = difflib.get_close_matches(name.casefold(), by_folded, n=1, cutoff=0.6)
    return f" Did you mean {by_folded[near[0]]!r}?" if near else ""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory ran out; on CPUs torch has no class of error for it."""
    told = str(error)
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "DefaultCPUAllocator: can't allocate memory" in told
        or "DefaultCPUAllocator: not enough memory" in told
    )
