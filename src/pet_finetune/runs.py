"""A run's folder, which belongs to one process, and the options that have changed since it began.

A folder with a default name is created by the first process; the next one gets ``.1`` after its
name. A named folder is created if needed; while a process works in it, all others are refused. The
latest of several runs is found by their records, or by the dates in their names without a record;
file times change when a folder is copied.
"""

from __future__ import annotations

import datetime
import itertools
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from pet_finetune import processes
from pet_finetune.config.run_options import Options
from pet_finetune.errors import DataError, RunError
from pet_finetune.files import found_whole, read_object, remove_half_written, writing_explained
from pet_finetune.locks import FileLock, Holder
from pet_finetune.log import get_logger

_logger = get_logger(__name__)
#: Where runs go that nobody named a folder for, as metatrain has it.
OUTPUTS = Path("outputs")
LOCK = ".lock"
#: In the record of a run: when it was begun and gone on with, UTC.
STARTED = "started"
_RECORDS = ("run.json", "md.json")
_DATED = re.compile(r"(?:^|/)(\d{4}-\d{2}-\d{2})/(\d{2}-\d{2}-\d{2})(?:\.(\d+))?(?=/|$)")


class RunFolder:
    """A folder that this process has claimed; a context that gives it back at its end.

    Make one with :meth:`new` or :meth:`take`.

    Attributes:
        path: the folder.
    """

    def __init__(self, path: Path, lock: FileLock | None = None) -> None:
        self.path = path
        self._lock = lock  # None where the process that started this one has it

    @classmethod
    def new(cls, root: Path | None = None) -> RunFolder:
        """Make ``root/DATE/TIME``, or the same with ``.1``, ``.2``... where that is there.

        Args:
            root: ``outputs`` in the current folder without it.

        Raises:
            RunError: it cannot be made.
        """
        name = datetime.datetime.now().strftime("%Y-%m-%d/%H-%M-%S")
        wanted = (root or OUTPUTS) / name
        for number in itertools.count():
            path = wanted.with_name(f"{wanted.name}.{number}") if number else wanted
            with writing_explained(path, RunError):
                path.parent.mkdir(parents=True, exist_ok=True)
                try:
                    path.mkdir()
                except FileExistsError:
                    continue
            return cls.take(path)
        raise AssertionError("there is always a next number")

    @classmethod
    def take(cls, path: Path) -> RunFolder:
        """Claim a folder, which is made where it does not exist.

        Raises:
            RunError: another process works in it, or it cannot be written to.
        """
        lock = FileLock(path / LOCK)
        with writing_explained(path, RunError):
            path.mkdir(parents=True, exist_ok=True)
            free = lock.acquire()
        if not free:
            raise _in_use(path, lock)
        remove_half_written(path)
        return cls(path, lock)

    def close(self) -> None:
        """Give the folder back."""
        if self._lock is not None:
            self._lock.release()

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


@contextmanager
def own_folder(folder: str | Path | RunFolder | None) -> Iterator[Path]:
    """The path of a folder that belongs to this process while the context is open.

    Of several processes that work together the first one claims it for all.

    Args:
        folder: one that was claimed already, which stays so afterwards; one to claim; or None for a
            new one in ``outputs``.

    Raises:
        RunError: another process works in it, or it cannot be written to.
    """
    if isinstance(folder, RunFolder):
        yield folder.path
        return
    if not processes.first():
        yield processes.from_first(Path())
        return
    with RunFolder.new() if folder is None else RunFolder.take(Path(folder)) as claimed:
        yield processes.from_first(claimed.path)


@contextmanager
def undisturbed(folder: Path) -> Iterator[None]:
    """A folder that nobody works in while the context is open, to be copied.

    Raises:
        RunError: a process works in it. One that cannot be written to is taken for free.
    """
    lock, free = _asked(folder)
    if not free:
        raise _in_use(folder, lock)
    try:
        yield
    finally:
        lock.release()


