"""The choice of the next token, on the device, by what each request asks for (`SamplingParams`).

The logits of a row pass, in the order of transformers' logits processors: bias, allowed and banned tokens; repetition, then
frequency and presence penalties; end and stop tokens withheld before `min_tokens`; bad words; temperature; top-k; top-p; min-p. Ties at the
border of top-k and top-p are all kept. Log-probabilities are those of the raw logits, before any of this, as vLLM's default.

What runs beside a request cannot change its tokens:
- the random number of a token is a hash of its request's seed and of its own index in the request, not the state of a generator;
- probabilities become integers (units of 2^-40 of the likeliest token's) before they are added, so that every sum is exact, in
  any order, for any number of rows: the running float sum of a GPU is neither. Tokens below 2^-40 of the likeliest are never drawn;
- the draw is the inverse of the distribution function over the vocabulary in its own order, whatever was cut off before.

Nothing here waits for the device, and a step can be captured in a CUDA graph whose key holds the `Needs` of its rows.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .bad_words import BadWords, Words
from .sampling_params import GREEDY_BELOW, SamplingParams

__all__ = ["Logprobs", "Needs", "Sampled", "Sampler", "SamplingParams", "logprobs_of"]

TABLE_BYTES = 10  # an element of the sampler's tables, all of them
_UNIT = 2.0**40  # the weight of the likeliest token: 2^23 of them still fit an int64
# on a CPU, top-p looks at so many tokens before it sorts the vocabulary: 0.5 against 14 ms for 128k tokens
_CANDIDATES = 1024
_GOLDEN = 0x9E3779B97F4A7C15


@dataclass(frozen=True)
class Needs:
    """What the rows of a batch need together, known on the host: it decides which ops run, so a graph's key holds it."""

    bias: bool = False
    penalties: bool = False
    min_tokens: bool = False
    random: bool = False
    width: int = 0  # how many of the likeliest tokens top-k and top-p look at; 0: neither is asked for
    min_p: bool = False
    bad_words: tuple[int, int] | None = None  # the shape of their tables
    logprobs: int | None = None


@dataclass(frozen=True)
class Logprobs:
    """Natural log-probabilities of the raw logits, float32: of each row's token, and of its `top_ids`, likeliest first."""

    chosen: Tensor  # (rows,)
    ranks: Tensor  # (rows,) int64, of the row's token among all: 1 if none is likelier
    top: Tensor  # (rows, count)
    top_ids: Tensor  # (rows, count)

    def to_host(self) -> "Logprobs":
        """A copy in pinned memory, on its way."""
        tensors = (self.chosen, self.ranks, self.top, self.top_ids)
        return Logprobs(*(tensor.to("cpu", non_blocking=True) for tensor in tensors))


@dataclass(frozen=True)
class Sampled:
    """The chosen tokens, (rows,) int64, on the device, and the log-probabilities where a row asked for them."""

    token_ids: Tensor
    logprobs: Logprobs | None

    def to_host(self) -> "Sampled":
        """A copy in pinned memory, on its way."""
        logprobs = None if self.logprobs is None else self.logprobs.to_host()
        return Sampled(self.token_ids.to("cpu", non_blocking=True), logprobs)


_TEMPERATURE, _TOP_P, _LOG_MIN_P, _REPETITION, _PRESENCE, _FREQUENCY = range(6)
_SEED, _PRODUCED, _TOP_K, _MIN_TOKENS = range(4)


