"""Memory that is used again and again, instead of fetched from the system anew."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from . import compiled

__all__ = ["Arena"]


class Arena:
    """The memory of one owner's work: predictions one after another, or the steps of a training.

    Each tensor lies as low in it as there is room. What lies above all that a piece of work used is
    returned to the system when it ends, the rest with the last reference to this object. Without
    the kernels' library nothing is kept. Copies and pickles start empty.
    """

    def __init__(self) -> None:
        self._arena: Any = None

    @contextmanager
    def reused(self) -> Iterator[None]:
        """Tensors of 16 KiB and more that this thread makes here lie in the kept memory.

        They may outlive the context.
        """
        if not compiled.loaded():
            yield
            return
        if self._arena is None:
            self._arena = torch.classes.pet_finetune.Arena()
        self._arena.enter()
        try:
            yield
        finally:
            self._arena.leave()

    @property
    def bytes(self) -> int:
        """What is kept and free now, at most."""
        return 0 if self._arena is None else int(self._arena.bytes())

    def __getstate__(self) -> dict[str, Any]:
        return {"_arena": None}
