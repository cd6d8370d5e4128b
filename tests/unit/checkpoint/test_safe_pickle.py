"""The pickle reader builds inert records and refuses everything else without running it."""

from __future__ import annotations

import os
import pickle
import random
import sys
from collections import OrderedDict

import pytest
import torch

from pet_finetune.checkpoint.archive import TorchArchive
from pet_finetune.checkpoint.safe_pickle import Inert, StoredTensor, read_pickle
from pet_finetune.errors import CheckpointError


class Call:
    """Pickles as a call of any function, which is how hostile files are made."""

    def __init__(self, function, *args):
        self.parts = (function, args)

    def __reduce__(self):
        return self.parts


PLAIN = {
    "none": None,
    "numbers": [1, -5, 2**40, 1 << 70, 0.25, float("inf"), True, False],
    "text": ("é", "a" * 300, ""),
    "bytes": b"\x00\xff",
    "nested": {1: {"a": ({},)}, "empty": ((), [], {}, set())},
    "set": {1, 2},
    "ordered": OrderedDict(a=1),
}


@pytest.mark.parametrize("protocol", range(6))
def test_plain_values_come_back_whatever_the_protocol(protocol):
    value = {k: v for k, v in PLAIN.items() if protocol >= 3 or k != "set"}
    assert read_pickle(pickle.dumps(value, protocol), "file") == value


def test_shared_and_self_containing_lists_keep_their_identity():
    inner = [1]
    value = [inner, inner]
    value.append(value)
    read = read_pickle(pickle.dumps(value, 2), "file")
    assert read[0] is read[1]
    assert read[2] is read


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (Call(os.system, "touch {mark}"), "posix.system"),
        (Call(eval, "open('{mark}', 'w')"), "builtins.eval"),
        (Call(exec, "open('{mark}', 'w')"), "builtins.exec"),
        (Call(getattr, "", "upper"), "builtins.getattr"),
        (Call(__import__, "this"), "builtins.__import__"),
        (Call(pickle.loads, b"N."), "pickle.loads"),
        (Call(torch.load, "other.pt"), "torch.serialization.load"),
        (Call(torch.storage._load_from_bytes, b""), "torch.storage._load_from_bytes"),
        (Call(torch.hub.load, "evil/repo", "model"), "torch.hub.load"),
    ],
)
@pytest.mark.parametrize("protocol", [2, 4])
def test_a_call_of_anything_else_is_refused_by_name_and_not_made(call, name, protocol, tmp_path):
    mark = tmp_path / "executed"
    function, args = call.parts
    call = Call(function, *(a.format(mark=mark) if isinstance(a, str) else a for a in args))
    data = pickle.dumps({"architecture_name": "pet", "x": call}, protocol)
    if protocol == 2:
        name = name.replace("builtins", "__builtin__")
    with pytest.raises(CheckpointError) as caught:
        read_pickle(data, "evil.ckpt")
    assert "evil.ckpt" in str(caught.value)
    assert f"{name}, which no PET checkpoint needs" in str(caught.value)
    assert "nothing in the file was executed" in str(caught.value)
    assert not mark.exists()


def test_a_refused_name_is_not_even_imported():
    sys.modules.pop("antigravity", None)
    with pytest.raises(CheckpointError, match=r"antigravity\.fly"):
        read_pickle(b"cantigravity\nfly\n.", "file")
    assert "antigravity" not in sys.modules


def test_dotted_names_do_not_reach_into_allowed_ones():
    data = b"\x80\x04\x8c\x0bcollections\x8c\x14OrderedDict.fromkeys\x93."
    with pytest.raises(CheckpointError, match=r"collections\.OrderedDict\.fromkeys"):
        read_pickle(data.replace(b"\x8c\x14", b"\x8c\x14"), "file")


@pytest.mark.parametrize(
    ("data", "instruction"),
    [
        (b"(S'ls'\nios\nsystem\n.", "INST"),
        (b"(cos\nsystem\nS'ls'\no.", r"os\.system"),
        (b"(N" + b"o.", "OBJ"),
        (b"\x80\x02\x82\x01.", "EXT1"),
        (b"Pabc\n.", "PERSID"),
        (b"\x80\x05\x97.", "NEXT_BUFFER"),
        (b"\x80\x04N)}\x92.", "NEWOBJ_EX"),
    ],
)
def test_instructions_pytorch_does_not_use_are_refused(data, instruction):
    with pytest.raises(CheckpointError, match=instruction):
        read_pickle(data, "file")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"N",
        b"\x80\x02}q\x00(X\x05\x00\x00\x00ab",
        b"\x80\xff.",
        b"t.",
        b"h\x05.",
        b"\x80\x02)}s.",
        b"\x80\x02}}K\x01s.",
        b"}(])u.",
        b"\x80\x02ccollections\nOrderedDict\nK\x01R.",
        b"\x80\x02]q\x00h\x00\x85\x81.",
    ],
)
def test_damaged_pickles_are_checkpoint_errors(data):
    with pytest.raises(CheckpointError):
        read_pickle(data, "file")


def test_states_are_kept_on_stand_ins_and_on_nothing_else():
    good = b"\x80\x02cmetatrain.utils.data.dataset\nDatasetInfo\n)\x81}X\x01\x00\x00\x00aK\x07sb."
    read = read_pickle(good, "file")
    assert isinstance(read, Inert)
    assert read.name == "metatrain.utils.data.dataset.DatasetInfo"
    assert (read.get("a"), read.get("b", 3)) == (7, 3)
    with pytest.raises(CheckpointError, match="sets the state of"):
        read_pickle(b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}X\x01\x00\x00\x00aK\x07sb.", "f")
    with pytest.raises(CheckpointError, match="sets the state of"):
        read_pickle(b"\x80\x02]}b.", "f")


def test_a_called_result_or_storage_type_cannot_be_called():
    with pytest.raises(CheckpointError, match="calls an object of type Inert"):
        read_pickle(b"\x80\x02cpathlib\nPosixPath\n)R)R.", "f")
    with pytest.raises(CheckpointError, match=r"calls torch\.FloatStorage"):
        read_pickle(b"\x80\x02ctorch\nFloatStorage\n)R.", "f")


def test_keys_are_hashable_without_recursion():
    data = b"\x80\x02}" + b"(" * 1 + b")" + b"\x85" * 100_000 + b"K\x01u."
    with pytest.raises(CheckpointError, match="key of type tuple"):
        read_pickle(data, "f")


def test_tensors_are_described_and_not_built(tmp_path):
    path = tmp_path / "x.pt"
    torch.save({"w": torch.nn.Parameter(torch.arange(6.0).reshape(2, 3).t())}, path)
    with TorchArchive(path) as archive:
        stored = archive.content()["w"]
    assert isinstance(stored, StoredTensor)
    assert (stored.size, stored.stride, stored.dtype) == ((3, 2), (1, 3), torch.float32)


def test_random_damage_never_escapes_as_another_exception(tmp_path):
    path = tmp_path / "x.pt"
    torch.save({"a": torch.ones(3), "b": {"c": [1, 2.0, ("x", None)]}, "d": OrderedDict(e=1)}, path)
    with TorchArchive(path) as archive:
        data = bytes(archive._read(f"{archive._root}/data.pkl"))
    generator = random.Random(0)
    refused = 0
    for _ in range(2000):
        broken = bytearray(data)
        for _ in range(generator.randint(1, 4)):
            broken[generator.randrange(len(broken))] = generator.randrange(256)
        try:
            read_pickle(bytes(broken[: generator.randint(1, len(broken))]), "file")
        except CheckpointError:
            refused += 1
    assert refused > 1000
