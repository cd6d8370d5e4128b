"""Frames and frame numbers from files; every failure says what to look at."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import ase.io

from pet_finetune.errors import DataError, did_you_mean

if TYPE_CHECKING:
    from ase import Atoms

__all__ = ["frame_numbers", "list_frames", "read_frames"]

_SHOWN = 10


def read_frames(path: str | Path) -> list[Atoms]:
    """Read all structures of a file with ASE.

    :raises DataError: the file is missing, a folder, of a format ASE does not know, damaged or
        empty.
    """
    file = Path(path)
    check_file(file, "data file")
    try:
        frames = ase.io.read(file, index=":", do_not_split_by_at_sign=True)
    except Exception as error:  # ASE's many readers raise whatever they meet
        if file.stat().st_size == 0:
            raise DataError(f"{path} is empty: it holds no structures.") from None
        reason = str(error).strip() or "no reason given"
        raise DataError(
            f"ASE cannot read {path} ({type(error).__name__}: {reason}). The format is guessed "
            "from name and content; extended xyz (.xyz, .extxyz) always works."
        ) from error
    if not frames:
        empty = file.stat().st_size == 0
        why = "is empty: it holds no structures." if empty else "holds no structures ASE can find."
        raise DataError(f"{path} {why}")
    return list(frames)


def check_file(file: Path, what: str) -> None:
    """Refuse a path that is no file, with the nearest name beside it.

    :param file: the path.
    :param what: what the file is, for the message.
    :raises DataError: nothing is there, or a folder.
    """
    if file.is_dir():
        raise DataError(f"The {what} {str(file)!r} is a folder; give a file that ASE reads.")
    if file.is_file():
        return
    folder = file.parent
    near = ""
    if folder.is_dir():
        near = did_you_mean(file.name, (entry.name for entry in folder.iterdir()))
    absolute = "" if file.is_absolute() else f" (looked in {folder.resolve()})"
    missing = "" if folder.is_dir() else " The folder does not exist either."
    raise DataError(f"The {what} {str(file)!r} does not exist{absolute}.{missing}{near}")


def frame_numbers(given: tuple[int, ...] | str, count: int | None, source: str) -> list[int]:
    """Frame numbers from the options: a list, or a text file with one a line.

    :param given: the numbers, counted from 0, or the path of a file (``#`` starts a comment).
    :param count: how many frames there are, or None when that is checked later.
    :param source: the file the numbers belong to, for messages.
    :raises DataError: missing or unreadable file, no numbers, repeated numbers, or numbers that
        are not below ``count``.
    """
    origin = f"the indices of {source}"
    if isinstance(given, str):
        check_file(Path(given), "index file")
        origin = f"{given}, the indices of {source}"
        numbers = _read_numbers(Path(given))
    else:
        numbers = list(given)
    if not numbers:
        raise DataError(f"{origin}: there are none.")
    last = max(numbers) if count is None else count - 1
    outside = [number for number in numbers if not 0 <= number <= last]
    if outside:
        raise DataError(
            f"{origin}: the file does not have {list_frames(outside)}. "
            + ("Frames count from 0." if count is None else f"It has frames 0 to {last}.")
        )
    repeated = sorted(number for number, times in Counter(numbers).items() if times > 1)
    if repeated:
        raise DataError(f"{origin}: given more than once: {list_frames(repeated)}.")
    return numbers


def list_frames(numbers: list[int]) -> str:
    """Frame numbers as text, the first ten of them."""
    shown = ", ".join(map(str, numbers[:_SHOWN]))
    more = f" and {len(numbers) - _SHOWN} more" if len(numbers) > _SHOWN else ""
    return f"frame{'s' if len(numbers) > 1 else ''} {shown}{more}"


def _read_numbers(file: Path) -> list[int]:
    """Whitespace-separated integers of a text file."""
    numbers = []
    text = file.read_text(encoding="utf-8", errors="replace")
    for line_number, line in enumerate(text.splitlines(), start=1):
        for word in line.partition("#")[0].split():
            try:
                numbers.append(int(word))
            except ValueError:
                raise DataError(
                    f"{file}, line {line_number}: {word!r} is not a frame number. Expected whole "
                    "numbers from 0, one a line."
                ) from None
    return numbers
