"""Parts of a training step: precision, gradients, records.

Each process takes the gradient of its part of a batch, whose loss is divided by the number of
labels of the whole batch. The sum over the processes is then the gradient of the whole batch,
whatever the parts are. It is taken once an update, in one call, after all backward passes.

torch's ``DistributedDataParallel`` is not used. It sends gradients while a backward pass runs, and
asks for exactly one such pass, through the wrapped ``forward``, with the same parameters each time.
Here a step has several: forces are derivatives within the forward pass, each feature goes backward
by itself, some parameters get no gradient in some batches, and a process may have no structure.
What is lost is the overlap of sending and computing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from rich.table import Table
from torch import Tensor
from torch.nn import Parameter

from pet_finetune import processes
from pet_finetune.backends.choice import EAGER, FUSED, FUSED_BFLOAT16, using
from pet_finetune.backends.fused import multiplies_bfloat16
from pet_finetune.graph import Batch
from pet_finetune.model.potential import Potential
from pet_finetune.model.prediction import Prediction, Property, evaluating

from .metrics import Errors, Metrics

_MEV = 1000.0


@contextmanager
def mixed(precision: str | None, model: Potential) -> Iterator[None]:
    """The context in which a model computes.

    ``bf16-mixed`` has matrix products in bfloat16, norms, softmax and sums in float32: torch's
    autocast, or on a processor with bfloat16 instructions the fused kernels, which round the
    factors of a product and nothing else. Gradients need no scaling, as bfloat16 has the range of
    float32.
    """
    if precision is None:
        yield
        return
    if model.network.backend is FUSED and multiplies_bfloat16():
        with using(FUSED_BFLOAT16, model):
            yield
        return
    # Without autocast's cache of cast weights, which forgets gradients where a layer is computed
    # once without and once with them.
    autocast = torch.autocast(model.device.type, torch.bfloat16, cache_enabled=False)
    with using(EAGER, model), autocast:
        yield


def precision_errors(
    model: Potential, batch: Batch, wanted: Mapping[str, tuple[bool, bool]], precision: str
) -> str:
    """Text on the difference of a batch's predictions from full precision."""
    with evaluating(model):
        exact = model.predict_targets(batch, wanted)
        with mixed(precision, model):
            rough = model.predict_targets(batch, wanted)
    parts = [difference_text(rough[name], exact[name], batch) for name in wanted]
    return f"{precision}: first batch against float32: {'; '.join(parts)}"


def difference_text(
    rough: Prediction | Property, exact: Prediction | Property, batch: Batch
) -> str:
    """How far rough predictions of a batch are from exact ones, in words."""
    if isinstance(rough, Property) or isinstance(exact, Property):
        assert isinstance(rough, Property)
        assert isinstance(exact, Property)
        errors = _rms((rough.values - exact.values).detach())
        share = 100.0 * errors / max(_rms(exact.values.detach()), 1e-30)
        return f"{exact.spec.name} {errors:.2g} {exact.spec.unit} RMS ({share:.2g} % of its own)"
    energy = (rough.energy - exact.energy).detach() / batch.atoms_per_structure
    text = f"energy {_rms(energy) * _MEV:.2f} meV/atom RMS"
    if rough.forces is None or exact.forces is None:
        return text
    forces = (rough.forces - exact.forces).detach()
    share = 100.0 * _rms(forces) / max(_rms(exact.forces.detach()), 1e-30)
    return (
        f"{text}, forces {_rms(forces) * _MEV:.2f} meV/A RMS ({share:.2g} % of theirs), "
        f"{float(forces.abs().max()) * _MEV:.1f} meV/A at most"
    )


def _rms(errors: torch.Tensor) -> float:
    return float(errors.double().square().mean().sqrt())


def total(values: Tensor) -> Tensor:
    """The sum of what all processes have; the tensor itself where there is one process."""
    if processes.size() > 1:
        from torch import distributed

        values = values.clone()
        distributed.all_reduce(values)
    return values


