"""Terms of the loss beside the errors of the batch: replayed data, anchors, penalties."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from pet_finetune.data.batch import LabelledBatch
from pet_finetune.model import Prediction, Property


@dataclass(frozen=True)
class Seen:
    """What the loop has just taken the gradient of.

    Attributes:
        epoch, index: of the batch, both from 0, as :meth:`pet_finetune.data.Loader.epoch` counts.
        batch: with its labels as they are.
        predictions: by target; their graph is gone.
    """

    epoch: int
    index: int
    batch: LabelledBatch
    predictions: Mapping[str, Prediction | Property]


class ExtraLoss(Protocol):
    """A weighted term that the loop adds to the loss of each batch before the gradient.

    It depends on what was seen and on the weights alone, so that a run that is resumed computes
    the very same terms.

    Attributes:
        name: its mean over an epoch is the column ``train/<name>`` of ``train.csv``.
    """

    name: str

    def __call__(self, seen: Seen) -> Tensor | None:
        """The weighted term, a scalar; None where this batch has none."""
        ...
