"""A few steps of a training run, to see where its time goes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.table import Table

from pet_finetune.config import Options
from pet_finetune.device import choose_device, versions
from pet_finetune.errors import PetFinetuneError
from pet_finetune.log import FILE_ONLY, get_logger, setup_logging
from pet_finetune.progress import clear
from pet_finetune.runs.folder import RunFolder, own_folder

from .prepare import NO_ROOMS, Rooms, prepare_run
from .profile import OTHER, TrainingProfile, check_steps, profile_steps
from .run_files import LOG, PROFILE, TRACE, RunFiles
from .tables import show

_logger = get_logger(__name__)
_LONGEST_NAME = 48

# What a user would look for, or could change, to make a stage shorter.
_STAGES = {
    "batch": "cut, rotate and move the batch (batch_size)",
    "energies": "the network, forwards (size of the model, cutoff)",
    "derivatives": "forces and stress, by autograd (which of them is asked for)",
    "replay": "structures that the foundation knows (finetune.replay)",
    "rotations": "predictions in another orientation (rotational_consistency)",
    "anchor": "distance from the foundation (finetune.anchor)",
    "loss": "errors and their weights",
    "backward": "gradient of the loss (what trains: finetune.method)",
    "update": "clipping, optimiser, running average (what trains, ema)",
    "metrics": "sums of the errors shown",
    OTHER: "everything else",
}


@torch.inference_mode(False)
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
        folder: where the files go; as for a run, it must hold none yet. None for
            ``outputs/DATE/TIME``.
        steps: to be timed.
        notices: what reading the options had to say, for the log.
        source: the options file, which must not be overwritten.
        rooms: what other rooms bring into the run.

    Raises:
        PetFinetuneError: any bad input, with one clear message.
    """
    check_steps(steps)
    device = choose_device(options.device)
    with own_folder(folder) as path:
        return _profile_in(RunFiles(path), options, device, steps, notices, source, rooms)


def _profile_in(
    files: RunFiles,
    options: Options,
    device: torch.device,
    steps: int,
    notices: Sequence[str],
    source: str | Path,
    rooms: Rooms,
) -> TrainingProfile:
    """Profile in a folder of the run's own."""
    files.check_free(source)
    setup_logging(file=files.folder / LOG)
    for notice in notices:
        _logger.warning(notice)
    try:
        run = prepare_run(options, files, None, device, rooms, to_finish=False)
        _logger.info("profile: nothing of what these steps train is kept")
        profile = profile_steps(run.trainer, steps, files.folder / TRACE)
    except PetFinetuneError as error:
        _logger.error("%s", error, extra=FILE_ONLY)
        raise
    content = {**profile.as_dict(), "versions": versions()}
    files.write(PROFILE, json.dumps(content, indent=2) + "\n")
    _tell(_stage_table(profile), [*_totals(profile), f"all numbers: {files.folder / PROFILE}"])
    _tell(_operation_table(profile), _trace_notes(profile, files))
    return profile


def _tell(table: Table, notes: Sequence[str]) -> None:
    """Print a table with notes below, and put both into the log file."""
    text = "\n".join(notes)
    shown = show(table)
    clear()
    print(text, end="\n\n")
    _logger.info("profile\n%s\n%s", shown, text, extra=FILE_ONLY)


def _stage_table(profile: TrainingProfile) -> Table:
    """How long each stage takes."""
    table = Table(
        title=f"a training step, mean of {profile.steps} ({_machine(profile)})",
        title_justify="left",
    )
    table.add_column("stage")
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


def _machine(profile: TrainingProfile) -> str:
    threads = "1 thread" if profile.threads == 1 else f"{profile.threads} threads"
    return f"{profile.device}, {profile.dtype}, {threads}"


def _totals(profile: TrainingProfile) -> list[str]:
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
    memory = profile.memory
    parts = []
    if memory.gpu is not None:
        parts.append(f"{memory.gpu:.0f} MiB of the GPU at the peak")
    if memory.process is not None:
        text = f"{memory.process:.0f} MiB of the process at the peak"
        if memory.process_before is not None:
            grown = max(0.0, memory.process - memory.process_before)
            text += f", {grown:.0f} MiB more than before the first step"
        parts.append(text)
    return "; ".join(parts) or "this system does not say"


def _trace_notes(profile: TrainingProfile, files: RunFiles) -> list[str]:
    """Where the operations come from, and the way to see them all."""
    return [
        f"from {profile.traced_steps} more steps under torch's profiler, which slows the small "
        "ones",
        f"timeline: {files.folder / TRACE}",
        "open it at https://ui.perfetto.dev, or in Chrome at chrome://tracing",
    ]


def _operation_table(profile: TrainingProfile) -> Table:
    """The most expensive operations."""
    table = Table(title="the most expensive operations", title_justify="left")
    table.add_column("operation")
    for name in ("calls a step", "ms a step", "share"):
        table.add_column(name, justify="right")
    for operation in profile.operations:
        table.add_row(
            _short(operation.name),
            f"{operation.calls:.0f}",
            f"{operation.seconds * 1e3:.2f}",
            f"{operation.share:.1%}",
        )
    return table


def _short(name: str) -> str:
    """The telling end of a long name."""
    name = name.removeprefix("aten::").removeprefix("autograd::engine::evaluate_function: ")
    return name if len(name) <= _LONGEST_NAME else f"…{name[1 - _LONGEST_NAME :]}"
