"""Plans that a sweep tries, and what a key of the table of tuned plans looks like as launches: nothing here needs a GPU."""

from collections.abc import Callable, Iterator
from itertools import product

import torch
from torch import Tensor

from llama_fast.kernels.attention import plan_attention
from llama_fast.kernels.attention_common import Pattern
from llama_fast.kernels.attention_decode import plan_attention_decode
from llama_fast.kernels.binary import inspect_plan
from llama_fast.kernels.launch import GPUS, Gpu, LaunchPlan, cdiv, next_power_of_2
from llama_fast.kernels.matmul import plan_linear
from llama_fast.kernels.norm_qkv_rope import plan_norm_qkv_rope
from llama_fast.kernels.norm_swiglu import plan_norm_swiglu
from llama_fast.kernels.rms_norm import plan_rms_norm
from llama_fast.kernels.softmax import plan_softmax
from llama_fast.kernels.tuned import Key, Plan, candidate

SPILL_BOUND = 16
"""Bytes a thread, as in the tests of the binaries."""

_BYTES = 2  # an element: only 16-bit dtypes are swept


def candidates(key: Key, gpu: Gpu) -> list[Plan]:
    """What is worth a try for a key: all that shared memory and registers hold, in a grid around the arithmetic's choice."""
    return list(_CANDIDATES[key[0]](key[4], gpu))


def _linear(size: tuple[int, ...], gpu: Gpu) -> Iterator[Plan]:
    m, n, _ = size
    tiles = ((256, 128), (128, 256), (128, 128), (64, 256), (128, 64), (64, 128), (64, 64))
    for (block_m, block_n), block_k, num_warps, num_stages in product(tiles, (64, 128), (4, 8), (2, 3, 4, 5)):
        accumulators = block_m * block_n // (32 * num_warps)  # registers a thread, of 255
        fits = (block_m + block_n) * block_k * _BYTES * num_stages <= gpu.shared_bytes
        if fits and 32 <= accumulators <= 128 and block_m < 2 * max(64, m) and block_n < 2 * n:
            yield dict(block_m=block_m, block_n=block_n, block_k=block_k, num_warps=num_warps, num_stages=num_stages)


def _linear_few_rows(size: tuple[int, ...], gpu: Gpu) -> Iterator[Plan]:
    m, n, k = size
    rows = ((4, 8, 16), (256, 512, 1024)) if m == 1 else ((16, 32, 64), (64, 128, 256))
    for block_n, block_k, splits, num_stages in product(*rows, (1, 2, 4, 8), (3, 5, 8, 11)):
        stage = (block_n + m) * block_k * _BYTES
        programs = cdiv(n, block_n) * splits
        # a split pays where there are too few programs, and not where there are enough without it
        enough = splits == 1 or (programs <= 4 * gpu.multiprocessors and k >= 4 * block_k * splits)
        if enough and 2048 <= block_n * block_k * _BYTES <= 16384 and stage * num_stages <= gpu.shared_bytes - 8192:
            yield dict(block_n=block_n, block_k=block_k, splits=splits, num_stages=num_stages)


def _pairs(size: tuple[int, ...], gpu: Gpu) -> Iterator[Plan]:
    m = size[0]
    blocks, widths = ((2, 4, 8, 16), (512, 1024, 2048)) if m == 1 else ((8, 16, 32), (128, 256))
    for block_p, row_bytes, num_stages in product(blocks, widths, (3, 5, 8, 11)):
        weight = 2 * block_p * row_bytes
        if 4096 <= weight <= 16384 and (weight + max(2, m) * row_bytes) * num_stages <= gpu.shared_bytes - 8192:
            yield dict(block_p=block_p, row_bytes=row_bytes, num_stages=num_stages)


def _attention(size: tuple[int, ...], gpu: Gpu) -> Iterator[Plan]:
    head_dim = size[0]
    for block_m, block_n, num_warps, num_stages in product((64, 128), (32, 64, 128), (4, 8), (2, 3, 4)):
        fits = (block_m + 2 * block_n * num_stages) * next_power_of_2(head_dim) * _BYTES <= gpu.shared_bytes
        if fits and block_m * (block_n + head_dim) // (32 * num_warps) <= 192:
            yield dict(block_m=block_m, block_n=block_n, num_warps=num_warps, num_stages=num_stages)


def _attention_decode(size: tuple[int, ...], gpu: Gpu) -> Iterator[Plan]:
    tile = next_power_of_2(size[2]) * _BYTES
    for block_n, programs, num_warps, num_stages in product((32, 64, 128), (1, 2, 3, 4), (4, 8), (2, 3, 4)):
        if 2 * block_n * tile * num_stages <= gpu.shared_bytes:
            yield dict(
                block_n=block_n, programs_per_multiprocessor=programs, num_warps=num_warps, num_stages=num_stages
            )


