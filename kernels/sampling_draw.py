"""The draw of a token from what top-k, top-p and min-p keep of a row: kernels of `sampling.py`, which says what they compute.

Nothing is sorted. A border is a score: `_border` bisects between two of them over the integers that are ordered as floats are, and after
each round both ends move to scores that are there, so that ties end it like distinct scores do. A row is cut into tiles, and a
round reads only those tiles whose largest score lies above its middle: few, for a border near the top of the row.
"""

from .sampling_pytorch import GOLDEN, LOG_MIN_P, MULTIPLIERS, PRODUCED, SEED, TOP_K, TOP_P, UNIT, signed
from .triton_compat import tl, triton

LOWEST = tl.constexpr(0x7F800000 ^ -1)  # -inf, ordered
_TOP_P, _LOG_MIN_P, _SEED, _PRODUCED, _TOP_K = (tl.constexpr(i) for i in (TOP_P, LOG_MIN_P, SEED, PRODUCED, TOP_K))
_UNIT = tl.constexpr(UNIT)
_NO_WEIGHT = tl.constexpr(28.0)  # so far below the largest score 2^40 exp(s - max(s)) is less than one
_GOLDEN = tl.constexpr(signed(GOLDEN))
_FIRST_MULTIPLIER, _SECOND_MULTIPLIER = (tl.constexpr(signed(multiplier)) for multiplier in MULTIPLIERS)


@triton.jit
def real(p_row, i: tl.constexpr):
    """One of the reals of a row of `numbers`."""
    return tl.load(p_row + i).to(tl.float64, bitcast=True)


@triton.jit
def ordered(b_s):
    """Floats as integers in the same order; NaN is the largest, and both zeros are one."""
    b_bits = (b_s + 0.0).to(tl.int32, bitcast=True)
    return tl.where(b_s == b_s, tl.where(b_bits < 0, b_bits ^ 0x7FFFFFFF, b_bits), 0x7FFFFFFF)


@triton.jit
def ordered_float(b_x):
    """The float that `ordered` made an integer."""
    return tl.where(b_x < 0, b_x ^ 0x7FFFFFFF, b_x).to(tl.float32, bitcast=True)


@triton.jit
def _weight(b_s, highest):
    """w of ordered scores, below the float `highest`."""
    return tl.floor(tl.exp(ordered_float(b_s) - highest) * _UNIT)


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
def draw(
    p_row, p_scores, p_weights, p_largest, p_mass, i_largest, largest, V, T,
    LIMITED: tl.constexpr, MIN_P: tl.constexpr, TILE: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """A token of a row whose largest score is finite; `p_mass` gets the weight of each tile."""
    o_t = tl.arange(0, TILE)
    highest = ordered_float(largest)
    kept = tl.full([], LOWEST, tl.int32)
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
        top_p = real(p_row, _TOP_P)
        if top_p < 1:
            # of ties at the border of top-k only so many count as there is room for, as if sorted; without top-k it is -inf
            within_k = total - (count - top_k) * _weight(kept, highest).to(tl.int64)
            lowest = tl.maximum(kept, ordered(highest - _NO_WEIGHT))
            border = _border(p_scores, p_weights, p_largest, lowest, largest, top_p * within_k.to(tl.float64), T, TILE)
    if MIN_P:
        border = tl.maximum(border, ordered(highest + real(p_row, _LOG_MIN_P).to(tl.float32)))
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
