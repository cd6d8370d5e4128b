"""Batches on the device that wants them; for a GPU, the next one is made while one is used."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Final, TypeVar

import torch

from .batch import LabelledBatch

__all__ = ["on_device", "one_ahead"]

T = TypeVar("T")


class _End:
    """What comes after the last item."""


_END: Final = _End()


def on_device(
    batches: Iterable[LabelledBatch], device: torch.device, dtype: torch.dtype
) -> Iterator[LabelledBatch]:
    """The same batches in the same order, moved to a device and cast.

    On a GPU the CPU would otherwise cut and turn a batch while the GPU waits for it: a thread
    does that for one batch ahead, and puts it where the GPU reads it without stopping the CPU.

    Args:
        batches: on the CPU; where they come from a generator, it must share no state with whoever
            uses the batches (a :class:`Loader`'s draws from its own random streams).
        device: where the batches go.
        dtype: of their floating-point tensors.
    """
    if device.type != "cuda":
        for batch in batches:
            yield batch.to(device, dtype)
        return
    for batch in one_ahead(_pinned(batches, device)):
        # Copied on the stream that computes, so nothing reads the batch before it is there.
        yield batch.to(device, dtype, non_blocking=True)


def _pinned(batches: Iterable[LabelledBatch], device: torch.device) -> Iterator[LabelledBatch]:
    for batch in batches:
        with torch.cuda.device(device):  # a new thread would wake the first GPU instead
            pinned = batch.pinned()
        yield pinned


def one_ahead(items: Iterable[T]) -> Iterator[T]:
    """The same items in the same order; a thread makes the next one while one is used.

    An error in making an item is raised where that item would have come.
    """
    iterator = iter(items)
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="loader") as thread:
        coming = thread.submit(next, iterator, _END)
        while not isinstance(item := coming.result(), _End):
            coming = thread.submit(next, iterator, _END)
            yield item