def _rows(size: tuple[int, ...], gpu: Gpu) -> Iterator[Plan]:
    (n,) = size
    whole = next_power_of_2(n)
    if n > 16384:  # in tiles: `rows.WHOLE_ROW_LIMIT`
        for block_n, num_warps in product((4096, 8192, 16384), (8, 16, 32)):
            yield dict(block_m=1, block_n=block_n, num_warps=num_warps)
        return
    for block_m, num_warps in product((1, 2, 4, 8, 16), (1, 2, 4, 8, 16)):
        if 4 <= block_m * whole // (32 * num_warps) <= 64:
            yield dict(block_m=block_m, block_n=whole, num_warps=num_warps)


_CANDIDATES: dict[str, Callable[[tuple[int, ...], Gpu], Iterator[Plan]]] = {
    "linear": _linear, "linear_few_rows": _linear_few_rows, "norm_qkv_rope": _pairs, "norm_swiglu": _pairs,
    "attention": _attention, "attention_decode": _attention_decode, "rms_norm": _rows, "softmax": _rows,
}  # fmt: skip


def gpu_of_key(key: Key) -> Gpu:
    """A GPU of the key's kind, which need not be here."""
    known = GPUS[key[1]]
    return Gpu(known.arch, key[2], known.shared_bytes, known.warp_size)


def launches(key: Key, gpu: Gpu) -> list[LaunchPlan]:
    """The launches of a call that looks up `key`, on meta tensors."""
    op, _, _, dtype, size = key

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    if op in ("linear", "linear_few_rows"):
        m, n, k = size
        return plan_linear(empty(m, k), empty(n, k), None, empty(m, n), empty(m, n), gpu=gpu)
    if op == "norm_swiglu":
        m, _, n, k = size
        return plan_norm_swiglu(empty(m, k), empty(k), empty(2 * n, k), None, empty(m, n), eps=1e-5, gpu=gpu)
    if op == "norm_qkv_rope":
        m, heads, half, k = size
        kv_heads = max(1, heads // 6)  # a key counts q's, k's and v's heads together; how many are q's is no matter
        cache, slots = empty(1024, kv_heads, 16, 2 * half), torch.empty(m, dtype=torch.int64, device="meta")
        q, cos = empty(m, heads - 2 * kv_heads, 1, 2 * half), empty(m, 2 * half)
        return plan_norm_qkv_rope(
            empty(m, k), empty(k), empty(heads * 2 * half, k), None, cos, cos, cache, cache, slots, q, eps=1e-5, gpu=gpu
        )
    if op == "attention":
        head_dim, seq, causal, window = size
        q, kv = (empty(1, seq, heads, head_dim).transpose(1, 2) for heads in (32, 8))
        pattern = Pattern(
            None, None, None, None, None, bool(causal), seq // 2 if window else None, head_dim**-0.5, None
        )
        return [plan_attention(q, kv, kv, q, torch.empty(1, 32, seq, device="meta"), pattern, gpu)]
    if op == "attention_decode":
        heads, kv_heads, head_dim = size
        q, lens = empty(1, heads, 1, head_dim), torch.empty(1, dtype=torch.int32, device="meta")
        cache, paged = empty(1, kv_heads, 32768, head_dim), empty(512, kv_heads, 64, head_dim)
        table, scale = torch.empty(1, 512, dtype=torch.int32, device="meta"), head_dim**-0.5
        plans = plan_attention_decode(q, cache, cache, lens, q, scale=scale, gpu=gpu)
        return plans + plan_attention_decode(q, paged, paged, lens, q, block_table=table, scale=scale, gpu=gpu)
    x = empty(8192, *size)
    if op == "softmax":
        return [plan_softmax(x, x, 1, gpu=gpu)]
    assert op == "rms_norm", op
    rstd = torch.empty(8192, device="meta")

    def plan(residual: Tensor | None) -> LaunchPlan:
        return plan_rms_norm(
            x, empty(*size), x, rstd, residual=residual, total=residual, eps=1e-5, offset=0.0, gpu=gpu
        )  # fmt: skip

    return [plan(None), plan(x)]  # a call with a residual, which holds twice as much, looks up the same key


def fault(key: Key, plan: Plan, gpu: Gpu) -> str | None:
    """What the binaries of a plan break, compiled for `gpu`: they spill, or need more shared memory than there is."""
    with candidate(key, plan):
        plans = launches(key, gpu)
    for launch in plans:
        report = inspect_plan(launch, gpu)
        if gpu.is_nvidia and report.spill_bytes > SPILL_BOUND:
            return f"{launch.kernel.__name__} spills {report.spill_bytes} bytes a thread"
        if report.shared_bytes > gpu.shared_bytes:
            return f"{launch.kernel.__name__} needs {report.shared_bytes} bytes of shared memory"
    return None
