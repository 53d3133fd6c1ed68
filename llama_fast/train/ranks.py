"""The processes that share a run out among them, as `torchrun` starts them: who each is, what they tell each other, and the model in shards.

They form a mesh of data parallel x tensor parallel ranks. Data parallel ranks take micro-batches in turn, rank r of R the micro-batches
r, r + R, ..., and keep a shard of all weights, gradients and states each (FSDP2: rows are gathered for a layer when it is computed).
Tensor parallel ranks compute one micro-batch together: see `tensor_parallel`.

Exact sums. R ranks get the bits of one process where R is a power of two, because all sums over micro-batches are the same tree of pairs:
((0 + 1) + (2 + 3)) + .... After each turn the ranks sum theirs by `PairwiseReduceScatter`, the lower levels of the tree; `GradientSum` sums
turns, the upper ones. What is computed from a whole row of a matrix does not depend on which rank has the row.
"""

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

T = TypeVar("T")


@dataclass(frozen=True)
class Layout:
    """What the bits of a run depend on beside its config.

    Attributes:
        data_parallel, tensor_parallel: how many ranks there are of each kind.
        threads: of each rank: products sum in another order on more of them.
        exact: whether sums over micro-batches are `exact`.
    """

    data_parallel: int
    tensor_parallel: int
    threads: int
    exact: bool

    @property
    def gives_the_bits_of_one(self) -> bool:
        """Whether any number of ranks that has this property gives the same bits, on as many threads each."""
        return self.exact and self.tensor_parallel == 1 and self.data_parallel.bit_count() == 1

    def gives_the_bits_of(self, other: "Layout") -> bool:
        of_one = self.gives_the_bits_of_one and other.gives_the_bits_of_one
        return self == other or (of_one and self.threads == other.threads)

    def __str__(self) -> str:
        count = self.data_parallel * self.tensor_parallel
        ranks = f"{count} rank" + "s" * (count > 1)
        if self.tensor_parallel > 1:
            ranks += f", {self.tensor_parallel} of them to a micro-batch,"
        return (
            f"{ranks} of {self.threads} thread"
            + "s" * (self.threads > 1)
            + ("" if self.exact else ", without exact sums")
        )


class Ranks:
    """This process among those of its run.

    Attributes:
        mesh: of ("dp", "tp") ranks; None: it is alone.
        number, count: which of the data parallel ranks it is, and how many there are.
        tensor_parallel: ranks that compute one micro-batch together.
        is_first: whether it is the one that writes and speaks.
        group: of all ranks, for what happens beside the steps: a checkpoint that is written.
    """

    def __init__(self, mesh: DeviceMesh | None = None) -> None:
        self.mesh = mesh
        self.number, self.count, self.tensor_parallel, self.is_first = 0, 1, 1, True
        self.group: dist.ProcessGroup | None = None
        if mesh is not None:
            self.number, self.count, self.tensor_parallel = (
                mesh["dp"].get_local_rank(),
                mesh["dp"].size(),
                mesh["tp"].size(),
            )
            self.is_first = dist.get_rank() == 0
            self.group = dist.new_group(backend="gloo")

    def layout(self, *, exact: bool) -> Layout:
        return Layout(self.count, self.tensor_parallel, torch.get_num_threads(), exact)

    def turns(self, count: int) -> list[int | None]:
        """Which of `count` pieces of work this rank does, one in each turn. None: it does any for the company, and throws it away."""
        rounds = -(-count // self.count)
        numbers = (turn * self.count + self.number for turn in range(rounds))
        return [number if number < count else None for number in numbers]

    def gathered(self, own: Mapping[int, Tensor | float], count: int, device: torch.device) -> Tensor:
        """(count,) float64: the numbers that data parallel ranks have for their pieces of work."""
        numbers = torch.zeros(count, dtype=torch.float64, device=device)
        for number, value in own.items():
            numbers[number] = value
        if self.mesh is not None:
            dist.all_reduce(numbers, group=self.mesh["dp"].get_group())
        return numbers

    def add(self, numbers: Tensor) -> Tensor:
        """The sum of the tensors of all ranks, in place. Where all but one are zero it is exact."""
        if self.mesh is not None:
            dist.all_reduce(numbers)
        return numbers

    def largest(self, value: int) -> int:
        """Of the values of all ranks."""
        if self.mesh is None:
            return value
        values = torch.tensor(value)  # on the CPU: no GPU is waited for
        dist.all_reduce(values, dist.ReduceOp.MAX)
        return int(values)

    def of_the_first(self, value: T) -> T:
        """What the first rank has."""
        values = [value]
        if self.mesh is not None:
            dist.broadcast_object_list(values)
        return values[0]

    def shard(self, model: nn.Module, layers: Sequence[nn.Module], *, exact: bool) -> "PairwiseReduceScatter | None":
        """Leaves a shard of the model to each data parallel rank; returns what sums their gradients, if that is exact."""
        if self.mesh is None:
            return None
        for module in (*layers, model):
            fully_shard(module, mesh=self.mesh["dp"])
        sums = PairwiseReduceScatter() if exact and self.count > 1 else None
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)  # gloo has no sum with a factor
                if sums is not None:
                    module.set_custom_reduce_scatter(sums)  # type: ignore[arg-type]  # its base class is private
        register_fsdp_forward_method(model, "logits")
        return sums

    def reshard(self, model: nn.Module) -> None:
        """Leaves a shard again of what a forward pass has gathered and no backward pass has let go."""
        if isinstance(model, FSDPModule):
            model.reshard()