@torch.no_grad()
def add_gradients(parameters: Sequence[Parameter], flag: bool) -> bool:
    """Give all processes the sum of their gradients; whether any of them has set its flag.

    A parameter that no process has a gradient for has none afterwards: the optimiser leaves it
    alone, as with one process. The parameters are in the same order everywhere.
    """
    if processes.size() == 1:
        return flag
    # On the CPU, where these are known: reading them from a GPU would make the CPU wait.
    told = total(torch.tensor([flag, *(p.grad is not None for p in parameters)], dtype=torch.int32))
    any_flag, *present = told.tolist()
    trained = [p for p, count in zip(parameters, present, strict=True) if count]
    for some in _by_dtype(trained):
        flat = torch.cat([_gradient(parameter).flatten() for parameter in some])
        summed = total(flat).split([parameter.numel() for parameter in some])
        for parameter, gradient in zip(some, summed, strict=True):
            parameter.grad = gradient.view_as(parameter)
    return bool(any_flag)


def _gradient(parameter: Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def _by_dtype(parameters: Iterable[Parameter]) -> Iterable[list[Parameter]]:
    groups: dict[torch.dtype, list[Parameter]] = {}
    for parameter in parameters:
        groups.setdefault(parameter.dtype, []).append(parameter)
    return groups.values()


@torch.no_grad()
def same_tensors(tensors: Iterable[Tensor]) -> None:
    """Give all processes the values that the first one has."""
    if processes.size() == 1:
        return
    from torch import distributed

    for tensor in tensors:
        contiguous = tensor.detach().contiguous()
        distributed.broadcast(contiguous, src=0)
        tensor.copy_(contiguous)


def add_part(
    parameters: Sequence[Parameter], gradients: Sequence[Tensor | None], size: int
) -> None:
    """Add the gradients of one of so many batches to those of the parameters."""
    with torch.no_grad():
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if gradient is None:
                continue
            part = gradient if size == 1 else gradient / size
            parameter.grad = part if parameter.grad is None else parameter.grad.add_(part)


class StepResult(NamedTuple):
    """Result of an update.

    Attributes:
        loss: sum over its batches, with the terms of features.
        extra: the same of each term of a feature, by name.
        batches, structures: how many, on all processes together.
        stop: whether any process was asked to stop.
    """

    loss: float
    extra: dict[str, float]
    batches: int
    structures: int
    stop: bool


class StepProgress(NamedTuple):
    """Progress of an epoch after an update.

    Attributes:
        done, total: batches of the epoch.
        loss: mean over those that are done.
        metrics: errors of those that are done, by target.
        rate: structures per second.
    """

    done: int
    total: int
    loss: float
    metrics: Mapping[str, Metrics]
    rate: float


class Measured(NamedTuple):
    """Measurement of a feature after an epoch.

    Attributes:
        columns: of ``train.csv``.
        line: added to the epoch's line in the log.
    """

    columns: Mapping[str, float]
    line: str


@dataclass
class EpochRecord:
    """Record of an epoch: a line of ``train.csv``.

    Attributes:
        epoch: from 1.
        learning_rate: of the last step.
        loss: mean training loss, extra losses included.
        train, validation: errors by target, during the epoch and after it.
        metric: what picks the best model (lower is better), a mean over the last epochs.
        best: whether this epoch is the best so far.
        seconds: of training and validation; waiting between two parts of a run does not count.
        structures_per_second: training throughput.
        extra: mean of each term that features add to the loss, by name.
        columns: what features measured after the epoch, by column of ``train.csv``.
        lines: the same in words.
    """

    epoch: int
    learning_rate: float
    loss: float
    train: dict[str, Metrics]
    validation: dict[str, Metrics]
    metric: float
    best: bool
    seconds: float
    structures_per_second: float
    extra: dict[str, float] = field(default_factory=dict)
    columns: dict[str, float] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class TrainingResult:
    """End of a run.

    Attributes:
        finished: False when it was interrupted.
        epochs: epochs completed.
        best_epoch, best_metric: of the best model.
        stopped_early: whether patience ran out.
    """

    finished: bool
    epochs: int
    best_epoch: int
    best_metric: float
    stopped_early: bool


@dataclass(frozen=True)
class TrainOutcome:
    """Result of a run.

    Attributes:
        folder: its files.
        result: how it ended; of an ensemble, how its last member did.
        before, after: errors of the starting model and the best one (or the committee), by set and
            target; empty for an interrupted run, or without ``final_eval``.
        table: of these errors, as it was printed; None where there are none.
    """

    folder: Path
    result: TrainingResult
    before: Errors
    after: Errors
    table: Table | None = None
