"""The verdict: what fine-tuning changed, in one sentence, in a table, and what to watch out for."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .frame_errors import ratio_interval
from .run_record import Quantity, RunRecord

#: A change of the error by less than this part is none.
_NO_CHANGE = 0.02
# The error of the training set this many times smaller than that of the test set is worth a word.
_OVERFITTED = 2.0


@dataclass(frozen=True)
class ErrorChange:
    """An error before and after.

    Attributes:
        quantity: what is compared.
        before, after: mean absolute errors, in the quantity's unit; NaN if unknown.
        rmse: the same two as root mean squared errors.
        interval: 95 % interval of after over before; None if unknown.
    """

    quantity: Quantity
    before: float
    after: float
    rmse: tuple[float, float]
    interval: tuple[float, float] | None

    @property
    def ratio(self) -> float:
        """After over before; NaN where either is unknown or there was no error."""
        return self.after / self.before if self.before > 0 else math.nan

    @property
    def direction(self) -> str:
        """``better``, ``worse``, ``same`` or ``unknown``; the same where chance may explain it."""
        if not math.isfinite(self.ratio):
            return "unknown"
        by_chance = self.interval is not None and self.interval[0] < 1.0 < self.interval[1]
        if abs(self.ratio - 1.0) < _NO_CHANGE or by_chance:
            return "same"
        return "better" if self.ratio < 1.0 else "worse"

    @property
    def bounds(self) -> str:
        """The interval as changes in percent; empty where there is none."""
        if self.interval is None:
            return ""
        low, high = (signed(100 * (bound - 1), 0) for bound in self.interval)
        return f"95\u00a0%: {low}\u00a0to\u00a0{high}\u00a0%"  # a narrow column breaks it once

    @property
    def words(self) -> str:
        """The change in words, such as ``2.6 times smaller``."""
        ratio = self.ratio
        if not math.isfinite(ratio):
            return ""
        if self.direction == "same":
            return f"no clear change ({signed(100 * (ratio - 1), 0)} %)"
        if ratio <= 0.5:
            return f"{1 / ratio:.1f} times smaller" if ratio > 0 else "no error left"
        if ratio >= 2.0:
            return f"{ratio:.1f} times larger"
        percent = f"{100 * abs(ratio - 1):.0f} %"
        return f"{percent} {'smaller' if ratio < 1 else 'larger'}"


@dataclass(frozen=True)
class Verdict:
    """Verdict on a run.

    Attributes:
        tone: ``better``, ``worse``, ``mixed``, ``same`` or ``open``.
        sentence: the one to read.
        changes: the rows of the table.
        measured_on: the set, in words.
        warnings: what to watch out for.
    """

    tone: str
    sentence: str
    changes: Sequence[ErrorChange]
    measured_on: str
    warnings: Sequence[str]


def judge(run: RunRecord) -> Verdict:
    """The verdict on a run."""
    changes = [_change(run, quantity) for quantity in run.quantities()]
    known = [change for change in changes if change.direction != "unknown"]
    directions = {change.direction for change in known}
    tone = "open"
    if known and run.after:
        if {"better", "worse"} <= directions:
            tone = "mixed"
        else:
            tone = next((d for d in ("worse", "better") if d in directions), "same")
    sentence = _sentence(run, known, tone)
    return Verdict(tone, sentence, changes, _measured_on(run), list(_warnings(run, changes)))


def _change(run: RunRecord, quantity: Quantity) -> ErrorChange:
    both, shown = (run.before, run.after), run.primary_set
    before, after = (quantity.error_in(errors, shown) for errors in both)
    old, new = (quantity.error_in(errors, shown, "rmse") for errors in both)
    interval = None
    if run.predicted is not None and run.predicted.set_name == shown:
        interval = ratio_interval(run.predicted, quantity)
    return ErrorChange(quantity, before, after, (old, new), interval)


def number(value: float) -> str:
    """An error with three digits (two below 1), or as many as a whole number needs."""
    if not math.isfinite(value):
        return "–"
    value = float(f"{value:.3g}") if abs(value) < 1000 else value
    if value == 0 or abs(value) >= 100:
        return f"{value:,.0f}"
    if abs(value) < 1:
        return f"{value:#.2g}"
    return f"{value:.{2 - math.floor(math.log10(abs(value)))}f}"


def signed(value: float, digits: int) -> str:
    """A number with a true minus sign and always a sign."""
    return f"{value:+,.{digits}f}".replace("-", "−")


def _count(run: RunRecord) -> int | None:
    if run.predicted is not None and run.predicted.set_name == run.primary_set:
        return len(run.predicted.sizes)
    of_set = run.start.get("data", {}).get(run.primary_set or "", {})
    return of_set.get("structures")


def _measured_on(run: RunRecord) -> str:
    """Text on the set and its reliability."""
    name, count = run.primary_set, _count(run)
    if name is None:
        return ""
    structures = f"{count:,} {name} structures" if count is not None else f"the {name} set"
    if name == "test":
        return f"{structures}, which training never saw"
    if name == "validation":
        why = "" if "test" in run.start.get("data", {}) else " (there is no test set)"
        return f"{structures}, which also pick the best epoch{why}"
    return f"{structures}, the ones it learned from (there is no test set)"


def _sentence(run: RunRecord, known: Sequence[ErrorChange], tone: str) -> str:
    """Verdict in one self-contained sentence."""
    what = "Fine-tuning" if run.is_finetuning else "Training"
    if not run.after:
        return _unfinished(run, what)
    if run.status != "finished":
        what = f"{_place(run)}. So far {what.lower()}"
    if not known:
        return f"{what} has finished; there is no starting model's error to compare with."

    def told(direction: str) -> str:
        parts = [
            f"the {c.quantity.error} from {number(c.before)} to {number(c.after)} "
            f"{c.quantity.unit} ({c.words})"
            for c in known
            if c.direction == direction
        ]
        return _joined(parts)

    same = _joined([f"the {c.quantity.error}" for c in known if c.direction == "same"])
    same = f"; {same} did not change clearly" if same else ""
    if tone == "mixed":
        return f"{what} lowered {told('better')}, but raised {told('worse')}{same}."
    if tone == "worse":
        return f"{what} made the model worse: it raised {told('worse')}{same}."
    if tone == "better":
        return f"{what} lowered {told('better')}{same}."
    return f"{what} changed little: {same.removeprefix('; ')}."


def _place(run: RunRecord) -> str:
    """Progress of an unfinished run."""
    epochs = max((len(rows) for rows in run.epochs), default=0)
    wanted = run.training.get("num_epochs")
    how = (
        "Under way, after epoch" if run.status == "running" else "Not finished: stopped after epoch"
    )
    return f"{how} {epochs}" + (f" of {wanted}" if wanted else "")


def _unfinished(run: RunRecord, what: str) -> str:
    if run.status == "finished":
        return f"{what} has finished; the model was not evaluated (final_eval is off)."
    return f"{_place(run)}; nothing has been evaluated yet."


def _joined(parts: Sequence[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    return " and ".join(filter(None, [", ".join(parts[:-1]), *parts[-1:]]))


def _warnings(run: RunRecord, changes: Sequence[ErrorChange]) -> Iterator[str]:
    """Warnings about the model."""
    worse = [c for c in changes if c.direction == "worse"]
    if worse and run.after:
        names = _joined([c.quantity.name for c in worse])
        yield (
            f"Got worse: {names}. Look at the loss weights, the learning rate and the units of the "
            "labels before using this model."
        )
    yield from _overfitting(run)
    yield from _forgotten(run)
    lost = [row.name for row in run.dimers.rows if row.verdict == "lost"] if run.dimers else []
    if lost:
        yield (
            f"Lost repulsion at short distances: {', '.join(lost)}. Atoms that come too close may "
            "fuse in MD; add short contacts to the data, or replay (finetune.replay)."
        )
    count = _count(run)
    if count is not None and count < 20 and run.after and run.status == "finished":
        yield f"Only {count} structures were evaluated: another selection may give other errors."


def _overfitting(run: RunRecord) -> Iterator[str]:
    """Training errors far below the others."""
    shown = run.primary_set
    if shown in (None, "train") or not run.after:
        return
    for quantity in run.quantities():
        own, other = (quantity.error_in(run.after, name) for name in ("train", shown))
        if other > _OVERFITTED * own > 0:
            yield (
                f"Overfitting: the {quantity.error} is {number(own)} {quantity.unit} on the "
                f"training set and {number(other)} on the {shown} set. More data, fewer epochs or "
                "a lower rank help."
            )


def _forgotten(run: RunRecord) -> Iterator[str]:
    """Forgetting, if it is larger than the error on the user's data."""
    kept = run.after.get("retention", {})
    for target, values in kept.items():
        drift = values.get("forces_mae")
        old = run.before.get("retention", {}).get(target, {}).get("forces_mae", 0.0)
        own = run.after.get(run.primary_set or "", {}).get(target, {}).get("forces_mae")
        if drift is not None and own is not None and drift > max(own, 1.05 * old):
            yield (
                f"Forgetting: on structures that the foundation knew, forces are now off by "
                f"{number(1000 * drift)} meV/Å (before: {number(1000 * old)}). Trust the model on "
                "structures like yours; to keep more, see finetune.replay and finetune.anchor."
            )
