"""Marks on the stages of a computation, which torch's profiler shows and adds up."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

import torch
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import record_function

__all__ = ["each", "stage", "stage_seconds"]

T = TypeVar("T")

_UNSEEN = nullcontext()


def stage(name: str) -> AbstractContextManager[object]:
    """What runs within this context is the stage ``name``; stages may lie within each other."""
    # Unseen, a mark would take as long as a few operations.
    seen = torch._C._autograd._profiler_enabled()
    return record_function(name) if seen else _UNSEEN


def each(name: str, items: Iterable[T]) -> Iterator[T]:
    """The same items; making each of them is the stage ``name``."""
    iterator = iter(items)
    while True:
        with stage(name):
            try:
                item = next(iterator)
            except StopIteration:
                return
        yield item


def stage_seconds(events: Iterable[FunctionEvent], device: str = "CPU") -> dict[str, float]:
    """Time of each stage, in the order in which they first began.

    Time within a stage that lies within another counts for the inner one only.

    Args:
        events: of torch's profiler.
        device: ``CUDA`` for when a GPU worked on each stage, instead of when it was asked to.
    """
    # torch marks the steps of optimisers, too, with a sign in their names.
    marks = (e for e in events if e.is_user_annotation and e.device_type.name == device)
    ranges = sorted(
        ((e.time_range.start, -e.time_range.end, e.name) for e in marks if "#" not in e.name),
    )
    seconds: dict[str, float] = {}
    around: list[tuple[str, float]] = []  # the stages that are open, and when they end
    for start, negative_end, name in ranges:
        end = -negative_end
        while around and around[-1][1] <= start:
            around.pop()
        seconds[name] = seconds.get(name, 0.0) + 1e-6 * (end - start)
        if around:
            seconds[around[-1][0]] -= 1e-6 * (end - start)
        around.append((name, end))
    return seconds
