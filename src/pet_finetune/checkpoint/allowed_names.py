"""The names a checkpoint's pickle may mention, and the inert things they are replaced by."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, eq=False)
class StoredTensor:
    """A tensor the pickle describes; its bytes stay in the archive until they are asked for."""

    #: The archive entry holding the storage, e.g. ``"0"`` for ``data/0``.
    key: str
    dtype: torch.dtype
    #: Number of elements in the whole storage.
    storage_size: int
    #: First element, extents and steps of the view, counted in elements.
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(eq=False)
class Inert:
    """What a file said about an object of a foreign class; the class itself is never touched."""

    name: str
    args: tuple[Any, ...] = ()
    #: The argument of the pickle's BUILD instruction, i.e. the object's state.
    state: Any = None

    def get(self, attribute: str, default: Any = None) -> Any:
        """Return one attribute from a state that is a plain dictionary, else ``default``."""
        return self.state.get(attribute, default) if isinstance(self.state, dict) else default


@dataclass(frozen=True, eq=False)
class Storage:
    """The block of numbers that one or more tensors are views of."""

    key: str
    dtype: torch.dtype
    size: int


STORAGE_DTYPES: Mapping[str, torch.dtype] = {
    "torch.DoubleStorage": torch.float64,
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
}

DTYPES: Mapping[str, torch.dtype] = {str(dtype): dtype for dtype in STORAGE_DTYPES.values()}

#: Foreign classes that occur in checkpoints people have; only their names and states are kept.
INERT_CLASSES = frozenset(
    {
        "torch.ScriptObject",
        "torch._C.ScriptObject",
        "torch.device",
        "metatrain.utils.data.dataset.DatasetInfo",
        "metatrain.utils.data.dataset.TargetInfo",
        "metatrain.utils.data.target_info.TargetInfo",
        "metatrain.utils.data.target_info.TargetInfoDict",
        "numpy.dtype",
        "numpy.core.multiarray.scalar",
        "numpy._core.multiarray.scalar",
        "pathlib.Path",
        "pathlib.PosixPath",
        "pathlib.PurePosixPath",
        "pathlib._local.PosixPath",
    }
)


def as_count(value: Any) -> int:
    """Return ``value`` if it is a whole number that is not negative."""
    if type(value) is not int or value < 0:
        raise ValueError("a tensor's extents must be whole numbers that are not negative")
    return value


def _rebuild_tensor(
    storage: Any, offset: Any, size: Any, stride: Any, *unused: Any
) -> StoredTensor:
    # unused: requires_grad, backward hooks, metadata; none of them belongs to the values.
    if not isinstance(storage, Storage) or type(size) is not tuple or type(stride) is not tuple:
        raise ValueError("a tensor is not described as PyTorch does it")
    if len(size) != len(stride) or len(size) > 16:
        raise ValueError("a tensor's sizes and strides do not go together")
    return StoredTensor(
        storage.key,
        storage.dtype,
        storage.size,
        as_count(offset),
        tuple(as_count(n) for n in size),
        tuple(as_count(n) for n in stride),
    )


def _rebuild_parameter(data: Any, *unused: Any) -> StoredTensor:
    if not isinstance(data, StoredTensor):
        raise ValueError("a parameter holds no tensor")
    return data


def _rebuild_size(values: Any = ()) -> tuple[int, ...]:
    return tuple(as_count(n) for n in values)


def _ordered_dict(items: Any = ()) -> OrderedDict[Any, Any]:
    return OrderedDict((as_key(k), v) for k, v in items)


def _set(items: Any = ()) -> set[Any]:
    return {as_key(k) for k in items}


def _encode(text: Any, encoding: Any = "latin1") -> bytes:
    # How protocol 2 writes ``bytes``.
    if type(text) is not str or encoding not in ("latin1", "latin-1"):
        raise ValueError("bytes are not described as Python does it")
    return text.encode("latin-1")


CALLS: Mapping[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_parameter": _rebuild_parameter,
    "torch.Size": _rebuild_size,
    "collections.OrderedDict": _ordered_dict,
    "builtins.set": _set,
    "__builtin__.set": _set,
    "_codecs.encode": _encode,
}


def as_key(value: Any) -> Any:
    """Return ``value`` if it may be a dictionary key or set member.

    Hashing runs no foreign code and, as containers are left out, cannot recurse.
    """
    if value is None or type(value) in (str, int, float, bool, bytes):
        return value
    raise ValueError(f"a dictionary has a key of type {type(value).__name__}")
