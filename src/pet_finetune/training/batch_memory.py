"""Batches against the memory: the largest that fits, and parts of one that does not."""

from __future__ import annotations

import copy
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from pet_finetune import processes
from pet_finetune.config.training import TrainingOptions
from pet_finetune.data.labelled_batch import LabelledBatch
from pet_finetune.data.loader import Loader
from pet_finetune.data.structure import evenly_apart
from pet_finetune.errors import is_out_of_memory
from pet_finetune.log import get_logger
from pet_finetune.model.potential import Potential
from pet_finetune.profiling import forget_peak, peak_gpu_mib, peak_resident_mib, resident_mib
from pet_finetune.terminal import Watch

from .feature import Feature
from .metrics import Metrics
from .objectives import Objective, batch_loss, derivatives
from .step import mixed

_logger = get_logger(__name__)
#: The part of the free memory that a step may take: a GPU is ours, other things run on a CPU.
_OF_GPU, _OF_CPU = 0.85, 0.5
#: Steps of an epoch at least, whatever the memory holds; structures that the trial is made of.
_STEPS, _TRIED = 10, 200
#: Atoms of the two steps on a CPU from which its memory is told.
_SMALL, _LARGE = 64, 512

#: The losses of a batch, whose gradient is added to the parameters and whose errors to metrics.
Take = Callable[[LabelledBatch, Mapping[str, Metrics]], dict[str, Tensor]]


class InParts:
    """Takes gradients of batches, in parts as soon as the memory was not enough for the whole.

    The parts of a batch are normalised by the whole of it, so that their sum is its gradient.
    """

    def __init__(
        self, loader: Loader, ready: Callable[[Iterator[LabelledBatch]], Iterator[LabelledBatch]]
    ) -> None:
        self.loader, self.count, self._ready = loader, 1, ready

    def losses(
        self,
        take: Take,
        batch: LabelledBatch,
        place: tuple[int, int],
        parameters: Sequence[nn.Parameter],
        metrics: Mapping[str, Metrics],
        features: Sequence[Feature] = (),
    ) -> dict[str, Tensor]:
        """The losses of a batch by name; errors in metrics and sums of features count once."""
        while True:
            before = [None if p.grad is None else p.grad.clone() for p in parameters]
            sums = [None if f.sums is None else f.sums.clone() for f in features]
            try:
                return self._losses(take, batch, place, metrics)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error) or self.count >= batch.graph.num_structures:
                    raise
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            # Outside of the handler, which holds the tensors of the step that failed.
            for parameter, gradient in zip(parameters, before, strict=True):
                parameter.grad = gradient
            for feature, value in zip(features, sums, strict=True):
                feature.sums = value
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            self.count *= 2
            _logger.warning(
                "a step with %d atoms ran out of memory (%s): from here on each batch is computed "
                "in %d parts, which changes only the time; a smaller batch_size or "
                "max_atoms_per_batch does without",
                batch.graph.num_atoms,
                reason,
                self.count,
            )

    def _losses(
        self,
        take: Take,
        batch: LabelledBatch,
        place: tuple[int, int],
        metrics: Mapping[str, Metrics],
    ) -> dict[str, Tensor]:
        if self.count == 1:
            return take(batch, metrics)
        # Errors of the first parts must not count where a later one fails.
        counted = {name: copy.deepcopy(own) for name, own in metrics.items()}
        sums: dict[str, Tensor] = {}
        for part in self._ready(self.loader.parts(*place, self.count)):
            if not part.graph.num_structures:
                continue
            for name, loss in take(part, counted).items():
                sums[name] = sums[name] + loss if name in sums else loss
        for name, own in metrics.items():
            vars(own).update(vars(counted[name]))
        return sums


