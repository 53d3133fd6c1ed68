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

from ..kernels.sampling import sample
from ..kernels.sampling_pytorch import NUMBERS
from .bad_words import BadWords, Words
from .sampling_params import SamplingParams

__all__ = ["Logprobs", "Needs", "Sampled", "Sampler", "SamplingParams", "logprobs_of"]

TABLE_BYTES = 10  # an element of the sampler's tables, all of them


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
        self._together: dict[tuple[int, ...], Needs] = {}  # what rows need together, until one is given away
        # six reals and four integers a row, in one tensor, so that one copy brings a row to a GPU
        self._numbers = torch.zeros(max_rows + 1, NUMBERS, dtype=torch.int64, device=device)
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
        self._together.clear()
        temperature = 0.0 if params.greedy else params.temperature
        reals = [temperature, params.top_p, math.log(params.min_p) if params.min_p else -math.inf]
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
        key = tuple(rows)
        needs = self._together.get(key)
        if needs is None:
            needs = self._together[key] = self._needs_together({self._needs[row] for row in key})
        return needs

    def _needs_together(self, each: set[Needs]) -> Needs:
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

    def sample(self, logits: Tensor, rows: Tensor, needs: Needs, last_tokens: Tensor | None = None) -> Sampled:
        """Chooses the next token of each of `rows` and counts it.

        Args:
            logits: (rows, vocab_size), any float dtype; not changed.
            rows: (rows,) int64, on the device; no row twice, except `padding_row`.
            needs: what `needs` says of these rows.
            last_tokens: (max_rows + 1,) int64: gets the token of each row.
        """
        scores = logits
        if needs.bad_words:  # before bias and penalties, since -inf stays -inf
            assert self._bad_words is not None
            scores = self._bad_words.forbid(logits, rows)
        token_ids = sample(
            scores, rows, self._numbers, **self._tables(needs), last_tokens=last_tokens, random=needs.random,
            width=needs.width, min_p=needs.min_p,
        )  # fmt: skip
        if needs.bad_words:
            assert self._bad_words is not None
            self._bad_words.push(rows, token_ids)
        found = None if needs.logprobs is None else logprobs_of(logits, token_ids, needs.logprobs)
        return Sampled(token_ids, found)

    def _tables(self, needs: Needs) -> dict[str, Tensor | None]:
        """Those that the rows need: what was made for others is not read."""
        return dict(
            bias=self._bias if needs.bias else None,
            in_prompt=self._in_prompt if needs.penalties else None,
            counts=self._counts if needs.penalties else None,
            ending=self._ending if needs.min_tokens else None,
        )


def logprobs_of(logits: Tensor, token_ids: Tensor, count: int) -> Logprobs:
    """Log-probabilities of `token_ids` (rows,) and of the `count` likeliest tokens under `logits` (rows, vocab_size)."""
    logprobs = logits.float().log_softmax(-1)
    chosen = logprobs.gather(-1, token_ids[:, None])
    ranks = (logprobs > chosen).sum(-1) + 1
    top, top_ids = logprobs.topk(min(count, logits.shape[-1]))
    return Logprobs(chosen[:, 0], ranks, top, top_ids)
