"""Logging as tests find it: what a command sets up ends with the test."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def logging_as_it_was() -> Iterator[None]:
    """On leaving, the package's logger has the handlers and settings that it had before."""
    root = logging.getLogger("pet_finetune")
    handlers, level, propagate = list(root.handlers), root.level, root.propagate
    yield
    for handler in set(root.handlers) - set(handlers):
        handler.close()
    root.handlers[:], root.level, root.propagate = handlers, level, propagate
