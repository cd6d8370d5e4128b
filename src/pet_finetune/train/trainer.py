"""The training loop.

One epoch is: every batch once (turned at random), then validation with the averaged weights if
there is an average, then the best model is kept. All that the next step depends on is in
:meth:`Trainer.state`, so a run that goes on from it ends with the weights it would have had.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pet_finetune.config import TrainingOptions
from pet_finetune.data.batch import Batch
from pet_finetune.data.loader import Loader
from pet_finetune.data.prefetch import on_device
from pet_finetune.errors import TrainingError
from pet_finetune.model import Potential
from pet_finetune.stages import each, stage

from .ema import WeightAverage
from .extra import ExtraLoss
from .interrupt import InterruptGuard
from .loss import Objective, batch_loss
from .metrics import Metrics, evaluate
from .optimizer import make_optimizer
from .records import Callbacks, EpochRecord, TrainingResult
from .schedule import learning_rate_factor
from .selection import best_metric, check_metric


@dataclass
class _Progress:
    """Where a run stands; plain numbers, part of the saved state."""

    epoch: int = 0
    batch: int = 0
    step: int = 0
    # Of the epoch under way, for when it is interrupted.
    loss_sum: float = 0.0
    extra_sums: dict[str, float] = field(default_factory=dict)
    structures: int = 0
    seconds: float = 0.0
    best_metric: float = math.inf
    best_epoch: int = 0
    # Patience: the metric last seen to improve by enough, and the epochs since.
    reference: float = math.inf
    waited: int = 0
    epoch_metrics: dict[str, dict[str, list[float]]] = field(default_factory=dict)


class Trainer:
    """Fits the trainable parameters of a model.

    Args:
        model: what trains is already chosen (``requires_grad``).
        objectives: what is asked of each target.
        training, validation: batches.
        options: ``architecture.training``.
        learning_rate: the highest.
        callbacks: see :class:`Callbacks`.
        extra_losses: terms added to the loss of each batch.

    Raises:
        TrainingError: no batch would be left, or the metric that picks the best model cannot
            be computed.
    """

    def __init__(
        self,
        model: Potential,
        objectives: Mapping[str, Objective],
        training: Loader,
        validation: Loader,
        options: TrainingOptions,
        learning_rate: float,
        callbacks: Callbacks | None = None,
        extra_losses: Sequence[ExtraLoss] = (),
    ) -> None:
        self.model = model
        self.objectives = dict(objectives)
        self.wanted = {name: (o.forces, o.stress) for name, o in self.objectives.items()}
        self.training, self.validation = training, validation
        self.options = options
        self.learning_rate = learning_rate
        self.callbacks = callbacks or Callbacks()
        self.extra_losses = tuple(extra_losses)
        self.parameters = {n: p for n, p in model.network.named_parameters() if p.requires_grad}
        self.optimizer = make_optimizer(self.parameters, learning_rate, options.weight_decay)
        self.average = WeightAverage(self.parameters, options.ema) if options.ema else None
        self.progress = _Progress()
        self.total_steps = sum(training.num_batches(e) for e in range(options.num_epochs))
        if self.total_steps == 0:
            raise TrainingError(
                f"min_atoms_per_batch ({options.min_atoms_per_batch}) leaves out every batch: "
                "choose a smaller number, or a larger max_atoms_per_batch."
            )
        check_metric(options.best_model_metric, validation.label_names, self.wanted)

    def fit(self) -> TrainingResult:
        """Train until the last epoch, early stopping or an interrupt.

        Raises:
            TrainingError: the loss or its gradient is not a number.
        """
        stopped_early = self._patience_ran_out()  # true when such a run is resumed
        with InterruptGuard() as guard:
            while self.progress.epoch < self.options.num_epochs and not stopped_early:
                record = self._run_epoch(guard)
                if record is None:
                    self.callbacks.save()
                    return self._result(finished=False, stopped_early=False)
                stopped_early = self._patience_ran_out()
                last = stopped_early or self.progress.epoch == self.options.num_epochs
                if last or self.progress.epoch % self.options.checkpoint_interval == 0:
                    self.callbacks.save()
        return self._result(finished=True, stopped_early=stopped_early)

    def _result(self, finished: bool, stopped_early: bool) -> TrainingResult:
        p = self.progress
        return TrainingResult(finished, p.epoch, p.best_epoch, p.best_metric, stopped_early)

    def _run_epoch(self, guard: InterruptGuard) -> EpochRecord | None:
        """One epoch, from the batch where the progress stands; None when interrupted."""
        progress = self.progress
        started = time.perf_counter() - progress.seconds
        self.model.train()
        metrics = {n: Metrics(n, progress.epoch_metrics.get(n)) for n in self.objectives}
        num_batches = self.training.num_batches(progress.epoch)
        for batch in self.batches(progress.epoch, progress.batch):
            loss, *extra = self.step(batch, metrics)
            progress.loss_sum += loss
            for term, value in zip(self.extra_losses, extra, strict=True):
                sums = progress.extra_sums
                sums[term.name] = sums.get(term.name, 0.0) + value
            progress.batch += 1
            progress.step += 1
            progress.structures += batch.num_structures
            progress.seconds = time.perf_counter() - started
            rate = progress.structures / max(progress.seconds, 1e-9)
            mean_loss = progress.loss_sum / progress.batch
            self.callbacks.step(progress.batch, num_batches, mean_loss, metrics, rate)
            if guard.requested:
                progress.epoch_metrics = {n: m.state() for n, m in metrics.items()}
                return None
        return self._end_epoch(metrics, num_batches, started)

    def batches(self, epoch: int, start_batch: int = 0) -> Iterator[Batch]:
        """The batches of an epoch, on the model's device and in its dtype."""
        made = self.training.epoch(epoch, start_batch=start_batch)
        return each("batch", on_device(made, self.model.device, self.model.dtype))

    def step(self, batch: Batch, metrics: Mapping[str, Metrics]) -> list[float]:
        """Forward, loss, backward, update.

        Returns:
            The loss and, one by one, the extra losses that are part of it.

        Raises:
            TrainingError: the loss or its gradient is not a number; nothing was updated.
        """
        self._set_learning_rate()
        self.optimizer.zero_grad(set_to_none=True)
        with stage("energies"):  # the potential marks the derivatives within
            predictions = self.model.predict_many(batch, self.wanted, create_graph=True)
        with stage("loss"):
            loss = batch_loss(batch, predictions, self.objectives)
        with stage("backward"):
            # Named inputs: the edge vectors ask for gradients too, and nobody reads theirs.
            loss.backward(inputs=list(self.parameters.values()))
        extra = [self._add_extra(term).to(loss) for term in self.extra_losses]
        with stage("update"):
            losses = torch.stack([loss.detach(), *extra])
            losses[0] = losses.sum()
            values = self._clip(losses, batch)
            self.optimizer.step()
            if self.average is not None:
                self.average.update()
        with stage("metrics"):
            for name, prediction in predictions.items():
                metrics[name].update(batch, prediction)
        return values

    def _add_extra(self, term: ExtraLoss) -> Tensor:
        """Add the gradient of an extra loss for the batch under way; its value, a scalar.

        One term after the other, so that the memory of one graph is enough for all.
        """
        with stage(term.name):
            value = term(self.progress.epoch, self.progress.batch)
            if value is None:
                return torch.zeros(())
            if value.requires_grad:
                value.backward(inputs=list(self.parameters.values()))
            return value.detach()

    def _set_learning_rate(self) -> None:
        rate = self.learning_rate * learning_rate_factor(
            self.progress.step,
            self.total_steps,
            self.options.warmup_fraction,
            self.options.scheduler,
        )
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def _clip(self, losses: Tensor, batch: Batch) -> list[float]:
        """Clip the gradient; the losses as numbers, once they and the gradient are known to be."""
        norm = nn.utils.clip_grad_norm_(
            self.parameters.values(), self.options.grad_clip_norm or math.inf
        )
        # Both at once: reading a number makes the CPU wait until the GPU has done all before it.
        *values, length = torch.cat([losses, norm.to(losses).view(1)]).tolist()
        if not all(map(math.isfinite, values)):
            raise TrainingError(self._not_finite("loss", batch))
        if not math.isfinite(length):
            raise TrainingError(self._not_finite("gradient of the loss", batch))
        return values

    def _not_finite(self, what: str, batch: Batch) -> str:
        return (
            f"The {what} is not a finite number in epoch {self.progress.epoch + 1}, batch "
            f"{self.progress.batch + 1}: {batch.where}. Look at the labels and the closest "
            "distances of these structures; if they are sound, lower learning_rate. The state of "
            "the last save is untouched."
        )

    def _end_epoch(
        self, metrics: dict[str, Metrics], num_batches: int, started: float
    ) -> EpochRecord:
        """Validate, remember the best, report."""
        progress = self.progress
        rate = progress.structures / max(progress.seconds, 1e-9)
        loss = progress.loss_sum / max(1, num_batches)
        extra = {n: value / max(1, num_batches) for n, value in progress.extra_sums.items()}
        with self.average.applied() if self.average else nullcontext():
            validation = evaluate(self.model, self.validation.view(), self.wanted)
            metric = best_metric(validation, self.options.best_model_metric, self._validation_loss)
            progress.epoch += 1
            progress.batch, progress.loss_sum, progress.epoch_metrics = 0, 0.0, {}
            progress.extra_sums, progress.structures, progress.seconds = {}, 0, 0.0
            self._count_patience(metric)
            best = metric < progress.best_metric or progress.best_epoch == 0
            record = EpochRecord(
                epoch=progress.epoch,
                learning_rate=self.optimizer.param_groups[0]["lr"],
                loss=loss,
                train=metrics,
                validation=validation,
                metric=metric,
                best=best,
                seconds=time.perf_counter() - started,
                structures_per_second=rate,
                extra=extra,
            )
            if best:
                progress.best_metric, progress.best_epoch = metric, progress.epoch
                self.callbacks.best(self.model, record)
        self.callbacks.epoch(record)
        return record

    def _count_patience(self, metric: float) -> None:
        """Improvements too small to count add up until they do."""
        early, progress = self.options.early_stopping, self.progress
        least = early.min_delta if early else 0.0
        if metric < progress.reference * (1.0 - least):
            progress.reference, progress.waited = metric, 0
        else:
            progress.waited += 1

    def _patience_ran_out(self) -> bool:
        early = self.options.early_stopping
        return early is not None and self.progress.waited >= early.patience

    def _validation_loss(self) -> float:
        """Mean loss over the validation set, with the weights the model has now."""
        self.model.eval()
        total, count = 0.0, 0
        for batch in on_device(self.validation.view(), self.model.device, self.model.dtype):
            predictions = self.model.predict_many(batch, self.wanted)
            total += float(batch_loss(batch, predictions, self.objectives)) * batch.num_structures
            count += batch.num_structures
        return total / count

    def state(self) -> dict[str, Any]:
        """All that the rest of the run depends on: tensors and plain values only.

        The optimiser's tensors are the run's own: write them before the next step.
        """
        average, device = self.average, self.model.device
        return {
            "progress": dict(vars(self.progress)),
            "trained": {n: p.detach().cpu().clone() for n, p in self.parameters.items()},
            "optimizer": self.optimizer.state_dict(),
            "average": {n: v.cpu() for n, v in average.average.items()} if average else {},
            "average_updates": average.updates if average else 0,
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
            "total_steps": self.total_steps,
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state`.

        Raises:
            TrainingError: the state belongs to another choice of trained parameters.
        """
        trained = state["trained"]
        if trained.keys() != self.parameters.keys():
            raise TrainingError(
                "The saved run trains other parameters than these options choose: keep the "
                "fine-tuning method and its settings when going on with --restart, or start a "
                "new run with -c."
            )
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(trained[name])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.average is not None and state["average"]:
            self.average.load(state["average"], state["average_updates"])
        self.progress = _Progress(**state["progress"])
        torch.set_rng_state(state["rng"].cpu())
        if self.model.device.type == "cuda" and state["cuda_rng"] is not None:
            torch.cuda.set_rng_state(state["cuda_rng"].cpu(), self.model.device)