def largest_batch(
    model: Potential,
    loader: Loader,
    objectives: Mapping[str, Objective],
    options: TrainingOptions,
) -> int:
    """Largest number of atoms in a batch, for all processes together.

    On a GPU steps of more and more atoms are tried until the memory is full; on a CPU two small
    ones tell what an atom takes, and half of the free memory may be used. The structures with most
    neighbours are taken for it. An epoch keeps at least ten steps.
    """
    atoms = loader.num_atoms
    largest, cap = int(atoms.max()), max(int(atoms.max()), int(atoms.sum()) // _STEPS)
    members = _crowded(loader)
    random = torch.get_rng_state()
    on_gpu = model.device.type == "cuda"
    with Watch("looking for the largest batch that fits"):
        try:
            trial = _Trial(model, loader, members, objectives, options)
            found = _on_gpu(trial, largest, cap) if on_gpu else _on_cpu(trial, largest, cap)
        finally:
            torch.set_rng_state(random)
    found = max(largest, min(found, cap))
    whole = min(cap, min(processes.gathered(found)) * processes.size())
    _logger.info(
        "max_atoms_per_batch: auto: %d atoms%s", whole, " (a tenth of the training set)"
        if whole == cap else "",
    )  # fmt: skip
    return whole


def _crowded(loader: Loader) -> np.ndarray:
    """Some structures, those with most edges an atom first."""
    count = len(loader.structures)
    some = np.unique(np.append(evenly_apart(count, _TRIED), int(loader.num_atoms.argmax())))
    edges = [loader.collate(some[k : k + 1], 0).graph.num_edges for k in range(len(some))]
    return some[np.argsort(-np.array(edges) / loader.num_atoms[some], kind="stable")]


class _Trial:
    """A step on chosen structures that changes nothing, and the memory that it took."""

    def __init__(
        self,
        model: Potential,
        loader: Loader,
        members: np.ndarray,
        objectives: Mapping[str, Objective],
        options: TrainingOptions,
    ) -> None:
        self._model, self._loader, self._members = model, loader, members
        self._objectives, self._options = objectives, options
        self.device = model.device

    def mib(self, atoms: int) -> float:
        """Memory of a step with about this many atoms, MiB."""
        sizes = np.cumsum(np.resize(self._loader.num_atoms[self._members], max(1, atoms)))
        count = max(1, int(np.searchsorted(sizes, atoms, "right")))
        batch = self._loader.collate(np.resize(self._members, count), 0)
        batch = batch.to(self.device, self._model.dtype)
        before = resident_mib() or 0.0
        forget_peak(self.device)
        held = torch.cuda.memory_allocated(self.device) / 2**20 if self._gpu else 0.0
        try:
            self._step(batch)
        finally:
            for parameter in self._model.network.parameters():
                parameter.grad = None
        peak = peak_gpu_mib(self.device) if self._gpu else peak_resident_mib()
        return max(1.0, (peak or 0.0) - (held if self._gpu else before))

    @property
    def _gpu(self) -> bool:
        return self.device.type == "cuda"

    def _step(self, batch: LabelledBatch) -> None:
        model, network = self._model, self._model.network
        kept, network.recompute = network.recompute, self._options.gradient_checkpointing
        parameters = [p for p in network.parameters() if p.requires_grad]
        try:
            with mixed(self._options.precision, model):
                found = model.predict_targets(
                    batch.graph, derivatives(dict(self._objectives)), create_graph=True
                )
            batch_loss(batch, found, dict(self._objectives)).backward(inputs=parameters)
        finally:
            network.recompute = kept


def _on_cpu(trial: _Trial, largest: int, cap: int) -> int:
    """From what two steps take; half of what is free."""
    small, large = max(_SMALL, largest), max(_LARGE, 2 * largest)
    if cap <= small:
        return cap
    first, second = trial.mib(small), trial.mib(min(large, cap))
    an_atom = max((second - first) / max(1, min(large, cap) - small), second / min(large, cap) / 4)
    return int(_OF_CPU * _free_mib() / an_atom)


def _free_mib() -> float:
    """Memory that a new process could have, MiB; those of this run on this host share it."""
    shared = processes.gathered(socket.gethostname()).count(socket.gethostname())
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) / 1024 / shared
    except OSError:
        pass
    return 4096.0


def _on_gpu(trial: _Trial, largest: int, cap: int) -> int:
    """Twice as many until it is too much, or nearly; then in proportion."""
    free = torch.cuda.mem_get_info(trial.device)[0] + (
        torch.cuda.memory_reserved(trial.device) - torch.cuda.memory_allocated(trial.device)
    )
    limit, atoms, fits = _OF_GPU * free / 2**20, max(_SMALL, largest), largest
    while True:
        try:
            took = trial.mib(min(atoms, cap))
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            took = 0.0
        torch.cuda.empty_cache()
        if not took:
            return fits
        fits = min(atoms, cap, int(min(atoms, cap) * limit / took))
        if atoms >= cap or 2 * took > limit:
            return min(cap, 2 * atoms, int(min(atoms, cap) * limit / took))
        atoms *= 2
