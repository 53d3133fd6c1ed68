"""Sums of gradients, groups by rule, schedules."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from llama_fast.train.config import Group, OptimizerConfig, ScheduleConfig
from llama_fast.train.optimizer import GradientSum, Optimizers, clip, gradient_norm, learning_rate_share
from tests.train.test_model import trained

NORMS = Group("*norm.weight", weight_decay=0.0)


def summed(gradients, *, exact):
    parameter = torch.nn.Parameter(torch.zeros(5))
    total = GradientSum([parameter], exact=exact)
    for gradient in gradients:
        (parameter * gradient).sum().backward()
        total.add()
    total.finish()
    return parameter.grad


@pytest.mark.parametrize("count", [1, 2, 3, 4, 6, 7, 8])
def test_processes_that_take_turns_sum_to_the_same_bits(count):
    gradients = torch.randn(count, 5).unbind()
    ranks = 2 if count % 2 == 0 else 1
    pairs = [sum(gradients[i : i + ranks]) for i in range(0, count, ranks)]  # as the ranks sum theirs after each turn
    assert torch.equal(summed(pairs, exact=True), summed(gradients, exact=True))
    torch.testing.assert_close(summed(gradients, exact=False), torch.stack(gradients).sum(0))


def test_the_sum_is_pairwise():
    small = torch.full((5,), 2.0**-24)
    gradients = [torch.ones(5), small, small, small]
    assert (summed(gradients, exact=True) == 1 + 2.0**-23).all()  # 1 + s = 1; s + s is kept
    assert (summed(gradients, exact=False) == 1).all()


@pytest.mark.parametrize("block", [1 << 20, 7])
def test_norm_and_clipping(monkeypatch, block):
    """A row that is longer than a block is one."""
    monkeypatch.setattr("llama_fast.train.optimizer._BLOCK", block)
    parameters = [torch.nn.Parameter(torch.zeros(3, 4)), torch.nn.Parameter(torch.zeros(4))]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    expected = torch.cat([parameter.grad.flatten() for parameter in parameters]).double().norm()
    norm = gradient_norm(parameters)
    assert norm.dtype == torch.float64 and norm.item() == pytest.approx(expected.item(), rel=1e-12)
    clip(parameters, norm, 100.0)
    assert gradient_norm(parameters) == norm
    clip(parameters, norm, 0.5)
    assert gradient_norm(parameters).item() == pytest.approx(0.5, rel=1e-5)


def test_groups_are_made_by_rule():
    config = OptimizerConfig(
        kind="muon", lr=0.1, muon_lr=0.2, groups=(NORMS, Group("model.embed_tokens.*", lr_factor=0.5))
    )
    model = trained()
    optimizers = Optimizers(model, config)
    muon, adamw = optimizers.parts
    assert {len(group["params"]) for group in muon.param_groups} == {14}  # q, k, v, o, gate, up, down of two layers
    found = {(group["lr"], group["weight_decay"], len(group["params"])) for group in adamw.param_groups}
    assert found == {(0.05, 0.1, 1), (0.1, 0.0, 5), (0.1, 0.1, 1)}  # embedding, norms, head
    states = optimizers.states()
    assert "model.norm.weight/exp_avg" in states
    assert "model.layers.1.mlp.up_proj.weight/momentum_buffer" in states
    assert len(states) == 14 + 3 * 7


@pytest.mark.parametrize("match", ["*.bias", "norm"])
def test_a_rule_that_matches_nothing_is_an_error(match):
    with pytest.raises(ValueError, match=r"optimizer.groups.1: .* matches no parameter .* model.embed_tokens.weight"):
        Optimizers(trained(), OptimizerConfig(groups=(NORMS, Group(match))))


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_states_made_at_once_are_those_that_pytorch_makes(kind):
    """Two steps, against optimizers of PyTorch's own making."""
    ours, theirs = trained(), trained()
    optimizers = Optimizers(ours, OptimizerConfig(kind=kind, groups=()))
    inner = [p for p in theirs.model.layers.parameters() if p.ndim == 2 and kind == "muon"]
    rest = [p for p in theirs.parameters() if not any(p is each for each in inner)]
    others = [torch.optim.AdamW(rest, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, foreach=True)]
    if inner:
        others.append(torch.optim.Muon(inner, lr=0.01, weight_decay=0.1))
    for _ in range(2):
        for mine, its in zip(ours.parameters(), theirs.parameters(), strict=True):
            mine.grad = torch.randn_like(mine)
            its.grad = mine.grad.clone()
        optimizers.step(1.0, skip=torch.tensor(False))
        for other in others:
            other.step()
    assert all(torch.equal(mine, its) for mine, its in zip(ours.parameters(), theirs.parameters(), strict=True))


def test_fused_adamw_is_told_to_skip_without_a_look_at_it(monkeypatch):
    """As on a GPU: nothing is read back."""
    monkeypatch.setattr("llama_fast.train.optimizer.FUSED_ON", ("cpu",))
    model = trained()
    optimizers = Optimizers(model, OptimizerConfig(groups=()))

    def changed(skip):
        before = [each.clone() for each in (*model.parameters(), *optimizers.states().values())]
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, float("nan") if skip else 1.0)
        with Reads() as reads:
            optimizers.step(1.0, skip=torch.tensor(skip))
        assert reads.count == 0 and all(parameter.grad is None for parameter in model.parameters())
        return not all(map(torch.equal, before, (*model.parameters(), *optimizers.states().values())))

    assert [changed(skip) for skip in (False, True, False)] == [True, False, True]


class Reads(TorchDispatchMode):
    """How often a tensor's value was asked for."""

    count = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.count += op is torch.ops.aten._local_scalar_dense.default
        return op(*args, **(kwargs or {}))


def test_schedules():
    cosine = ScheduleConfig(steps=10, warm_up=2, final=0.1)
    shares = [learning_rate_share(step, cosine) for step in range(10)]
    assert shares[:3] == [0.5, 1.0, 1.0] and shares[6] == pytest.approx(0.55)
    assert shares[2:] == sorted(shares[2:], reverse=True) and 0.1 < shares[-1] < 0.15
    wsd = ScheduleConfig(steps=10, kind="wsd", decay=0.4, final=0.0)
    assert [learning_rate_share(step, wsd) for step in range(10)] == pytest.approx([1.0] * 7 + [0.75, 0.5, 0.25])
    assert learning_rate_share(0, ScheduleConfig(steps=1, warm_up=1)) == 1.0
