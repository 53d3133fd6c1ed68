"""The choice of each row's next token from its logits, and the count of it: greedy, or a draw from what filters keep.

    s = (penalties(logits + bias), -inf for ending tokens before min_tokens) / temperature          (float32)
    kept: s >= border, the largest border that top-k, top-p and min-p ask for; w = floor(2^40 exp(s - max(s))) where kept, else 0
    token = the first i with w[0] + ... + w[i] > floor(u * sum(w)), or the first largest s where the temperature is 0

u is number `produced` of the stream of the row's seed (SplitMix64). Weights are integers, so their sums are exact in any order.
`sampling_pytorch.py` defines every step. Both give the same tokens but for `exp`, here and there within 1 ulp: a draw or the border of
top-p may fall to the other side where a sum is within 2^-22 of it. NaN or +inf among a row's scores makes it greedy, and the first NaN is
the largest.

Nothing is sorted. A border is a score: `_border` bisects between two of them over the integers that are ordered as floats are, and after
each round both ends move to scores that are there, so that ties end it like distinct scores do. A row is cut into tiles, and a
round reads only those tiles whose largest score lies above its middle: few, for a border near the top of the row.

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
from .sampling_pytorch import (
    FREQUENCY,
    GOLDEN,
    LOG_MIN_P,
    MIN_TOKENS,
    MULTIPLIERS,
    NUMBERS,
    PRESENCE,
    PRODUCED,
    REPETITION,
    SEED,
    TEMPERATURE,
    TOP_K,
    TOP_P,
    UNIT,
    signed,
)  # fmt: skip
from .triton_compat import tl, triton
from .validate import require_floating, require_kernel_dtype, require_same_device, require_shape

_NUMBERS = tl.constexpr(NUMBERS)
_TEMPERATURE, _TOP_P, _LOG_MIN_P = tl.constexpr(TEMPERATURE), tl.constexpr(TOP_P), tl.constexpr(LOG_MIN_P)
_REPETITION, _PRESENCE, _FREQUENCY = tl.constexpr(REPETITION), tl.constexpr(PRESENCE), tl.constexpr(FREQUENCY)
_SEED, _PRODUCED, _TOP_K, _MIN_TOKENS = (tl.constexpr(i) for i in (SEED, PRODUCED, TOP_K, MIN_TOKENS))
_UNIT = tl.constexpr(UNIT)
_NO_WEIGHT = tl.constexpr(28.0)  # so far below the largest score 2^40 exp(s - max(s)) is less than one
_LOWEST = tl.constexpr(0x7F800000 ^ -1)  # -inf, ordered
_GOLDEN = tl.constexpr(signed(GOLDEN))
_FIRST_MULTIPLIER, _SECOND_MULTIPLIER = (tl.constexpr(signed(multiplier)) for multiplier in MULTIPLIERS)


@triton.jit
def _real(p_row, i: tl.constexpr):
    return tl.load(p_row + i).to(tl.float64, bitcast=True)


@triton.jit
def _ordered(b_s):
    """Floats as integers in the same order; NaN is the largest, and both zeros are one."""
    b_bits = (b_s + 0.0).to(tl.int32, bitcast=True)
    return tl.where(b_s == b_s, tl.where(b_bits < 0, b_bits ^ 0x7FFFFFFF, b_bits), 0x7FFFFFFF)


@triton.jit
def _float(b_x):
    """The float that `_ordered` made an integer."""
    return tl.where(b_x < 0, b_x ^ 0x7FFFFFFF, b_x).to(tl.float32, bitcast=True)


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
        repetition = _real(p_row, _REPETITION).to(tl.float32)
        b_repeated = tl.where(b_s < 0, b_s * repetition, tl.div_rn(b_s, repetition + tl.zeros([TILE], tl.float32)))
        b_s = tl.where(seen, b_repeated, b_s) - _real(p_row, _FREQUENCY).to(tl.float32) * b_counts.to(tl.float32)
        b_s -= _real(p_row, _PRESENCE).to(tl.float32) * (b_counts > 0).to(tl.float32)
    if p_ending is not None:
        early = tl.load(p_row + _PRODUCED) < tl.load(p_row + _MIN_TOKENS)
        b_s = tl.where(early & (tl.load(p_ending + first + o_v, mask=mask, other=0) != 0), float("-inf"), b_s)
    if RANDOM:
        temperature = _real(p_row, _TEMPERATURE)
        temperature = tl.where(temperature > 0, temperature, 1.0).to(tl.float32)
        b_s = tl.div_rn(b_s, temperature + tl.zeros([TILE], tl.float32))
    return _ordered(b_s)


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
            p_logits,
            p_row,
            p_bias,
            p_in_prompt,
            p_counts,
            p_ending,
            p_scores,
            p_largest + i * BLOCK_T,
            row * V,
            i_tile,
            V,
            TILE,
        )


@triton.jit
def _weight(b_s, highest):
    """w of ordered scores, below the float `highest`."""
    return tl.floor(tl.exp(_float(b_s) - highest) * _UNIT)


@triton.jit
def _sum(b_w):
    """The sum of a tile's weights, which is exact in float64: at most 2^12 of at most 2^40."""
    return tl.sum(b_w.to(tl.float64)).to(tl.int64)


