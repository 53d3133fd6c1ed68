"""The choice of each row's next token from its logits, and the count of it: greedy, or a draw from what filters keep.

    s = (penalties(logits + bias), -inf for ending tokens before min_tokens) / temperature          (float32)
    kept: s >= border, the largest border that top-k, top-p and min-p ask for; w = floor(2^40 exp(s - max(s))) where kept, else 0
    token = the first i with w[0] + ... + w[i] > floor(u * sum(w)), or the first largest s where the temperature is 0

u is number `produced` of the stream of the row's seed (SplitMix64). Weights are integers, so their sums are exact in any order.
`sampling_pytorch.py` defines every step. Both give the same tokens but for `exp`, here and there within 1 ulp: a draw or the border of
top-p may fall to the other side where a sum is within 2^-22 of it. NaN or +inf among a row's scores makes it greedy, and the first NaN is
the largest.

Nothing is sorted (`sampling_draw.py`).

Two launches: `scores_kernel`, whose programs own a few tiles of a row, writes s and the largest of each tile; `token_kernel`, a program a
row, does the rest. Short rows take the second alone. Greedy rows read the logits once and write a number a tile; others also write and
read s and w, 4 bytes each, in cache: 20 FLOPs a token for w, 6 for each round.

What changes from step to step lies in tensors, so that a recorded launch or a CUDA graph goes on by itself.
"""

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from . import sampling_pytorch
from .launch import Gpu, LaunchPlan, as_rows, cdiv, gpu_of, next_power_of_2
from .library import call, register
from .sampling_draw import LOWEST, draw, ordered, ordered_float, real
from .sampling_pytorch import FREQUENCY, MIN_TOKENS, NUMBERS, PRESENCE, PRODUCED, REPETITION, TEMPERATURE
from .triton_compat import tl, triton
from .validate import require_floating, require_kernel_dtype, require_same_device, require_shape

_NUMBERS, _TEMPERATURE, _REPETITION, _PRESENCE, _FREQUENCY, _PRODUCED, _MIN_TOKENS = (
    tl.constexpr(i) for i in (NUMBERS, TEMPERATURE, REPETITION, PRESENCE, FREQUENCY, PRODUCED, MIN_TOKENS)
)


@triton.jit
def _first_largest(b_x, BLOCK: tl.constexpr):
    """The largest of [BLOCK] integers, and its first index."""
    largest = tl.max(b_x, 0)
    return largest, tl.min(tl.where(b_x == largest, tl.arange(0, BLOCK), BLOCK - 1), 0)


@triton.jit
def _scores(
    p_logits, p_row, p_bias, p_in_prompt, p_counts, p_ending, first, i_tile, V, RANDOM: tl.constexpr, TILE: tl.constexpr
):
    """s of a tile of a row, [TILE], ordered; -inf beyond the row. The pointers are those of the row."""
    o_v = i_tile * TILE + tl.arange(0, TILE)
    mask = o_v < V
    b_s = tl.load(p_logits + o_v, mask=mask, other=float("-inf")).to(tl.float32)
    if p_bias is not None:
        b_s += tl.load(p_bias + first + o_v, mask=mask, other=0.0)
    if p_counts is not None:
        b_counts = tl.load(p_counts + first + o_v, mask=mask, other=0)
        seen = (b_counts > 0) | (tl.load(p_in_prompt + first + o_v, mask=mask, other=0) != 0)
        repetition = real(p_row, _REPETITION).to(tl.float32)
        b_repeated = tl.where(b_s < 0, b_s * repetition, tl.div_rn(b_s, repetition + tl.zeros([TILE], tl.float32)))
        b_s = tl.where(seen, b_repeated, b_s) - real(p_row, _FREQUENCY).to(tl.float32) * b_counts.to(tl.float32)
        b_s -= real(p_row, _PRESENCE).to(tl.float32) * (b_counts > 0).to(tl.float32)
    if p_ending is not None:
        early = tl.load(p_row + _PRODUCED) < tl.load(p_row + _MIN_TOKENS)
        b_s = tl.where(early & (tl.load(p_ending + first + o_v, mask=mask, other=0) != 0), float("-inf"), b_s)
    if RANDOM:
        temperature = real(p_row, _TEMPERATURE)
        temperature = tl.where(temperature > 0, temperature, 1.0).to(tl.float32)
        b_s = tl.div_rn(b_s, temperature + tl.zeros([TILE], tl.float32))
    return ordered(b_s)


