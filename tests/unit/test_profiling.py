"""Stages are marks in torch's profile, and their times add up; memory is seen."""

from __future__ import annotations

import mmap
import time
from types import SimpleNamespace

import pytest
import torch

from pet_finetune import profiling
from pet_finetune.profiling import each, stage, stage_seconds


def event(name, start, end, annotation=True, device="CPU"):
    return SimpleNamespace(
        name=name,
        time_range=SimpleNamespace(start=start, end=end),
        is_user_annotation=annotation,
        device_type=SimpleNamespace(name=device),
    )


def test_each_microsecond_counts_for_the_innermost_stage():
    events = [
        event("outer", 0, 20),
        event("inner", 3, 8),
        event("aten::mm", 4, 5, annotation=False),
        event("Optimizer.step#SGD", 10, 12),
        event("outer", 30, 40),
        event("inner", 30, 40, device="CUDA"),
        event("last", 40, 41),
    ]
    found = stage_seconds(events)
    assert list(found) == ["outer", "inner", "last"]
    assert found == pytest.approx({"outer": 25e-6, "inner": 5e-6, "last": 1e-6})
    assert stage_seconds(events, "CUDA") == pytest.approx({"inner": 10e-6})


def test_stages_are_seen_by_torchs_profiler():
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        with stage("outer"):
            time.sleep(0.02)
            with stage("inner"):
                time.sleep(0.05)
        for _ in each("made", range(3)):
            time.sleep(0.02)
    found = stage_seconds(profiler.events())
    assert list(found) == ["outer", "inner", "made"]
    assert 0.02 <= found["outer"] < found["inner"]
    assert found["made"] < 0.02


def test_making_an_item_is_a_stage_whose_errors_come_out():
    def broken():
        yield 1
        raise ValueError("broken")

    assert list(each("make", range(3))) == [0, 1, 2]
    with pytest.raises(ValueError, match="broken"):
        list(each("make", broken()))


def test_memory_is_seen():
    if profiling.resident_mib() is None:
        pytest.skip("this system does not say")
    cpu = torch.device("cpu")
    profiling.forget_peak(cpu)
    before = profiling.resident_mib()
    # Pages straight from the system: a tensor may get some that the process has held all along.
    with mmap.mmap(-1, 64 * 2**20) as held:
        held.write(bytes(64 * 2**20))
        assert profiling.resident_mib() > before + 60
    assert profiling.peak_resident_mib() > before + 60
    assert profiling.peak_gpu_mib(cpu) is None


def test_a_system_that_does_not_say(tmp_path, monkeypatch):
    monkeypatch.setattr(profiling, "_PROCESS", tmp_path / "nowhere")
    profiling.forget_peak(torch.device("cpu"))
    assert profiling.resident_mib() is None
    assert profiling.peak_resident_mib() is None or profiling.peak_resident_mib() > 10
