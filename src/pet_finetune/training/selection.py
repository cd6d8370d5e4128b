"""The number that picks the best model of a run."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping

from pet_finetune import processes
from pet_finetune.config import TrainingOptions
from pet_finetune.data.batch import on_device
from pet_finetune.data.loader import Loader
from pet_finetune.errors import TrainingError
from pet_finetune.keys import forces_key
from pet_finetune.model import Potential

from .loss import Objective, batch_loss, derivatives, objectives_at
from .metrics import Metrics


def check_metric(
    kind: str,
    labels: Collection[str],
    wanted: Mapping[str, tuple[bool, bool]],
    energies: Collection[str] | None = None,
) -> None:
    """Make sure, as soon as data are read, that :func:`best_metric` will find what it needs.

    Args:
        kind: ``best_model_metric``.
        labels: names of all labels in the validation set.
        wanted: for each target, whether forces and stress are computed.
        energies: which of the targets are energies; None for all.

    Raises:
        TrainingError: the validation set lacks the labels, or they are not computed.
    """
    values = [name for name in wanted if name in labels]
    energies = [name for name in values if energies is None or name in energies]
    forces = [name for name in wanted if forces_key(name) in labels]
    needed = {"energy_mae": energies, "forces_mae": forces}.get(kind, values + forces)
    if not needed:
        there = ", ".join(sorted(labels)) or "none"
        raise TrainingError(
            f"best_model_metric '{kind}' needs labels that no validation structure has (there: "
            f"{there}). Use another metric, or validation structures that have them."
        )
    if kind == "forces_mae" and not any(wanted[name][0] for name in forces):
        raise TrainingError(
            "best_model_metric 'forces_mae' needs forces, but none are trained: no training "
            "structure has any, or their weight in the loss is 0. Use another metric."
        )


def best_window(options: TrainingOptions) -> int:
    """Over how many epochs the mean of :func:`best_metric` picks the best model."""
    return options.best_model_window or min(5, max(1, options.num_epochs // 10))


def best_metric(metrics: Mapping[str, Metrics], kind: str, loss: Callable[[], float]) -> float:
    """The number that picks the best model; lower is better, infinite if it is not finite.

    ``mae_prod`` and ``rmse_prod`` multiply the errors of all quantities of all targets, so that
    none is forgotten because another has larger numbers.

    Args:
        metrics: errors on the validation set, by target.
        kind: ``best_model_metric``.
        loss: computes the loss on the validation set; called only where it is asked for.
    """
    if kind == "loss":
        value = loss()
    elif kind in ("energy_mae", "forces_mae"):
        quantity = kind.split("_")[0]
        value = math.prod(m.mae(quantity) for m in metrics.values() if quantity in m.kinds)
    else:
        name = kind.split("_")[0]
        value = math.prod(getattr(m, name)(k) for m in metrics.values() for k in m.kinds)
    return value if math.isfinite(value) else math.inf


def mean_loss(
    model: Potential,
    batches: Loader,
    objectives: Mapping[str, Objective],
    options: TrainingOptions,
) -> float:
    """The loss as a mean over structures, with the weights that the model has now.

    Those of the loss are the last stage's in every epoch: numbers with different weights could
    not be compared.

    Args:
        model: is put into evaluation mode.
        batches: of the validation set.
        objectives: what is asked of each target.
        options: ``architecture.training``.
    """
    model.eval()
    wanted = derivatives(objectives)
    objectives = objectives_at(objectives, options, options.num_epochs)
    total, count = 0.0, 0
    own = batches.dealt(processes.rank(), processes.size())
    for batch in on_device(own, model.device, model.dtype):
        predictions = model.predict_targets(batch.graph, wanted)
        total += float(batch_loss(batch, predictions, objectives)) * batch.graph.num_structures
        count += batch.graph.num_structures
    totals, counts = zip(*processes.gathered((total, count)), strict=True)
    return sum(totals) / sum(counts)
