"""Tables with a row for each species, made for other species."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def pick_rows(table: Tensor, sources: Sequence[int | None]) -> Tensor:
    """Rows of a table in another order, some of them twice, others new.

    Args:
        table: [n_species, width].
        sources: for each row of the result the one it copies, or None for a random one: normal,
            with the mean and the spread that each column has in the table.

    Returns:
        [len(sources), width].
    """
    mean, spread = table.mean(0), table.std(0, correction=0)
    rows = []
    for source in sources:
        if source is None:
            noise = torch.randn(table.shape[1]).to(table)  # drawn on the CPU: the same anywhere
            rows.append(mean + spread * noise)
        else:
            rows.append(table[source])
    return torch.stack(rows)
