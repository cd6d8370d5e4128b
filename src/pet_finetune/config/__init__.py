"""The options of a run: schema, loading, overrides and legacy spellings."""

from __future__ import annotations

from .dataset import DatasetOptions, ExtraDataOptions, IndexedSet, SetOptions, SystemsOptions
from .finetune import (
    DEFAULT_TARGET_MODULES,
    FinetuneConfig,
    FinetuneMethod,
    FinetuneOptions,
    LegacyStart,
)
from .finetune_sections import (
    AnchorOptions,
    PretrainOptions,
    ReplayOptions,
    RetentionOptions,
    Unfreeze,
)
from .load import LoadedOptions, load_options, parse_options
from .run_options import ArchitectureOptions, LongRangeOptions, ModelOptions, Options
from .target import GradientOptions, TargetOptions
from .training import BaselineOptions, BestModelMetric, EarlyStopping, TrainingOptions
from .training_sections import (
    LabelNoise,
    LossStage,
    LossTerm,
    LossType,
    RotationalConsistency,
    TargetLoss,
    WeightMean,
    first_epoch,
)

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
    "PretrainOptions",
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
