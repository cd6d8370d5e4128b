"""Layers that several models share, computed once for all of them.

The members of a committee differ from some layer on. What comes before is the same for all of them,
so their tokens at that point are copies of one computation. Its derivatives are not the same: each
member hands another gradient down, and each needs its own way back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pet_finetune.data.batch import Batch


@dataclass(frozen=True)
class Tokens:
    """What one GNN layer hands to the next.

    Attributes:
        nodes: [n_atoms, d_node].
        messages: [n_edges, d_pet], what arrives along each edge.
        readouts: centre and edge features of the layers so far, where each has a read-out.
    """

    nodes: Tensor
    messages: Tensor
    readouts: tuple[tuple[Tensor, Tensor], ...] = ()

    def flat(self) -> list[Tensor]:
        """All tensors in one list."""
        return [self.nodes, self.messages, *(t for pair in self.readouts for t in pair)]

    @staticmethod
    def of(flat: list[Tensor]) -> Tokens:
        """The opposite of :meth:`flat`."""
        nodes, messages, *rest = flat
        return Tokens(nodes, messages, tuple(zip(rest[::2], rest[1::2], strict=True)))


class Fork:
    """Where the members part.

    Args:
        layers: how many GNN layers they share, one at least.
    """

    def __init__(self, layers: int) -> None:
        self.layers = layers
        self._run: Callable[[], tuple[Tensor, list[Tensor]]] | None = None
        self._num_atoms = 0
        self._made: tuple[Tensor, list[Tensor]] | None = None

    @contextmanager
    def sharing(self, batch: Batch, run: Callable[[Batch], Tokens]) -> Iterator[None]:
        """Meanwhile :meth:`tokens` are those of a batch, computed when first asked for.

        Args:
            batch: the structures once.
            run: the shared layers.
        """

        def compute() -> tuple[Tensor, list[Tensor]]:
            vectors = batch.edge_vectors.detach().requires_grad_(torch.is_grad_enabled())
            return vectors, run(replace(batch, edge_vectors=vectors)).flat()

        self._run, self._num_atoms = compute, batch.num_atoms
        try:
            yield
        finally:
            self._run = self._made = None

    @property
    def active(self) -> bool:
        """Whether there is a batch to share."""
        return self._run is not None

    def tokens(self, batch: Batch) -> Tokens:
        """The tokens after the shared layers.

        Args:
            batch: the structures of :meth:`sharing` several times over; its edge vectors receive
                the gradients.
        """
        count = batch.num_atoms // self._num_atoms
        return Tokens.of(list(_Copies.apply(batch.edge_vectors, self, count)))

    def computed(self) -> tuple[Tensor, list[Tensor]]:
        """The edge vectors and the tensors made of them."""
        assert self._run is not None, "there is no batch to share"
        if self._made is None:
            self._made = self._run()
        return self._made


class _Copies(torch.autograd.Function):
    """Copies of the shared tensors, each with a gradient of its own. Differentiates once."""

    @staticmethod
    def forward(ctx: Any, vectors: Tensor, fork: Fork, count: int) -> tuple[Tensor, ...]:
        with torch.set_grad_enabled(ctx.needs_input_grad[0]):
            ctx.computed = fork.computed()
        ctx.count = count
        return tuple(t.detach().repeat(count, 1) for t in ctx.computed[1])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        vectors, tensors = ctx.computed
        chosen = [index for index, tensor in enumerate(tensors) if tensor.requires_grad]
        each = zip(*(gradients[index].chunk(ctx.count) for index in chosen), strict=True)
        found = [
            torch.autograd.grad(
                [tensors[index] for index in chosen],
                vectors,
                grads,
                retain_graph=True,
                materialize_grads=True,
            )[0]
            for grads in each
        ]
        return torch.cat(found), None, None