@triton.jit
def _write_tile(
    p_logits, p_row, p_bias, p_in_prompt, p_counts, p_ending, p_scores, p_largest, first, i_tile, V, TILE: tl.constexpr
):
    """s of a tile, where it is asked for, and the largest of it."""
    b_s = _scores(
        p_logits, p_row, p_bias, p_in_prompt, p_counts, p_ending, first, i_tile, V, p_scores is not None, TILE
    )
    if p_scores is not None:
        tl.store(p_scores + i_tile * TILE + tl.arange(0, TILE), b_s)
    tl.store(p_largest + i_tile, tl.max(b_s, 0))


@triton.jit
def scores_kernel(
    p_logits, p_rows, p_numbers, p_bias, p_in_prompt, p_counts, p_ending, p_scores, p_largest, logits_stride, V, T,
    TILE: tl.constexpr, TILES: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(1).to(tl.int64)
    row = tl.load(p_rows + i)
    p_logits += i * logits_stride
    p_row = p_numbers + row * _NUMBERS
    if p_scores is not None:
        p_scores += i * T * TILE
    first = tl.program_id(0) * TILES
    for i_tile in range(first, tl.minimum(first + TILES, T)):
        _write_tile(
            p_logits, p_row, p_bias, p_in_prompt, p_counts, p_ending, p_scores, p_largest + i * BLOCK_T, row * V, i_tile, V, TILE
        )  # fmt: skip


@triton.jit
def token_kernel(
    p_logits, p_rows, p_numbers, p_bias, p_in_prompt, p_counts, p_ending, p_scores, p_weights, p_largest, p_mass,
    p_token_ids, p_last_tokens, logits_stride, V, T,
    WHOLE: tl.constexpr, LIMITED: tl.constexpr, MIN_P: tl.constexpr, TILE: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64)
    row = tl.load(p_rows + i)
    p_largest += i * BLOCK_T
    p_logits += i * logits_stride
    p_row = p_numbers + row * _NUMBERS
    if p_scores is not None:
        p_scores += i * T * TILE
        p_weights += i * T * TILE
        p_mass += i * T
    if WHOLE:
        for i_tile in range(T):
            _write_tile(
                p_logits, p_row, p_bias, p_in_prompt, p_counts, p_ending, p_scores, p_largest, row * V, i_tile, V, TILE
            )
        tl.debug_barrier()  # what a thread has written, others read

    o_t = tl.arange(0, BLOCK_T)
    b_largest = tl.load(p_largest + o_t, mask=o_t < T, other=LOWEST)
    largest, i_tile = _first_largest(b_largest, BLOCK_T)
    if p_scores is not None:
        b_s = tl.load(p_scores + i_tile * TILE + tl.arange(0, TILE))
    else:
        b_s = _scores(p_logits, p_row, p_bias, p_in_prompt, p_counts, p_ending, row * V, i_tile, V, False, TILE)
    _, o_v = _first_largest(b_s, TILE)
    token = i_tile * TILE + o_v
    if p_scores is not None:
        tl.store(p_largest + o_t, b_largest)  # beyond the tiles too, where a draw reads it
        if (real(p_row, _TEMPERATURE) > 0) & (tl.abs(ordered_float(largest)) < float("inf")):
            tl.debug_barrier()
            token = draw(
                p_row, p_scores, p_weights, p_largest, p_mass, i_tile, largest, V, T, LIMITED, MIN_P, TILE, BLOCK_T
            )

    tl.store(p_token_ids + i, token.to(tl.int64))
    if p_last_tokens is not None:
        tl.store(p_last_tokens + row, token.to(tl.int64))
    tl.store(p_row + _PRODUCED, tl.load(p_row + _PRODUCED) + 1)
    if p_counts is not None:
        p_count = p_counts + row * V + token
        tl.store(p_count, tl.load(p_count) + 1)


def plan_sample(
    logits: Tensor, rows: Tensor, numbers: Tensor, token_ids: Tensor, *,
    bias: Tensor | None = None, in_prompt: Tensor | None = None, counts: Tensor | None = None,
    ending: Tensor | None = None, last_tokens: Tensor | None = None, random: bool = False, limited: bool = False,
    min_p: bool = False, gpu: Gpu,
) -> list[LaunchPlan]:  # fmt: skip
    """The launches, in order, that write `token_ids` (batch,) int64; the rest is as in `sample`.

    `limited` says whether a random row has top-k or top-p.
    """
    count, vocab_size = logits.shape
    tile, tiles_of_program = _tile(vocab_size, random, gpu)
    tiles = cdiv(vocab_size, tile)
    scores = weights = mass = None
    block_t = next_power_of_2(tiles)
    largest = logits.new_empty((count, block_t), dtype=torch.int32)
    if random:
        scores = logits.new_empty((count, tiles * tile), dtype=torch.int32)
        weights = logits.new_empty((count, tiles * tile), dtype=torch.float32)
        mass = logits.new_empty((count, tiles), dtype=torch.int64)
    arguments: dict[str, Any] = dict(
        p_logits=logits, p_rows=rows, p_numbers=numbers, p_bias=bias, p_in_prompt=in_prompt, p_counts=counts,
        p_ending=ending, p_scores=scores, p_largest=largest, logits_stride=logits.stride(0), V=vocab_size, T=tiles,
    )  # fmt: skip
    # rounded as PyTorch's ops round: no product is fused with a sum
    plan = functools.partial(LaunchPlan, num_warps=4, options=dict(enable_fp_fusion=False))
    whole = tiles <= tiles_of_program
    constants: dict[str, Any] = dict(TILE=tile, BLOCK_T=block_t)
    plans = []
    if not whole:
        grid = (cdiv(tiles, tiles_of_program), count)
        plans.append(plan(scores_kernel, grid, arguments, constants | dict(TILES=tiles_of_program)))
    arguments = arguments | dict(p_weights=weights, p_mass=mass, p_token_ids=token_ids, p_last_tokens=last_tokens)
    constants = constants | dict(WHOLE=whole, LIMITED=limited, MIN_P=min_p)
    plans.append(plan(token_kernel, (count,), arguments, constants))
    return plans


def _tile(vocab_size: int, random: bool, gpu: Gpu) -> tuple[int, int]:
    """Tokens of a tile, and tiles of a program of `scores_kernel`; a row of no more than one program needs no other launch."""
    if not gpu.is_cpu:
        # with Triton 3.6 tiles of 2048 of a longer row spill 24 bytes a thread on sm_90
        return (next_power_of_2(max(vocab_size, 16)) if vocab_size <= 2048 else 1024), 1
    # small tiles leave out more of a row: top-k took 11 us for 32,000 tokens in tiles of 64, 23 of 256, 41 of 512
    return (64, 128) if random else (256, 32)


def example_plans(gpu: Gpu) -> Iterator[tuple[str, LaunchPlan]]:
    """Plans at LLaMA sizes, as (shape, plan), for compilation ahead of time."""
    for count, vocab_size, edited in ((8, 128256, False), (8, 128256, True), (1, 1136, True)):
        logits = torch.empty(count, vocab_size, dtype=torch.bfloat16, device="meta")
        rows = torch.empty(count, dtype=torch.int64, device="meta")
        numbers = torch.empty(count + 1, NUMBERS, dtype=torch.int64, device="meta")
        tables: dict[str, Any] = {
            name: torch.empty(count + 1, vocab_size, dtype=dtype, device="meta")
            for name, dtype in dict(
                bias=torch.float32, in_prompt=torch.bool, counts=torch.int32, ending=torch.bool
            ).items()
            if edited
        }
        for random in (False, True):
            shape = f"{count}x{vocab_size}" + "+edits" * edited + "+random" * random
            tables |= dict(random=random, limited=random, min_p=random)
            for plan in plan_sample(logits, rows, numbers, rows, **tables, last_tokens=rows, gpu=gpu):
                yield shape, plan


def _kernel(
    logits: Tensor, rows: Tensor, numbers: Tensor, bias: Tensor | None, in_prompt: Tensor | None,
    counts: Tensor | None, ending: Tensor | None, last_tokens: Tensor | None, random: bool, width: int, min_p: bool,
) -> Tensor:  # fmt: skip
    require_kernel_dtype(logits=logits)
    token_ids = _fake(logits, rows)
    plans = plan_sample(
        as_rows(logits), rows, numbers, token_ids, bias=bias, in_prompt=in_prompt, counts=counts, ending=ending,
        last_tokens=last_tokens, random=random, limited=width > 0, min_p=min_p, gpu=gpu_of(logits.device),
    )  # fmt: skip
    for plan in plans:
        plan.launch()
    return token_ids


def _fake(logits: Tensor, rows: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(rows, memory_format=torch.contiguous_format)


sample_op = register(
    "sample(Tensor logits, Tensor rows, Tensor(a!) numbers, Tensor? bias, Tensor? in_prompt, Tensor(b!)? counts,"
    " Tensor? ending, Tensor(c!)? last_tokens, bool random, int width, bool min_p) -> Tensor",
    kernel=_kernel, pytorch=sampling_pytorch.sample, fake=_fake,
)  # fmt: skip


def sample(
    logits: Tensor, rows: Tensor, numbers: Tensor, *, bias: Tensor | None = None, in_prompt: Tensor | None = None,
    counts: Tensor | None = None, ending: Tensor | None = None, last_tokens: Tensor | None = None,
    random: bool = False, width: int = 0, min_p: bool = False,
) -> Tensor:  # fmt: skip
    """The next token of each row of `logits`, by the parameters of row `rows[i]` of the tables; and counts it there.

    Args:
        logits: (batch, vocab_size), float16, bfloat16 or float32 (float64 on the CPU); not changed.
        rows: (batch,) int64, contiguous. A row may be given twice if it is greedy and its token is of no interest.
        numbers: (max_rows, 10) int64: the bits of six float64, temperature (0 is greedy), top-p, log of min-p, repetition, presence
            and frequency penalty; then seed, tokens produced, top-k (vocab_size for none), min_tokens. Produced is counted up.
        bias: (max_rows, vocab_size) float32, added to the logits; it, or another table, is None where no row needs it.
        in_prompt, counts: (max_rows, vocab_size) bool and int32, together: which tokens are in the prompt, and how often each is in
            the output, which is counted up. They turn penalties on.
        ending: (max_rows, vocab_size) bool: tokens that may not be chosen before min_tokens.
        last_tokens: (max_rows,) int64: gets the token of each row.
        random: whether a row has a temperature.
        width: 0 if no random row has top-k or top-p; else so many of the likeliest tokens are enough to tell what each of them keeps.
        min_p: whether a random row has a min-p.

    Returns:
        (batch,) int64.

    Raises:
        TypeError: `logits` is not floating point.
        ValueError: a shape or device does not fit, or only one of `in_prompt` and `counts` is given.
    """
    require_floating(logits=logits)
    if logits.ndim != 2 or logits.shape[1] == 0:
        raise ValueError(
            f"logits must have shape (batch, vocab_size) with at least one token, got {tuple(logits.shape)}"
        )
    require_same_device(logits=logits, rows=rows, numbers=numbers)
    require_shape("rows", rows, logits.shape[:1])
    require_shape("numbers", numbers, (len(numbers), NUMBERS))
    if (in_prompt is None) != (counts is None):
        raise ValueError("in_prompt and counts must be given together")
    return call(
        sample_op, logits, rows, numbers, bias, in_prompt, counts, ending, last_tokens, random, width, min_p
    )  # fmt: skip
