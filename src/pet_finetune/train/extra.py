"""Terms of the loss beside the errors of the batch: replayed data, anchors, penalties."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class ExtraLoss(Protocol):
    """A weighted term that the loop adds to the loss of each batch before the gradient.

    It depends on the epoch, the batch and the weights alone, so that a run that is resumed
    computes the very same terms.

    Attributes:
        name: its mean over an epoch is the column ``train/<name>`` of ``train.csv``.
    """

    name: str

    def __call__(self, epoch: int, batch: int) -> Tensor | None:
        """The weighted term, a scalar; None where this batch has none.

        Args:
            epoch, batch: both from 0, as :meth:`pet_finetune.data.Loader.epoch` counts them.
        """
        ...
