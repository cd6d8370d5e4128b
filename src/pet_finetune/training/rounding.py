"""How much a model changes when its weights are rounded: the one start that is not exact."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from pet_finetune.config import Options
from pet_finetune.data.loader import Loader
from pet_finetune.log import get_logger
from pet_finetune.model import Potential, Prediction

_logger = get_logger(__name__)


@contextmanager
def rounding_told(options: Options, model: Potential, loader: Loader) -> Iterator[None]:
    """Log what happens to the predictions on the first batch within this context.

    Does nothing unless ``finetune.config.quant_bits`` is given.

    Args:
        options: of the run.
        model: quantised within the context.
        loader: of the training structures.
    """
    bits = options.finetune.config.quant_bits
    if bits is None or not options.is_finetuning:
        yield
        return
    target = next(iter(options.target_specs()))
    before = _predict(model, loader, target)
    yield
    after = _predict(model, loader, target)
    batch = next(iter(loader.view())).graph
    atoms = batch.atoms_per_structure.to(after.energy)
    energy = ((after.energy - before.energy) / atoms).square().mean().sqrt()
    assert after.forces is not None
    assert before.forces is not None
    change, size = after.forces - before.forces, before.forces
    _logger.info(
        "holding the frozen weights in %d bits is not exact: on the first batch it changes "
        "energies by %.2f meV/atom and forces by %.1f meV/A (%.1f %% of them), root mean squares",
        bits,
        1000 * float(energy),
        1000 * float(change.square().mean().sqrt()),
        100 * float(change.norm() / size.norm().clamp_min(1e-12)),
    )


def _predict(model: Potential, loader: Loader, target: str) -> Prediction:
    batch = next(iter(loader.view())).graph.to(model.device)
    return model.predict(batch, target)
