"""The registry of operators: what the network is computed with, and each one's implementations.

An operator is one of ``torch.ops.pet_finetune``, defined in ``csrc`` together with its kernel for
the CPU and its first and second derivative. Here stand, under the same name and with the same
arguments, what it means in plain torch, and the shapes of its results and of its derivatives'
without any numbers (torch's *fake* implementations), with which a traced or compiled graph can
contain it. A kernel for another device is registered under the same name:
``torch.library.impl("pet_finetune::attention", "cuda")(kernel)``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from pet_finetune.graph import make_layout

from .attention import attend, pad_keys
from .reference import RowOp, apply_rows

__all__ = ["OPERATORS", "PROLOGUES", "Operator", "register_fakes", "unpacked"]

#: What can be done to the rows of a linear layer's input, by the number that operators know it by.
PROLOGUES = {"none": 0, "rms_norm": 1, "layer_norm": 2, "silu": 3, "swiglu": 4}
_KINDS = {number: kind for kind, number in PROLOGUES.items()}


@dataclass(frozen=True)
class Operator:
    """One operator of ``torch.ops.pet_finetune``.

    Attributes:
        reference: what it means, by plain torch.
        fake: an empty result of the right shape.
        derivatives: the operators that its derivatives are computed by, and empty results of them.
    """

    reference: Callable[..., Any]
    fake: Callable[..., Any]
    derivatives: Mapping[str, Callable[..., Any]] = field(default_factory=dict)


def _none(like: Tensor) -> Tensor:
    return like.new_empty(0)


# ---- norms and gates


def _norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, centered: bool) -> Tensor:
    kind = "layer_norm" if centered else "rms_norm"
    return apply_rows(x, RowOp(kind, weight, bias, eps))


def _gate(x: Tensor, silu: bool) -> Tensor:
    return apply_rows(x, RowOp("silu" if silu else "swiglu"))


def _empty_gate(x: Tensor, silu: bool) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[1] if silu else x.shape[1] // 2)


def _norm_parameters(
    grad: Tensor, x: Tensor, weight: Tensor, eps: float, centered: bool
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(weight), torch.empty_like(weight) if centered else _none(x)


def _norm_double_backward(
    cotangent: Tensor, grad: Tensor, x: Tensor, weight: Tensor, eps: float, centered: bool,
    trains: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    to_weight = torch.empty_like(weight) if trains else _none(x)
    return torch.empty_like(x), torch.empty_like(x), to_weight


# ---- attention


def _attention(qkv: Tensor, bias: Tensor, starts: Tensor, heads: int, scale: float) -> Tensor:
    num_atoms = len(starts) - 1
    centers = torch.arange(num_atoms, device=starts.device).repeat_interleave(starts.diff())
    layout = make_layout(centers, num_atoms, rectangles=True)
    assert layout.rectangles is not None
    return attend(qkv, layout.rectangles, pad_keys(bias, layout), heads, scale)


def _empty_attention(qkv: Tensor, bias: Tensor, starts: Tensor, heads: int, scale: float) -> Tensor:
    return qkv.new_empty(qkv.shape[0], qkv.shape[1] // 3)


def _attention_double_backward(
    to_qkv: Tensor | None, to_bias: Tensor | None, grad: Tensor, qkv: Tensor, bias: Tensor,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return torch.empty_like(grad), torch.empty_like(qkv), torch.empty_like(bias)


# ---- linear layers


def _before(
    x: Tensor, prologue: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    return x if prologue == 0 else apply_rows(x, RowOp(_KINDS[prologue], weight, bias, eps))


def _projection(
    x: Tensor, weight: Tensor, packed: Tensor | None, bias: Tensor | None, prologue: int,
    norm_weight: Tensor | None, norm_bias: Tensor | None, eps: float, a: Tensor | None,
    b: Tensor | None, scaling: float, residual: Tensor | None, rounds: bool,
) -> Tensor:  # fmt: skip
    """Without rounding; ``packed`` is the weight once more."""
    if a is not None and b is not None:
        update = scaling * (b @ a)  # is in the weight: what is added here is its gradient alone
        weight = weight.detach() + update - update.detach()
    out = functional.linear(_before(x, prologue, norm_weight, norm_bias, eps), weight, bias)
    return out if residual is None else out + residual


def _empty_projection(x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


def _projection_backward(
    grad: Tensor, x: Tensor, layer: list[Tensor], prologue: int, eps: float, scaling: float,
    rounds: bool, twice: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    inner = x.new_empty(x.shape[0], layer[0].shape[1]) if twice else _none(x)
    return torch.empty_like(x), inner


def _projection_double_backward(
    cotangent: Tensor, grad: Tensor, x: Tensor, inner: Tensor, layer: list[Tensor], prologue: int,
    eps: float, scaling: float, rounds: bool, dense: bool, low_rank: bool, norms: bool,
) -> list[Tensor]:  # fmt: skip
    weight, _, _, norm_weight, _, a, b = layer
    return [
        torch.empty_like(grad),
        torch.empty_like(x) if prologue else _none(x),
        *_if_wanted((dense, weight), (low_rank, a), (low_rank, _turned(b)), (norms, norm_weight)),
    ]


def _projection_parameters(
    grad: Tensor, x: Tensor, layer: list[Tensor], prologue: int, eps: float, scaling: float,
    rounds: bool, of_x: bool, dense: bool, low_rank: bool, norms: bool,
) -> list[Tensor]:  # fmt: skip
    weight, _, _, norm_weight, norm_bias, a, b = layer
    wanted = ((of_x or norms, x), (dense, weight), (low_rank, a), (low_rank, _turned(b)))
    return _if_wanted(*wanted, (norms, norm_weight), (norms, norm_bias))


def _turned(b: Tensor) -> Tensor:
    """Like ``b``, in the order in which the kernels' gradient of it lies in memory: by columns."""
    return b.new_empty(b.shape[::-1]).t()


