"""The methods of the table and the variants of the sweep, as options."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from pet_finetune.config.finetune import METHOD_SHORTHANDS
from pet_finetune.config.run_options import ADAMW_LEARNING_RATES, DEFAULT_LEARNING_RATES

SCRATCH = "scratch"


@dataclass(frozen=True)
class Method:
    """A way to fine-tune.

    Attributes:
        name: the method's name in ``options.yaml``, or ``scratch``.
        config: ``finetune.config``.
        finetune: further keys of ``finetune``.
        training: further keys of ``architecture.training``.
        own_head: whether the foundation's head stays beside a copy that trains.
    """

    name: str
    config: dict[str, Any] = field(default_factory=dict)
    finetune: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    own_head: bool = False

    @property
    def target(self) -> str:
        """What the energy to learn is called."""
        return "energy/new" if self.own_head else "energy"

    @property
    def learning_rate(self) -> float:
        """The default of the package for it with AdamW."""
        shorthand = METHOD_SHORTHANDS.get(self.name)
        rates = DEFAULT_LEARNING_RATES | ADAMW_LEARNING_RATES
        return rates[self.name if shorthand is None else shorthand[0]]


def _lora(**config: Any) -> Method:
    return Method("lora", config)


#: Rows of the table, in its order.
METHODS: dict[str, Method] = {
    "scratch": Method(SCRATCH),
    "full": Method("full"),
    "full, layer decay 0.8": Method("full", {"layer_decay": 0.8}),
    "full, unfreezing": Method("full", finetune={"unfreeze": {"every": 2}}),
    "heads": Method("heads"),
    "lora r4": _lora(rank=4),
    "lora r8": _lora(rank=8),
    "lora r16": _lora(rank=16),
    "rslora r16": _lora(rank=16, alpha=8, use_rslora=True),
    "dora r8": Method("dora", {"rank": 8}),
    "lora+ r8": _lora(rank=8, loraplus_lr_ratio=4),
    "qlora r8, 8 bits": _lora(rank=8, quant_bits=8),
    "qlora r8, 4 bits": _lora(rank=8, quant_bits=4),
    "prompt": Method("prompt"),
    "full + replay": Method("full", finetune={"replay": {}}, own_head=True),
    "full + l2sp": Method("full", finetune={"anchor": "l2sp"}),
    "full + ewc": Method("full", finetune={"anchor": "ewc"}),
    "lora r8 + replay": Method("lora", {"rank": 8}, {"replay": {"structures": ["probe"]}}),
}

#: What else the sweep tries, beside other learning rates.
VARIANTS: dict[str, Method] = {
    "lora r32": _lora(rank=32),
    "lora r8, constant": Method("lora", {"rank": 8}, training={"scheduler": "constant"}),
    "lora r8, ema 0.99": Method("lora", {"rank": 8}, training={"ema": 0.99}),
    "lora r8, ema 0.999": Method("lora", {"rank": 8}, training={"ema": 0.999}),
    "full, constant": Method("full", training={"scheduler": "constant"}),
    "full, ema 0.99": Method("full", training={"ema": 0.99}),
    "full, ema 0.999": Method("full", training={"ema": 0.999}),
}

ALL = METHODS | VARIANTS

#: Whose learning rate the sweep varies.
FAMILIES = ("full", "heads", "lora r8", "dora r8", "prompt", "qlora r8, 4 bits")