ALONE = Ranks()


class PairwiseReduceScatter:
    """The sum of all ranks' gradients in a fixed order, a shard to each rank: instead of FSDP's own, whose order is the library's.

    Each rank sends every other one its part, as many bytes as a reduce-scatter in a ring, and needs room for one part of each.

    Attributes:
        seconds: that it took, in all.
    """

    def __init__(self) -> None:
        self.seconds = 0.0

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, op: Any, async_op: bool = False
    ) -> None:
        start = time.perf_counter()
        parts = torch.empty_like(input_tensor)
        dist.all_to_all_single(parts, input_tensor, group=group)
        sums = list(parts.view(group.size(), -1).unbind())
        while len(sums) > 1:
            pairs = [one.add_(next_one) for one, next_one in zip(sums[::2], sums[1::2], strict=False)]
            sums = pairs + sums[2 * len(pairs) :]
        output_tensor.copy_(sums[0])
        self.seconds += time.perf_counter() - start


@contextmanager
def joined(tensor_parallel: int, device: torch.device) -> Iterator[Ranks]:
    """This process among its ranks: those of `torchrun`, or of a process group that is there already; else alone.

    Raises:
        ValueError: their number is no multiple of `tensor_parallel`.
        ConnectionError: another one was lost.
    """
    there = dist.is_initialized()
    count = dist.get_world_size() if there else int(os.environ.get("WORLD_SIZE", "1"))
    if tensor_parallel < 1 or count % tensor_parallel:
        raise ValueError(f"ranks.tensor_parallel must divide the number of ranks ({count}), got {tensor_parallel}")
    if count == 1:
        yield ALONE
        return
    if not there:
        if device.type == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    sizes = (count // tensor_parallel, tensor_parallel)
    try:
        yield Ranks(init_device_mesh(device.type, sizes, mesh_dim_names=("dp", "tp")))
    except RuntimeError as error:
        if "gloo" in str(error) or isinstance(error, dist.DistError):
            raise ConnectionError(f"another rank has ended, or cannot be reached: {error}") from error
        raise
    if not there:  # where something went wrong the others may not come to it
        dist.destroy_process_group()


def number_of_this() -> int:
    """Of this process among those of `torchrun`, from 0."""
    return int(os.environ.get("RANK", "0"))


def told_by_this(error: str) -> str:
    """What is to be said of an error that ends this process.

    One that all ranks meet is told by the first: the others wait so long that `torchrun`, which ends all when one has ended, does it first.
    """
    if not number_of_this():
        return error
    time.sleep(3.0)
    return f"rank {number_of_this()}: {error}"


def local(tensor: Tensor) -> Tensor:
    """What this rank has of a tensor that ranks share out."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def assign(parameter: Tensor, whole: Tensor) -> None:
    """Gives a parameter its value, of which each rank has the whole, and keeps its part."""
    if isinstance(parameter, DTensor):
        whole = local(distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None))
    local(parameter).copy_(whole)


def first_row(tensor: Tensor) -> int | None:
    """Which row of a tensor the first row is that this rank has; None: another rank has the same rows, and they count there."""
    if not isinstance(tensor, DTensor):
        return 0
    first, rows, mesh = 0, len(tensor), tensor.device_mesh
    for i in reversed(range(mesh.ndim)):  # tensor parallel ranks cut first
        placement, number = tensor.placements[i], mesh.get_local_rank(i)
        if isinstance(placement, Replicate):
            if number:
                return None
        elif getattr(placement, "dim", None) == 0:
            each = rows_each(rows, mesh.size(i))
            first += min(number * each, rows)
            rows = max(0, min(each, rows - number * each))
    return first


def rows_each(rows: int, ranks: int) -> int:
    """How many rows each rank has of so many: the last ones have fewer, or none."""
    return -(-rows // ranks)