def _if_wanted(*pairs: tuple[bool, Tensor]) -> list[Tensor]:
    return [torch.empty_like(tensor) if wanted else _none(tensor) for wanted, tensor in pairs]


@cache
def _panel_width(dtype: torch.dtype) -> int:
    """Columns of a whole panel, read off one whose rows are 0, 1, 2..."""
    counts = torch.arange(64, dtype=dtype).unsqueeze(1).expand(64, 16)
    panels: Tensor = torch.ops.pet_finetune.pack(counts.contiguous())[0]
    return 1 + int((panels[1:] == 0).nonzero()[0])


def unpacked(packed: Tensor, in_features: int) -> Tensor:
    """The weight [out, in] that :func:`~.fused.pack` put in the processor's form.

    Its panels are of two of the processor's vectors of columns (the last may be of one), each
    [in, columns].
    """
    numbers, wide = packed[0], _panel_width(packed.dtype)
    out_features = len(numbers) // in_features
    widths = [min(wide, out_features - start) for start in range(0, out_features, wide)]
    panels = numbers.split([in_features * width for width in widths])
    return torch.cat([panel.view(in_features, -1).T for panel in panels])


def _two_layers(
    x: Tensor, packed: Tensor, bias: Tensor | None, prologue: int, norm_weight: Tensor | None,
    norm_bias: Tensor | None, eps: float, second_packed: Tensor, second_bias: Tensor | None,
    activation: int, residual: Tensor | None, onto_x: bool,
) -> Tensor:  # fmt: skip
    weight = unpacked(packed, x.shape[1])
    h = functional.linear(_before(x, prologue, norm_weight, norm_bias, eps), weight, bias)
    h = _before(h, activation, None, None, 0.0)
    out = functional.linear(h, unpacked(second_packed, h.shape[1]), second_bias)
    rest = x if onto_x else residual
    return out if rest is None else out + rest


