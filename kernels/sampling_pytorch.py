"""The choice of tokens in PyTorch's ops: what `sampling.py` computes, step by step, on any device and in any float dtype.

What each row asks for is a line of `numbers`, (max_rows, NUMBERS) int64: the bits of six reals in float64, then four integers.
"""

import math

import torch
from torch import Tensor

TEMPERATURE, TOP_P, LOG_MIN_P, REPETITION, PRESENCE, FREQUENCY, SEED, PRODUCED, TOP_K, MIN_TOKENS = range(10)
REALS, NUMBERS = 6, 10

UNIT = 2.0**40  # the weight of the likeliest token: 2^23 of them still fit an int64
# on a CPU, top-p looks at so many tokens before it sorts the vocabulary: 0.5 against 14 ms for 128k tokens
_CANDIDATES = 1024
GOLDEN = 0x9E3779B97F4A7C15
MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)


def sample(
    logits: Tensor, rows: Tensor, numbers: Tensor, bias: Tensor | None, in_prompt: Tensor | None,
    counts: Tensor | None, ending: Tensor | None, last_tokens: Tensor | None, random: bool, width: int, min_p: bool,
) -> Tensor:  # fmt: skip
    """The op `sample`: arguments and result are those of `sampling.sample`."""
    scores = _edit(logits, rows, numbers, bias, in_prompt, counts, ending)
    token_ids = _choose(scores, rows, numbers, random, width, min_p)
    _count(token_ids, rows, numbers, counts, last_tokens)
    return token_ids


def _edit(
    logits: Tensor, rows: Tensor, numbers: Tensor, bias: Tensor | None, in_prompt: Tensor | None,
    counts: Tensor | None, ending: Tensor | None,
) -> Tensor:  # fmt: skip
    """The scores of `logits` (batch, vocab_size) with bias, penalties, and ending tokens withheld; float32 if there are any."""
    scores = logits if bias is None and counts is None and ending is None else logits.float()
    if bias is not None:
        scores = scores + bias[rows]
    if counts is not None:
        assert in_prompt is not None
        penalties = _reals(numbers)[rows, REPETITION:].unbind(1)
        scores = penalize(scores, in_prompt[rows], counts[rows], *penalties)
    if ending is not None:
        early = numbers[rows, PRODUCED] < numbers[rows, MIN_TOKENS]
        scores = scores.masked_fill(ending[rows] & early[:, None], -math.inf)
    return scores


def _choose(scores: Tensor, rows: Tensor, numbers: Tensor, random: bool, width: int, min_p: bool) -> Tensor:
    """The token of each row: the first of the likeliest, or a draw where the row has a temperature."""
    token_ids = scores.argmax(-1)
    if not random:
        return token_ids
    reals, integers = _reals(numbers)[rows], numbers[rows]
    is_random = reals[:, TEMPERATURE] > 0
    scores = scores.float() / reals[:, TEMPERATURE].where(is_random, 1.0).float()[:, None]
    if width:
        scores = keep_likeliest(scores, integers[:, TOP_K], reals[:, TOP_P], width)
    if min_p:
        scores = keep_near_likeliest(scores, reals[:, LOG_MIN_P])
    return torch.where(is_random, draw(scores, uniform(integers[:, SEED], integers[:, PRODUCED])), token_ids)


def _count(token_ids: Tensor, rows: Tensor, numbers: Tensor, counts: Tensor | None, last_tokens: Tensor | None) -> None:
    """Takes note of the tokens that were chosen, (batch,)."""
    numbers[:, PRODUCED].index_add_(0, rows, torch.ones_like(rows))
    if counts is not None:
        counts.view(-1).index_add_(0, rows * counts.shape[1] + token_ids, torch.ones_like(rows, dtype=counts.dtype))
    if last_tokens is not None:
        last_tokens[rows] = token_ids


def _reals(numbers: Tensor) -> Tensor:
    return numbers[:, :REALS].view(torch.float64)


def penalize(
    scores: Tensor, in_prompt: Tensor, counts: Tensor, repetition: Tensor, presence: Tensor, frequency: Tensor
) -> Tensor:
    """Repetition penalty (transformers, vLLM), then frequency and presence penalties (OpenAI, vLLM).

    Args:
        scores: (rows, vocab_size) float32.
        in_prompt, counts: of the same shape: whether a token is in the prompt, and how often in the output.
        repetition, presence, frequency: (rows,).
    """
    repetition, presence, frequency = (value.to(scores.dtype)[:, None] for value in (repetition, presence, frequency))
    in_output = counts > 0
    repeated = torch.where(scores < 0, scores * repetition, scores / repetition)
    return torch.where(in_prompt | in_output, repeated, scores) - frequency * counts - presence * in_output


