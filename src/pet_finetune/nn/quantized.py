"""Linear layers whose frozen weight is held in 4 or 8 bits (QLoRA, arXiv:2305.14314).

The numbers are bitsandbytes': NF4 in blocks of 64 with double quantisation, or int8 with one scale
a row (LLM.int8(), arXiv:2208.07339, weights only). Its layers are not used: they compute in the
activations' 16 bits, while forces need the whole precision and a product that can be
differentiated twice.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import lru_cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from pet_finetune.errors import ConfigError
from pet_finetune.installation import QUANTIZATION, missing_extra

from .projection import plain_linear


class FixedBuffers(nn.Module):
    """A module whose buffers follow the model to its device and never to another type."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        for name, buffer in self._buffers.items():
            if buffer is not None:
                self._buffers[name] = buffer.to(fn(buffer).device)
        return self


#: What stands between a layer and the parts of its quantised weight in a state dict.
QUANTIZED_PART = ".quantized."
# Sizes of the paper's section 3: numbers that share a scale, and scales that share one in turn.
_BLOCK, _OUTER_BLOCK = 64, 256


def _functional() -> Any:
    missing = missing_extra(*QUANTIZATION)
    if missing is not None:
        raise ConfigError(f"quant_bits {missing}")
    # It looks for a faster product for layers of its own, which we do not use, and says so.
    logging.getLogger(f"{QUANTIZATION[0]}.backends.cpu.ops").setLevel(logging.ERROR)
    return import_module(f"{QUANTIZATION[0]}.functional")


@lru_cache
def _outer_map(device: torch.device) -> Tensor:
    """The 256 values that scales are rounded to, the same for every weight."""
    table: Tensor = _functional().create_dynamic_map().to(device)
    return table


