"""Our reader of metatensor buffers against metatensor's own writer."""

from __future__ import annotations

import io
import zipfile

import metatensor.torch as mts
import numpy as np
import pytest
import torch
from metatensor.torch import Labels, TensorBlock, TensorMap

from pet_finetune.checkpoint.stored_targets import read_tensor_map


def tensor_map():
    def block(rows, components, properties):
        return TensorBlock(
            values=torch.randn(rows, *[3] * components, properties, dtype=torch.float64),
            samples=Labels(["system", "atom"], torch.arange(2 * rows).reshape(-1, 2)),
            components=[
                Labels([f"xyz_{i + 1}"], torch.arange(3).reshape(-1, 1)) for i in range(components)
            ],
            properties=Labels.range("energy", properties),
        )

    keys = Labels(["o3_lambda", "o3_sigma"], torch.tensor([[0, 1], [1, -1], [2, 1]]))
    return TensorMap(keys, [block(2, 2, 1), block(0, 2, 4), block(3, 2, 2)])


def test_blocks_equal_what_metatensor_wrote():
    written = tensor_map()
    read = read_tensor_map(mts.save_buffer(written).numpy().tobytes())
    assert [b.key for b in read] == [
        {"o3_lambda": 0, "o3_sigma": 1},
        {"o3_lambda": 1, "o3_sigma": -1},
        {"o3_lambda": 2, "o3_sigma": 1},
    ]
    for ours, theirs in zip(read, written.blocks(), strict=True):
        assert np.array_equal(ours.values, theirs.values.numpy())
        assert ours.sample_names == ("system", "atom")
        assert np.array_equal(ours.samples, theirs.samples.values.numpy())
        assert ours.num_properties == len(theirs.properties)
        assert ours.component_sizes == tuple(len(c) for c in theirs.components)
    assert read[2].component_names == ("xyz_1", "xyz_2")


def test_gradients_are_passed_over():
    block = tensor_map().block(0).copy()
    block.add_gradient(
        "positions",
        TensorBlock(
            values=torch.zeros(1, 3, 3, 3, 1, dtype=torch.float64),
            samples=Labels(["sample"], torch.tensor([[0]])),
            components=[Labels(["xyz"], torch.arange(3).reshape(-1, 1)), *block.components],
            properties=block.properties,
        ),
    )
    values = block.values.numpy().copy()
    buffer = mts.save_buffer(TensorMap(Labels.single(), [block]))
    (read,) = read_tensor_map(buffer.numpy().tobytes())
    assert np.array_equal(read.values, values)


def changed(name, content):
    """A good buffer with one entry replaced (or left out, for None)."""
    good = mts.save_buffer(tensor_map()).numpy().tobytes()
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(good)) as old, zipfile.ZipFile(out, "w") as new:
        for entry in old.namelist():
            data = content if entry == name else old.read(entry)
            if data is not None:
                new.writestr(entry, data)
    return out.getvalue()


def npy(array):
    out = io.BytesIO()
    np.save(out, array)
    return out.getvalue()


LABELS = np.array([(0,)], dtype=[("energy", "<i4")])


@pytest.mark.parametrize(
    "buffer",
    [
        b"",
        b"not a zip",
        changed("keys.npy", None),
        changed("blocks/1/values.npy", None),
        changed("blocks/0/values.npy", npy(np.zeros((2, 7)))),
        changed("blocks/0/samples.npy", npy(np.zeros(3))),
        changed("blocks/0/values.npy", b"junk"),
        changed("blocks/0/values.npy", npy(np.zeros((2, 3, 3, 1)))[:-8]),
        changed("keys.npy", npy(np.array([None]))),
    ],
)
def test_damaged_buffers_are_value_errors(buffer):
    with pytest.raises(ValueError):
        read_tensor_map(buffer)


def test_a_header_cannot_claim_more_than_there_is():
    header = npy(LABELS).replace(b"(1,)", b"(10,")
    huge = npy(np.zeros(1)).replace(b"(1,)", b"(999999999999,)")
    for data in (header, huge):
        with pytest.raises(ValueError):
            read_tensor_map(changed("blocks/0/values.npy", data))
