"""From gradients to new weights: sums of them, their norm, which parameter learns how, and the learning rate at each step."""

import math
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from .config import OptimizerConfig, ScheduleConfig
from .ranks import ALONE, Ranks, first_row, local
from .sharded_muon import ShardedMuon

_BLOCK = 1 << 20
"""Elements of a gradient that are float64 at a time."""
FUSED_ON = ("cuda",)
"""Devices whose AdamW is the fused one. A CPU's treats the last elements of a tensor otherwise: cut in shards they would get other bits."""


class GradientSum:
    """The sum of the gradients of a step's micro-batches, in `.grad` at the end.

    `exact` sums pairwise, neighbours first: ((0 + 1) + (2 + 3)) + .... Processes that share micro-batches out among them, a power of two
    and each its turn, sum theirs in the same order: so they get the same bits. Otherwise autograd adds each to what is there.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], *, exact: bool) -> None:
        self._parameters, self._exact = parameters, exact
        self._sums: list[tuple[int, list[Tensor]]] = []  # how many micro-batches, and their sum

    def add(self) -> None:
        """Takes what the last backward pass has left in `.grad`."""
        if not self._exact:
            return
        count, total = 1, [_taken(parameter) for parameter in self._parameters]
        while self._sums and self._sums[-1][0] == count:
            total = self._merge(total)
            count *= 2
        self._sums.append((count, total))

    def finish(self) -> None:
        if not self._exact:
            return
        _, total = self._sums.pop()
        while self._sums:
            total = self._merge(total)
        for parameter, gradient in zip(self._parameters, total, strict=True):
            parameter.grad = gradient

    def _merge(self, later: list[Tensor]) -> list[Tensor]:
        _, earlier = self._sums.pop()
        torch._foreach_add_([local(each) for each in earlier], [local(each) for each in later])
        return earlier


def _taken(parameter: nn.Parameter) -> Tensor:
    gradient, parameter.grad = parameter.grad, None
    assert gradient is not None
    return gradient


def gradient_norm(parameters: Sequence[nn.Parameter], ranks: Ranks = ALONE) -> Tensor:
    """The norm of all gradients, a float64 scalar: of the sum of each row's squares, in the order of parameters and rows."""
    squares = torch.zeros(sum(map(len, parameters)), dtype=torch.float64, device=parameters[0].device)
    start = 0
    for parameter in parameters:
        assert parameter.grad is not None
        first, rows = first_row(parameter), local(parameter.grad)
        if first is not None and len(rows):
            squares[start + first : start + first + len(rows)] = _squares(rows.reshape(len(rows), -1))
        start += len(parameter)
    return ranks.add(squares).sum().sqrt()