class Sampler:
    """Chooses tokens for up to `max_rows` requests, and keeps on the device what the choice depends on.

    A request takes a row with `add` for as long as it runs; a later request takes it over with its own `add`. Each call of
    `sample` counts as one more token of each row given. `padding_row` is a row beyond the others for graphs of a fixed size.

    Tables of (max_rows + 1, vocab_size) are made when a request first needs them: 4 bytes an element for bias, allowed and banned
    tokens, 5 for penalties, 1 for `min_tokens`.
    """

    def __init__(self, vocab_size: int, max_rows: int, *, eos_ids: Iterable[int] = (), device: torch.device) -> None:
        self.vocab_size = vocab_size
        self.padding_row = max_rows
        self._eos_ids = tuple(eos_ids)
        self._needs = [Needs()] * (max_rows + 1)
        # six reals and four integers a row, in one tensor, so that one copy brings a row to a GPU
        self._numbers = torch.zeros(max_rows + 1, 10, dtype=torch.int64, device=device)
        self._reals, self._integers = self._numbers[:, :6].view(torch.float64), self._numbers[:, 6:]
        self._bias: Tensor | None = None  # float32
        self._in_prompt: Tensor | None = None  # bool
        self._counts: Tensor | None = None  # int32, of each token in the output
        self._ending: Tensor | None = None  # bool
        self._bad_words: BadWords | None = None
        self.add(self.padding_row, SamplingParams(temperature=0.0), seed=0, prompt_ids=())

    def add(
        self, row: int, params: SamplingParams, *, seed: int, prompt_ids: Sequence[int], output_ids: Sequence[int] = (),
        bad_words: Words = (),
    ) -> None:  # fmt: skip
        """Gives `row` to a request that has `output_ids` already (some, if it was preempted), with its `bad_words` as tokens.

        `params` fit the vocabulary: `SamplingParams.check_vocabulary` has said so, once for a request.
        """
        if bad_words and self._bad_words is None:
            self._bad_words = BadWords(len(self._needs), self.vocab_size, upload=self._upload)
        if self._bad_words is not None:
            self._bad_words.put(row, bad_words, output_ids)
        needs = self._needs[row] = self._needs_of(params, bad_words)
        reals = [params.temperature, params.top_p, math.log(params.min_p) if params.min_p else -math.inf]
        reals += [params.repetition_penalty, params.presence_penalty, params.frequency_penalty]
        top_k = params.top_k if 0 < params.top_k < self.vocab_size else self.vocab_size
        integers = [seed, len(output_ids), top_k, params.min_tokens]
        numbers = torch.cat((torch.tensor(reals, dtype=torch.float64).view(torch.int64), torch.tensor(integers)))
        self._numbers[row] = self._upload(numbers)
        for table in (self._bias, self._in_prompt, self._counts, self._ending):
            if table is not None:  # what a row does not need, its neighbours may: it must find zeros there
                table[row].zero_()
        if needs.bias:
            self._bias = self._table(self._bias, torch.float32)
            self._fill_bias(self._bias[row], params)
        if needs.penalties:
            self._in_prompt = self._table(self._in_prompt, torch.bool)
            self._counts = self._table(self._counts, torch.int32)
            self._in_prompt[row].index_fill_(0, self._ids(prompt_ids), True)
            if output_ids:
                output = self._ids(output_ids)
                self._counts[row].index_add_(0, output, torch.ones_like(output, dtype=torch.int32))
        if needs.min_tokens:
            self._ending = self._table(self._ending, torch.bool)
            self._ending[row].index_fill_(0, self._ids(tuple(params.ending_ids(self._eos_ids))), True)

    def _table(self, table: Tensor | None, dtype: torch.dtype) -> Tensor:
        shape = (len(self._needs), self.vocab_size)
        return torch.zeros(shape, dtype=dtype, device=self._numbers.device) if table is None else table

    def _fill_bias(self, row: Tensor, params: SamplingParams) -> None:
        if params.allowed_token_ids is not None:
            row.fill_(-math.inf).index_fill_(0, self._ids(params.allowed_token_ids), 0)
        if params.logit_bias:
            biases = torch.tensor(list(params.logit_bias.values()), dtype=torch.float32)
            row.index_add_(0, self._ids([int(i) for i in params.logit_bias]), self._upload(biases))
        row.index_fill_(0, self._ids(params.banned_token_ids or ()), -math.inf)

    def _ids(self, token_ids: Sequence[int]) -> Tensor:
        return self._upload(torch.tensor(token_ids, dtype=torch.int64))

    def _upload(self, values: Tensor) -> Tensor:
        """On the device; from pinned memory to a GPU, whose host does not wait for it."""
        device = self._numbers.device
        return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values

    def needs(self, rows: Iterable[int]) -> Needs:
        """What these rows need together. Host only."""
        each = {self._needs[row] for row in rows}
        asked = [needs.logprobs for needs in each if needs.logprobs is not None]
        width = max((needs.width for needs in each), default=0)
        return Needs(
            bias=any(needs.bias for needs in each),
            penalties=any(needs.penalties for needs in each),
            min_tokens=any(needs.min_tokens for needs in each),
            random=any(needs.random for needs in each),
            width=min(1 << (width - 1).bit_length(), self.vocab_size) if width else 0,  # few widths, few graphs
            min_p=any(needs.min_p for needs in each),
            bad_words=self._bad_words.shape if self._bad_words and any(needs.bad_words for needs in each) else None,
            logprobs=max(asked, default=None),
        )

    def _needs_of(self, params: SamplingParams, bad_words: Words) -> Needs:
        random = not params.greedy
        top_k = params.top_k if 0 < params.top_k < self.vocab_size else 0
        return Needs(
            bias=bool(params.logit_bias or params.banned_token_ids) or params.allowed_token_ids is not None,
            penalties=params.repetition_penalty != 1 or params.presence_penalty != 0 or params.frequency_penalty != 0,
            min_tokens=params.min_tokens > 0,
            random=random,
            width=(top_k or (self.vocab_size if params.top_p < 1 else 0)) if random else 0,
            min_p=random and params.min_p > 0,
            bad_words=self._bad_words.shape if self._bad_words and bad_words else None,
            logprobs=params.logprobs,
        )

    def sample(self, logits: Tensor, rows: Tensor, needs: Needs) -> Sampled:
        """Chooses the next token of each of `rows` and counts it.

        Args:
            logits: (rows, vocab_size), any float dtype; not changed.
            rows: (rows,) int64, on the device; no row twice, except `padding_row`.
            needs: what `needs` says of these rows.
        """
        scores = logits
        if needs.bias or needs.penalties or needs.min_tokens or needs.bad_words:
            scores = self._edit(logits.float(), rows, needs)
        token_ids = scores.argmax(-1)
        if needs.random:
            reals, integers = self._reals[rows], self._integers[rows]
            drawn = self._draw(scores.float(), reals, integers, needs)
            token_ids = torch.where(reals[:, _TEMPERATURE] < GREEDY_BELOW, token_ids, drawn)
        self._integers[:, _PRODUCED].index_add_(0, rows, torch.ones_like(rows))
        if needs.penalties:
            assert self._counts is not None
            ones = torch.ones_like(rows, dtype=torch.int32)
            self._counts.view(-1).index_add_(0, rows * self.vocab_size + token_ids, ones)
        if needs.bad_words:
            assert self._bad_words is not None
            self._bad_words.push(rows, token_ids)
        found = None if needs.logprobs is None else logprobs_of(logits, token_ids, needs.logprobs)
        return Sampled(token_ids, found)

    def _edit(self, scores: Tensor, rows: Tensor, needs: Needs) -> Tensor:
        if needs.bias:
            assert self._bias is not None
            scores = scores + self._bias[rows]
        if needs.penalties:
            assert self._in_prompt is not None and self._counts is not None
            penalties = self._reals[rows, _REPETITION:].unbind(1)
            scores = penalize(scores, self._in_prompt[rows], self._counts[rows], *penalties)
        if needs.min_tokens:
            assert self._ending is not None
            integers = self._integers[rows]
            early = integers[:, _PRODUCED] < integers[:, _MIN_TOKENS]
            scores = scores.masked_fill(self._ending[rows] & early[:, None], -math.inf)
        if needs.bad_words:
            assert self._bad_words is not None
            scores = self._bad_words.forbid(scores, rows)
        return scores

    @staticmethod
    def _draw(scores: Tensor, reals: Tensor, integers: Tensor, needs: Needs) -> Tensor:
        temperature = reals[:, _TEMPERATURE].where(reals[:, _TEMPERATURE] >= GREEDY_BELOW, 1.0)
        scores = scores / temperature.float()[:, None]
        if needs.width:
            scores = keep_likeliest(scores, integers[:, _TOP_K], reals[:, _TOP_P], needs.width)
        if needs.min_p:
            scores = keep_near_likeliest(scores, reals[:, _LOG_MIN_P])
        return draw(scores, uniform(integers[:, _SEED], integers[:, _PRODUCED]))


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
    return ((scores - largest).exp() * _UNIT).to(torch.int64)


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


