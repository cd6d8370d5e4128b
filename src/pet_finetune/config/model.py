"""Options of the network: ``architecture.model``, with metatrain's names and defaults."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from .base import Flag, NonNegativeInt, OneOf, PositiveFloat, PositiveInt, Section

__all__ = ["LongRangeOptions", "ModelOptions"]


class LongRangeOptions(Section):
    """Long-range Coulomb features of metatrain's PET; kept so that its files can be read."""

    enable: Flag = Field(
        default=False, description="Must be false: long-range features are not built."
    )
    use_ewald: Flag = Field(default=False, description="Ewald summation instead of P3M.")
    smearing: PositiveFloat = Field(default=1.4, description="Smearing width in Fourier space, Å.")
    kspace_resolution: PositiveFloat = Field(
        default=1.33, description="Resolution of the reciprocal-space grid, Å."
    )
    interpolation_nodes: PositiveInt = Field(
        default=5, description="Grid points of the interpolation."
    )


class ModelOptions(Section):
    """Size and shape of a PET network trained from scratch.

    When training starts from a checkpoint, the checkpoint's own values are used.
    """

    cutoff: PositiveFloat = Field(
        default=4.5, description="Radius within which atoms see each other, Å."
    )
    num_neighbors_adaptive: PositiveFloat | None = Field(
        default=None,
        description="Aim at this many neighbours: each atom gets its own, shorter cutoff. "
        "Null uses every neighbour within `cutoff`.",
    )
    adaptive_cutoff_method: Annotated[Literal["grid", "solver"], OneOf()] = Field(
        default="solver",
        description="How the adaptive cutoff is found: root finding (`solver`) or an average "
        "over probe distances (`grid`, used by older models).",
    )
    cutoff_function: Annotated[Literal["Cosine", "Bump"], OneOf()] = Field(
        default="Bump", description="Shape of the smooth step to zero at the cutoff."
    )
    cutoff_width: PositiveFloat = Field(default=0.5, description="Width of that step, Å.")
    cutoff_width_adaptive: PositiveFloat = Field(
        default=1.0, description="Width of the step used when counting neighbours adaptively, Å."
    )
    d_pet: PositiveInt = Field(
        default=128, description="Width of an edge token; divisible by `num_heads`."
    )
    d_head: PositiveInt = Field(default=128, description="Width of the hidden layers of the heads.")
    d_node: PositiveInt = Field(default=256, description="Width of a centre-atom token.")
    d_feedforward: PositiveInt = Field(
        default=256, description="Width of the hidden layer in a transformer block's MLP."
    )
    num_heads: PositiveInt = Field(
        default=8, description="Attention heads of each attention layer."
    )
    num_attention_layers: PositiveInt = Field(
        default=2, description="Transformer blocks in each message-passing layer."
    )
    num_gnn_layers: PositiveInt = Field(default=2, description="Message-passing layers.")
    normalization: Annotated[Literal["RMSNorm", "LayerNorm"], OneOf()] = Field(
        default="RMSNorm", description="Normalisation inside the transformer blocks."
    )
    activation: Annotated[Literal["SiLU", "SwiGLU"], OneOf()] = Field(
        default="SwiGLU", description="Activation of the transformer's MLP."
    )
    attention_temperature: PositiveFloat = Field(
        default=1.0, description="Divides the attention scores; below 1 sharpens them."
    )
    transformer_type: Annotated[Literal["PreLN", "PostLN"], OneOf()] = Field(
        default="PreLN",
        description="Normalise before (`PreLN`) or after (`PostLN`) attention and MLP.",
    )
    featurizer_type: Annotated[Literal["residual", "feedforward"], OneOf()] = Field(
        default="feedforward",
        description="One read-out after the last layer (`feedforward`) or one for each layer "
        "(`residual`, the scheme of the first PET).",
    )
    zbl: Flag = Field(
        default=False, description="Add the ZBL repulsion between nuclei at short distance."
    )
    long_range: LongRangeOptions = Field(
        default=LongRangeOptions(), description="Long-range Coulomb features; not supported."
    )
    system_conditioning: Flag = Field(
        default=False, description="Let the total charge and spin multiplicity enter the network."
    )
    max_charge: NonNegativeInt = Field(
        default=10, description="Largest absolute total charge the conditioning knows."
    )
    max_spin_multiplicity: PositiveInt = Field(
        default=10, description="Largest spin multiplicity (2S + 1) the conditioning knows."
    )
    num_prompts: NonNegativeInt = Field(
        default=0,
        description="Learned tokens of each attention layer that every neighbourhood attends to. "
        "Prompt tuning adds them to a trained model; 0, as in metatrain, has none.",
    )
