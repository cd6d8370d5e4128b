"""SOAP, an optimiser of matrices: Adam in the eigenbases of their gradients (arXiv:2409.11321)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from inspect import unwrap
from typing import Any

import torch
from torch import Tensor, nn

#: Longer sides keep their coordinates: an eigenbasis costs the cube of its size.
LARGEST = 1024
#: The same holds for the longer side of a matrix twice as long as wide, if it is longer than this:
#: the shorter one brings most of what both do, for a fraction of the time.
SMALL = 128
#: A rotated side that is longer is cut into equal parts of at most this size, each with a basis of
#: its own: the time of a step goes with the size of the bases, and errors hardly do.
BLOCK = 128
# A matrix whose update goes nearly everywhere against its gradient moves the rest at most this much
# further, inversely.
_LEAST_KEPT = 0.1
#: Updates between two looks at the eigenbases, which change slowly and cost a decomposition each.
REFRESH = 10


@dataclass
class _Stack:
    """Matrices of one shape in one group, which are computed with as one batch.

    Attributes:
        parameters: k matrices, [m, n] each.
        moments: ``exp_avg`` and ``exp_avg_sq``, [k, b, h, w], both in the eigenbases of the b
            blocks that a matrix is cut into; of each side that is rotated the running mean of the
            gradients' products, ``left`` [k, b, h, h] and ``right`` [k, b, w, w], and its
            eigenvectors as columns, ``left_basis`` and ``right_basis``.
        steps: gradients seen by each matrix.
    """

    parameters: list[Tensor]
    moments: dict[str, Tensor]
    steps: list[int] = field(default_factory=list)

    def blocks(self, matrices: Tensor) -> Tensor:
        """[i, m, n] to [i, b, h, w]."""
        height, width = self.moments["exp_avg"].shape[-2:]
        cut = matrices.unflatten(2, (-1, width)).unflatten(1, (-1, height))
        return cut.transpose(2, 3).flatten(1, 2).contiguous()

    def whole(self, blocks: Tensor) -> Tensor:
        """[i, b, h, w] to [i, m, n]."""
        across = self.parameters[0].shape[1] // blocks.shape[-1]
        return blocks.unflatten(1, (-1, across)).transpose(2, 3).flatten(3, 4).flatten(1, 2)

    def due(self) -> Iterator[tuple[int, list[int]]]:
        """Rows of the stack that have a gradient, by how many they have seen before."""
        rows = defaultdict(list)
        for row, parameter in enumerate(self.parameters):
            if parameter.grad is not None:
                rows[self.steps[row]].append(row)
        yield from sorted(rows.items())


class LightOptimizer(torch.optim.Optimizer):
    """An optimiser that leaves torch's compiler alone: torch's own import it, which takes 1.2 s.

    They do so to be left out of compiled graphs, and no optimiser is part of one here.
    """

    add_param_group = unwrap(torch.optim.Optimizer.add_param_group)
    zero_grad = unwrap(torch.optim.Optimizer.zero_grad)
    state_dict = unwrap(torch.optim.Optimizer.state_dict)
    load_state_dict = unwrap(torch.optim.Optimizer.load_state_dict)


class AdamW(LightOptimizer, torch.optim.AdamW):
    """torch's."""

    step = torch.no_grad()(unwrap(torch.optim.AdamW.step))


