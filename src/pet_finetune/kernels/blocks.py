"""Memory that one prediction after another uses, instead of fetching it from the system anew."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from . import compiled

__all__ = ["Blocks"]


class Blocks:
    """The large blocks of one owner's predictions, kept from one to the next.

    Blocks that a prediction did not use are returned to the system when it ends, all of them with
    the last reference to this object. Without the kernels' library nothing is kept. Copies and
    pickles start empty.
    """

    def __init__(self) -> None:
        self._blocks: Any = None

    @contextmanager
    def reused(self) -> Iterator[None]:
        """Tensors of 1 MB and more that this thread makes here are made from the kept blocks.

        They may outlive the context.
        """
        if not compiled.active():
            yield
            return
        if self._blocks is None:
            self._blocks = torch.classes.pet_finetune.Blocks()
        self._blocks.enter()
        try:
            yield
        finally:
            self._blocks.leave()

    @property
    def bytes(self) -> int:
        """What is kept and free now."""
        return 0 if self._blocks is None else int(self._blocks.bytes())

    def __getstate__(self) -> dict[str, Any]:
        return {"_blocks": None}
