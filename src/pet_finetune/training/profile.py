"""Profile of training: a few steps of a run, timed stage by stage.

The steps are those of training. First some warm up; then some are timed, with nothing else going
on; then a few run under torch's profiler, which says how the time is shared among the stages and
the operations.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import chain, cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table
from torch.autograd.profiler_util import EventList
from torch.profiler import ProfilerActivity

from pet_finetune.backends.choice import Arena
from pet_finetune.config.run_options import Options
from pet_finetune.data.labelled_batch import LabelledBatch
from pet_finetune.device import choose_device, plain_torch, versions
from pet_finetune.errors import PetFinetuneError, TrainingError
from pet_finetune.log import FILE_ONLY, get_logger, setup_logging
from pet_finetune.profiling import (
    forget_peak,
    peak_gpu_mib,
    peak_resident_mib,
    resident_mib,
    stage_seconds,
)
from pet_finetune.runs import RunFolder, own_folder
from pet_finetune.terminal import clear, show

from .metrics import Metrics, evaluate
from .prepare import NO_ROOMS, Rooms, prepare_run
from .run_files import LOG, PROFILE, TRACE, RunFiles
from .trainer import Trainer

#: What a step does that is in no stage.
OTHER = "other"
_LONGEST_NAME = 48

# What a user would look for, or could change, to make a stage shorter.
_STAGES = {
    "batch": "make, rotate and move the batch (batch_size)",
    "energies": "the network, forwards (size of the model, cutoff)",
    "derivatives": "forces and stress, by autograd (which of them are trained)",
    "replay": "structures that the foundation knows (finetune.replay)",
    "rotations": "predictions in another orientation (rotational_consistency)",
    "anchor": "distance from the foundation (finetune.anchor)",
    "energy offset": "mean error of the energies (track_energy_offset)",
    "loss": "errors and their weights",
    "backward": "gradient of the loss (what trains: finetune.method)",
    "update": "clipping, optimiser, running average (what trains, ema)",
    "metrics": "sums of the errors shown",
    "other": "everything else",
}


@dataclass(frozen=True)
class Operation:
    """One kind of operation under torch's profiler.

    Attributes:
        name: as torch calls it.
        calls: in a step.
        seconds: in a step, without the operations that it calls; on a GPU, of its kernels there.
        share: of the time of all operations.
    """

    name: str
    calls: float
    seconds: float
    share: float


@dataclass(frozen=True)
class TrainingProfile:
    """Cost of a few steps. Times are in seconds; counts are means over the steps.

    Attributes:
        device, dtype, threads: what computes.
        warmup_steps, steps, traced_steps: not counted, timed, under torch's profiler.
        step_seconds: of each timed step.
        stages: mean time of each stage in a step, in the order in which they begin; they add up
            to a step. The profiler says how they share it.
        structures, atoms, edges: of a batch; edges are directed, within the cutoff.
        memory: peaks over the warm-up and the timed steps, MiB; None where the system does not
            say: of the ``process`` (on a GPU run too: its part in the computer's main memory), what
            it held before the first step, ``process_before``, and of the tensors on the ``gpu``.
        operations: the most expensive ones first.
        steps_per_epoch: of training.
        validation_seconds: of an epoch's validation, from its first batches.
    """

    device: str
    dtype: str
    threads: int
    warmup_steps: int
    steps: int
    traced_steps: int
    step_seconds: list[float]
    stages: dict[str, float]
    structures: float
    atoms: float
    edges: float
    memory: dict[str, float | None]
    operations: list[Operation]
    steps_per_epoch: int
    validation_seconds: float

    @property
    def seconds(self) -> float:
        """Mean time of a step."""
        return sum(self.step_seconds) / len(self.step_seconds)

    @property
    def epoch_seconds(self) -> float:
        """Time of an epoch: its steps and the validation, without checkpoints."""
        return self.steps_per_epoch * self.seconds + self.validation_seconds

    def as_dict(self) -> dict[str, Any]:
        """Plain values: the attributes, and what follows from them."""
        return {
            **asdict(self),
            "seconds_per_step": self.seconds,
            "seconds_per_epoch": self.epoch_seconds,
            "structures_per_second": self.structures / self.seconds,
            "atoms_per_second": self.atoms / self.seconds,
            "neighbors_per_atom": self.edges / self.atoms,
        }


def stage_table(profile: TrainingProfile) -> Table:
    """Table of the time of each stage."""
    threads = "1 thread" if profile.threads == 1 else f"{profile.threads} threads"
    machine = f"{profile.device}, {profile.dtype}, {threads}"
    title = f"a training step, mean of {profile.steps} ({machine})"
    table = Table("stage", title=title, title_justify="left")
    table.add_column("ms", justify="right")
    table.add_column("share", justify="right")
    table.add_column("what it is (what changes it)")
    whole = sum(profile.stages.values())
    for name, seconds in profile.stages.items():
        share = f"{seconds / whole:.1%}"
        table.add_row(name, f"{seconds * 1e3:.2f}", share, _STAGES.get(name, ""))
    table.add_section()
    fastest, slowest = min(profile.step_seconds) * 1e3, max(profile.step_seconds) * 1e3
    table.add_row(
        "step", f"{profile.seconds * 1e3:.2f}", "", f"between {fastest:.2f} and {slowest:.2f}"
    )
    return table


def profile_lines(profile: TrainingProfile) -> list[str]:
    """Throughput, sizes, memory and what an epoch takes, a line each."""
    structures, atoms = (n / profile.seconds for n in (profile.structures, profile.atoms))
    neighbors = profile.edges / profile.atoms
    return [
        f"speed: {structures:.4g} structures/s, {atoms:.4g} atoms/s",
        f"batch: {profile.structures:.4g} structures, {profile.atoms:.4g} atoms, "
        f"{profile.edges:.6g} edges ({neighbors:.3g} neighbours an atom)",
        f"epoch: {profile.steps_per_epoch} steps and validation "
        f"({profile.validation_seconds:.3g} s), {profile.epoch_seconds:.3g} s",
        f"memory: {_memory_text(profile)}",
    ]


def _memory_text(profile: TrainingProfile) -> str:
    process, before, gpu = (profile.memory[name] for name in ("process", "process_before", "gpu"))
    parts = [] if gpu is None else [f"{gpu:.0f} MiB of the GPU at the peak"]
    if process is not None:
        text = f"{process:.0f} MiB of the process at the peak"
        if before is not None:
            grown = max(0.0, process - before)
            text += f", {grown:.0f} MiB more than before the first step"
        parts.append(text)
    return "; ".join(parts) or "this system does not say"


def operation_table(profile: TrainingProfile) -> Table:
    """The most expensive operations."""
    table = Table("operation", title="the most expensive operations", title_justify="left")
    for name in ("calls a step", "ms a step", "share"):
        table.add_column(name, justify="right")
    for operation in profile.operations:
        name = operation.name.removeprefix("aten::")
        name = name.removeprefix("autograd::engine::evaluate_function: ")
        table.add_row(
            name if len(name) <= _LONGEST_NAME else f"…{name[1 - _LONGEST_NAME :]}",
            f"{operation.calls:.0f}",
            f"{operation.seconds * 1e3:.2f}",
            f"{operation.share:.1%}",
        )
    return table


_logger = get_logger(__name__)

WARMUP_STEPS = 3
_TRACED_STEPS = 2
_OPERATIONS = 15
_VALIDATION_BATCHES = 5


class _Steps:
    """The steps of a run, one after the other, for as many epochs as it takes."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._metrics = {name: Metrics(name) for name in trainer.objectives}
        epochs = cycle(range(trainer.options.epochs))
        self._batches = chain.from_iterable(map(trainer.batches, epochs))
        self._memory = Arena()
        self._batches_of_step = trainer.options.gradient_accumulation_steps
        self._device = trainer.model.device

    def synchronize(self) -> None:
        """Wait until a GPU has done all that was asked of it."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def take(self, count: int) -> np.ndarray:
        """Take some steps; the learning rate stays that of the run's next step.

        Returns:
            [count, 4], of each step its seconds, structures, atoms and edges.
        """
        with self._memory.reused():  # as in Trainer.fit
            return np.array([self._one() for _ in range(count)])

    def _one(self) -> tuple[float, ...]:
        started, sizes = time.perf_counter(), []

        def counted(batch: LabelledBatch) -> LabelledBatch:
            graph = batch.graph
            sizes.append((graph.num_structures, graph.num_atoms, graph.num_edges))
            return batch

        count = self._batches_of_step
        self._trainer.step(map(counted, islice(self._batches, count)), count, self._metrics)
        self.synchronize()
        return time.perf_counter() - started, *map(sum, zip(*sizes, strict=True))


def _check_steps(steps: int) -> None:
    if steps < 1:
        raise TrainingError(f"--profile {steps}: at least 1 step must be timed.")


def profile_steps(trainer: Trainer, steps: int, trace: Path) -> TrainingProfile:
    """Train for a few steps and say what they cost. The weights change as in training.

    Args:
        trainer: ready to train; its progress stays where it is.
        steps: to be timed.
        trace: where the timeline of the steps under torch's profiler goes, in Chrome's format.
    """
    _check_steps(steps)
    model, device = trainer.model, trainer.model.device
    model.train()
    before = resident_mib()
    forget_peak(device)
    running = _Steps(trainer)
    running.take(WARMUP_STEPS)
    taken = running.take(steps)
    peaks = {"process": peak_resident_mib(), "process_before": before, "gpu": peak_gpu_mib(device)}
    shares, operations = _trace(running, device, trace)
    seconds, structures, atoms, edges = taken.mean(0).tolist()
    return TrainingProfile(
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        dtype=str(model.dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
        warmup_steps=WARMUP_STEPS,
        steps=steps,
        traced_steps=_TRACED_STEPS,
        step_seconds=taken[:, 0].tolist(),
        stages={name: share * seconds for name, share in shares.items()},
        structures=structures,
        atoms=atoms,
        edges=edges,
        memory=peaks,
        operations=operations,
        steps_per_epoch=trainer.num_steps(trainer.progress.epoch),
        validation_seconds=_validation_seconds(trainer, running),
    )


def _validation_seconds(trainer: Trainer, running: _Steps) -> float:
    """Time of the validation after an epoch, as its first batches let expect."""
    loader = trainer.validation.view()
    batches = list(islice(loader, _VALIDATION_BATCHES))
    running.synchronize()
    started = time.perf_counter()
    evaluate(trainer.model, batches, trainer.wanted)
    running.synchronize()
    seconds = time.perf_counter() - started
    return seconds * len(loader.structures) / sum(b.graph.num_structures for b in batches)


def _trace(
    running: _Steps, device: torch.device, path: Path
) -> tuple[dict[str, float], list[Operation]]:
    """Take steps under torch's profiler and write the timeline."""
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with torch.profiler.profile(activities=activities) as profiler:
        taken = running.take(_TRACED_STEPS)
    profiler.export_chrome_trace(str(path))
    stages = stage_seconds(profiler.events() or (), "CUDA" if on_gpu else "CPU")
    total = max(float(taken[:, 0].sum()), sum(stages.values()))
    stages[OTHER] = total - sum(stages.values())
    shares = {name: seconds / total for name, seconds in stages.items()}
    return shares, _operations(profiler.key_averages(), device)


def _operations(events: EventList, device: torch.device) -> list[Operation]:
    """The operations that take the most time themselves."""
    found = []
    for event in events:
        # Ranges that someone marked are no operations; a GPU's kernels count with the operation
        # that started them.
        if event.is_user_annotation or event.device_type.name != "CPU":
            continue
        on_gpu = device.type == "cuda"
        microseconds = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        found.append((microseconds * 1e-6, event.count, str(event.key)))
    total = sum(seconds for seconds, _, _ in found) or 1.0
    return [
        Operation(name, count / _TRACED_STEPS, seconds / _TRACED_STEPS, seconds / total)
        for seconds, count, name in sorted(found, reverse=True)[:_OPERATIONS]
    ]


@plain_torch()
def profile_run(
    options: Options,
    folder: str | Path | RunFolder | None,
    steps: int = 10,
    *,
    notices: Sequence[str] = (),
    source: str | Path = "",
    rooms: Rooms = NO_ROOMS,
) -> TrainingProfile:
    """Get a run ready as training does, take a few steps, and say what they cost.

    Writes ``profile.json`` and ``profile_trace.json``; no model is saved.

    Args:
        options: checked options.
        folder: where the files go; as for a run, it must hold none yet.
        steps: to be timed.
        notices: what reading the options had to say, for the log.
        source: the options file, which must not be overwritten.
        rooms: what other rooms bring into the run.
    """
    _check_steps(steps)
    device = choose_device(options.device)
    with own_folder(folder) as path:
        files = RunFiles(path)
        files.check_free(source)
        setup_logging(file=path / LOG)
        for notice in notices:
            _logger.warning(notice)
        try:
            run = prepare_run(options, files, device, rooms, to_finish=False)
            _logger.info("profile: nothing of what these steps train is kept")
            profile = profile_steps(run.trainer, steps, path / TRACE)
        except PetFinetuneError as error:
            _logger.error("%s", error, extra=FILE_ONLY)
            raise
        content = {**profile.as_dict(), "versions": versions()}
        files.write(PROFILE, json.dumps(content, indent=2) + "\n")
        _tell(stage_table(profile), [*profile_lines(profile), f"all numbers: {path / PROFILE}"])
        traced = [
            f"from {profile.traced_steps} more steps under torch's profiler, which slows the small "
            "ones",
            f"timeline: {path / TRACE}",
            "open it at https://ui.perfetto.dev, or in Chrome at chrome://tracing",
        ]
        _tell(operation_table(profile), traced)
        return profile


def _tell(table: Table, notes: Sequence[str]) -> None:
    """Print a table with notes below, and put both into the log file."""
    text = "\n".join(notes)
    shown = show(table)
    clear()
    print(text, end="\n\n")
    _logger.info("profile\n%s\n%s", shown, text, extra=FILE_ONLY)
