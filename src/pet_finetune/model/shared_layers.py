"""Layers that several models share, computed once for all of them.

The members of a committee differ from some layer on. What comes before is the same for all of them,
so their tokens at that point are copies of one computation. Its derivatives are not the same: each
member hands another gradient down, and each needs its own way back.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pet_finetune.graph import Batch


class Tokens(NamedTuple):
    """Tokens passed from one GNN layer to the next.

    Attributes:
        nodes: [n_atoms, d_node].
        messages: [n_edges, d_pet], what arrives along each edge.
        readouts: centre and edge features of the layers so far, where each has a read-out.
    """

    nodes: Tensor
    messages: Tensor
    readouts: list[tuple[Tensor, Tensor]]

    def flat(self) -> list[Tensor]:
        """All tensors in one list."""
        return [self.nodes, self.messages, *(t for pair in self.readouts for t in pair)]

    @staticmethod
    def of(flat: list[Tensor]) -> "Tokens":
        """The opposite of :meth:`flat`."""
        nodes, messages, *rest = flat
        return Tokens(nodes, messages, list(zip(rest[::2], rest[1::2], strict=True)))


class SharedLayers:
    """The first layers of a committee, which its members share.

    Args:
        count: how many GNN layers they share, one at least.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._run: Callable[[int], tuple[Tensor, list[Tensor]]] | None = None
        self._num_atoms = 0
        self._made: tuple[Tensor, list[Tensor]] | None = None
        self._sums: list[Tensor] | None = None

    @contextmanager
    def sharing(
        self, batch: Batch, run: Callable[[Batch, int], Tokens], together: bool = False
    ) -> Iterator[None]:
        """Context in which :meth:`tokens` are those of a batch, computed on first use.

        Args:
            batch: the structures once.
            run: the shared layers, of a batch and a kind of memory.
            together: whether the members' gradients stop behind these layers, to go the rest of
                the way as their sum, in :meth:`gradient`.
        """

        def compute(memory: int) -> tuple[Tensor, list[Tensor]]:
            vectors = batch.edge_vectors.detach().requires_grad_(torch.is_grad_enabled())
            return vectors, run(batch._replace(edge_vectors=vectors), memory).flat()

        self._run, self._num_atoms = compute, batch.num_atoms
        self._sums = [] if together else None
        try:
            yield
        finally:
            self._run = self._made = self._sums = None

    @property
    def active(self) -> bool:
        """Whether there is a batch to share."""
        return self._run is not None

    def tokens(self, batch: Batch, memory: int) -> Tokens:
        """The tokens after the shared layers.

        Args:
            batch: the structures of :meth:`sharing` several times over; its edge vectors receive
                the gradients.
            memory: what the graph keeps, one of :class:`~pet_finetune.nn.projection.Memory`.
        """
        count = batch.num_atoms // self._num_atoms
        return Tokens.of(list(_Copies.apply(batch.edge_vectors, self, count, memory)))

    def computed(self, memory: int = 0) -> tuple[Tensor, list[Tensor]]:
        """The edge vectors and the tensors made of them."""
        assert self._run is not None, "there is no batch to share"
        if self._made is None:
            self._made = self._run(memory)
        return self._made

    def back(self, gradients: Sequence[Tensor], count: int) -> Tensor | None:
        """The gradient of each member on its edge vectors, or None where it waits for the others.

        ``gradients`` are of the tensors of :meth:`computed`, each that of so many members in turn.
        """
        if self._sums is None:
            each = zip(*(gradient.chunk(count) for gradient in gradients), strict=True)
            return torch.cat([self._through(own) for own in each])
        sums = [gradient.unflatten(0, (count, -1)).sum(0) for gradient in gradients]
        old = self._sums or [torch.zeros_like(own) for own in sums]
        self._sums = [one + other for one, other in zip(old, sums, strict=True)]
        return None

    def gradient(self) -> Tensor | None:
        """The sum over the members of what ``together`` kept from them, [n_edges, 3]."""
        return self._through(self._sums) if self._sums else None

    def _through(self, gradients: Sequence[Tensor]) -> Tensor:
        """The way back through the shared layers."""
        vectors, tensors = self.computed()
        pairs = [pair for pair in zip(tensors, gradients, strict=True) if pair[0].requires_grad]
        outputs, arrived = zip(*pairs, strict=True)
        (found,) = torch.autograd.grad(
            outputs, vectors, arrived, retain_graph=True, materialize_grads=True
        )
        return found


class _Copies(torch.autograd.Function):
    """Copies of the shared tensors, each with a gradient of its own. Differentiates once."""

    @staticmethod
    def forward(
        ctx: Any, vectors: Tensor, layers: SharedLayers, count: int, memory: int
    ) -> tuple[Tensor, ...]:
        ctx.layers, ctx.count = layers, count
        with torch.set_grad_enabled(ctx.needs_input_grad[0]):
            _, tensors = layers.computed(memory)
        return tuple(tensor.detach().repeat(count, 1) for tensor in tensors)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, None, None]:
        return ctx.layers.back(gradients, ctx.count), None, None, None