def works_elsewhere(folder: Path) -> bool:
    """Whether a process other than this one works in a folder."""
    if not (folder / LOCK).exists():
        return False
    lock, free = _asked(folder)
    lock.release()
    me, other = Holder.me(), lock.holder
    return not free and (other is None or (other.host, other.pid) != (me.host, me.pid))


def _asked(folder: Path) -> tuple[FileLock, bool]:
    """The lock of a folder, if possible, and whether no other process holds it."""
    lock = FileLock(folder / LOCK)
    try:
        return lock, lock.acquire()
    except OSError:  # it cannot be written to
        return lock, True


def _in_use(folder: Path, lock: FileLock) -> RunError:
    return RunError(
        f"The folder '{folder}' is in use by {lock.holder or 'another process'}. Wait for it or "
        "stop it, or choose another folder with -o FOLDER."
    )


def starts_of(record: Mapping[str, Any]) -> list[str]:
    """Times of a run's starts from its record, with now added."""
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="microseconds")
    return [*record.get(STARTED, []), now]


def newest_run(root: Path, state: str) -> Path | None:
    """Folder of the run that was started or continued last; None if there is none.

    A run that was begun later and ended before it wrote its state is named in the log.

    Args:
        root: it and all folders below it are searched. Members of an ensemble count as one run.
        state: the file that a run needs to be gone on with.

    Raises:
        RunError: several runs may be the last.
    """
    folders = dict.fromkeys(_run_of(path) for path in found_whole(root, state))
    dated = {folder: when for folder in folders if (when := _last_start(folder)) is not None}
    if dated or not folders:
        newest = max(dated, key=dated.__getitem__) if dated else None
        _name_dead(root, folders, dated[newest] if newest else None, state)
        return newest
    if len(folders) > 1:
        shown = ", ".join(f"'{folder}'" for folder in itertools.islice(folders, 5))
        raise RunError(
            f"--restart auto: of {len(folders)} runs below '{root}' none says when it was begun "
            f"({shown}{', ...' if len(folders) > 5 else ''}). Name the one to go on with: "
            "--restart FOLDER."
        )
    return next(iter(folders), None)


def _name_dead(
    root: Path,
    alive: Collection[Path],
    since: tuple[datetime.datetime, int] | None,
    state: str,
) -> None:
    """Log later runs that left no state to continue from."""
    records = (path for name in _RECORDS for path in found_whole(root, name))
    others = [folder for folder in dict.fromkeys(map(_run_of, records)) if folder not in alive]
    later = {folder: when for folder in others if (when := _last_start(folder)) is not None}
    dead = [folder for folder, when in later.items() if since is None or when > since]
    if dead:
        last = max(dead, key=later.__getitem__)
        more = f", and {len(dead) - 1} more," if len(dead) > 1 else ""
        _logger.warning(
            "--restart auto: '%s'%s was begun %s and has no %s so far, so it cannot be gone on "
            "with; see its log",
            last,
            more,
            "later" if since else f"at {later[last][0]:%Y-%m-%d %H:%M} UTC",
            state,
        )


def _run_of(state: Path) -> Path:
    folder = state.parent
    return folder.parent if re.fullmatch(r"member_\d+", folder.name) else folder


def _last_start(folder: Path) -> tuple[datetime.datetime, int] | None:
    """Last start of a run from its record or name; UTC, and a number."""
    named = _DATED.search(folder.absolute().as_posix())
    number = int(named[3] or 0) if named else 0
    known = [
        start for part in (folder, *sorted(folder.glob("member_*"))) for start in _starts(part)
    ]
    if known:
        return max(known), number
    if named is None:
        return None
    try:
        local = datetime.datetime.strptime(f"{named[1]} {named[2]}", "%Y-%m-%d %H-%M-%S")
    except ValueError:
        return None
    return local.astimezone(datetime.timezone.utc), number


def _starts(folder: Path) -> Iterator[datetime.datetime]:
    """Starts in the records of a run; damaged ones are skipped."""
    for name in _RECORDS:
        try:
            record = read_object(folder / name)
            for text in record.get(STARTED, []):
                start = datetime.datetime.fromisoformat(text)
                yield start if start.tzinfo else start.replace(tzinfo=datetime.timezone.utc)
        except (FileNotFoundError, DataError, ValueError, TypeError):
            continue


