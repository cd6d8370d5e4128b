"""SOAP: it does what the paper says, in batches as one by one, and goes on exactly."""

from __future__ import annotations

import builtins
import io

import pytest
import torch
from torch import nn

from pet_finetune.training.soap import SOAP, AdamW

SHAPES = ((6, 6), (6, 6), (4, 4), (1, 1), (6, 6))


def matrices(shapes=SHAPES, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float64)) for s in shapes]


def targets(parameters):
    """For each matrix a target, and a change of the rows that correlates them."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for p in parameters:
        mix = torch.randn(len(p), len(p), generator=generator, dtype=torch.float64)
        made.append((mix, torch.randn(p.shape, generator=generator, dtype=torch.float64)))
    return made


def loss_of(parameters, wanted):
    """No quadratic: its gradients would not change direction as those of a network do."""
    return sum(
        ((mix @ (p - target)).abs() ** 1.5).sum()
        for p, (mix, target) in zip(parameters, wanted, strict=True)
    )


def train(parameters, optimizer, steps, wanted=None):
    wanted = wanted or targets(parameters)
    for _ in range(steps):
        optimizer.zero_grad(set_to_none=True)
        loss_of(parameters, wanted).backward()
        optimizer.step()
    return loss_of(parameters, wanted).item()


class OneByOne:
    """The paper's algorithm for a list of matrices, with means kept in plain coordinates.

    With caution (arXiv:2411.16085) numbers stay that would move against their gradient.

    On 2026-11-30 it and ``SOAP`` agreed to 1e-6 over 60 steps with ``pytorch_optimizer`` 4.1,
    there with its QR in double precision too.
    """

    def __init__(self, parameters, lr, refresh, cautious):
        self.cautious = cautious
        self.parameters, self.lr, self.refresh, self.beta = parameters, lr, refresh, 0.95
        self.seen, self.state = 0, [{} for _ in parameters]

    def zero_grad(self, set_to_none):
        for p in self.parameters:
            p.grad = None

    @torch.no_grad()
    def step(self):
        b = self.beta
        for p, s in zip(self.parameters, self.state, strict=True):
            g = p.grad
            if not s:
                s |= {"m": 0 * g, "v": 0 * g, "l": (1 - b) * g @ g.T, "r": (1 - b) * g.T @ g}
                s["ql"], s["qr"] = (torch.linalg.eigh(s[k])[1].flip(1) for k in "lr")
                continue
            s["m"] = b * s["m"] + (1 - b) * g
            s["v"] = b * s["v"] + (1 - b) * (s["ql"].T @ g @ s["qr"]) ** 2
            mean = s["ql"].T @ s["m"] @ s["qr"] / (1 - b**self.seen)
            change = mean / (s["v"].sqrt() + 1e-8)
            if self.cautious:
                kept = mean * (s["ql"].T @ g @ s["qr"]) > 0
                change = torch.where(kept, change, 0.0) / max(kept.double().mean(), 0.1)
            p -= self.lr * (1 - b**self.seen) ** 0.5 * s["ql"] @ change @ s["qr"].T
            s["l"], s["r"] = b * s["l"] + (1 - b) * g @ g.T, b * s["r"] + (1 - b) * g.T @ g
            if self.seen % self.refresh == 0:
                for side, axis in (("l", 0), ("r", 1)):
                    product = s[side] @ s[f"q{side}"]
                    order = (s[f"q{side}"] * product).sum(0).argsort(descending=True)
                    s["v"] = s["v"].index_select(axis, order)
                    s[f"q{side}"] = torch.linalg.qr(product[:, order])[0]
        self.seen += 1


@pytest.mark.parametrize("cautious", [False, True])
def test_it_is_the_algorithm_of_the_paper(cautious):
    ours, theirs = matrices(), matrices()
    optimizer = SOAP(ours, lr=0.03, refresh=3, cautious=cautious)
    for parameters, own in ((ours, optimizer), (theirs, OneByOne(theirs, 0.03, 3, cautious))):
        # The first bases are of another gradient: in its own one has zeros, whose sign is chance.
        train(parameters, own, 1, [(mix, -target) for mix, target in targets(parameters)])
        train(parameters, own, 25)
    for a, b, start in zip(ours, theirs, matrices(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
        assert (a - start).abs().max() > 0.1


def test_axes_of_its_own_do_not_matter_to_it_but_to_adam():
    """Where a problem is rotated, the path is rotated: Adam's is another."""

    def path(make, turn):
        (p,) = matrices([(6, 6)])
        rotated = nn.Parameter(turn @ p.detach())
        ((mix, target),) = targets([p])
        train([rotated], make([rotated]), 15, [(mix @ turn.T, turn @ target)])
        return turn.T @ rotated.detach()

    same = torch.eye(6, dtype=torch.float64)
    turn = torch.linalg.qr(matrices([(6, 6)], seed=2)[0].detach()).Q
    # Without caution, which looks at the sign of zeros in the bases of the first gradient.
    plain = {"lr": 0.03, "refresh": 5, "cautious": False}
    soap, adam = (lambda p: SOAP(p, **plain)), (lambda p: torch.optim.Adam(p, lr=0.03))
    torch.testing.assert_close(path(soap, same), path(soap, turn), rtol=1e-4, atol=1e-4)
    assert (path(adam, same) - path(adam, turn)).abs().max() > 0.05


