"""Writing a network down as the list of instructions that ``csrc/network.h`` runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor

from .fused import lanes, pack
from .operators import PROLOGUES

__all__ = [
    "CannotRecord",
    "Instructions",
    "Recorder",
    "Part",
    "Row",
    "Rows",
    "static_network",
]


class CannotRecord(Exception):
    """The network has a part that there are no instructions for."""


class Part(IntEnum):
    """Tokens whose rows a buffer has: centres, edges or both."""

    ATOMS = 0
    EDGES = 1
    ALL = 2


class _Op(IntEnum):
    PROJECT = 0
    ATTEND = 1
    TAKE = 2
    EMBED = 3
    LOOK_UP = 4
    CONDITION = 5
    NORM = 6
    READ = 7


class Rows(NamedTuple):
    """Rows of a buffer, [n, width]."""

    buffer: int
    part: Part
    width: int

    @property
    def code(self) -> int:
        """Both as one number."""
        return 3 * self.buffer + self.part

    def of(self, part: Part) -> Rows:
        """The rows of some of its tokens."""
        return Rows(self.buffer, part, self.width)


class Row(NamedTuple):
    """Operation on each row of the input of a linear layer.

    Attributes:
        prologue, norm_weight, norm_bias, eps: as in :func:`~.fused.projection`.
    """

    prologue: str = "none"
    norm_weight: Tensor | None = None
    norm_bias: Tensor | None = None
    eps: float = 0.0


class Instructions(NamedTuple):
    """A finished list.

    Attributes:
        weights: all numbers that do not change, in one array.
        code, numbers: the instructions.
        shapes: those of the buffers.
        condition_width: of the rows that an evaluation brings along; 0 for none.
        species: how many each table has a row for.
    """

    weights: Tensor
    code: Tensor
    numbers: Tensor
    shapes: Tensor
    condition_width: int
    species: int


@dataclass
class Recorder:
    """Writes down a network, instruction by instruction.

    Every width is a multiple of :func:`~.fused.lanes`.

    Args:
        dtype: of all numbers.
    """

    dtype: torch.dtype
    _weights: list[Tensor] = field(default_factory=list)
    _size: int = 0
    _code: list[list[int]] = field(default_factory=list)
    _numbers: list[float] = field(default_factory=list)
    _shapes: list[tuple[Part, int]] = field(default_factory=list)
    _condition_width: int = 0
    _species: int = 0

    def buffer(self, part: Part, width: int) -> Rows:
        """A new buffer with a row for each atom, edge, or both."""
        if width % lanes(self.dtype):
            raise ValueError(f"a width of {width} is not a multiple of {lanes(self.dtype)}")
        self._shapes.append((part, width))
        return Rows(len(self._shapes) - 1, part, width)

    def project(
        self,
        x: Rows,
        weight: Tensor,
        bias: Tensor | None,
        before: Row | None = None,
        residual: Rows | None = None,
        out: Rows | None = None,
    ) -> Rows:
        """A linear layer as :func:`~.fused.projection` computes it, into ``out`` if given."""
        width, before = weight.shape[0], before or Row()
        out = self.buffer(x.part, width) if out is None else out
        packed = pack(weight.to(self.dtype))
        self._add(
            _Op.PROJECT, x, out, residual, weight.shape[1], width, PROLOGUES[before.prologue],
            self._keep(packed[0]), self._keep(packed[1]), self._keep(bias),
            self._keep(before.norm_weight), self._keep(before.norm_bias), number=before.eps,
        )  # fmt: skip
        return out

    def norm(self, x: Rows, how: Row) -> Rows:
        """A norm by itself."""
        out = self.buffer(x.part, x.width)
        self._add(
            _Op.NORM, x, out, None, x.width, x.width, PROLOGUES[how.prologue], -1, 0, -1,
            self._keep(how.norm_weight), self._keep(how.norm_bias), number=how.eps,
        )  # fmt: skip
        return out

    def attend(self, qkv: Rows, heads: int, scale: float) -> Rows:
        """Attention as :func:`~.fused.attention` computes it, of all tokens."""
        out = self.buffer(qkv.part, qkv.width // 3)
        self._add(_Op.ATTEND, qkv, out, None, qkv.width, heads, number=scale)
        return out

    def take(
        self,
        x: Rows,
        out: Rows,
        column: int = 0,
        *,
        reversed_edges: bool = False,
        add: bool = False,
        factor: float = 1.0,
    ) -> Rows:
        """``factor * x``, or of the reversed edges, to columns of ``out``; put there or added."""
        back = int(reversed_edges)
        self._add(_Op.TAKE, x, out, None, x.width, 0, back, -1, column, int(add), number=factor)
        return out

    def embed(self, out: Rows, column: int, weight: Tensor, bias: Tensor) -> None:
        """A linear layer [width, 4] of edge vectors and distances, to columns of ``out``."""
        place, offset = self._keep(weight.T), self._keep(bias)
        self._add(_Op.EMBED, None, out, None, len(weight), 0, 0, place, column, offset)

    def look_up(self, out: Rows, column: int, table: Tensor) -> None:
        """Rows of a table by the species of atoms, or of edges' neighbours, to columns."""
        self._species = len(table)
        self._add(_Op.LOOK_UP, None, out, None, table.shape[1], 0, 0, self._keep(table), column)

    def condition(self, x: Rows) -> Rows:
        """``x`` and the rows that the evaluation brings along, [n_atoms, width]."""
        out, self._condition_width = self.buffer(x.part, x.width), x.width
        self._add(_Op.CONDITION, x, out, None, x.width, 0)
        return out

    def read(self, x: Rows, weight: Tensor, bias: Tensor, before: Row) -> None:
        """Add a linear layer's one output to that of the atom, an edge's times its factor."""
        self._add(
            _Op.READ, x, None, None, weight.shape[1], 1, PROLOGUES[before.prologue],
            self._keep(weight), 0, self._keep(bias), self._keep(before.norm_weight),
            self._keep(before.norm_bias), number=before.eps,
        )  # fmt: skip

    def finish(self) -> Instructions:
        """The recorded instructions for :func:`static_network`."""
        return Instructions(
            torch.cat(self._weights),
            torch.tensor(self._code, dtype=torch.int64),
            torch.tensor(self._numbers, dtype=torch.float64),
            torch.tensor(self._shapes, dtype=torch.int64),
            self._condition_width,
            self._species,
        )

    def _keep(self, tensor: Tensor | None) -> int:
        """Offset of a tensor among all weights; -1 without one."""
        if tensor is None:
            return -1
        numbers = tensor.detach().to(self.dtype).flatten()
        padding = -len(numbers) % lanes(self.dtype)
        self._weights.append(torch.nn.functional.pad(numbers, (0, padding)))
        place, self._size = self._size, self._size + len(numbers) + padding
        return place

    def _add(
        self, op: _Op, x: Rows | None, out: Rows | None, residual: Rows | None, *fields: int,
        number: float = 0.0,
    ) -> None:  # fmt: skip
        values = [-1 if rows is None else rows.code for rows in (x, out, residual)]
        defaults = (0, 0, 0, -1, 0, -1, -1, -1)
        self._code.append([op, *values, *fields, *defaults[len(fields) :]])
        self._numbers.append(number)


def static_network(
    instructions: Instructions,
    edges: Sequence[Tensor],
    indices: Sequence[Tensor],
    condition: Tensor | None,
    gradient: Tensor,
) -> list[Tensor]:
    """Run a list, forward and backward; nothing of it is known to autograd.

    Args:
        instructions: the list.
        edges: vectors [n_edges, 3], distances, logarithms of the factors, and factors [n_edges].
        indices: species of the atoms [n_atoms]; centres, neighbours and reverse [n_edges].
        condition: [n_atoms, width] where the list wants one.
        gradient: [n_atoms], the weights of the outputs in the sum that is differentiated.

    Returns:
        The outputs [n_atoms], and the gradients of the weighted sum by each of ``edges``.
    """
    width = 0 if condition is None else condition.shape[1]
    if width != instructions.condition_width:
        raise ValueError(f"rows of {instructions.condition_width} numbers for {width}")
    results: list[Tensor] = torch.ops.pet_finetune.static_network(
        list(edges),
        list(indices),
        condition,
        gradient,
        instructions.weights,
        [instructions.code, instructions.numbers, instructions.shapes],
        instructions.species,
    )
    return results