def logprobs_of(logits: Tensor, token_ids: Tensor, count: int) -> Logprobs:
    """Log-probabilities of `token_ids` (rows,) and of the `count` likeliest tokens under `logits` (rows, vocab_size)."""
    logprobs = logits.float().log_softmax(-1)
    chosen = logprobs.gather(-1, token_ids[:, None])
    ranks = (logprobs > chosen).sum(-1) + 1
    top, top_ids = logprobs.topk(min(count, logits.shape[-1]))
    return Logprobs(chosen[:, 0], ranks, top, top_ids)


def uniform(seed: Tensor, index: Tensor) -> Tensor:
    """Number `index` of the stream of `seed`: float64 from 0 up to 1, in steps of 2^-53. Both (rows,) int64.

    SplitMix64 (Steele, Lea and Flood, 2014) with the mixed seed as its state: any number of the stream without those before.
    """
    bits = _mix(_mix(seed) + (index + 1) * _signed(_GOLDEN))
    return ((bits >> 11) & (2**53 - 1)).double() * 2.0**-53


_MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)


def _signed(bits: int) -> int:
    return bits - 2**64 if bits >= 2**63 else bits


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's finalizer in int64, whose products wrap around; masks make its shifts those of unsigned numbers."""
    x = (x ^ ((x >> 30) & (2**34 - 1))) * _signed(_MULTIPLIERS[0])
    x = (x ^ ((x >> 27) & (2**37 - 1))) * _signed(_MULTIPLIERS[1])
    return x ^ ((x >> 31) & (2**33 - 1))
