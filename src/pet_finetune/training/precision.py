"""Training in fewer digits: the network in bfloat16, all around it as it is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from pet_finetune.backends import EAGER, FUSED, FUSED_BFLOAT16, using
from pet_finetune.backends.fused import multiplies_bfloat16
from pet_finetune.graph import Batch
from pet_finetune.model import Potential, Prediction, Property

_MEV = 1000.0


@contextmanager
def mixed(precision: str | None, model: Potential) -> Iterator[None]:
    """The context in which a model computes.

    ``bf16-mixed`` has matrix products in bfloat16, norms, softmax and sums in float32: torch's
    autocast, or on a processor with bfloat16 instructions the fused kernels, which round the
    factors of a product and nothing else. Gradients need no scaling, as bfloat16 has the range of
    float32.

    Args:
        precision: ``architecture.training.precision``.
        model: what computes; in full precision again afterwards.
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
    """How far the predictions of a batch are from those in full precision, in words.

    Args:
        model: is put into evaluation mode, and back.
        batch: on the model's device.
        wanted: for each target, whether forces and stress are computed.
        precision: as for :func:`mixed`.
    """
    training = model.training
    model.eval()
    try:
        exact = model.predict_targets(batch, wanted)
        with mixed(precision, model):
            rough = model.predict_targets(batch, wanted)
    finally:
        model.train(training)
    parts = [_errors(rough[name], exact[name], batch) for name in wanted]
    return f"{precision}: first batch against float32: {'; '.join(parts)}"


def _errors(rough: Prediction | Property, exact: Prediction | Property, batch: Batch) -> str:
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
