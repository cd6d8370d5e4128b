"""Fine-tune pre-trained PET interatomic potentials on your own data.

>>> import pet_finetune as pf  # doctest: +SKIP
>>> model = pf.load("foundation.ckpt")  # doctest: +SKIP
>>> result = pf.finetune(model, train_atoms, method=pf.Lora(), epochs=100)  # doctest: +SKIP
>>> atoms.calc = result.calculator()  # doctest: +SKIP

The public names are imported on first use, so that ``import pet_finetune`` (and with it
``pet-finetune --help``) does not wait for torch.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from pet_finetune.installation import __version__, provide_home

provide_home()  # before libraries are imported that need one

if TYPE_CHECKING:  # the same names, for those who check types
    from pet_finetune.api import EvaluationResult as EvaluationResult
    from pet_finetune.api import EvaluationSettings as EvaluationSettings
    from pet_finetune.api import FinetuneResult as FinetuneResult
    from pet_finetune.api import LabelNames as LabelNames
    from pet_finetune.api import PretrainResult as PretrainResult
    from pet_finetune.api import add_uncertainty as add_uncertainty
    from pet_finetune.api import evaluate as evaluate
    from pet_finetune.api import export as export
    from pet_finetune.api import finetune as finetune
    from pet_finetune.api import inspect as inspect
    from pet_finetune.api import pretrain as pretrain
    from pet_finetune.calculator import PETCalculator as PETCalculator
    from pet_finetune.checkpoint.opening import load as load
    from pet_finetune.checkpoint.opening import load_checkpoint as load_checkpoint
    from pet_finetune.errors import PetFinetuneError as PetFinetuneError
    from pet_finetune.keywords import Anchor as Anchor
    from pet_finetune.keywords import Dora as Dora
    from pet_finetune.keywords import Full as Full
    from pet_finetune.keywords import Heads as Heads
    from pet_finetune.keywords import Lora as Lora
    from pet_finetune.keywords import Prompt as Prompt
    from pet_finetune.keywords import Qlora as Qlora
    from pet_finetune.keywords import Replay as Replay
    from pet_finetune.keywords import Retention as Retention
    from pet_finetune.training.feature import Feature as Feature

#: Modules, and the public names that come from each.
_HOMES = {
    name: module
    for module, names in {
        "pet_finetune.api": (
            "finetune pretrain add_uncertainty evaluate inspect export FinetuneResult "
            "PretrainResult EvaluationResult EvaluationSettings LabelNames"
        ),
        "pet_finetune.calculator": "PETCalculator",
        "pet_finetune.checkpoint.opening": "load load_checkpoint",
        "pet_finetune.errors": "PetFinetuneError",
        "pet_finetune.keywords": "Lora Dora Qlora Prompt Heads Full Replay Anchor Retention",
        "pet_finetune.training.feature": "Feature",
    }.items()
    for name in names.split()
}

__all__ = ["__version__", *_HOMES]


class _Package(ModuleType):
    """Keeps a folder of the package from taking the place of a public name: ``export``."""

    def __setattr__(self, name: str, value: Any) -> None:
        """Bind a name; importing a folder binds its name, too."""
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    """Import the public ``name`` from its home module (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Names shown by ``dir()``: those already imported and those that can be."""
    return sorted({*globals(), *__all__})
