"""An uncertainty from the last layer: ``finetune.llpr``, and for models as they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from pet_finetune import processes
from pet_finetune.checkpoint.archive import Checkpoint
from pet_finetune.checkpoint.native import save_checkpoint
from pet_finetune.checkpoint.opening import load_checkpoint, open_model
from pet_finetune.committee.calibration import Curves
from pet_finetune.committee.llpr import fit_last_layers
from pet_finetune.config.finetune import LastLayerOptions
from pet_finetune.data.loader import Loader
from pet_finetune.device import plain_torch
from pet_finetune.errors import TrainingError
from pet_finetune.log import FILE_ONLY, get_logger
from pet_finetune.model.potential import Potential
from pet_finetune.model.prediction import LastLayer
from pet_finetune.terminal import show

from .evaluation import LabelNames, chosen_target, read_labelled
from .extend import check_known
from .feature import Feature, Plan
from .loggers import calibration_table
from .run_files import RunFiles

_logger = get_logger(__name__)
_BATCH = 32  # structures, when a model gets an uncertainty that it was not trained with


@plain_torch()
def add_uncertainty(
    checkpoint: str | Path | Potential,
    training: Sequence[str | Path],
    validation: Sequence[str | Path],
    output: Path | None,
    options: LastLayerOptions,
    *,
    target: str | None = None,
    device: str = "auto",
    labels: LabelNames,
) -> Potential:
    """A model with a last-layer uncertainty that is made for it as it is.

    Arguments are those of :func:`pet_finetune.add_uncertainty`, and structures are in files.

    Raises:
        TrainingError: the files have no labels to calibrate with.
    """
    provenance = {}
    if not isinstance(checkpoint, Potential):
        opened = load_checkpoint(checkpoint)
        checkpoint, provenance = opened.model, opened.provenance
    model, adapted = open_model(checkpoint, None, device)
    spec = chosen_target(model, target, adapted)

    def batches(files: Sequence[str | Path]) -> Loader:
        structures = read_labelled(files, spec, labels)
        check_known(structures, model)
        return Loader(structures, model.cutoff, batch_size=_BATCH, dtype=model.dtype)

    found = fit_last_layers(model, batches(training), batches(validation), [spec.name], options)
    if spec.name not in found:
        raise TrainingError(
            f"The validation structures have no values of '{spec.name}' to calibrate with."
        )
    layer, curves = found[spec.name]
    model.set_uncertainty(spec.name, layer)
    if output is not None:
        save_checkpoint(output, model, provenance=provenance)
    if curves is not None:
        show(_table({spec.name: curves}))
    return model


def _table(curves: Mapping[str, Curves]) -> Table:
    table = calibration_table(curves)
    table.title = "calibration of the uncertainty, on the validation set"
    return table


class LastLayerUncertainty(Feature):
    """Makes an uncertainty of the best model from the training and the validation set."""

    name = "llpr"

    def __init__(self, options: LastLayerOptions) -> None:
        self._options = options

    def check(self, plan: Plan) -> None:
        """Make sure that it can be calibrated."""
        targets = plan.options.target_specs()
        if not plan.splits.validation:
            raise TrainingError(
                "finetune.llpr: the uncertainty is calibrated on the validation set, and there is "
                "none: errors on the training set are too small for it. Give a validation_set "
                "(0.1, say), or leave llpr out."
            )
        if not any(name in s.labels for s in plan.splits.validation for name in targets):
            raise TrainingError(
                "finetune.llpr: the uncertainty is calibrated on the validation set, which has no "
                f"values of {', '.join(targets)}. Forces alone do not do."
            )

    def complete(self, best: Checkpoint, files: RunFiles) -> Mapping[str, Any]:
        """Fit the uncertainties, give them to the model and write it with them."""
        trainer, model = self.trainer, best.model
        fitted: dict[str, tuple[LastLayer, Curves | None]] = {}
        with processes.alone():
            if processes.first():
                fitted = fit_last_layers(
                    model.eval(),
                    trainer.training.view(),
                    trainer.validation.view(),
                    list(trainer.objectives),
                    self._options,
                    trainer.training.seed,
                )
        fitted = processes.from_first(fitted)
        for target, (layer, _) in fitted.items():
            model.set_uncertainty(target, layer)
        if processes.first():
            save_checkpoint(files.best, model, provenance=best.provenance)
        curves = {name: curve for name, (_, curve) in fitted.items() if curve is not None}
        if curves:
            _logger.info("uncertainty\n%s", show(_table(curves)), extra=FILE_ONLY)
        return {"uncertainty": {name: curve.plain() for name, curve in curves.items()}}
