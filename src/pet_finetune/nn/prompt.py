"""Learned tokens that every neighbourhood attends to (LLaMA-Adapter, arXiv:2303.16199)."""

import torch
from torch import Tensor, nn


class Prompt(nn.Module):
    """The prompt of one attention layer, with a gate a head that starts at zero.

    The prompt has a softmax of its own, and the gate multiplies what it yields: with the gates at
    zero the layer is what it was. Each token answers to the prompt by itself, so nothing of an atom
    depends on another one that it did not depend on before.

    Names as in Hugging Face PEFT (``adaption_prompt``, ``adaption_gate``), which has one gate a
    layer where the paper has one a head.

    Args:
        length: number of learned tokens.
        width: of the attention's tokens.
        num_heads: of the attention.
    """

    def __init__(self, length: int, width: int, num_heads: int) -> None:
        super().__init__()
        # Rows of about unit size, as the norm before the attention gives the real tokens.
        self.adaption_prompt = nn.Parameter(torch.randn(length, width))
        self.adaption_gate = nn.Parameter(torch.zeros(num_heads))
        self.enabled = True

    def forward(self, queries: Tensor, projected: Tensor, scale: float) -> Tensor:
        """What the tokens read from the prompt, times the gates.

        Args:
            queries: [n, width] of the real tokens.
            projected: [length, 3 * width], what the projection that makes the tokens' queries, keys
                and values makes of the prompt.
            scale: of the scores.

        Returns:
            [n, width].
        """
        heads = self.adaption_gate.size(0)
        _, keys, values = projected.chunk(3, dim=-1)
        split = queries.unflatten(-1, (heads, -1)).transpose(0, 1)
        keys = keys.unflatten(-1, (heads, -1)).permute(1, 2, 0)
        values = values.unflatten(-1, (heads, -1)).transpose(0, 1)
        weights = torch.matmul(split * scale, keys).softmax(dim=-1)
        read = torch.matmul(weights, values) * self.adaption_gate[:, None, None]
        return read.transpose(0, 1).flatten(1)
