"""The methods of the table, as options."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from pet_finetune.config.finetune import METHOD_SHORTHANDS
from pet_finetune.config.run_options import DEFAULT_LEARNING_RATES

SCRATCH = "scratch"


@dataclass(frozen=True)
class Method:
    """A way to fine-tune.

    Attributes:
        name: the method's name in ``options.yaml``, or ``scratch``.
        config: ``finetune.config``.
        finetune: further keys of ``finetune``.
        own_head: whether the foundation's head stays beside a copy that trains.
    """

    name: str
    config: dict[str, Any] = field(default_factory=dict)
    finetune: dict[str, Any] = field(default_factory=dict)
    own_head: bool = False

    @property
    def target(self) -> str:
        """What the energy to learn is called."""
        return "energy/new" if self.own_head else "energy"

    @property
    def learning_rate(self) -> float:
        """The default of the package for it."""
        shorthand = METHOD_SHORTHANDS.get(self.name)
        return DEFAULT_LEARNING_RATES[self.name if shorthand is None else shorthand[0]]


def _lora(**config: Any) -> Method:
    return Method("lora", config)


#: Rows of the table, in its order.
METHODS: dict[str, Method] = {
    "scratch": Method(SCRATCH),
    "full": Method("full"),
    "full, layer decay 0.8": Method("full", {"layer_decay": 0.8}),
    "full, unfreezing": Method("full", finetune={"unfreeze": {"every": 2}}),
    "heads": Method("heads"),
    "lora r8": _lora(rank=8),
    "lora r32": _lora(rank=32),
    "lora r32, all linear": _lora(rank=32, target_modules="all-linear"),
    "rslora r32": _lora(rank=32, alpha=8, use_rslora=True),
    "dora r32": Method("dora", {"rank": 32}),
    "lora+ r32": _lora(rank=32, loraplus_lr_ratio=4),
    "qlora r32, 8 bits": _lora(rank=32, quant_bits=8),
    "qlora r32, 4 bits": _lora(rank=32, quant_bits=4),
    "prompt": Method("prompt"),
    "full + replay": Method("full", finetune={"replay": {}}, own_head=True),
    "full + l2sp": Method("full", finetune={"anchor": "l2sp"}),
    "full + ewc": Method("full", finetune={"anchor": "ewc"}),
    "lora r32 + replay": Method("lora", {"rank": 32}, {"replay": {"structures": ["probe"]}}),
}
