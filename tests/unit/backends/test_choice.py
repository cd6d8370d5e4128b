"""Finding and building the library: what happens where it is unwanted, absent or broken."""

from __future__ import annotations

import hashlib
import logging
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch

from pet_finetune import files
from pet_finetune.backends import choice, graphs
from pet_finetune.errors import ConfigError


@pytest.fixture
def fresh(monkeypatch, tmp_path, caplog):
    """As at the start of a process, with an empty cache."""
    for name in ("tried", "loaded"):
        monkeypatch.setattr(choice._State, name, False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name in (choice.VARIABLE, choice.PROCESSOR):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(logging.getLogger("pet_finetune"), "propagate", True)
    caplog.set_level("INFO", "pet_finetune")
    return caplog


def messages(caplog):
    return [record.getMessage() for record in caplog.records]


def test_they_can_be_switched_off(fresh, monkeypatch):
    monkeypatch.setenv(choice.VARIABLE, "off")
    assert not choice.prepare()
    assert messages(fresh) == ["Computing with plain torch operations (PET_FINETUNE_KERNELS=off)."]


def test_a_wrong_setting_is_an_error(fresh, monkeypatch):
    monkeypatch.setenv(choice.VARIABLE, "fast")
    with pytest.raises(
        ConfigError, match=r"PET_FINETUNE_KERNELS: 'fast' is not one of auto, off, require"
    ):
        choice.prepare()


def test_without_a_compiler_it_computes_plainly_and_says_so_once(fresh, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert not choice.prepare()
    assert not choice.prepare()
    (said,) = messages(fresh)
    assert "need a C++ compiler" in said


def test_a_failing_compiler_is_a_notice(fresh, monkeypatch):
    monkeypatch.setenv("CXX", "false")
    assert not choice.prepare()
    assert "could not be built or loaded" in messages(fresh)[-1]
    assert not list(choice._library_path().parent.glob("*.so"))


@pytest.mark.parametrize(
    ("compiler", "reason"),
    [("no-such-compiler", r"need a C\+\+ compiler"), ("false", "could not be built")],
)
def test_required_kernels_that_cannot_be_had_are_an_error(compiler, reason, fresh, monkeypatch):
    """Each time: not only in the first call, after which others might go on without."""
    monkeypatch.setenv(choice.VARIABLE, "require")
    monkeypatch.setenv("CXX", compiler)
    for _ in range(2):
        with pytest.raises(ConfigError, match=f"KERNELS=require, but .*{reason}.*KERNELS=auto"):
            choice.prepare()
    assert not choice.loaded()


def test_a_gpu_has_no_use_for_them(fresh):
    assert not choice.prepare("cuda")
    assert messages(fresh) == []
    assert not choice._State.tried


def test_each_torch_processor_and_target_has_a_library_of_its_own(fresh, monkeypatch):
    paths = [choice._library_path()]
    for patch in (
        lambda inside: inside.setattr(choice.torch, "__version__", "0.0.1"),
        lambda inside: inside.setattr(choice, "processor", lambda: "flags: none"),
        lambda inside: inside.setenv(choice.PROCESSOR, "x86-64-v3"),
    ):
        with monkeypatch.context() as inside:
            patch(inside)
            paths.append(choice._library_path())
        assert choice._library_path() == paths[0]
    assert len(set(paths)) == 4


def test_of_several_processes_that_need_it_one_compiles(monkeypatch, tmp_path):
    compiles = []

    def compile_slowly(path):
        compiles.append(path)
        time.sleep(0.05)
        path.touch()
        return path

    monkeypatch.setattr(choice, "_compiled", compile_slowly)
    path = tmp_path / "kernels" / "library.so"
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(choice._library, [path] * 4)) == [path] * 4
    assert compiles == [path]


def test_a_damaged_library_is_compiled_again(monkeypatch, tmp_path):
    path = tmp_path / "library.so"
    path.write_bytes(b"as it was compiled")
    compiles = []
    monkeypatch.setattr(choice, "_compiled", lambda path: compiles.append(path) or path)
    assert choice._library(path) == path  # of an earlier release, without a digest
    path.with_suffix(".sha256").write_text(hashlib.sha256(path.read_bytes()).hexdigest())
    assert choice._library(path) == path
    assert not compiles
    path.write_bytes(b"as it was")
    assert choice._library(path) == path
    assert compiles == [path]


def test_a_damaged_graph_is_compiled_again(monkeypatch, tmp_path):
    path = tmp_path / "one.so"
    made = []
    monkeypatch.setattr(graphs, "_path", lambda key, device: path)
    monkeypatch.setattr(graphs, "_loaded", lambda path, device: path.read_bytes())
    monkeypatch.setattr(
        graphs, "_compile", lambda path, *function: made.append(path) or path.write_bytes(b"new")
    )
    wanted = ("a graph", "key", torch.device("cpu"), list, [], [])
    path.write_bytes(b"as it was compiled")
    files.note_digest(path)
    assert graphs.compiled_graph(*wanted) == b"as it was compiled"
    path.write_bytes(b"as it was compilee")
    assert not graphs.is_compiled("key", torch.device("cpu"))
    assert graphs.compiled_graph(*wanted) == b"new"
    assert made == [path]


def test_a_full_disk_is_told_before_anything_is_compiled(monkeypatch, tmp_path):
    monkeypatch.setattr(graphs, "_path", lambda key, device: tmp_path / "one.so")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
    with pytest.raises(graphs.CannotCompile, match="No space left on device: '"):
        graphs.compiled_graph("a graph", "key", torch.device("cpu"), list, [], [])