def test_a_matrix_without_a_gradient_is_left_alone_and_starts_late_as_on_its_own():
    """Gradual unfreezing, and heads whose target is not in every batch."""
    together, alone = matrices([(6, 4)] * 3), matrices([(6, 4)] * 3)
    optimizer = SOAP(together, lr=0.03, refresh=2, weight_decay=0.1)
    separate = [SOAP([p], lr=0.03, refresh=2, weight_decay=0.1) for p in alone]
    wanted = targets(together)
    for step in range(12):
        given = [step >= 3, True, step % 2 == 0]
        for parameters, optimizers in ((together, [optimizer]), (alone, separate)):
            for p in parameters:
                p.grad = None
            loss_of(parameters, wanted).backward()
            for p, has in zip(parameters, given, strict=True):
                p.grad = p.grad if has else None
            before = [p.detach().clone() for p in parameters]
            for each in optimizers:
                each.step()
            for p, old, has in zip(parameters, before, given, strict=True):
                assert has or torch.equal(p, old)
    for a, b, start in zip(together, alone, matrices([(6, 4)] * 3), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
        assert not torch.equal(a, start)
    assert [optimizer.state[p]["step"] for p in together] == [9, 12, 6]


@pytest.mark.parametrize("stop", [0, 1, 2, 3, 4, 7])
def test_it_goes_on_from_a_file_as_if_it_had_not_stopped(stop):
    def make(parameters):
        return SOAP(parameters, lr=0.03, refresh=3)

    whole, parts = matrices(), matrices()
    wanted = targets(whole)
    train(whole, make(whole), 8, wanted)
    first = make(parts)
    train(parts, first, stop, wanted)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    resumed = make(parts)
    resumed.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    train(parts, resumed, 8 - stop, wanted)
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))


def test_long_sides_keep_their_coordinates():
    (p,) = matrices([(9, 3)])
    optimizer = SOAP([p], largest=5)
    assert {n for n in optimizer.state[p] if "basis" in n} == {"right_basis"}
    before = loss_of([p], targets([p])).item()
    assert train([p], optimizer, 30) < before


def test_of_two_unequal_long_sides_the_shorter_is_rotated():
    def rotated(*shape):
        (p,) = matrices([shape])
        return {n.removesuffix("_basis") for n in SOAP([p]).state[p] if n.endswith("basis")}

    assert rotated(128, 8) == rotated(130, 130) == rotated(200, 130) == {"left", "right"}
    assert rotated(512, 130) == rotated(260, 8) == {"right"}
    assert rotated(130, 260) == {"left"}
    assert not rotated(1030, 1030)


def test_a_saved_state_says_which_sides_are_rotated(monkeypatch):
    """A run that began where both were goes on so."""
    whole, parts = matrices([(9, 3)]), matrices([(9, 3)])
    optimizer = SOAP(whole, lr=0.03)
    train(whole, optimizer, 6)
    first = SOAP(parts, lr=0.03)
    train(parts, first, 3)
    monkeypatch.setattr("pet_finetune.training.soap.SMALL", 5)
    assert "left_basis" not in SOAP(matrices([(9, 3)])).state_dict()["state"][0]
    resumed = SOAP(parts, lr=0.03)
    resumed.load_state_dict(first.state_dict())
    train(parts, resumed, 3)
    assert torch.equal(parts[0], whole[0])


