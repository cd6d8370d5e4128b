"""The feature ``finetune.llpr``: an uncertainty from the last layer of the best model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pet_finetune import processes
from pet_finetune.checkpoint import Checkpoint, save_checkpoint
from pet_finetune.committee.last_layer_fit import Fitted, fit_last_layers
from pet_finetune.config.recipes import LastLayerOptions
from pet_finetune.errors import TrainingError
from pet_finetune.log import FILE_ONLY, get_logger

from .feature import Feature, Plan, TrainingRun
from .run_files import RunFiles
from .tables import calibration_table, show

__all__ = ["LastLayerUncertainty"]

_logger = get_logger(__name__)


class LastLayerUncertainty(Feature):
    """Makes an uncertainty of the best model from the training and the validation set.

    Args:
        options: how.
    """

    name = "llpr"

    def __init__(self, options: LastLayerOptions) -> None:
        self._options = options

    def check(self, plan: Plan) -> None:
        """Make sure that it can be calibrated.

        Raises:
            TrainingError: there is no validation set, or no label in it.
        """
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

    def start(self, trainer: TrainingRun, kept: Mapping[str, Any] | None) -> None:
        """Note the sets."""
        self._trainer = trainer

    def complete(self, best: Checkpoint, files: RunFiles) -> Mapping[str, Any]:
        """Fit the uncertainties, give them to the model and write it with them."""
        trainer, model = self._trainer, best.model
        fitted: dict[str, Fitted] = {}
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
        for target, own in fitted.items():
            model.set_uncertainty(target, own.layer)
        if processes.first():
            save_checkpoint(files.best, model, provenance=best.provenance)
        curves = {name: own.curves for name, own in fitted.items() if own.curves is not None}
        if curves:
            table = calibration_table(curves)
            table.title = "calibration of the uncertainty, on the validation set"
            _logger.info("uncertainty\n%s", show(table), extra=FILE_ONLY)
        return {"uncertainty": {name: curve.plain() for name, curve in curves.items()}}
