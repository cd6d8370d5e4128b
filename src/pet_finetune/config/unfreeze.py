"""Options of gradual unfreezing: ``architecture.training.finetune.unfreeze``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field, model_validator

from .base import Expects, PositiveInt, Section, TextList

__all__ = ["Unfreeze"]


def _stages(value: Any) -> dict[int, tuple[str, ...]]:
    if not isinstance(value, Mapping) or not value:
        raise ValueError
    stages = {}
    for epoch, names in value.items():
        if isinstance(epoch, bool) or not isinstance(epoch, int) or epoch < 0:
            raise ValueError(f"{epoch!r} is not a number of epochs.")
        listed = [names] if isinstance(names, str) else names
        if not isinstance(listed, (list, tuple)) or not listed:
            raise ValueError(f"Epoch {epoch} names nothing that trains.")
        if not all(isinstance(name, str) and name.strip() for name in listed):
            raise ValueError(f"Epoch {epoch} names something that is no text.")
        stages[epoch] = tuple(listed)
    return dict(sorted(stages.items()))


UnfreezeStages = Annotated[
    dict[int, TextList], Expects("{epochs done: name or list of names}", _stages)
]


class Unfreeze(Section):
    """Training begins with the heads and takes in deeper parts as it goes.

    This is the gradual unfreezing of ULMFiT (arXiv:1801.06146). In a file also just the
    number of epochs ``every``.
    """

    every: PositiveInt | None = Field(
        default=None,
        description="Epochs after which one part more trains: first the heads, then the GNN "
        "layers from the last to the first, then the embeddings.",
    )
    stages: UnfreezeStages | None = Field(
        default=None,
        description="Instead of `every`: how many epochs are done when something begins to "
        "train, and what: `heads`, `embeddings`, `all`, or modules of the network such as "
        "`gnn_layers.1`. What trains once goes on training.",
    )

    @model_validator(mode="before")
    @classmethod
    def _epochs_alone(cls, value: Any) -> Any:
        if isinstance(value, bool) or not isinstance(value, (int, float, str)):
            return value
        return {"every": value}