def test_a_long_rotated_side_is_cut_into_parts_that_are_matrices_of_their_own(monkeypatch):
    monkeypatch.setattr("pet_finetune.training.soap.BLOCK", 4)
    (whole,), parts = matrices([(6, 8)]), [nn.Parameter(torch.zeros(3, 4).double()) for _ in "1234"]
    cuts = [(slice(i, i + 3), slice(j, j + 4)) for i in (0, 3) for j in (0, 4)]
    for part, cut in zip(parts, cuts, strict=True):
        part.data.copy_(whole.data[cut])
    start = whole.detach().clone()
    optimizers = [SOAP([whole], lr=0.03, refresh=2), SOAP(parts, lr=0.03, refresh=2)]
    for seed in range(6):
        whole.grad = matrices([(6, 8)], seed)[0].detach()
        for part, cut in zip(parts, cuts, strict=True):
            part.grad = whole.grad[cut]
        for optimizer in optimizers:
            optimizer.step()
    assert optimizers[0].state[whole]["right_basis"].shape == (4, 4, 4)
    for part, cut in zip(parts, cuts, strict=True):
        torch.testing.assert_close(whole[cut], part)
        assert (whole[cut] - start[cut]).abs().min() > 1e-4


def test_states_that_were_saved_before_sides_were_cut_and_with_caution_go_on_so(monkeypatch):
    whole, parts = matrices([(6, 6)]), matrices([(6, 6)])
    optimizer, first = (SOAP(own, lr=0.03, cautious=False) for own in (whole, parts))
    train(whole, optimizer, 6)
    train(parts, first, 3)
    state = first.state_dict()
    for name, moment in state["state"][0].items():
        state["state"][0][name] = moment if name == "step" else moment[0]
    del state["param_groups"][0]["cautious"]
    monkeypatch.setattr("pet_finetune.training.soap.BLOCK", 3)
    resumed = SOAP(parts, lr=0.03)
    resumed.load_state_dict(state)
    train(parts, resumed, 3)
    assert torch.equal(parts[0], whole[0])


def test_the_state_of_each_matrix_is_that_of_its_batch():
    """Saved states hold what the steps have written, not a copy from the beginning."""
    parameters = matrices()
    optimizer = SOAP(parameters, lr=0.03)
    train(parameters, optimizer, 3)
    for p in parameters:
        basis = optimizer.state[p]["left_basis"]
        torch.testing.assert_close(basis[0].T @ basis[0], torch.eye(len(p), dtype=p.dtype))
        assert optimizer.state[p]["exp_avg_sq"].min() > 0


def test_decay_shrinks_what_has_no_gradient_worth_the_name():
    (p,) = matrices([(4, 4)])
    start = p.detach().clone()
    optimizer = SOAP([p], lr=0.1, weight_decay=0.5)
    for _ in range(3):
        p.grad = torch.zeros_like(p)
        optimizer.step()
    torch.testing.assert_close(p.detach(), start * 0.95**2)


def test_only_matrices_are_taken():
    with pytest.raises(ValueError, match="is for matrices"):
        SOAP([nn.Parameter(torch.zeros(3))])


@pytest.mark.parametrize("kind", [SOAP, AdamW])
def test_no_optimiser_wakes_torchs_compiler(kind, monkeypatch):
    """It would take over a second to import, and torch's own import it in each step."""
    imported, original = [], builtins.__import__

    def noted(name, *arguments):
        imported.append(name)
        return original(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", noted)
    parameter = nn.Parameter(torch.ones(2, 3))
    parameter.grad = torch.ones(2, 3)
    optimizer = kind([parameter], lr=0.1)
    for _ in range(2):
        optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.zero_grad()
    assert parameter.grad is None
    assert float(parameter.detach().max()) < 1.0
    assert not [name for name in imported if name.startswith("torch._dynamo")]
    torch.optim.AdamW([parameter]).step()
    assert "torch._dynamo" in imported
