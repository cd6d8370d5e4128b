"""Marks on the stages of a computation: a profile listens to them, otherwise they cost nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TypeVar

__all__ = ["Listener", "each", "listening", "stage"]

T = TypeVar("T")

#: Makes the context in which a stage of the given name runs.
Listener = Callable[[str], AbstractContextManager[object]]

_UNHEARD = nullcontext()
_listener: Listener | None = None


def stage(name: str) -> AbstractContextManager[object]:
    """What runs within this context is the stage ``name``; stages may lie within each other."""
    return _UNHEARD if _listener is None else _listener(name)


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


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Within this context the listener hears of every stage."""
    global _listener
    before, _listener = _listener, listener
    try:
        yield
    finally:
        _listener = before
