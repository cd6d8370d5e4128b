"""What a profile of training found, as numbers and as tables."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

#: What a step does that is in no stage.
OTHER = "other"
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
    """What a few steps of a run cost. Times are in seconds; counts are means over the steps.

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
        """What an epoch takes: its steps and the validation; not writing the checkpoints."""
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
    """How long each stage takes."""
    threads = "1 thread" if profile.threads == 1 else f"{profile.threads} threads"
    machine = f"{profile.device}, {profile.dtype}, {threads}"
    title = f"a training step, mean of {profile.steps} ({machine})"
    table = Table(title=title, title_justify="left")
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
    table = Table(title="the most expensive operations", title_justify="left")
    table.add_column("operation")
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