def _empty_two_layers(
    x: Tensor, packed: Tensor, bias: Tensor | None, prologue: int, norm_weight: Tensor | None,
    norm_bias: Tensor | None, eps: float, second_packed: Tensor, second_bias: Tensor | None,
    activation: int, *rest: Any,
) -> Tensor:  # fmt: skip
    middle = packed.shape[1] // x.shape[1] // (2 if _KINDS[activation] == "swiglu" else 1)
    return x.new_empty(x.shape[0], second_packed.shape[1] // middle)


def _attention_layer(
    x: Tensor, key_bias: Tensor, starts: Tensor, heads: int, scale: float, packed: Tensor,
    bias: Tensor | None, prologue: int, norm_weight: Tensor | None, norm_bias: Tensor | None,
    eps: float, out_packed: Tensor, out_bias: Tensor | None,
) -> Tensor:  # fmt: skip
    weight, width = unpacked(packed, x.shape[1]), x.shape[1]
    qkv = functional.linear(_before(x, prologue, norm_weight, norm_bias, eps), weight, bias)
    mixed = _attention(qkv, key_bias, starts, heads, scale)
    return functional.linear(mixed, unpacked(out_packed, width), out_bias)


def _grouped_projection(
    x: Tensor, packed: Tensor, bias: Tensor | None, leading: int, prologue: int,
    norm_weight: Tensor | None, norm_bias: Tensor | None, eps: float, residual: Tensor | None,
) -> Tensor:  # fmt: skip
    rows, groups = _before(x, prologue, norm_weight, norm_bias, eps), len(packed)
    weights = torch.stack([unpacked(one, rows.shape[1]) for one in packed]).transpose(1, 2)
    parts = rows.split([groups * leading, len(rows) - groups * leading])
    made = [torch.bmm(part.view(groups, -1, rows.shape[1]), weights) for part in parts]
    if bias is not None:
        made = [part + bias.unsqueeze(1) for part in made]
    out = torch.cat([part.flatten(0, 1) for part in made])
    return out if residual is None else out + residual


def _empty_grouped_projection(
    x: Tensor, packed: Tensor, bias: Tensor | None, leading: int, prologue: int, *rest: Any
) -> Tensor:
    width = x.shape[1] // (2 if _KINDS[prologue] == "swiglu" else 1)
    return x.new_empty(x.shape[0], packed.shape[2] // width)


def _permute(rows: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
    return rows.index_select(0, index)


#: All of them by name.
OPERATORS = {
    "norm": Operator(
        _norm,
        lambda x, *rest: torch.empty_like(x),
        {
            "norm_backward": lambda grad, x, *rest: torch.empty_like(x),
            "norm_parameters": _norm_parameters,
            "norm_double_backward": _norm_double_backward,
        },
    ),
    "gate": Operator(
        _gate,
        _empty_gate,
        {
            "gate_backward": lambda grad, x, silu: torch.empty_like(x),
            "gate_double_backward": lambda cotangent, grad, x, silu: (
                torch.empty_like(grad),
                torch.empty_like(x),
            ),
        },
    ),
    "attention": Operator(
        _attention,
        _empty_attention,
        {
            "attention_backward": lambda grad, qkv, bias, *rest: (
                torch.empty_like(qkv),
                torch.empty_like(bias),
            ),
            "attention_double_backward": _attention_double_backward,
        },
    ),
    "projection": Operator(
        _projection,
        _empty_projection,
        {
            "projection_backward": _projection_backward,
            "projection_double_backward": _projection_double_backward,
            "projection_parameters": _projection_parameters,
        },
    ),
    "grouped_projection": Operator(
        _grouped_projection,
        _empty_grouped_projection,
        {"grouped_projection_backward": lambda grad, x, *rest: torch.empty_like(x)},
    ),
    "two_layers": Operator(
        _two_layers,
        _empty_two_layers,
        {"two_layers_backward": lambda grad, x, *rest: torch.empty_like(x)},
    ),
    "attention_layer": Operator(
        _attention_layer,
        lambda x, *rest: torch.empty_like(x),
        {
            "attention_layer_backward": lambda grad, x, key_bias, *rest: (
                torch.empty_like(x),
                torch.empty_like(key_bias),
            )
        },
    ),
    "permute": Operator(_permute, lambda rows, *rest: torch.empty_like(rows)),
}


def _empty_packed(weight: Tensor, dtype: torch.dtype) -> Tensor:
    return weight.new_empty(2, weight.shape[0] * weight.shape[1], dtype=dtype)


@cache
def register_fakes() -> None:
    """Tell torch the shapes of all results; the library is loaded."""
    fakes: dict[str, Callable[..., Any]] = {
        "pack": lambda weight: _empty_packed(weight, weight.dtype),
        "pack_bfloat16": lambda weight: _empty_packed(weight, torch.bfloat16),
    }
    for name, operator in OPERATORS.items():
        fakes |= {name: operator.fake, **operator.derivatives}
    for name, fake in fakes.items():
        torch.library.register_fake(f"pet_finetune::{name}", fake)