def _squares(rows: Tensor) -> Tensor:
    """The sum of each row's squares in float64."""
    block = max(1, _BLOCK // rows.shape[1])
    return torch.cat([part.double().square().sum(1) for part in torch.split(rows, block)])


def clip(parameters: Sequence[nn.Parameter], norm: Tensor, longest: float) -> None:
    """Shortens gradients of this norm to `longest` where they are longer."""
    factor = (longest / (norm + 1e-6)).clamp(max=1.0).float()
    torch._foreach_mul_([local(parameter.grad) for parameter in parameters if parameter.grad is not None], factor)


class Optimizers:
    """AdamW, and Muon beside it if the config asks for it: each parameter is learnt by one of them.

    Their states are made at once, so that what a checkpoint holds does not depend on when it is written.

    Raises:
        ValueError: a group matches no parameter.
    """

    def __init__(self, model: nn.Module, config: OptimizerConfig) -> None:
        named = dict(model.named_parameters())
        names = [name for name, parameter in named.items() if parameter.requires_grad]
        frozen = [name for name, parameter in named.items() if not parameter.requires_grad]
        matched = {name: _rule(config, name) for name in names}
        for i, group in enumerate(config.groups):
            if i not in matched.values() and not any(fnmatchcase(name, config.groups[i].match) for name in frozen):
                raise ValueError(
                    f"optimizer.groups.{i}: {group.match!r} matches no parameter that none before it matches; there are, for "
                    f"example, {', '.join(dict.fromkeys([names[0], *names[-2:], names[1]]))}"
                )
        by_muon = {name for name in names if config.kind == "muon" and _is_inner_matrix(name, named[name])}
        settings: dict[tuple[bool, int | None], list[str]] = {}
        for name in names:
            settings.setdefault((name in by_muon, matched[name]), []).append(name)
        self._named = named
        self.parts: list[torch.optim.Optimizer] = []
        for muon in (True, False):
            groups = [
                _group(named, config, muon, rule, its) for (its_muon, rule), its in settings.items() if its_muon == muon
            ]
            if groups:
                self.parts.append(_muon(groups, config) if muon else _adamw(groups, config))

    def step(self, share: float, *, skip: Tensor) -> None:
        """Changes the weights by their gradients, at this share of the peak learning rates, and forgets the gradients.

        Where `skip`, a boolean scalar on their device, is true, weights and states stay as they are: fused AdamW reads it where it
        is, for the others it is read here.
        """
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = group["peak_lr"] * share
            if part.defaults.get("fused"):
                part.found_inf = skip.float()  # type: ignore[attr-defined]  # as GradScaler sets it
                part.step()
            elif not skip:
                part.step()
        self.zero_grad()

    def zero_grad(self) -> None:
        for part in self.parts:
            part.zero_grad()

    def states(self) -> Mapping[str, Tensor]:
        """All states, by parameter and their own names, as `model.norm.weight/exp_avg`. They are the optimizer's own, not copies."""
        return dict(self._states())

    def _states(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self._named.items():
            for part in self.parts:
                for key, state in part.state.get(parameter, {}).items():
                    yield f"{name}/{key}", state


def _rule(config: OptimizerConfig, name: str) -> int | None:
    """Which group a parameter is of; None: of no exception."""
    return next((i for i, group in enumerate(config.groups) if fnmatchcase(name, group.match)), None)


def _is_inner_matrix(name: str, parameter: nn.Parameter) -> bool:
    return parameter.ndim == 2 and name.startswith("model.layers.")


def _group(
    named: Mapping[str, nn.Parameter], config: OptimizerConfig, muon: bool, rule: int | None, names: list[str]
) -> dict[str, object]:
    exception = None if rule is None else config.groups[rule]
    decay = None if exception is None else exception.weight_decay
    peak = (config.muon_lr if muon else config.lr) * (1.0 if exception is None else exception.lr_factor)
    return dict(
        params=[named[name] for name in names],
        weight_decay=config.weight_decay if decay is None else decay,
        lr=peak,
        peak_lr=peak,
    )


def _muon(groups: list[dict[str, object]], config: OptimizerConfig) -> torch.optim.Optimizer:
    sharded = any(isinstance(parameter, DTensor) for group in groups for parameter in group["params"])  # type: ignore[attr-defined]
    optimizer = (ShardedMuon if sharded else torch.optim.Muon)(groups, momentum=config.momentum)
    for parameter in _parameters(optimizer):
        optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def _adamw(groups: list[dict[str, object]], config: OptimizerConfig) -> torch.optim.Optimizer:
    fused = all(parameter.device.type in FUSED_ON for group in groups for parameter in group["params"])  # type: ignore[attr-defined]
    optimizer = torch.optim.AdamW(
        groups, betas=(config.beta1, config.beta2), eps=config.eps, fused=fused, foreach=not fused
    )
    for parameter in _parameters(optimizer):
        optimizer.state[parameter] = dict(
            step=torch.zeros((), device=parameter.device if fused else "cpu"),
            exp_avg=torch.zeros_like(parameter),
            exp_avg_sq=torch.zeros_like(parameter),
        )
    return optimizer


def _parameters(optimizer: torch.optim.Optimizer) -> Iterator[nn.Parameter]:
    for group in optimizer.param_groups:
        yield from group["params"]


def learning_rate_share(step: int, config: ScheduleConfig) -> float:
    """The learning rate of a step, counted from 0, as a share of its peak."""
    if step < config.warm_up:
        return (step + 1) / config.warm_up
    if config.kind == "cosine":
        fallen = (step - config.warm_up) / max(1, config.steps - config.warm_up)
        return config.final + (1 - config.final) * 0.5 * (1 + math.cos(math.pi * fallen))
    fall = max(1, round(config.decay * config.steps))
    fallen = max(0.0, (step - (config.steps - fall)) / fall)
    return 1 - (1 - config.final) * fallen
