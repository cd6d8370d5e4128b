"""Operations that keep their inputs alone, for predictions.

What lies within them is computed again when the derivative is taken, so they need a fraction of the
memory. They compute, to the last bit, what the operations that they stand for compute, but can be
differentiated once only and have no gradient of any parameter: that is all that the derivative of
an energy by the geometry needs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

#: Rows from which on memory counts. Where they are fewer, products are better dealt out otherwise.
_MANY = 512


class _State:
    """Whether graphs that are made now are differentiated once, by the geometry."""

    compact = False


@contextmanager
def compact(wanted: bool = True) -> Iterator[None]:
    """Promise that what is computed here is differentiated at most once, by the geometry alone.

    Args:
        wanted: False makes no promise, whatever is around.
    """
    before, _State.compact = _State.compact, wanted
    try:
        yield
    finally:
        _State.compact = before


def compacts(rows: Tensor) -> bool:
    """Whether these rows, [n, d], may go through operations that keep their inputs alone."""
    promised = _State.compact or not torch.is_grad_enabled()
    return promised and len(rows) >= _MANY


@dataclass(frozen=True)
class PackedLayer:
    """A linear layer behind a norm or an activation, in the kernels' form.

    Attributes:
        packed: from :func:`pack`.
        bias: [out] or None.
        prologue: settings as in :func:`projection`; empty for none.
    """

    packed: Tensor
    bias: Tensor | None
    prologue: dict[str, Any] = field(default_factory=dict)

    @property
    def _arguments(self) -> tuple[Any, ...]:
        own = self.prologue
        return (
            self.packed,
            self.bias,
            own.get("prologue", "none"),
            own.get("norm_weight"),
            own.get("norm_bias"),
            own.get("eps", 0.0),
        )

    def then(self, x: Tensor, second: PackedLayer, residual: Tensor | None) -> Tensor:
        """This layer and another, of which only the first may have a norm: [n, in] to [n, out].

        Args:
            x: [n, in].
            second: with no prologue or an activation.
            residual: [n, out], added to the result; ``x`` itself costs nothing extra.
        """
        activation = second.prologue.get("prologue", "none")
        out: Tensor = torch.ops.pet_finetune.two_layers(
            x, *self._arguments, second.packed, second.bias, activation, residual
        )
        return out

    def attend(
        self,
        tokens: Tensor,
        key_bias: Tensor,
        starts: Tensor,
        heads: int,
        scale: float,
        output: PackedLayer,
    ) -> Tensor:
        """This layer makes queries, keys and values of the tokens, another takes the attention's.

        Args:
            tokens: [n_atoms + n_edges, width], centre tokens first.
            key_bias: as in :func:`attention`.
            starts: as in :func:`attention`.
            heads: as in :func:`attention`.
            scale: as in :func:`attention`.
            output: with no prologue.

        Returns:
            [n_atoms + n_edges, width].
        """
        out: Tensor = torch.ops.pet_finetune.attention_layer(
            tokens, key_bias, starts, heads, scale, *self._arguments, output.packed, output.bias
        )
        return out