@triton.jit
def _border(p_scores, p_weights, p_largest, low, high, wanted, T, TILE: tl.constexpr):
    """The smallest score that has less than `wanted` above it: tokens, or, with `p_weights`, weight.

    It lies between `low` and the score `high`, which has.
    """
    o_t = tl.arange(0, TILE)
    while low < high:
        middle = (low & high) + ((low ^ high) >> 1)
        above = tl.full([], 0, tl.int64)
        next_above, next_below = high, low
        for i_tile in range(T):
            largest = tl.load(p_largest + i_tile)
            if largest > middle:
                b_s = tl.load(p_scores + i_tile * TILE + o_t)
                b_above = b_s > middle
                if p_weights is not None:
                    above += _sum(tl.where(b_above, tl.load(p_weights + i_tile * TILE + o_t), 0.0))
                else:
                    above += tl.sum(b_above.to(tl.int32))
                next_above = tl.minimum(next_above, tl.min(tl.where(b_above, b_s, high), 0))
                next_below = tl.maximum(next_below, tl.max(tl.where(b_above, low, b_s), 0))
            else:
                next_below = tl.maximum(next_below, largest)
        enough = above.to(tl.float64) < wanted
        high = tl.where(enough, next_below, high)
        low = tl.where(enough, low, next_above)
    return high


@triton.jit
def _mix(x):
    """SplitMix64's finalizer; masks make its shifts those of unsigned numbers."""
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * _FIRST_MULTIPLIER
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * _SECOND_MULTIPLIER
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


@triton.jit
def _uniform(seed, index):
    bits = _mix(_mix(seed) + (index + 1) * _GOLDEN)
    return ((bits >> 11) & 0x1FFFFFFFFFFFFF).to(tl.float64) * 1.1102230246251565e-16  # 2^-53


@triton.jit
def _drawn(
    p_row, p_scores, p_weights, p_largest, p_mass, i_largest, largest, V, T,
    LIMITED: tl.constexpr, MIN_P: tl.constexpr, TILE: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """A token of a row whose largest score is finite; `p_mass` gets the weight of each tile."""
    o_t = tl.arange(0, TILE)
    highest = _float(largest)
    kept = tl.full([], _LOWEST, tl.int32)
    if LIMITED:
        top_k = tl.load(p_row + _TOP_K)
        if top_k < V:
            # as many tokens as tiles that have a larger one lie above this
            wanted = top_k.to(tl.float64)
            kept = _border(p_largest, None, p_largest + i_largest, kept, largest, wanted, 1, BLOCK_T)
            kept = _border(p_scores, None, p_largest, kept, largest, wanted, T, TILE)

    total, count = tl.full([], 0, tl.int64), tl.full([], 0, tl.int64)  # of what top-k keeps
    for i_tile in range(T):
        mass = tl.full([], 0, tl.int64)
        if tl.load(p_largest + i_tile) >= kept:
            b_s = tl.load(p_scores + i_tile * TILE + o_t)
            b_w = tl.where(b_s >= kept, _weight(b_s, highest), 0.0)
            tl.store(p_weights + i_tile * TILE + o_t, b_w)
            mass = _sum(b_w)
            if LIMITED:
                count += tl.sum((b_s >= kept).to(tl.int32))
        total += mass
        tl.store(p_mass + i_tile, mass)
    tl.debug_barrier()

    border = kept
    if LIMITED:
        top_p = _real(p_row, _TOP_P)
        if top_p < 1:
            # of ties at the border of top-k only so many count as there is room for, as if sorted; without top-k it is -inf
            within_k = total - (count - top_k) * _weight(kept, highest).to(tl.int64)
            lowest = tl.maximum(kept, _ordered(highest - _NO_WEIGHT))
            border = _border(p_scores, p_weights, p_largest, lowest, largest, top_p * within_k.to(tl.float64), T, TILE)
    if MIN_P:
        border = tl.maximum(border, _ordered(highest + _real(p_row, _LOG_MIN_P).to(tl.float32)))
    if border > kept:
        total = tl.full([], 0, tl.int64)
        for i_tile in range(T):
            mass = tl.full([], 0, tl.int64)
            if tl.load(p_largest + i_tile) >= border:
                b_s = tl.load(p_scores + i_tile * TILE + o_t)
                mass = _sum(tl.where(b_s >= border, tl.load(p_weights + i_tile * TILE + o_t), 0.0))
            total += mass
            tl.store(p_mass + i_tile, mass)
        tl.debug_barrier()

    # less than the total: a product by at most 1 - 2^-53 never rounds up to it
    u = _uniform(tl.load(p_row + _SEED), tl.load(p_row + _PRODUCED))
    target = (u * total.to(tl.float64)).to(tl.int64)
    reached, before, i_drawn = tl.full([], 0, tl.int64), tl.full([], 0, tl.int64), tl.full([], 0, tl.int32)
    for i_tile in range(T):
        reached += tl.load(p_mass + i_tile)
        passed = reached <= target
        i_drawn += passed.to(tl.int32)
        before = tl.where(passed, reached, before)
    b_s = tl.load(p_scores + i_drawn * TILE + o_t)
    b_w = tl.where(b_s >= border, tl.load(p_weights + i_drawn * TILE + o_t), 0.0)
    b_reached = tl.cumsum(b_w.to(tl.float64), 0)
    return i_drawn * TILE + tl.sum((b_reached <= (target - before).to(tl.float64)).to(tl.int32))


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
    b_largest = tl.load(p_largest + o_t, mask=o_t < T, other=_LOWEST)
    largest, i_tile = _first_largest(b_largest, BLOCK_T)
    if p_scores is not None:
        b_s = tl.load(p_scores + i_tile * TILE + tl.arange(0, TILE))
    else:
        b_s = _scores(p_logits, p_row, p_bias, p_in_prompt, p_counts, p_ending, row * V, i_tile, V, False, TILE)
    _, o_v = _first_largest(b_s, TILE)
    token = i_tile * TILE + o_v
    if p_scores is not None:
        tl.store(p_largest + o_t, b_largest)  # beyond the tiles too, where a draw reads it
        if (_real(p_row, _TEMPERATURE) > 0) & (tl.abs(_float(largest)) < float("inf")):
            tl.debug_barrier()
            token = _drawn(
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
