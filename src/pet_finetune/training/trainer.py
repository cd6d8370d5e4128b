"""The training loop.

One epoch is: every batch once (turned at random), then validation with the averaged weights if
there is an average, then the best model is kept. All that the next step depends on is in
:meth:`Trainer.state`, so a run that goes on from it ends with the weights it would have had.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from pet_finetune import kernels
from pet_finetune.config import TrainingOptions
from pet_finetune.data.batch import LabelledBatch
from pet_finetune.data.loader import Loader
from pet_finetune.data.prefetch import on_device
from pet_finetune.errors import TrainingError
from pet_finetune.log import get_logger
from pet_finetune.model import Potential
from pet_finetune.stages import each, stage

from .average import WeightAverage
from .consistency import ConsistencyLoss
from .extra import ExtraLoss, Seen
from .finite import check_and_clip
from .interrupt import InterruptGuard
from .loss import Objective, batch_loss, derivatives, objectives_at
from .metrics import Metrics, evaluate
from .noise import add_label_noise
from .optimizer import load_optimizer, make_optimizer, set_learning_rate
from .precision import mixed, precision_errors
from .records import Callbacks, EpochRecord, StepResult, TrainingResult
from .schedule import averages_weights, rate_at
from .selection import best_metric, best_window, check_metric, mean_loss
from .state import Progress
from .unfreeze import Unfreezing

_logger = get_logger(__name__)


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
        self.wanted = derivatives(self.objectives)
        self.training, self.validation = training, validation
        self.options = options
        self.learning_rate = learning_rate
        self.callbacks = callbacks or Callbacks()
        self.extra_losses = (*extra_losses, *self._own_extra_losses())
        self.parameters = {n: p for n, p in model.network.named_parameters() if p.requires_grad}
        self.optimizer = make_optimizer(model.network, self.parameters, options, learning_rate)
        averages = options.ema is not None or options.swa is not None
        self.average = WeightAverage(self.parameters, options.ema) if averages else None
        self.unfreezing = Unfreezing(
            model.network, self.parameters, options.finetune.unfreeze, options.num_epochs
        )
        model.network.recompute = options.gradient_checkpointing
        self.progress = Progress()
        if not any(self.num_steps(epoch) for epoch in range(options.num_epochs)):
            raise TrainingError(
                f"min_atoms_per_batch ({options.min_atoms_per_batch}) leaves out every batch: "
                "choose a smaller number, or a larger max_atoms_per_batch."
            )
        self._energies = [name for name, o in self.objectives.items() if o.energy]
        labels = validation.label_names
        check_metric(options.best_model_metric, labels, self.wanted, self._energies)

    def _own_extra_losses(self) -> list[ExtraLoss]:
        options = self.options.rotational_consistency
        if options is None:
            return []
        seed = self.training.seed
        return [ConsistencyLoss(self.model, self.objectives, options, self.options, seed)]

    def fit(self) -> TrainingResult:
        """Train until the last epoch, early stopping or an interrupt.

        Raises:
            TrainingError: the loss or its gradient is not a number.
        """
        early = self.options.early_stopping
        stopped_early = self.progress.patience_ran_out(early)  # when such a run is resumed
        self._log_precision()
        with InterruptGuard() as guard, kernels.Blocks().reused():
            while self.progress.epoch < self.options.num_epochs and not stopped_early:
                record = self._run_epoch(guard)
                if record is None:
                    self.callbacks.save()
                    return self._result(finished=False, stopped_early=False)
                stopped_early = self.progress.patience_ran_out(early)
                last = stopped_early or self.progress.epoch == self.options.num_epochs
                if last or self.progress.epoch % self.options.checkpoint_interval == 0:
                    self.callbacks.save()
        return self._result(finished=True, stopped_early=stopped_early)

    def _log_precision(self) -> None:
        """Say what the first batch loses to fewer digits. Changes nothing of the run."""
        precision = self.options.precision
        if precision is not None:
            batch = next(self.batches(0))
            _logger.info("%s", precision_errors(self.model, batch.graph, self.wanted, precision))

    def _result(self, finished: bool, stopped_early: bool) -> TrainingResult:
        p = self.progress
        return TrainingResult(finished, p.epoch, p.best_epoch, p.best_metric, stopped_early)

    def _run_epoch(self, guard: InterruptGuard) -> EpochRecord | None:
        """One epoch, from the batch where the progress stands; None when interrupted."""
        progress = self.progress
        started = time.perf_counter() - progress.seconds
        self.model.train()
        metrics = progress.metrics(list(self.objectives))
        num_batches = self.training.num_batches(progress.epoch)
        batches = self.batches(progress.epoch, progress.batch)
        while progress.batch < num_batches:
            size = min(self.options.gradient_accumulation_steps, num_batches - progress.batch)
            self._count(self.step(islice(batches, size), size, metrics))
            progress.seconds = time.perf_counter() - started
            mean_loss = progress.loss_sum / progress.batch
            rate = progress.structures_per_second
            self.callbacks.step(progress.batch, num_batches, mean_loss, metrics, rate)
            if guard.requested:
                progress.epoch_metrics = {n: m.state() for n, m in metrics.items()}
                return None
        return self._end_epoch(metrics, num_batches, started)

    def _count(self, result: StepResult) -> None:
        """Add an update to the progress."""
        progress, (loss, *extra) = self.progress, result.losses
        progress.loss_sum += loss
        for term, value in zip(self.extra_losses, extra, strict=True):
            progress.extra_sums[term.name] = progress.extra_sums.get(term.name, 0.0) + value
        progress.batch += result.batches
        progress.step += 1
        progress.structures += result.structures

    @cached_property
    def total_steps(self) -> int:
        """Updates in the whole run, counted when the first one needs it."""
        if self.training.same_every_epoch:
            return self.options.num_epochs * self.num_steps(0)
        return sum(self.num_steps(epoch) for epoch in range(self.options.num_epochs))

    def num_steps(self, epoch: int) -> int:
        """Updates in an epoch."""
        return -(-self.training.num_batches(epoch) // self.options.gradient_accumulation_steps)

    def batches(self, epoch: int, start_batch: int = 0) -> Iterator[LabelledBatch]:
        """The batches of an epoch, on the model's device and in its dtype."""
        made = self.training.epoch(epoch, start_batch=start_batch)
        return each("batch", on_device(made, self.model.device, self.model.dtype))

    def step(
        self, group: Iterable[LabelledBatch], size: int, metrics: Mapping[str, Metrics]
    ) -> StepResult:
        """One update of the weights, from the mean of the losses of some batches.

        Args:
            group: the batches; the gradient of one is taken before the next is asked for.
            size: how many there are.
            metrics: the errors are added to them.

        Raises:
            TrainingError: the loss or its gradient is not a number; nothing was updated.
        """
        progress, options = self.progress, self.options
        place = (progress.epoch, progress.step, self.total_steps)
        set_learning_rate(self.optimizer, rate_at(options, self.learning_rate, *place))
        parameters = self.unfreezing.at(progress.epoch)
        self.optimizer.zero_grad(set_to_none=True)
        losses, where, structures = [], [], 0
        for index, batch in enumerate(group, progress.batch):
            losses.append(self._add_gradient(batch, index, size, parameters, metrics))
            where.append(batch.where)
            structures += batch.graph.num_structures
        with stage("update"):
            values = check_and_clip(
                parameters, options.grad_clip_norm, torch.stack(losses), where,
                progress.epoch, progress.batch,
            )  # fmt: skip
            self.optimizer.step()
            if self.average is not None and self._averages():
                self.average.update()
        return StepResult(values, len(losses), structures)

    def _averages(self) -> bool:
        """Whether the update under way goes into the average."""
        return self.options.ema is not None or averages_weights(self.options, self.progress.epoch)

    def _add_gradient(
        self,
        batch: LabelledBatch,
        index: int,
        size: int,
        parameters: list[nn.Parameter],
        metrics: Mapping[str, Metrics],
    ) -> Tensor:
        """Forward, loss, backward; the losses as in :class:`StepResult`, [1 + extra losses].

        Args:
            batch: the one with number ``index`` in the epoch.
            index: from 0.
            size: how many batches the update takes the mean of.
            parameters: what trains.
            metrics: the errors are added to them.
        """
        epoch = self.progress.epoch
        with stage("energies"), self._precision():  # the potential marks the derivatives within
            predictions = self.model.predict_targets(batch.graph, self.wanted, create_graph=True)
        with stage("loss"):
            objectives = objectives_at(self.objectives, self.options, epoch)
            loss = batch_loss(self._noisy(batch, index), predictions, objectives)
        with stage("backward"):
            # Named inputs: the edge vectors ask for gradients too, and nobody reads theirs.
            (loss / size).backward(inputs=parameters)
        losses = [loss.detach()]
        seen = Seen(epoch, index, batch, predictions)
        # One after the other, so that the memory of one graph is enough for all.
        for term in self.extra_losses:
            with stage(term.name):
                with self._precision():
                    value = term(seen)
                if value is not None and value.requires_grad:
                    (value / size).backward(inputs=parameters)
            losses.append(torch.zeros_like(losses[0]) if value is None else value.detach().to(loss))
        with stage("metrics"):
            for name, prediction in predictions.items():
                metrics[name].update(batch, prediction)
        return torch.stack([torch.stack(losses).sum(), *losses[1:]])

    def _precision(self) -> AbstractContextManager[object]:
        return mixed(self.options.precision, self.model.device)

    def _noisy(self, batch: LabelledBatch, index: int) -> LabelledBatch:
        seed = (self.training.seed, self.progress.epoch, index)
        return add_label_noise(batch, self._energies, self.options.label_noise, seed)

    def _end_epoch(
        self, metrics: dict[str, Metrics], num_batches: int, started: float
    ) -> EpochRecord:
        """Validate, remember the best, report."""
        progress = self.progress
        rate = progress.structures_per_second
        loss = progress.loss_sum / max(1, num_batches)
        extra = {n: value / max(1, num_batches) for n, value in progress.extra_sums.items()}
        with self.average.applied() if self.average else nullcontext():
            validation = evaluate(self.model, self.validation.view(), self.wanted)
            own = best_metric(validation, self.options.best_model_metric, self._validation_loss)
            window = best_window(self.options)
            metric = progress.averaged(own, window)
            progress.next_epoch()
            progress.count_patience(metric, window, self.options.early_stopping)
            best = progress.is_best(metric, window)
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
                retention=self.callbacks.retention(self.model, progress.epoch),
            )
            if best:
                progress.best_metric, progress.best_epoch = metric, progress.epoch
                self.callbacks.best(self.model, record)
        self.callbacks.epoch(record)
        return record

    def _validation_loss(self) -> float:
        return mean_loss(self.model, self.validation.view(), self.objectives, self.options)

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
        load_optimizer(self.optimizer, state["optimizer"])
        if self.average is not None and state["average"]:
            self.average.load(state["average"], state["average_updates"])
        self.progress = Progress(**state["progress"])
        torch.set_rng_state(state["rng"].cpu())
        if self.model.device.type == "cuda" and state["cuda_rng"] is not None:
            torch.cuda.set_rng_state(state["cuda_rng"].cpu(), self.model.device)
