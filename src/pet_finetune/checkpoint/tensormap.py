"""Reading the metatensor ``TensorMap`` buffers inside metatrain checkpoints, with numpy only.

metatrain keeps baselines, scales and the layout of each target as the bytes of an ``.mts`` file:
a zip of ``keys.npy`` and, for each block, ``values.npy``, ``samples.npy``, ``properties.npy`` and
``components/<i>.npy``; labels are structured int32 arrays whose field names are the label names
(https://docs.metatensor.org/latest/core/reference/c/io.html).

These bytes come from a file nobody vouches for, so they are parsed here, with sizes checked,
rather than handed to metatensor's compiled library; that also leaves checkpoints readable with
whatever torch is installed, since the compiled library must match torch's version.
"""

from __future__ import annotations

import io
import math
import tokenize
import zipfile
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.lib import format as npy

__all__ = ["TensorBlock", "read_tensor_map"]


@dataclass(frozen=True)
class TensorBlock:
    """One block of a ``TensorMap``.

    Labels are kept as a tuple of names and an integer array ``[n_entries, n_names]``.
    """

    key: dict[str, int]
    #: ``[n_samples, *components, n_properties]``.
    values: np.ndarray[Any, Any]
    sample_names: tuple[str, ...]
    samples: np.ndarray[Any, Any]
    #: Names and lengths of the component axes.
    component_names: tuple[str, ...]
    component_sizes: tuple[int, ...]
    num_properties: int


def read_tensor_map(buffer: bytes) -> list[TensorBlock]:
    """Read the blocks of a serialized ``TensorMap``; gradients are left out.

    Raises:
        ValueError: if the bytes are not a ``TensorMap``.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(buffer)) as archive:
            key_names, keys = _labels(archive, "keys.npy")
            return [
                _block(archive, index, dict(zip(key_names, map(int, key), strict=True)))
                for index, key in enumerate(keys)
            ]
    except (zipfile.BadZipFile, KeyError, EOFError, NotImplementedError) as error:
        raise ValueError(f"not a metatensor TensorMap: {error}") from error


def _block(archive: zipfile.ZipFile, index: int, key: dict[str, int]) -> TensorBlock:
    folder = f"blocks/{index}"
    sample_names, samples = _labels(archive, f"{folder}/samples.npy")
    components: list[tuple[tuple[str, ...], np.ndarray[Any, Any]]] = []
    while f"{folder}/components/{len(components)}.npy" in archive.NameToInfo:
        components.append(_labels(archive, f"{folder}/components/{len(components)}.npy"))
    _, properties = _labels(archive, f"{folder}/properties.npy")
    values = _array(archive, f"{folder}/values.npy")
    sizes = tuple(len(entries) for _, entries in components)
    if values.shape != (len(samples), *sizes, len(properties)):
        raise ValueError(f"the values of block {index} do not fit their labels")
    return TensorBlock(
        key=key,
        values=values,
        sample_names=sample_names,
        samples=samples,
        component_names=tuple(names[0] for names, _ in components),
        component_sizes=sizes,
        num_properties=len(properties),
    )


def _labels(archive: zipfile.ZipFile, name: str) -> tuple[tuple[str, ...], np.ndarray[Any, Any]]:
    table = _array(archive, name)
    names = table.dtype.names
    if names is None or table.ndim != 1:
        raise ValueError(f"{name} holds no labels")
    columns = [table[field].astype(np.int64) for field in names]
    return tuple(names), np.stack(columns, axis=1)


def _array(archive: zipfile.ZipFile, name: str) -> np.ndarray[Any, Any]:
    """Read one ``.npy`` entry, trusting its header only as far as the bytes go."""
    info = archive.getinfo(name)
    if info.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{name} is compressed")
    file = io.BytesIO(archive.read(info))
    version = npy.read_magic(file)
    read_header = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
    if version not in read_header:
        raise ValueError(f"{name} has npy version {version}")
    try:
        shape, fortran, dtype = read_header[version](file)
    except (SyntaxError, tokenize.TokenError, RecursionError, MemoryError) as error:
        raise ValueError(f"{name} has a damaged header") from error
    data = file.read()
    expected = math.prod(shape) * dtype.itemsize
    if dtype.hasobject or fortran or expected != len(data):
        raise ValueError(f"{name} does not hold what its header says")
    return np.frombuffer(data, dtype=dtype).reshape(shape)
