"""Embeddings of new elements that train while those of known elements stay as they are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn

from pet_finetune.model import Potential
from pet_finetune.nn.embedding import ROWS, GrownEmbedding

__all__ = ["ROWS", "drop_new_rows", "grown_tables", "merge_new_rows", "train_new_rows"]


def grown_tables(model: Potential) -> Iterator[tuple[str, GrownEmbedding]]:
    """The tables of a model with rows that train apart, with their paths in the network."""
    for path, table in model.network.species_embeddings().items():
        if isinstance(table, GrownEmbedding):
            yield path, table


def train_new_rows(model: Potential, species: Sequence[int]) -> None:
    """Let the embeddings of some species train and keep those of all others, in place.

    Tables that train whole are left as they are.

    Args:
        model: knows the species (:meth:`~pet_finetune.model.Potential.add_species`).
        species: atomic numbers; with none of them, nothing happens.
    """
    rows = [model.species.index(number) for number in species]
    if not rows:
        return
    for path, table in model.network.species_embeddings().items():
        assert isinstance(table, nn.Embedding), f"{path} trains rows of its own already"
        if not table.weight.requires_grad:
            model.network.set_submodule(path, GrownEmbedding(table, rows).train(table.training))


def drop_new_rows(model: Potential) -> None:
    """Give tables back as they were before their rows trained, in place."""
    for path, table in list(grown_tables(model)):
        model.network.set_submodule(path, table.base_embedding())


def merge_new_rows(model: Potential) -> Potential:
    """Write trained rows into their tables, in place, and return the model."""
    for path, table in list(grown_tables(model)):
        model.network.set_submodule(path, table.to_embedding())
    return model
