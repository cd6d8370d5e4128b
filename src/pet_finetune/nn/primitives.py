"""Norms and activations, linear layers of several members, embeddings of which some rows train.

Parameters, names and results of norms and activations are those of the torch modules they derive
from. Each can also be made part of the linear layer that follows it, see :mod:`.projection`, for
which it describes itself as a :class:`~pet_finetune.backends.reference.RowOp`.

The rows of a committee's members go through a linear layer together: [leading rows of every member,
the other rows of every member], where only layers that see centre and edge tokens in one array have
leading rows. All members have equally many of either kind, because they are given the same
structures.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from pet_finetune.backends import fused
from pet_finetune.backends.choice import Accelerated
from pet_finetune.backends.instructions import CannotRecord
from pet_finetune.backends.reference import RowOp, apply_rows


class Prologue(Accelerated, nn.Module):
    """Operations on the input rows of a linear layer."""

    def op(self) -> RowOp:
        """Its description."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """[..., d] to [..., d], of :class:`SwiGLU` [..., 2 d] to [..., d]."""
        if not torch.jit.is_scripting():
            if self.backend.fused and x.dim() == 2:
                return fused.apply_rows(x, self.op())
        return apply_rows(x, self.op())


class RMSNorm(Prologue, nn.RMSNorm):
    """``torch.nn.RMSNorm`` over the last axis."""

    def op(self) -> RowOp:
        """See :class:`Prologue`."""
        return RowOp("rms_norm", self.weight, None, self.eps)


class LayerNorm(Prologue, nn.LayerNorm):
    """``torch.nn.LayerNorm`` over the last axis."""

    def op(self) -> RowOp:
        """See :class:`Prologue`."""
        return RowOp("layer_norm", self.weight, self.bias, self.eps)


class SiLU(Prologue, nn.SiLU):
    """``torch.nn.SiLU``."""

    def op(self) -> RowOp:
        """See :class:`Prologue`."""
        return RowOp("silu")


class SwiGLU(Prologue):
    """The first half times the *sigmoid* of the second, [..., 2 d] to [..., d]."""

    def op(self) -> RowOp:
        """See :class:`Prologue`."""
        return RowOp("swiglu")


@dataclass
class MemberRows:
    """Rows of the current batch by member, for grouped layers.

    Attributes:
        atoms: of one member.
        members: whose rows these are; the others are left out.
    """

    atoms: int = 0
    members: slice = field(default_factory=lambda: slice(None))


class GroupedLinear(nn.Module):
    """Several linear layers of one shape side by side; frozen.

    Args:
        weights: [members, out, in].
        biases: [members, out], or None.
        rows: the batch under way.
        all_tokens: whether centre and edge tokens arrive in one array, or rows of one kind.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(
        self, weights: Tensor, biases: Tensor | None, rows: MemberRows, all_tokens: bool
    ) -> None:
        super().__init__()
        self.rows, self.all_tokens = rows, all_tokens
        self.out_features, self.in_features = weights.shape[1:]
        self.register_buffer("weight", weights.detach())
        self.register_buffer("bias", None if biases is None else biases.detach())
        self._packed: Tensor | None = None

    @property
    def leading(self) -> int:
        """Rows of one member that come before the others."""
        return self.rows.atoms if self.all_tokens else 0

    def _own(self, tensor: Tensor | None) -> Tensor | None:
        """The part of the members whose rows are under way."""
        return None if tensor is None else tensor[self.rows.members]

    def forward(self, x: Tensor) -> Tensor:
        """[n, in] to [n, out], each row by the layer of its member."""
        turned, biases = self.weight[self.rows.members].transpose(1, 2), self._own(self.bias)
        head = len(turned) * self.leading
        out = []
        for part in x.split([head, len(x) - head]):
            rows = part.view(len(turned), -1, self.in_features)
            if biases is None:
                out.append(torch.bmm(rows, turned).flatten(0, 1))
            else:
                out.append(torch.baddbmm(biases.unsqueeze(1), rows, turned).flatten(0, 1))
        return torch.cat(out) if self.leading else out[1]

    def fits(self, x: Tensor) -> bool:
        """Whether the kernels can multiply these rows with the weights."""
        lanes = fused.lanes(x.dtype)
        return self.in_features % lanes == 0 and self.out_features % lanes == 0

    def project(self, x: Tensor, prologue: RowOp | None, residual: Tensor | None) -> Tensor:
        """By the kernels what :func:`~.projection.project` is of each member's rows."""
        panels, biases = self._panels()[self.rows.members], self._own(self.bias)
        before = fused.settings(prologue, x.dtype)
        return fused.grouped_projection(
            x, panels, biases, self.leading, residual=residual, **before
        )

    def _panels(self) -> Tensor:
        """The weights in the kernels' form; they do not change, so they are packed once."""
        if self._packed is None or self._packed.dtype != self.weight.dtype:
            self._packed = torch.stack([fused.pack(weight) for weight in self.weight])
        return self._packed


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
