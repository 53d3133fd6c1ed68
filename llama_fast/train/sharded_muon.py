"""Muon for matrices whose rows ranks share out: the numbers of `torch.optim.Muon` in one process, to the bit.

The orthogonal matrix nearest to a momentum needs all its rows. So of each R matrices every one of R ranks is given one whole, with its
gradient and its momentum, changes it as `torch.optim.Muon` does, and gives the rows back: 5 bytes are sent for each byte of a matrix, and each
matrix is orthogonalised once.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from .ranks import local, rows_each


class ShardedMuon(torch.optim.Muon):
    """`torch.optim.Muon` of parameters that `fully_shard` has cut."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # of no use here
        for group in self.param_groups:
            parameters = group["params"]
            ranks = parameters[0].device_mesh.size()
            for first in range(0, len(parameters), ranks):
                self._step(parameters[first : first + ranks], {name: group[name] for name in self.defaults})

    def _step(self, parameters: Sequence[nn.Parameter], settings: dict[str, Any]) -> None:
        """Changes as many parameters as there are ranks, or fewer."""
        mesh = _sharded(parameters[0]).device_mesh
        mine = parameters[mesh.get_local_rank()] if mesh.get_local_rank() < len(parameters) else None
        parts = [
            torch.stack(
                [local(each) for each in (parameter, self.state[parameter]["momentum_buffer"], _gradient(parameter))]
            )
            for parameter in parameters
        ]
        whole = _exchanged(parts, [] if mine is None else _shapes(mine, 3), mesh.get_group(), parts[0])
        changed: list[Tensor] = []
        if mine is not None:
            weight, momentum, gradient = torch.cat(whole, 1)
            _change(weight, momentum, gradient, settings)
            rows = rows_each(len(mine), mesh.size())
            changed = list(torch.stack([weight, momentum]).tensor_split([rows * i for i in range(1, mesh.size())], 1))
        given_back = _exchanged(changed, [part[:2].shape for part in parts], mesh.get_group(), parts[0])
        for parameter, (weight, momentum) in zip(parameters, given_back, strict=True):
            local(parameter).copy_(weight)
            local(self.state[parameter]["momentum_buffer"]).copy_(momentum)


def _change(weight: Tensor, momentum: Tensor, gradient: Tensor, settings: dict[str, Any]) -> None:
    parameter = nn.Parameter(weight)
    parameter.grad = gradient
    optimizer = torch.optim.Muon([parameter], **settings)
    optimizer.state[parameter]["momentum_buffer"] = momentum
    optimizer.step()  # type: ignore[no-untyped-call]


def _gradient(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def _sharded(parameter: nn.Parameter) -> DTensor:
    assert isinstance(parameter, DTensor)
    return parameter


def _shapes(parameter: nn.Parameter, count: int) -> list[torch.Size]:
    """Of `count` tensors like a parameter in a stack, as each rank has its rows."""
    ranks = _sharded(parameter).device_mesh.size()
    each = rows_each(len(parameter), ranks)
    return [
        torch.Size((count, max(0, min(each, len(parameter) - each * rank)), parameter.shape[1]))
        for rank in range(ranks)
    ]


def _exchanged(
    given: Sequence[Tensor], shapes: Sequence[torch.Size], group: dist.ProcessGroup, like: Tensor
) -> list[Tensor]:
    """Gives the i-th tensor to rank i, and returns what each rank gave: tensors of these shapes. The last ranks may give, or get, none."""
    ranks = group.size()
    sent = [each.numel() for each in given] + [0] * (ranks - len(given))
    received = [shape.numel() for shape in shapes] + [0] * (ranks - len(shapes))
    flat = torch.cat([each.flatten() for each in given]) if given else like.new_empty(0)
    gotten = flat.new_empty(sum(received))
    dist.all_to_all_single(gotten, flat, received, sent, group=group)
    return [part.view(shape) for part, shape in zip(torch.split(gotten, received), shapes, strict=False)]
