"""The options of a run: schema, loading, overrides and legacy spellings."""

from __future__ import annotations

from .dataset import (
    DatasetOptions,
    ExtraDataOptions,
    GradientOptions,
    IndexedSet,
    SetOptions,
    SystemsOptions,
    TargetOptions,
)
from .finetune import (
    DEFAULT_TARGET_MODULES,
    FinetuneConfig,
    FinetuneMethod,
    FinetuneOptions,
    LegacyStart,
)
from .keeping import AnchorOptions, ReplayOptions, RetentionOptions
from .load import LoadedOptions, load_options, parse_options
from .loss import LossTerm, LossType, TargetLoss
from .model import LongRangeOptions, ModelOptions
from .options import ArchitectureOptions, Options
from .recipes import (
    LabelNoise,
    LossStage,
    PretrainOptions,
    RotationalConsistency,
    Unfreeze,
    WeightMean,
    first_epoch,
)
from .training import BaselineOptions, BestModelMetric, EarlyStopping, TrainingOptions

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
