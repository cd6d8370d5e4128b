"""A pickle reader that can build nothing but inert records.

A checkpoint written by ``torch.save`` is a zip archive around a pickle, and a pickle is a program
that may call any function of any module. This reader runs the few instructions that PyTorch's files
use. Names in the file never reach ``import``: each must be listed here and is replaced by a builder
of ours, so that what comes out are numbers, strings, containers, :class:`StoredTensor` (where a
tensor lies in the archive, not its data) and :class:`Inert` (the name of a foreign class beside
what the file said about it). Everything else is refused by name before anything is done with it.

It is Python's own reader written in Python, with a table of instructions that lacks all that could
call or set something. The compiled ``pickle.Unpickler`` cannot be restricted so: it would still run
``__setstate__``, ``__reduce__`` results and the extension registry, and it sizes its memo from the
file.

``torch.load(weights_only=True)`` with stand-ins in ``torch.serialization.safe_globals`` reads every
checkpoint we know too, but (torch 2.13)

* a dictionary key of tuples within tuples, three million bytes of them, ends the process with a
  segmentation fault, because keys of any kind are hashed;
* ``bytearray`` of any size is allowed: forty bytes of a file ask for all memory;
* pickle protocols 0, 4 and 5 are not read (``torch.save(..., pickle_protocol=4)``);
* every tensor is built, those of the optimiser and of other epochs too, and memory or the mapped
  file is held for them, while here the chosen weights alone are read.
"""

from __future__ import annotations

import io
import pickle
import pickletools
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from pet_finetune.errors import CheckpointError, damage_explained

_PureUnpickler: Any = pickle._Unpickler


@dataclass(frozen=True, eq=False)
class StoredTensor:
    """A tensor in the pickle; its bytes are read from the archive on demand."""

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
    """Inert stand-in for an object of a foreign class, which is never imported."""

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
    "torch.Size": lambda values=(): tuple(as_count(n) for n in values),
    "collections.OrderedDict": lambda items=(): OrderedDict((as_key(k), v) for k, v in items),
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


@dataclass(frozen=True, eq=False)
class _Global:
    """A global name from a pickle, with the stand-in that is called in its place."""

    name: str
    #: None for a name that only says what something is.
    build: Callable[..., Any] | None


def _code(name: str) -> int:
    """The code of an instruction."""
    return int(getattr(pickle, name)[0])


#: Instructions that push what they carry, build containers, or take from the stack and the memo.
_READ = (
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT",
    "STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8",
    "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "NONE", "NEWTRUE", "NEWFALSE",
    "EMPTY_TUPLE", "EMPTY_LIST", "EMPTY_DICT", "EMPTY_SET", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3",
    "LIST", "APPEND", "APPENDS", "MARK", "POP", "POP_MARK", "DUP", "PUT", "BINPUT", "LONG_BINPUT",
    "MEMOIZE", "GET", "BINGET", "LONG_BINGET", "GLOBAL", "STACK_GLOBAL", "BINPERSID",
    "PROTO", "FRAME", "STOP",
)  # fmt: skip


class _Instructions(dict[int, Callable[["_Reader"], None]]):
    """What the reader does, by the code of an instruction; all others are refused by name."""

    def __missing__(self, code: int) -> Callable[[_Reader], None]:
        known = (op.name for op in pickletools.opcodes if op.code == chr(code))
        name = next(known, f"of code {code}")

        def refuse(reader: _Reader) -> None:
            raise reader.refusal(f"uses the pickle instruction {name}")

        return refuse


class _Reader(_PureUnpickler):
    """Python's reader with the instructions that PyTorch's files use, and names of ours."""

    dispatch = _Instructions({c: _PureUnpickler.dispatch[c] for c in map(_code, _READ)})

    def __init__(self, data: bytes, where: str) -> None:
        super().__init__(io.BytesIO(data), encoding="latin-1")
        self.where = where

    def refusal(self, what: str) -> CheckpointError:
        return CheckpointError(
            f"{self.where}: the file {what}, which no PET checkpoint needs. It was refused and "
            "nothing in the file was executed. Get the checkpoint again from a source you trust."
        )

    def find_class(self, module: str, name: str) -> Any:
        """Our stand-in for ``module.name``; never an import."""
        full = f"{module}.{name}"
        if full in DTYPES:
            return DTYPES[full]
        if full in STORAGE_DTYPES:
            # Only ever passed to persistent_load, which looks the dtype up by this name.
            return _Global(full, None)
        if full in CALLS:
            return _Global(full, CALLS[full])
        if full in INERT_CLASSES:
            return _Global(full, lambda *args: Inert(full, args))
        raise self.refusal(f"asks for {full}")

    def persistent_load(self, reference: Any) -> Storage:
        """The storage that a tensor is a view of."""
        if type(reference) is not tuple or len(reference) != 5 or reference[0] != "storage":
            raise ValueError("a storage is not described as PyTorch does it")
        _, kind, key, _, size = reference
        if not isinstance(kind, _Global) or kind.name not in STORAGE_DTYPES:
            raise ValueError("a storage has no element type")
        return Storage(str(key), STORAGE_DTYPES[kind.name], as_count(size))

    def _call(self) -> None:
        args, function = self.stack.pop(), self.stack.pop()
        if not isinstance(function, _Global):
            raise self.refusal(f"calls an object of type {type(function).__name__}")
        if type(args) is not tuple:
            raise ValueError("the arguments of a call are not a tuple")
        if function.build is None:
            raise self.refusal(f"calls {function.name}")
        self.append(function.build(*args))

    def _build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, Inert):
            target.state = state
        elif not isinstance(target, (OrderedDict, StoredTensor)):
            # A state dict carries its modules' version numbers this way; we have no use for them.
            raise self.refusal(f"sets the state of an object of type {type(target).__name__}")

    def _dict(self) -> None:
        items = self.pop_mark()
        self.append({})
        self._set_items(items)

    def _set_item(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set_items([key, value])

    def _set_items(self, items: list[Any] | None = None) -> None:
        items = self.pop_mark() if items is None else items
        target = self.stack[-1]
        if type(target) not in (dict, OrderedDict) or len(items) % 2:
            raise ValueError("items are stored in what is not a dictionary")
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[as_key(key)] = value

    def _add_items(self) -> None:
        items = self.pop_mark()
        if type(self.stack[-1]) is not set:
            raise ValueError("members are added to what is not a set")
        self.stack[-1].update(as_key(item) for item in items)

    dispatch |= {
        _code("REDUCE"): _call,
        _code("NEWOBJ"): _call,
        _code("BUILD"): _build,
        _code("DICT"): _dict,
        _code("SETITEM"): _set_item,
        _code("SETITEMS"): _set_items,
        _code("ADDITEMS"): _add_items,
    }


def read_pickle(data: bytes, where: str) -> Any:
    """Read the pickle of a ``torch.save`` archive without executing anything in it.

    Returns:
        plain Python values, :class:`StoredTensor` and :class:`Inert` objects.

    Raises:
        CheckpointError: if the pickle names anything that is not listed in this module, uses an
            instruction PyTorch does not, or is damaged.
    """
    with damage_explained(lambda why: CheckpointError(f"{where}: the file is damaged ({why}).")):
        return _Reader(data, where).load()
