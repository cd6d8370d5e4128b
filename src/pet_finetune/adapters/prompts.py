"""Prompt tuning: learned tokens in every attention layer (LLaMA-Adapter, arXiv:2303.16199)."""

from __future__ import annotations

from collections.abc import Iterator

from pet_finetune.errors import AdapterError
from pet_finetune.model import Potential
from pet_finetune.nn.attention import Attention, PromptTokens


def _attentions(model: Potential) -> Iterator[tuple[str, Attention]]:
    for path, module in model.network.named_modules():
        if isinstance(module, Attention):
            yield path, module


def prompts(model: Potential) -> dict[str, PromptTokens]:
    """The prompts of a model by their path in the network."""
    found = ((f"{path}.prompt", attention.prompt) for path, attention in _attentions(model))
    return {path: prompt for path, prompt in found if prompt is not None}


def add_prompts(model: Potential, length: int) -> None:
    """Give every attention layer of a model a fresh prompt, in place; no prediction changes.

    Raises:
        AdapterError: the model has prompts, from an earlier run.
    """
    if model.hypers.num_prompts:
        raise AdapterError(
            f"The model has {model.hypers.num_prompts} prompt tokens in each layer already, which "
            "an earlier run of prompt tuning left in it. Start from the model that run started "
            "from, or fine-tune this one with another method."
        )
    for _, attention in _attentions(model):
        width, heads = attention.output_linear.in_features, attention.num_heads
        prompt = PromptTokens(length, width, heads).to(device=model.device, dtype=model.dtype)
        attention.prompt = prompt.train(attention.training)
    _set_number(model, length)


def remove_prompts(model: Potential) -> None:
    """The opposite of :func:`add_prompts`."""
    for _, attention in _attentions(model):
        attention.prompt = None
    _set_number(model, 0)


def _set_number(model: Potential, length: int) -> None:
    model.hypers = model.hypers.model_copy(update={"num_prompts": length})
    model.network.options = model.hypers
