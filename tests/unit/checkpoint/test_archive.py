"""Opening torch archives: tensors come back exactly, other files are told apart by one line."""

from __future__ import annotations

import gzip
import sys
import zipfile

import pytest
import torch
from checkpoint_files import rewrite

from pet_finetune.checkpoint.archive import TorchArchive
from pet_finetune.checkpoint.safe_pickle import StoredTensor
from pet_finetune.errors import CheckpointError

TENSORS = {
    "matrix": torch.arange(6.0).reshape(2, 3),
    "transposed": torch.arange(6.0, dtype=torch.float64).reshape(2, 3).t(),
    "slice": torch.arange(10)[3:9:2],
    "scalar": torch.tensor(2.5),
    "empty": torch.empty(0, 4),
    "half": torch.tensor([1.5, -2.0], dtype=torch.float16),
    "brain": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    "bool": torch.tensor([True, False]),
    "bytes": torch.tensor([0, 255], dtype=torch.uint8),
    "int32": torch.tensor([-(2**31)], dtype=torch.int32),
}


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "tensors.pt"
    torch.save(TENSORS, path)
    return path


def test_tensors_equal_what_was_saved(saved):
    with TorchArchive(saved) as archive:
        read = archive.tensors(archive.content())
    assert read.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor)


def test_tensors_own_their_memory_and_no_more(saved):
    with TorchArchive(saved) as archive:
        content = archive.content()
        first, second = archive.tensor(content["slice"]), archive.tensor(content["slice"])
    first += 1
    assert torch.equal(second, TENSORS["slice"])
    assert second.untyped_storage().nbytes() == 3 * 8


def test_the_other_byte_order_is_swapped(saved, tmp_path):
    def other_end(name, data):
        if name.endswith("byteorder"):
            return b"big" if sys.byteorder == "little" else b"little"
        sizes = {str(k): t for k, t in enumerate(TENSORS.values())}
        key = name.rsplit("/data/")[-1]
        if "/data/" not in name or key not in sizes:
            return data
        n = sizes[key].itemsize
        return b"".join(data[i : i + n][::-1] for i in range(0, len(data), n))

    with TorchArchive(rewrite(saved, tmp_path / "swapped.pt", other_end)) as archive:
        read = archive.tensors(archive.content())
    assert all(torch.equal(read[name], TENSORS[name]) for name in TENSORS)


def test_files_without_a_byte_order_are_little_endian(saved, tmp_path):
    path = rewrite(saved, tmp_path / "x.pt", lambda n, d: None if "byteorder" in n else d)
    with TorchArchive(path) as archive:
        assert torch.equal(archive.tensor(archive.content()["matrix"]), TENSORS["matrix"])


@pytest.mark.parametrize(
    ("size", "stride", "offset"),
    [((7,), (1,), 0), ((2, 3), (4, 1), 0), ((3,), (1,), 4), ((1000,), (0,), 0)],
)
def test_views_beyond_their_storage_are_damage(saved, size, stride, offset):
    with TorchArchive(saved) as archive:
        good = archive.content()["matrix"]
        view = StoredTensor(good.key, good.dtype, good.storage_size, offset, size, stride)
        with pytest.raises(CheckpointError, match="reaches beyond its storage"):
            archive.tensor(view)


def damage(name, data):
    return data[:-1] + bytes([data[-1] ^ 1]) if name.endswith("/data/0") else data


def shorten(name, data):
    return data[:-4] if name.endswith("/data/0") else data


def lose(name, data):
    return None if name.endswith("/data/0") else data


@pytest.mark.parametrize("change", [shorten, lose])
def test_a_storage_that_is_short_or_missing_is_damage(saved, tmp_path, change):
    path = rewrite(saved, tmp_path / "x.pt", change)
    with TorchArchive(path) as archive, pytest.raises(CheckpointError, match="damaged"):
        archive.tensor(archive.content()["matrix"])


def test_a_flipped_bit_is_noticed(saved, tmp_path):
    data = bytearray(saved.read_bytes())
    at = bytes(data).index(TENSORS["matrix"].numpy().tobytes())
    data[at + 5] ^= 1
    path = tmp_path / "flipped.pt"
    path.write_bytes(data)
    with TorchArchive(path) as archive, pytest.raises(CheckpointError, match="CRC"):
        archive.tensor(archive.content()["matrix"])


def test_compressed_entries_are_refused(saved, tmp_path):
    path = tmp_path / "small.pt"
    with zipfile.ZipFile(saved) as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    with pytest.raises(CheckpointError, match="compressed"), TorchArchive(path) as archive:
        archive.content()


def line(path):
    with pytest.raises(CheckpointError) as caught, TorchArchive(path) as archive:
        archive.content()
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    return message


def test_other_files_are_told_apart(saved, tmp_path):
    whole = saved.read_bytes()
    cases = {
        "cut.ckpt": (whole[: len(whole) // 2], "its end is missing"),
        "head.ckpt": (whole[:100], "its end is missing"),
        "nothing.ckpt": (b"", "empty"),
        "text.ckpt": (b"hello there", "not a zip archive"),
        "x.ckpt.gz": (gzip.compress(whole), "gunzip"),
        "lfs.ckpt": (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        "page.ckpt": (b"<!DOCTYPE html><html>", "web page"),
        "old.pt": (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", "before 1.6"),
    }
    for name, (data, expected) in cases.items():
        path = tmp_path / name
        path.write_bytes(data)
        assert expected in line(path), name


def test_a_zip_that_is_no_checkpoint(tmp_path):
    path = tmp_path / "data.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "x")
    assert "no data.pkl inside" in line(path)
    with zipfile.ZipFile(tmp_path / "empty.zip", "w"):
        pass
    assert "no data.pkl inside" in line(tmp_path / "empty.zip")


def test_an_exported_model_is_named_as_such(tmp_path):
    class Module(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    path = tmp_path / "model.pt"
    torch.jit.script(Module()).save(str(path))
    assert "exported model" in line(path)


def test_missing_files_and_folders(tmp_path):
    (tmp_path / "best_model.ckpt").write_bytes(b"x")
    message = line(tmp_path / "bestmodel.ckpt")
    assert "no such checkpoint file" in message
    assert "best_model.ckpt" in message
    assert "no such checkpoint file" in line(tmp_path / "nowhere" / "x.ckpt")
    assert "this is a folder" in line(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "adapter folder" in line(tmp_path)