_TRAINING = "architecture.training."
#: Chosen by a new run where they are null, and kept by one that goes on.
_CHOSEN = ("learning_rate", "batch_size", "num_epochs")
#: Used before the first step only; what came of them is in the run's files.
_AS_BEGUN = (
    "seed",
    "validation_set",
    "test_set",
    "architecture.name",
    "architecture.model",
    *(_TRAINING + name for name in ("baseline", "atomic_baseline", "scale_targets")),
    _TRAINING + "fixed_scaling_weights",
)
#: Of ``finetune``, what is looked at again when a run goes on.
_LOOKED_AT = tuple(_TRAINING + "finetune." + name for name in ("unfreeze", "replay", "anchor"))
#: Of ``training``, what a run goes on with unless the file says otherwise, since its default was
#: another in older releases; with the value of runs that do not say.
_OLDER_DEFAULTS = {"optimizer": "adamw", "ema": None, "track_energy_offset": 0.0}
#: Change no number of a run that goes on; pre-training was over when it began.
_NO_MATTER = (
    *(_TRAINING + name for name in ("log_interval", "checkpoint_interval")),
    _TRAINING + "finetune.pretrain",
)


@dataclass(frozen=True)
class Change:
    """An option that has another value than when the run began.

    Attributes:
        name: with its sections, as on the command line.
        now, then: its values; None where it has none.
        heeded: whether the run goes on with the new one.
    """

    name: str
    now: Any
    then: Any
    heeded: bool


def changed_options(options: Options, before: Mapping[str, Any]) -> Iterator[Change]:
    """The options that differ from those of a run, by name.

    An option that the run does not look at again is a change only where it is written out: a run
    goes on with an options file that says no more of its start.
    """
    now, then = dict(_flat(options.resolved())), dict(_flat(before))
    given = set(_given(options))
    for name in sorted(now.keys() | then.keys()):
        value, old = now.get(name), then.get(name)
        heeded = not _below(name, _AS_BEGUN) and (
            not _below(name, (_TRAINING + "finetune",)) or _below(name, _LOOKED_AT)
        )
        # What is not written out is a default, or what the run found for itself.
        chosen = name.removeprefix(_TRAINING) in _CHOSEN
        silent = name not in given and (not heeded or chosen or name not in then)
        silent = silent or (chosen and value is None)
        if value == old or silent or _below(name, _NO_MATTER):
            continue
        yield Change(name, value, old, heeded)


def with_defaults_of(options: Options, before: Mapping[str, Any]) -> Options:
    """The options of a continued run, with the defaults of its start."""
    training = options.training
    then = before.get("architecture", {}).get("training", {})
    left_out = {
        name: then.get(name, default)
        for name, default in _OLDER_DEFAULTS.items()
        if name not in training.model_fields_set
    } | {
        name: then[name] for name in _CHOSEN[1:]
        if name in then and getattr(training, name) is None
    }  # fmt: skip
    return options.with_training(**left_out)


def _below(name: str, sections: tuple[str, ...]) -> bool:
    return any(name == s or name.startswith((f"{s}.", f"{s}[")) for s in sections)


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Values with the names of all sections above them; lists of sections count from 0."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _flat(item, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
        for index, item in enumerate(value):
            yield from _flat(item, f"{name}[{index}]")
    else:
        yield name, value


def _given(value: Any, name: str = "") -> Iterator[str]:
    """Names of the values that are written out, as :func:`_flat` has them."""
    if isinstance(value, BaseModel):
        for key in value.model_fields_set:
            yield from _given(getattr(value, key), f"{name}.{key}" if name else key)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _given(item, f"{name}.{key}" if name else str(key))
    elif isinstance(value, (list, tuple)) and value and isinstance(value[0], BaseModel):
        for index, item in enumerate(value):
            yield from _given(item, f"{name}[{index}]")
    else:
        yield name
