"""The training loop.

One epoch is: every batch once (rotated at random), then validation with the averaged weights if
there is an average, then the best model is kept. All that the next step depends on is in
:meth:`Trainer.state`, so a run that goes on from it ends with the weights it would have had.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import cached_property, partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from pet_finetune import processes
from pet_finetune.backends.choice import Arena
from pet_finetune.config.training import TrainingOptions
from pet_finetune.data.labelled_batch import LabelledBatch, on_device
from pet_finetune.data.loader import Loader
from pet_finetune.errors import TrainingError
from pet_finetune.log import get_logger
from pet_finetune.model.potential import Potential
from pet_finetune.model.prediction import Prediction, Property
from pet_finetune.profiling import each, stage
from pet_finetune.rng import generator_states, seed_process, set_generators
from pet_finetune.terminal import InterruptGuard, Watch

from .batch_memory import InParts
from .compiled_step import CompiledStep
from .feature import Feature, Step, states_of
from .metrics import Metrics, evaluate
from .objectives import (
    Objective,
    batch_loss,
    best_metric,
    best_window,
    derivatives,
    mean_loss,
    objectives_at,
)
from .optimizer import check_and_clip, load_optimizer, make_optimizer, rate_at, set_learning_rate
from .resume import Progress
from .step import (
    EpochRecord,
    StepProgress,
    StepResult,
    TrainingResult,
    add_gradients,
    add_part,
    mixed,
    precision_errors,
    same_tensors,
    total,
)

_logger = get_logger(__name__)
_LOSS = "loss"  # the whole, among its terms
_SECONDS_BETWEEN_SAVES = 600.0


class Trainer:
    """Fits the trainable parameters of a model.

    Args:
        model: what trains is already chosen (``requires_grad``).
        objectives: what is asked of each target.
        training, validation: batches.
        options: ``architecture.training``.
        learning_rate: the highest.
        features: what takes part, each at the hooks of :class:`~.feature.Feature`.
        kept: what features kept of the start of a run that goes on, by their names.

    Raises:
        TrainingError: no batch would be left.
    """

    def __init__(
        self,
        model: Potential,
        objectives: Mapping[str, Objective],
        training: Loader,
        validation: Loader,
        options: TrainingOptions,
        learning_rate: float,
        features: Sequence[Feature] = (),
        kept: Mapping[str, Any] | None = None,
    ) -> None:
        self.model = model
        self.objectives = dict(objectives)
        self.wanted = derivatives(self.objectives)
        self.training, self.validation = training, validation
        self.options = options
        self.learning_rate = learning_rate
        self.parameters = {n: p for n, p in model.network.named_parameters() if p.requires_grad}
        self.optimizer = make_optimizer(model.network, self.parameters, options, learning_rate)
        model.network.recompute = options.gradient_checkpointing
        self.progress = Progress()
        self._counted = (-1, 0)  # an epoch, and its updates
        self._guard = InterruptGuard()
        self._in_parts = InParts(training, self._ready)
        if not any(self.num_steps(epoch) for epoch in range(options.epochs)):
            raise TrainingError(
                f"min_atoms_per_batch ({options.min_atoms_per_batch}) leaves out every batch: "
                "choose a smaller number, or a larger max_atoms_per_batch."
            )
        self.features: tuple[Feature, ...] = ()
        for feature in features:
            self.add(feature, (kept or {}).get(feature.name))
        if not processes.first():
            seed_process((self.training.seed, self.progress.step))

    def add(self, feature: Feature, kept: Mapping[str, Any] | None = None) -> None:
        """Let a feature take part, and start it."""
        self.features = (*self.features, feature)
        with Watch(f"preparing {feature.name}"):
            feature.start(self, kept)

    def fit(self) -> TrainingResult:
        """Train until the last epoch, early stopping or an interrupt."""
        early, progress, finished = self.options.early_stopping, self.progress, True
        self._guard = InterruptGuard()
        self._saved = time.monotonic()
        stopped_early = progress.patience_ran_out(early)  # when such a run is resumed
        precision = self.options.precision
        if precision is not None:  # say what the first batch loses to fewer digits
            graph = next(self.batches(0)).graph
            _logger.info("%s", precision_errors(self.model, graph, self.wanted, precision))
        same_tensors([*self.model.parameters(), *self.model.buffers()])
        with ExitStack() as stack:
            stack.enter_context(self._guard)
            stack.enter_context(Arena().reused())
            for feature in reversed(self.features):
                stack.callback(feature.close)
            while finished and progress.epoch < self.options.epochs and not stopped_early:
                finished = self._run_epoch()
                stopped_early = finished and progress.patience_ran_out(early)
                last = stopped_early or progress.epoch == self.options.epochs
                if self._save_is_due() or not finished or last:
                    for feature in self.features:
                        feature.save()
        best = progress.best_epoch, progress.best_metric
        return TrainingResult(finished, progress.epoch, *best, stopped_early)

    def _save_is_due(self) -> bool:
        """Whether the state is saved now; a job that is killed loses what came after."""
        progress, now = self.progress, time.monotonic()
        due = progress.epoch == 1 or progress.epoch % self.options.checkpoint_interval == 0
        due = processes.from_first(due or now - self._saved > _SECONDS_BETWEEN_SAVES)
        self._saved = now if due else self._saved
        return due

    def _run_epoch(self) -> bool:
        """Run one epoch from the current batch on; False when interrupted."""
        progress = self.progress
        started = time.perf_counter() - progress.seconds
        self.model.train()
        # What is saved is of all processes: one of them goes on with it.
        metrics = progress.metrics(list(self.objectives), fresh=not processes.first())
        num_batches = self.training.num_batches(progress.epoch)
        batches = self.batches(progress.epoch, progress.batch)
        while progress.batch < num_batches:
            size = min(self.options.gradient_accumulation_steps, num_batches - progress.batch)
            result = self.step(islice(batches, size), size, metrics)
            progress.loss_sum += result.loss
            for name, value in result.extra.items():
                progress.extra_sums[name] = progress.extra_sums.get(name, 0.0) + value
            progress.batch += result.batches
            progress.step += 1
            progress.structures += result.structures
            progress.seconds = time.perf_counter() - started
            mean_loss, rate = progress.loss_sum / progress.batch, progress.structures_per_second
            ended = StepProgress(progress.batch, num_batches, mean_loss, metrics, rate)
            for feature in self.features:
                feature.step_ended(ended)
            # Alone, what came during this step counts now: nobody else has to know of it.
            if result.stop or (processes.size() == 1 and self._guard.requested):
                progress.epoch_metrics = {n: m.pooled().state() for n, m in metrics.items()}
                return False
        metrics = {name: own.pooled() for name, own in metrics.items()}
        self._end_epoch(metrics, num_batches, started)
        return True

    @cached_property
    def total_steps(self) -> int:
        """Updates in the whole run, if each epoch has as many as the first."""
        return self.options.epochs * max(1, self.num_steps(0))

    def _scheduled_step(self) -> float:
        """Completed steps of :attr:`total_steps`; all epochs have the same length in the schedule.

        So none has to be cut into batches before its time.
        """
        epoch, batches = self.progress.epoch, self.progress.batch
        each = self.total_steps // self.options.epochs
        done = batches // self.options.gradient_accumulation_steps
        return epoch * each + done * each / max(1, self.num_steps(epoch))

    def num_steps(self, epoch: int) -> int:
        """Updates in an epoch."""
        if self._counted[0] != epoch:  # each step of it asks
            size = self.options.gradient_accumulation_steps
            self._counted = (epoch, -(-self.training.num_batches(epoch) // size))
        return self._counted[1]

    def batches(self, epoch: int, start_batch: int = 0) -> Iterator[LabelledBatch]:
        """The batches of an epoch, on the model's device and in its dtype."""
        return each("batch", self._ready(self.training.epoch(epoch, start_batch=start_batch)))

    def _ready(self, made: Iterator[LabelledBatch]) -> Iterator[LabelledBatch]:
        """Batches on the model's device, in its dtype and order of edges."""
        ready = self.model.network.neighborhood.with_edges
        return on_device(made, self.model.device, self.model.dtype, ready)

    def step(
        self, group: Iterable[LabelledBatch], size: int, metrics: Mapping[str, Metrics]
    ) -> StepResult:
        """Update the weights once, from the mean of the losses of some batches.

        Args:
            group: the batches; the gradient of one is taken before the next is asked for.
            size: how many there are.
            metrics: the errors are added to them.

        Raises:
            TrainingError: the loss or its gradient is not a number; nothing was updated.
        """
        progress, options = self.progress, self.options
        place = (progress.epoch, self._scheduled_step(), self.total_steps)
        set_learning_rate(self.optimizer, rate_at(options, self.learning_rate, *place))
        for feature in self.features:
            feature.before_step(progress.epoch)
        parameters = [p for p in self.parameters.values() if p.requires_grad]
        self.optimizer.zero_grad(set_to_none=True)
        losses: list[dict[str, Tensor]] = []
        where, structures = [], 0
        for index, batch in enumerate(group, progress.batch):
            take = partial(self._add_gradient, index=index, size=size, parameters=parameters)
            at = progress.epoch, index
            found = self._in_parts.losses(take, batch, at, parameters, metrics, self.features)
            losses.append(found)
            where.append(batch.where)
            structures += batch.size
        names = list(dict.fromkeys(name for found in losses for name in found))
        zero = torch.zeros((), device=self.model.device)
        table = [torch.stack([found.get(name, zero) for name in names]) for found in losses]
        with stage("update"):
            stop = add_gradients(parameters, self._guard.requested)
            values = check_and_clip(
                parameters, options.grad_clip_norm, total(torch.stack(table)), where,
                progress.epoch, progress.batch,
            )  # fmt: skip
            self.optimizer.step()
            for feature in self.features:
                feature.after_update(progress.epoch)
        extra = dict(zip(names, values, strict=True))
        return StepResult(extra.pop(_LOSS), extra, len(losses), structures, stop)

    def _add_gradient(
        self,
        batch: LabelledBatch,
        metrics: Mapping[str, Metrics],
        *,
        index: int,
        size: int,
        parameters: list[nn.Parameter],
    ) -> dict[str, Tensor]:
        """Forward, loss, backward; the whole loss and the terms of features, by name."""
        loss, predictions = self._gradient_of_loss(batch, index, size, parameters)
        losses = {_LOSS: loss}
        step = Step(self.progress.epoch, index, batch, predictions)
        # One after the other, so that the memory of one graph is enough for all.
        for feature in self.features:
            if type(feature).losses is Feature.losses:
                continue
            with stage(feature.name):
                with mixed(self.options.precision, self.model):
                    terms = feature.losses(step)
                if not feature.shared:
                    terms = {name: batch.share * term for name, term in terms.items()}
                value = sum(terms.values())
                if isinstance(value, Tensor) and value.requires_grad:
                    (value / size).backward(inputs=parameters)
            losses |= {name: term.detach().to(loss) for name, term in terms.items()}
        with stage("metrics"):
            for name, prediction in predictions.items():
                metrics[name].update(batch, prediction)
        losses[_LOSS] = torch.stack(list(losses.values())).sum()
        return losses

    def _gradient_of_loss(
        self, batch: LabelledBatch, index: int, size: int, parameters: list[nn.Parameter]
    ) -> tuple[Tensor, Mapping[str, Prediction | Property]]:
        """The loss of a batch and its predictions; arguments as above."""
        objectives = objectives_at(self.objectives, self.options, self.progress.epoch)
        seen = batch
        for feature in self.features:
            seen = feature.labels(seen, self.progress.epoch, index)
        if self._compiled is not None:
            with stage("compiled step"):
                found = self._compiled(seen, objectives, parameters)
                if found is not None:
                    add_part(parameters, found.gradients, size)
                    return found.loss, found.predictions
        # The potential marks the derivatives within.
        with stage("energies"), mixed(self.options.precision, self.model):
            predictions = self.model.predict_targets(batch.graph, self.wanted, create_graph=True)
        with stage("loss"):
            loss = batch_loss(seen, predictions, objectives)
        with stage("backward"):
            # Named inputs: the edge vectors ask for gradients too, and nobody reads theirs.
            (loss / size).backward(inputs=parameters)
        return loss.detach(), predictions

    @cached_property
    def _compiled(self) -> CompiledStep | None:
        """Computes steps as compiled graphs, where the options have it so."""
        batches = self.total_steps * self.options.gradient_accumulation_steps
        return CompiledStep.chosen(self.model, self.wanted, self.options, batches)

    def _end_epoch(self, metrics: dict[str, Metrics], num_batches: int, started: float) -> None:
        """Validate, remember the best, report."""
        progress = self.progress
        rate = progress.structures_per_second
        loss = progress.loss_sum / max(1, num_batches)
        extra = {n: value / max(1, num_batches) for n, value in progress.extra_sums.items()}
        # Processors of different makes round differently: this does not add up.
        same_tensors(self.parameters.values())
        with ExitStack() as stack:
            for feature in self.features:
                stack.enter_context(feature.weights())
            validation = evaluate(self.model, self.validation.view(), self.wanted)
            own = best_metric(validation, self.options.best_model_metric, self._validation_loss)
            window = best_window(self.options)
            metric = progress.averaged(processes.from_first(own), window)
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
            )
            for feature in self.features:
                measured = feature.validate(self.model, progress.epoch)
                if measured is not None:
                    record.columns |= measured.columns
                    record.lines.append(measured.line)
            if best:
                progress.best_metric, progress.best_epoch = metric, progress.epoch
            for feature in self.features:
                feature.epoch_ended(record)

    def _validation_loss(self) -> float:
        return mean_loss(self.model, self.validation.view(), self.objectives, self.options)

    def state(self) -> dict[str, Any]:
        """State that the rest of the run depends on: tensors and plain values only.

        The optimiser's tensors are the run's own: write them before the next step.
        """
        return {
            "progress": dict(vars(self.progress)),
            "trained": {n: p.detach().cpu().clone() for n, p in self.parameters.items()},
            "optimizer": self.optimizer.state_dict(),
            "features": {f.name: state for f in self.features if (state := f.state())},
            **generator_states(self.model.device),
            "total_steps": self.total_steps,
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state`."""
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
        states = states_of(state)
        for feature in self.features:
            if feature.name in states:
                feature.load_state(states[feature.name])
        self.progress = Progress(**state["progress"])
        set_generators(state, self.model.device, (self.training.seed, self.progress.step))
