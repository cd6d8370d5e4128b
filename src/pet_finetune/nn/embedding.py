"""An embedding table of which some rows train and the others stay as they are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pet_finetune.backends.instructions import CannotRecord

from .rowwise import SiLU

#: The name of the trained rows, behind the path of their table.
ROWS = "new_rows"


class GrownEmbedding(nn.Module):
    """A frozen table with rows of its own for some of its entries.

    The rows that train are a parameter apart, so nothing an optimiser, an average or a penalty
    does can move the others. They replace the table's rows rather than being added to them, as in
    Hugging Face PEFT's trainable tokens, so that merging is writing them down.

    Args:
        base: the table; its tensor is shared, not copied.
        rows: the entries that train, [n_rows] indices into the table.
    """

    row_index: Tensor

    def __init__(self, base: nn.Embedding, rows: Sequence[int]) -> None:
        super().__init__()
        self.weight = base.weight
        self.weight.requires_grad_(False)
        index = torch.tensor(list(rows), device=base.weight.device)
        self.register_buffer("row_index", index, persistent=False)
        self.new_rows = nn.Parameter(base.weight.detach()[index].clone())

    def table(self) -> Tensor:
        """The table as it is used, [n_entries, width]."""
        return self.weight.index_copy(0, self.row_index, self.new_rows)

    def forward(self, entries: Tensor) -> Tensor:
        """[n] indices to [n, width]."""
        return nn.functional.embedding(entries, self.table())

    def base_embedding(self) -> nn.Embedding:
        """The table as it was before its rows trained, with the very same parameter."""
        base = nn.Embedding.from_pretrained(self.weight)
        base.weight = self.weight
        return base.train(self.training)

    def to_embedding(self) -> nn.Embedding:
        """A plain table with the rows written into it."""
        return nn.Embedding.from_pretrained(self.table().detach().clone(), freeze=False).train(
            self.training
        )


def table_of(embedding: nn.Module) -> Tensor:
    """The rows that an embedding looks up, [n_entries, width].

    Raises:
        CannotRecord: another library's.
    """
    if isinstance(embedding, GrownEmbedding):
        return embedding.table()
    if not isinstance(embedding, nn.Embedding):
        raise CannotRecord(f"a {type(embedding).__name__}")
    return embedding.weight


class SystemConditioning(nn.Module):
    """Embeds charge and spin multiplicity; starts as a no-op because its last layer is zero."""

    def __init__(self, width: int, max_charge: int, max_spin_multiplicity: int) -> None:
        super().__init__()
        self.max_charge = max_charge
        self.max_spin_multiplicity = max_spin_multiplicity
        self.charge_embedding = nn.Embedding(2 * max_charge + 1, width)
        self.spin_multiplicity_embedding = nn.Embedding(max_spin_multiplicity, width)
        gate = nn.Linear(width, width)
        nn.init.zeros_(gate.weight)
        nn.init.zeros_(gate.bias)
        self.project = nn.Sequential(nn.Linear(2 * width, width), SiLU(), gate)

    def forward(self, charges: Tensor, spins: Tensor, structure_index: Tensor) -> Tensor:
        """Per-atom features [n_atoms, width] from per-structure integers.

        Args:
            charges: [n_structures] int64, within plus or minus ``max_charge``.
            spins: [n_structures] int64, 2S + 1, from 1 to ``max_spin_multiplicity``.
            structure_index: [n_atoms].
        """
        charge = self.charge_embedding(charges + self.max_charge)
        spin = self.spin_multiplicity_embedding(spins - 1)
        features: Tensor = self.project(torch.cat([charge, spin], dim=-1))
        return features[structure_index]
