"""The options of a run: schema, loading, overrides and legacy spellings."""

from __future__ import annotations

from pet_finetune.config.dataset import (
    DatasetOptions,
    ExtraDataOptions,
    GradientOptions,
    IndexedSet,
    SetOptions,
    SystemsOptions,
    TargetOptions,
)
from pet_finetune.config.finetune import (
    DEFAULT_TARGET_MODULES,
    FinetuneConfig,
    FinetuneMethod,
    FinetuneOptions,
    LegacyStart,
)
from pet_finetune.config.keeping import AnchorOptions, ReplayOptions, RetentionOptions
from pet_finetune.config.load import LoadedOptions, load_options, parse_options
from pet_finetune.config.loss import LossTerm, LossType, TargetLoss
from pet_finetune.config.model import LongRangeOptions, ModelOptions
from pet_finetune.config.options import ArchitectureOptions, Options
from pet_finetune.config.recipes import (
    LabelNoise,
    LossStage,
    RotationalConsistency,
    WeightMean,
    first_epoch,
)
from pet_finetune.config.training import (
    BaselineOptions,
    BestModelMetric,
    EarlyStopping,
    TrainingOptions,
)
from pet_finetune.config.unfreeze import Unfreeze

__all__ = [
    "DEFAULT_TARGET_MODULES",
    "AnchorOptions",
    "ArchitectureOptions",
    "BaselineOptions",
    "BestModelMetric",
    "DatasetOptions",
    "EarlyStopping",
    "ExtraDataOptions",
    "FinetuneConfig",
    "FinetuneMethod",
    "FinetuneOptions",
    "GradientOptions",
    "IndexedSet",
    "LabelNoise",
    "LegacyStart",
    "LongRangeOptions",
    "LoadedOptions",
    "LossStage",
    "LossTerm",
    "LossType",
    "ModelOptions",
    "Options",
    "ReplayOptions",
    "RetentionOptions",
    "RotationalConsistency",
    "SetOptions",
    "SystemsOptions",
    "TargetLoss",
    "TargetOptions",
    "TrainingOptions",
    "Unfreeze",
    "WeightMean",
    "first_epoch",
    "load_options",
    "parse_options",
]
