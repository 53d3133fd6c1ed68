"""Layers cut over ranks that compute one micro-batch together (Megatron-LM: Shoeybi et al. 2019, arXiv:1909.08053).

Each of T ranks has num_heads / T heads and intermediate_size / T columns of the MLP: the rows of q_proj, k_proj, v_proj, gate_proj and
up_proj that make them, and the columns of o_proj and down_proj that take them. So each rank computes a part of what a block adds to the
residual, the parts are summed over the ranks, and in the backward pass so are the gradients of what went in: two sums a layer each way.
Embedding, head and norms are whole on each rank, and computed there alike.

Weights are DTensors, so that a checkpoint holds them whole; ops are called on the local ones. The sum over ranks is in another order than
that over the columns of a whole matrix: the losses are those of one rank but for roundings.
"""

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from .. import ops
from ..decoder.model import Embedding
from ..kernels.embedding import embedding
from .model import Layer, Linear, RMSNorm, TrainedDecoder
from .ranks import local

_ROWS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
_COLUMNS = ("o_proj.weight", "down_proj.weight")


def cut(model: TrainedDecoder, mesh: DeviceMesh) -> None:
    """Leaves each rank of a mesh of one dimension its part of a model that all of them have whole.

    Raises:
        ValueError: the heads, or the columns of the MLP, cannot be shared out evenly.
    """
    config, count, group = model.config, mesh.size(), mesh.get_group()
    for name, size in (("num_kv_heads", config.num_kv_heads), ("intermediate_size", config.intermediate_size)):
        if size % count:
            raise ValueError(f"ranks.tensor_parallel must divide {name} ({size}), got {count}")
    for layer in model.model.layers:
        assert isinstance(layer, Layer)
        for block, last in ((layer.self_attn, "o_proj"), (layer.mlp, "down_proj")):
            block.set_submodule(last, _RowParallel(getattr(block, last), group))
            block.register_forward_pre_hook(partial(_enter, group))
        for name in ("q_norm", "k_norm"):
            if (norm := getattr(layer.self_attn, name)) is not None:
                layer.self_attn.set_submodule(name, _HeadNorm(norm, group))
    model.model.set_submodule("embed_tokens", _Embedding(model.model.embed_tokens))
    for name, parameter in list(model.named_parameters()):
        where, _, last = name.rpartition(".")
        whole = distribute_tensor(parameter.data, mesh, [_placement(name)], src_data_rank=None)
        setattr(model.get_submodule(where), last, nn.Parameter(whole))


def _placement(name: str) -> Shard | Replicate:
    if any(part in name for part in _ROWS):
        return Shard(0)
    return Shard(1) if name.endswith(_COLUMNS) else Replicate()


class _RowParallel(nn.Module):
    """A product whose columns are cut: the sum of all ranks' products, then bias and residual, once."""

    def __init__(self, whole: Linear, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.weight, self.bias, self._group = whole.weight, whole.bias, group

    def forward(self, x: Tensor, residual: Tensor | None = None, key: Tensor | None = None) -> Tensor:
        y = _summed(ops.linear(x, local(self.weight).to(x.dtype)), self._group)
        if self.bias is not None:
            y = y + local(self.bias).to(x.dtype)
        return y if residual is None else y + residual


class _HeadNorm(nn.Module):
    """The norm of heads, of which this rank has some: their gradients of its weight are summed."""

    def __init__(self, whole: RMSNorm, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.weight, self.eps, self._group = whole.weight, whole.eps, group

    def forward(self, x: Tensor) -> Any:
        return ops.rms_norm(x, _copied(local(self.weight), self._group).to(x.dtype), self.eps)


class _Embedding(nn.Module):
    def __init__(self, whole: Embedding) -> None:
        super().__init__()
        self.weight = whole.weight

    def forward(self, ids: Tensor) -> Tensor:
        return embedding(ids, local(self.weight))


def _enter(group: dist.ProcessGroup, block: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    x, *others = arguments
    return (_copied(x, group), *others)


class _Copied(torch.autograd.Function):
    """The same on all ranks, each of which makes something else of it: gradients are summed."""

    @staticmethod
    def forward(context: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        context.group = group
        return x.view_as(x)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _over_ranks(gradient, context.group), None


class _Summed(torch.autograd.Function):
    """The sum of what ranks have, which all of them go on with alike."""

    @staticmethod
    def forward(context: FunctionCtx, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        return _over_ranks(x, group)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def _copied(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    y: Tensor = _Copied.apply(x, group)  # type: ignore[no-untyped-call]
    return y


def _summed(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    y: Tensor = _Summed.apply(x, group)  # type: ignore[no-untyped-call]
    return y


def _over_ranks(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total
