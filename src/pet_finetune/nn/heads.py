"""Read-outs of one target: node part plus the cutoff-weighted sum over edges."""

from torch import Tensor, nn

from pet_finetune.graph import Neighborhood

from .projection import Chain
from .rowwise import SiLU


def make_head(width: int, d_head: int) -> Chain:
    """Linear-SiLU-Linear-SiLU from ``width`` to ``d_head``."""
    return Chain(nn.Linear(width, d_head), SiLU(), nn.Linear(d_head, d_head), SiLU())


def sum_over_edges(values: Tensor, hood: Neighborhood, num_atoms: int) -> Tensor:
    """Cutoff-weighted sum of [n_edges, k] over the edges of each atom, [n_atoms, k]."""
    weighted = values * hood.factors.unsqueeze(-1)
    return weighted.new_zeros([num_atoms, values.size(-1)]).index_add(0, hood.centers, weighted)