class SOAP(LightOptimizer):
    """Adam for matrices, in coordinates in which their entries hardly correlate.

    A running mean of G Gᵀ and of Gᵀ G is kept for the gradients G of each matrix. The gradient is
    rotated into the eigenvectors of both, Adam's update is computed there and rotated back. The
    eigenvectors are renewed every ``refresh`` steps by one step of orthogonal iteration. The first
    gradient of a matrix gives the first eigenvectors and moves nothing, as in the reference.

    Matrices of one shape are batched, and one without a gradient is left alone, step and all.

    Args:
        params: matrices, or groups of them.
        lr: learning rate.
        betas: decay of the mean of gradients, and of the means of their squares and products.
        eps: added to the root of the mean square.
        weight_decay: decoupled, as in AdamW.
        refresh: steps between two renewals of the eigenvectors.
        largest: sides longer than this are not rotated, nor those longer than :data:`SMALL` that
            are twice as long as the other; those longer than :data:`BLOCK` in parts.
        cautious: whether numbers that the mean would move against the present gradient stay,
            and the others move further in return (arXiv:2411.16085).

    Raises:
        ValueError: a parameter is no matrix.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.95, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        refresh: int = REFRESH,
        largest: int = LARGEST,
        cautious: bool = True,
    ) -> None:
        defaults = {
            "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay,
            "refresh": refresh, "largest": largest, "cautious": cautious,
        }  # fmt: skip
        super().__init__(params, defaults)
        if any(p.dim() != 2 for group in self.param_groups for p in group["params"]):
            raise ValueError("SOAP is for matrices: give parameters of other shapes to AdamW.")
        self._stacks = [_stacked(group, self.state) for group in self.param_groups]

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a saved state; one of earlier runs has no word of caution."""
        super().load_state_dict(dict(state_dict))
        for group in self.param_groups:
            group.setdefault("cautious", False)
        self._stacks = [_stacked(group, self.state) for group in self.param_groups]

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update all parameters that have a gradient."""
        for group, stacks in zip(self.param_groups, self._stacks, strict=True):
            for stack in stacks:
                for seen, rows in stack.due():
                    _step(group, stack, rows, seen)
                    for row in rows:
                        stack.steps[row] = seen + 1
                        self.state[stack.parameters[row]]["step"] = seen + 1


def _stacked(group: Mapping[str, Any], state: Mapping[Tensor, dict[str, Any]]) -> list[_Stack]:
    """The matrices of a group by shape; what ``state`` holds of each becomes part of its stack."""
    shapes = defaultdict(list)
    for parameter in group["params"]:
        shapes[parameter.shape, parameter.dtype, parameter.device].append(parameter)
    stacks = []
    for members in shapes.values():
        fresh = _fresh(members[0], group["largest"])
        own = [state[p] or {"step": 0, **fresh} for p in members]
        stack = _Stack(members, {}, [int(s["step"]) for s in own])
        for name in (n for n in own[0] if n != "step"):  # a saved state has sides of its own
            saved = [s[name] if s[name].dim() == 3 else s[name][None] for s in own]  # once uncut
            stack.moments[name] = torch.stack(saved)
        for row, parameter in enumerate(members):
            views = {name: moment[row] for name, moment in stack.moments.items()}
            state[parameter].update({"step": stack.steps[row], **views})
        stacks.append(stack)
    return stacks


def _fresh(parameter: nn.Parameter, largest: int) -> dict[str, Tensor]:
    """The moments of a matrix that has seen no gradient."""
    short = min(parameter.shape)
    turns = [n <= largest and (n <= SMALL or n < 2 * short) for n in parameter.shape]
    sizes = [_part(n) if turn else n for n, turn in zip(parameter.shape, turns, strict=True)]
    blocks = parameter.numel() // (sizes[0] * sizes[1])
    made = {name: parameter.new_zeros(blocks, *sizes) for name in ("exp_avg", "exp_avg_sq")}
    for side, size, turn in zip(("left", "right"), sizes, turns, strict=True):
        if turn:
            made[side] = parameter.new_zeros(blocks, size, size)
            made[f"{side}_basis"] = torch.zeros_like(made[side])
    return {name: moment.detach() for name, moment in made.items()}


def _part(size: int) -> int:
    """How long the parts are where a side is cut into the fewest equal ones."""
    return next(n for n in range(min(size, BLOCK), 0, -1) if size % n == 0)


def _step(group: Mapping[str, Any], stack: _Stack, rows: list[int], seen: int) -> None:
    """Update some matrices of a stack, all of which have seen as many gradients."""
    every = len(rows) == len(stack.parameters)
    moments = stack.moments if every else {n: m[rows] for n, m in stack.moments.items()}
    parameters = [stack.parameters[row] for row in rows]
    gradient = stack.blocks(torch.stack([p.grad for p in parameters if p.grad is not None]))
    if seen > 0:
        rate, decay = group["lr"], group["lr"] * group["weight_decay"]
        own = (group["betas"], group["eps"], group["cautious"])
        change = _adam(moments, gradient, seen, *own)
        if decay:
            torch._foreach_mul_(parameters, 1.0 - decay)
        torch._foreach_add_(parameters, list(stack.whole(change).unbind()), alpha=-rate)
    # After the update, so that a gradient does not choose the basis that it is seen in.
    beta = group["betas"][1]
    for side, one, other in (("left", gradient, gradient.mT), ("right", gradient.mT, gradient)):
        if side in moments:
            mean, products = moments[side].flatten(0, 1), (one.flatten(0, 1), other.flatten(0, 1))
            mean.baddbmm_(*products, beta=beta, alpha=1.0 - beta)
            if seen == 0:  # the longest first
                vectors = torch.linalg.eigh(moments[side].double()).eigenvectors
                moments[f"{side}_basis"].copy_(vectors.flip(-1))
    if seen > 0 and seen % group["refresh"] == 0:
        _renew_bases(moments)
    if not every:
        for name, moment in moments.items():
            stack.moments[name][rows] = moment


def _adam(
    moments: Mapping[str, Tensor],
    gradient: Tensor,
    step: int,
    betas: tuple[float, float],
    eps: float,
    cautious: bool,
) -> Tensor:
    """Adam's update, found in the eigenbases, in the parameters' coordinates, [k, b, h, w]."""
    beta1, beta2 = betas
    rotated = _rotated(gradient, moments)
    correction = (1.0 - beta2**step) ** 0.5
    change = torch.zeros_like(rotated)
    # torch's own step of zeros, in one pass over the numbers. As the reference: eps beside the root
    # that is not yet corrected for its start at zero.
    torch._fused_adam_(
        [change], [rotated], [moments["exp_avg"]], [moments["exp_avg_sq"]], [],
        [torch.full((), float(step), device=change.device)],
        lr=-1.0, beta1=beta1, beta2=beta2, weight_decay=0.0, eps=eps / correction, amsgrad=False,
        maximize=False,
    )  # fmt: skip
    if cautious:
        kept = (change * rotated > 0).to(change)
        change *= kept / kept.mean((2, 3), keepdim=True).clamp_min(_LEAST_KEPT)
    return _rotated(change, moments, back=True)


def _rotated(matrix: Tensor, moments: Mapping[str, Tensor], back: bool = False) -> Tensor:
    """Into the eigenbases, or back from them; [k, b, h, w] as the argument."""
    if "left" in moments:
        basis = moments["left_basis"]
        matrix = (basis if back else basis.mT) @ matrix
    if "right" in moments:
        basis = moments["right_basis"]
        matrix = matrix @ (basis.mT if back else basis)
    return matrix


def _renew_bases(moments: Mapping[str, Tensor]) -> None:
    """One step of orthogonal iteration; the means move into the new eigenbases."""
    mean, square = moments["exp_avg"], moments["exp_avg_sq"]
    for side, axis in (("left", -2), ("right", -1)):
        if side not in moments:
            continue
        basis = moments[f"{side}_basis"]
        product = moments[side] @ basis
        # In falling order of the estimated eigenvalues, since QR takes the first columns as given.
        order = (basis * product).sum(-2).argsort(dim=-1, descending=True, stable=True)
        columns = order[..., None, :].expand_as(product)
        renewed = torch.linalg.qr(product.gather(-1, columns)).Q
        rotation = basis.mT @ renewed
        if side == "left":
            mean.copy_(rotation.mT @ mean)
            square.copy_(square.gather(axis, order[..., None].expand_as(square)))
        else:
            mean.copy_(mean @ rotation)
            square.copy_(square.gather(axis, order[..., None, :].expand_as(square)))
        basis.copy_(renewed)