class QuantizedWeight(FixedBuffers):
    """A quantised matrix [out, in]; :meth:`dense` dequantises it.

    Args:
        size: [2] int64, out and in.
        parts: what it is held as; see :attr:`names` of each kind.
    """

    bits: int
    #: The names of all tensors that a weight is held as.
    names: tuple[str, ...]
    size: Tensor

    def __init__(self, size: Tensor, **parts: Tensor) -> None:
        super().__init__()
        self.register_buffer("size", size)
        self.shape = torch.Size(size.tolist())
        for name in self.names:
            self.register_buffer(name, parts[name])

    def dense(self, dtype: torch.dtype) -> Tensor:
        """[out, in], made anew at each call."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        """Shown by ``print(model)``."""
        return f"{tuple(self.shape)}, bits={self.bits}"


class NF4Weight(QuantizedWeight):
    """NF4 with double quantisation: 4.13 bits a number.

    Attributes:
        codes: [(out * in + 1) // 2, 1] uint8, two numbers a byte.
        scales: [blocks] uint8, the largest magnitude of each block of 64, less ``offset``.
        outer_scales: [blocks of blocks] float32, the largest of 256 scales.
        offset: float32 scalar, the mean of the scales.
    """

    bits = 4
    names = ("codes", "scales", "outer_scales", "offset")
    codes: Tensor
    scales: Tensor
    outer_scales: Tensor
    offset: Tensor

    @classmethod
    def of(cls, weight: Tensor) -> NF4Weight:
        """Quantise a float32 weight [out, in] on the CPU."""
        codes, state = _functional().quantize_4bit(
            weight, blocksize=_BLOCK, compress_statistics=True, quant_type="nf4"
        )
        return cls(
            torch.tensor(weight.shape),
            codes=codes,
            scales=state.absmax,
            outer_scales=state.state2.absmax,
            offset=state.offset,
        )

    def dense(self, dtype: torch.dtype) -> Tensor:
        """See :class:`QuantizedWeight`; exact in float32 and above."""
        functional = _functional()
        outer = functional.QuantState(
            absmax=self.outer_scales,
            code=_outer_map(self.codes.device),
            blocksize=_OUTER_BLOCK,
            dtype=torch.float32,
        )
        state = functional.QuantState(
            absmax=self.scales,
            shape=self.shape,
            blocksize=_BLOCK,
            quant_type="nf4",
            dtype=torch.float32,
            offset=self.offset,
            state2=outer,
        )
        dense: Tensor = functional.dequantize_4bit(self.codes, state)
        return dense.to(dtype)


class Int8Weight(QuantizedWeight):
    """int8 with one scale a row: 8 bits a number and 32 a row.

    Attributes:
        codes: [out, in] int8.
        scales: [out] float32, the largest magnitude of each row.
    """

    bits = 8
    names = ("codes", "scales")
    codes: Tensor
    scales: Tensor

    @classmethod
    def of(cls, weight: Tensor) -> Int8Weight:
        """Quantise a float32 weight [out, in] on the CPU."""
        # A copy, because the library may write into what it is given.
        codes, scales, _ = _functional().int8_vectorwise_quant(weight.clone())
        return cls(torch.tensor(weight.shape), codes=codes, scales=scales)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """See :class:`QuantizedWeight`; exact in float32 and above."""
        dense: Tensor = _functional().int8_vectorwise_dequant(self.codes, self.scales)
        return dense.to(dtype)


QUANTIZED: dict[int, type[NF4Weight] | type[Int8Weight]] = {4: NF4Weight, 8: Int8Weight}


@torch.no_grad()
def quantize(weight: Tensor, bits: int) -> QuantizedWeight:
    """Hold a weight, [out, in], in 4 or 8 bits, on its device.

    Quantised on the CPU from float32 whatever the weight's device and type, so that the same base
    gives the same numbers on every machine and in every precision.

    Raises:
        ConfigError: the library is not installed.
    """
    plain = weight.detach().to("cpu", torch.float32).contiguous()
    return QUANTIZED[bits].of(plain).to(weight.device)


class _Product(torch.autograd.Function):
    """``x @ weight.T + bias``, or ``x @ weight`` where ``transposed``.

    The dense weight lives within one product and is made again for the next: nothing of it is kept
    for the backward. Each of the two products is the other's derivative, so they can be
    differentiated any number of times.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: QuantizedWeight, bias: Tensor | None, transposed: bool
    ) -> Tensor:
        ctx.weight, ctx.transposed = weight, transposed
        dense = weight.dense(x.dtype)
        return nn.functional.linear(x, dense.T if transposed else dense, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return _Product.apply(gradient, ctx.weight, None, not ctx.transposed), None, None, None


def product(x: Tensor, weight: QuantizedWeight, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias`` where neither weight nor bias trains, [..., in] to [..., out]."""
    out: Tensor = _Product.apply(x, weight, bias, False)
    return out


class QuantizedLinear(nn.Module):
    """A frozen linear layer with its weight in few bits; the bias stays as it is.

    Args:
        base: the layer to stand in for; its weight is not kept.
        bits: 4 or 8.
    """

    def __init__(self, base: nn.Linear, bits: int) -> None:
        super().__init__()
        self.in_features, self.out_features = base.in_features, base.out_features
        self.quantized = quantize(base.weight, bits)
        self.bias = base.bias
        if self.bias is not None:
            self.bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out]."""
        return product(x, self.quantized, self.bias)

    def to_linear(self, dtype: torch.dtype) -> nn.Linear:
        """Convert to a plain layer with dequantised weights."""
        weight = nn.Parameter(self.quantized.dense(dtype))
        bias = None if self.bias is None else nn.Parameter(self.bias.detach().clone())
        return plain_linear(weight, bias)

    def extra_repr(self) -> str:
        """Shown by ``print(model)``."""
        return f"in_features={self.in_features}, out_features={self.out_features}"


def dense_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Dequantise the weights of a state dict, ``X.quantized.<part>`` of a layer X."""
    dense, parts = {}, defaultdict[str, dict[str, Tensor]](dict)
    for name, tensor in state.items():
        layer, quantised, part = name.partition(QUANTIZED_PART)
        if quantised:
            parts[layer][part] = tensor
        else:
            dense[name] = tensor
    dtype = next((t.dtype for t in dense.values() if t.is_floating_point()), torch.float32)
    for layer, held in parts.items():
        kind = next(k for k in QUANTIZED.values() if {"size", *k.names} == held.keys())
        dense[f"{layer}.weight"] = kind(**held).dense(dtype)
    return dense


def num_quantized(module: nn.Module) -> int:
    """Number of values in the quantised weights of a module."""
    return sum(m.shape.numel() for m in module.modules() if isinstance(m, QuantizedWeight))


def held_bytes(module: nn.Module) -> int:
    """Bytes of all parameters and buffers of a module."""
    tensors = (*module.parameters(), *module.buffers())
    return sum(tensor.nbytes for tensor in tensors)
