"""How far from the heads each part of the network is."""

from __future__ import annotations

from .pet import HEAD_GROUPS, PET

#: What the parts at the two ends are called.
HEADS = "heads"
EMBEDDINGS = "embeddings"
# What belongs to one GNN layer, beside the layer itself.
_OF_LAYER = ("gnn_layers", "combination_norms", "combination_mlps")


def depth_names(network: PET) -> list[str]:
    """The parts by depth: the heads, the GNN layers from the last to the first, the embeddings."""
    layers = reversed(range(len(network.gnn_layers)))
    return [HEADS, *(f"gnn_layers.{index}" for index in layers), EMBEDDINGS]


def depth_of(parameter: str, network: PET) -> int:
    """Depth of a parameter: 0 for heads and last layers, largest for the embeddings.

    Args:
        parameter: its path in the network.
        network: which says how many layers there are.
    """
    part, _, rest = parameter.partition(".")
    num_layers = len(network.gnn_layers)
    if part in HEAD_GROUPS:
        return 0
    if part == "long_range_featurizer":  # reads what the last layer says
        return 1
    if part in _OF_LAYER:
        return num_layers - int(rest.partition(".")[0])
    return num_layers + 1
