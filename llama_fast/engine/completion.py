"""What a request has produced: tokens become text, and text ends where it should."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Literal

from ..decoder.detokenizer import DetokenizedStream
from ..decoder.tokenizer import Tokenizer
from .sampling import Logprobs, SamplingParams
from .stop_strings import StopStrings

TextOf = Callable[[int], str]
FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True)
class TokenLogprob:
    """The log-probability of a token, and those of the likeliest tokens by id, likeliest first, from the raw logits.

    `rank` is 1 where no token is likelier; the ranks of `top` are their order. `texts` says what each token of these is alone.
    """

    token_id: int
    logprob: float
    rank: int
    top: dict[int, float]
    texts: dict[int, str]

    @classmethod
    def of(cls, logprobs: Logprobs, row: int, token_id: int, count: int, text_of: TextOf) -> "TokenLogprob":
        """That of a row's `token_id`, with the `count` likeliest tokens. `logprobs` are on the host."""
        ids, values = logprobs.top_ids[row, :count].tolist(), logprobs.top[row, :count].tolist()
        texts = {i: text_of(i) for i in (token_id, *ids)}
        rank = int(logprobs.ranks[row])
        return cls(token_id, logprobs.chosen[row].item(), rank, dict(zip(ids, values, strict=True)), texts)


@dataclass
class Completion:
    """What a request has generated; `others` are the second to the last of `n` results, and `outputs` all of them.

    `text` is what `token_ids` add to the text of the prompt (`DetokenizedStream` says what that is where the prompt ends inside a
    character), up to what stopped it; `token_ids` hold the token that stopped it too. It is empty with `detokenize=False`, and
    where the model's folder has no tokenizer.

    `finish_reason` is "stop" (an end token, a stop token or a stop string), "length" (`max_tokens`, or the end of the context),
    "cancelled", or None while it runs. `stop_reason` is the stop string or the stop token's id; None for the model's own end tokens.
    `logprobs` has an entry for each token, `prompt_logprobs` one for each token of the prompt after the first, if asked for.
    """

    prompt_token_ids: list[int]
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    logprobs: list[TokenLogprob] | None = None
    prompt_logprobs: list[TokenLogprob] | None = None
    others: list["Completion"] = field(default_factory=list, repr=False, compare=False)

    @property
    def cumulative_logprob(self) -> float | None:
        """The sum of the log-probabilities of all tokens, if they were asked for."""
        return None if self.logprobs is None else sum(entry.logprob for entry in self.logprobs)

    @property
    def outputs(self) -> list["Completion"]:
        """All `n` results."""
        return [self, *self.others]


class Output:
    """A completion that grows token by token. `new_text()` gives what has been settled since it was last asked."""

    def __init__(
        self, completion: Completion, params: SamplingParams, tokenizer: Tokenizer | None, *, eos_ids: Iterable[int]
    ) -> None:
        self.completion = completion
        self._asked = (params, tokenizer, frozenset(eos_ids))
        self._min_tokens, self._include = params.min_tokens, params.include_stop_str_in_output
        self._stop_ids = frozenset(params.stop_token_ids or ())
        self._eos_ids = frozenset() if params.ignore_eos else self._asked[2]
        self._detokenizer: DetokenizedStream | None = None
        if tokenizer is not None and params.detokenize:
            ids, skip = completion.prompt_token_ids, params.skip_special_tokens
            self._detokenizer = DetokenizedStream(tokenizer, ids, skip_special=skip)
        self._stops = StopStrings(params.stop_strings, include=self._include)
        self._given = 0

    def push(self, token_id: int, logprob: TokenLogprob | None, *, last: bool) -> bool:
        """Takes the next token; `last` says that no more may follow. Returns whether the completion has ended."""
        completion = self.completion
        completion.token_ids.append(token_id)
        if logprob is not None and completion.logprobs is not None:
            completion.logprobs.append(logprob)
        is_eos, is_stop = token_id in self._eos_ids, token_id in self._stop_ids
        if self._detokenizer and (self._include or not (is_eos or is_stop)):
            self._settle(self._detokenizer.push(token_id))
        if is_eos or is_stop:
            self.end("stop", None if is_eos else token_id)
        elif last:
            self.end("length")
        return completion.finish_reason is not None

    def read_again(self, max_tokens: int) -> None:
        """Makes the text and the end anew from the tokens, of which the last may have been taken in part. A completion that has ended stays."""
        completion = self.completion
        if completion.finish_reason is not None:
            return
        if completion.logprobs is not None:
            whole = min(len(completion.token_ids), len(completion.logprobs))
            del completion.token_ids[whole:], completion.logprobs[whole:]
        params, tokenizer, eos_ids = self._asked
        again = Output(Completion(completion.prompt_token_ids), params, tokenizer, eos_ids=eos_ids)
        for count, token_id in enumerate(completion.token_ids, 1):
            again.push(token_id, None, last=count >= max_tokens)
        self._detokenizer, self._stops = again._detokenizer, again._stops
        completion.text = again.completion.text
        completion.finish_reason, completion.stop_reason = again.completion.finish_reason, again.completion.stop_reason

    def end(self, reason: FinishReason, stop_reason: int | None = None) -> None:
        """Ends the completion, unless a stop string has, and settles what was held back."""
        completion = self.completion
        if self._detokenizer and completion.finish_reason is None:
            self._settle(self._detokenizer.flush())
        if completion.finish_reason is None:
            completion.text += self._stops.flush()
            completion.finish_reason, completion.stop_reason = reason, stop_reason

    def new_text(self) -> str:
        text = self.completion.text  # once: another thread's step may add to it meanwhile
        start, self._given = self._given, len(text)
        return text[start:]

    def _settle(self, text: str) -> None:
        """Adds text up to the first stop string, which ends the completion; one that ends in the first `min_tokens` tokens does not."""
        completion = self.completion
        completion.text += self._stops.push(text, may_end=len(completion.token_ids) > self._min_tokens)
        if self._stops.found is not None:
            completion.finish_reason, completion.stop_reason = "stop", self._stops.found