def keep_likeliest(scores: Tensor, top_k: Tensor, top_p: Tensor, width: int) -> Tensor:
    """Sets to -inf what top-k (`TopKLogitsWarper`) and, of what that leaves, top-p (`TopPLogitsWarper`) do not keep.

    A token is kept by top-p if those likelier than it have less than the probability `top_p`; the likeliest always is.

    Args:
        scores: (rows, vocab_size) float32, the largest of a row finite.
        top_k: (rows,) int64, `vocab_size` for all.
        top_p: (rows,) float64, 1 for all.
        width: so many of the likeliest tokens are enough for every row: at least the `top_k` of each row that limits it, and
            `vocab_size` if `top_p` limits a row that `top_k` does not.
    """
    vocab_size = scores.shape[-1]
    if scores.device.type == "cpu" and width > _CANDIDATES:
        kept, enough = _smallest_kept(scores, top_k, top_p, _CANDIDATES)
        if enough.all():
            return scores.masked_fill(scores < kept, -math.inf)
    kept, _ = _smallest_kept(scores, top_k, top_p, min(width, vocab_size))
    return scores.masked_fill(scores < kept, -math.inf)


def _smallest_kept(scores: Tensor, top_k: Tensor, top_p: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The smallest score that each row keeps, (rows, 1), and whether the `width` largest were enough to tell, (rows,)."""
    vocab_size = scores.shape[-1]
    top_k, top_p = top_k[:, None], top_p[:, None]
    ordered = scores.topk(width).values if width < vocab_size else scores.sort(descending=True).values
    within_k = torch.arange(width, device=scores.device) < top_k
    weights = _weights(ordered, ordered[:, :1]) * within_k
    reached = weights.cumsum(-1)
    unlimited = top_k >= vocab_size
    total = torch.where(unlimited, _weights(scores, ordered[:, :1]).sum(-1, keepdim=True), reached[:, -1:])
    wanted = top_p * total
    # top_p = 1 keeps also what is too unlikely to have a weight
    kept = (((reached - weights) < wanted) | (top_p >= 1)) & within_k
    smallest = ordered.gather(-1, kept.sum(-1, keepdim=True).clamp(min=1) - 1)
    unfiltered = unlimited & (top_p >= 1)
    enough = unfiltered | (top_k <= width) | (unlimited & (reached[:, -1:] >= wanted))
    return smallest.masked_fill(unfiltered, -math.inf), enough[:, 0]


def keep_near_likeliest(scores: Tensor, log_min_p: Tensor) -> Tensor:
    """Sets to -inf what is less likely than exp(`log_min_p`), (rows,), of the likeliest token (`MinPLogitsWarper`)."""
    smallest = scores.amax(-1, keepdim=True) + log_min_p.to(scores.dtype)[:, None]
    return scores.masked_fill(scores < smallest, -math.inf)


def _weights(scores: Tensor, largest: Tensor) -> Tensor:
    return ((scores - largest).exp() * UNIT).to(torch.int64)


def draw(scores: Tensor, uniform: Tensor) -> Tensor:
    """A token of softmax(`scores`) for each row, by the inverse of its distribution function.

    Args:
        scores: (rows, vocab_size) float32, the largest of a row finite.
        uniform: (rows,) float64 from 0 up to, not including, 1.

    Returns:
        (rows,) int64.
    """
    reached = _weights(scores, scores.amax(-1, keepdim=True)).cumsum(-1)
    total = reached[:, -1:]
    # less than the total: a product by at most 1 - 2^-53 never rounds up to it
    target = (uniform[:, None] * total).to(torch.int64)
    token_ids = torch.searchsorted(reached, target, right=True)[:, 0]
    # NaN scores have no total: what comes of them is a token all the same, for the embedding that reads it next
    return token_ids.clamp(max=scores.shape[-1] - 1)


def uniform(seed: Tensor, index: Tensor) -> Tensor:
    """Number `index` of the stream of `seed`: float64 from 0 up to 1, in steps of 2^-53. Both (rows,) int64.

    SplitMix64 (Steele, Lea and Flood, 2014) with the mixed seed as its state: any number of the stream without those before.
    """
    bits = _mix(_mix(seed) + (index + 1) * signed(GOLDEN))
    return ((bits >> 11) & (2**53 - 1)).double() * 2.0**-53


def signed(bits: int) -> int:
    return bits - 2**64 if bits >= 2**63 else bits


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's finalizer in int64, whose products wrap around; masks make its shifts those of unsigned numbers."""
    x = (x ^ ((x >> 30) & (2**34 - 1))) * signed(MULTIPLIERS[0])
    x = (x ^ ((x >> 27) & (2**37 - 1))) * signed(MULTIPLIERS[1])
    return x ^ ((x >> 31) & (2**33 - 1))
