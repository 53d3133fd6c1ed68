"""The requests on their way, and the steps that serve them all, whichever threads they came from."""

import functools
from collections import deque
from collections.abc import Callable
from typing import TypeVar

from . import prompt_logprobs
from .completion import TextOf, TokenLogprob
from .placement import own_modes
from .request import Request, Run
from .runner import Launched, Runner
from .sampling import Logprobs
from .scheduler import Chunk, Scheduler, Sequence
from .turns import Turns

_Result = TypeVar("_Result")


class EngineCore:
    """Everything here, and in the scheduler, the pool of blocks and the runner behind it, is read and changed in turn (`turns`).

    There is no thread of its own: who waits for tokens computes a step, and those who wait beside it find its results.

    A turn may come to no end: a fault of the device, or an interrupt between any two statements. The next turn then takes nothing for
    granted but the tokens of the completions, and makes all else anew from them.

    Args:
        scheduler, runner: of one engine.
        text_of: what a token is alone, for those that have log-probabilities.
        reads_late: a step is read after the next one has been launched.
        phase: is told the name of each phase of a step as it ends on the host.
    """

    def __init__(
        self, scheduler: Scheduler, runner: Runner, *, text_of: TextOf, reads_late: bool, phase: Callable[[str], None]
    ) -> None:  # fmt: skip
        self.scheduler, self.runner = scheduler, runner
        self.runs: dict[Sequence, Run] = {}
        self.launched: Launched | None = None
        self._text_of, self._reads_late, self._phase = functools.cache(text_of), reads_late, phase
        self._turns = Turns()
        self._repeating: list[Chunk] | None = None  # of the last step, if the next may be the same a token further
        self._whole = True  # the last turn came to its end
        self._cancelled: deque[Request] = deque()  # and not ended yet
        self._steps = 0  # that came to their end

    def between_steps(self, work: Callable[[], _Result]) -> _Result:
        """What `work` returns, while no other thread is in the midst of a step."""
        return self._turns.take(lambda: self._in_turn(work))

    def add(self, requests: list[Request]) -> None:
        self.between_steps(lambda: self._add(requests))

    def cancel(self, requests: list[Request]) -> None:
        """At once; in the midst of a turn of this thread (it drops a stream there, or hears a signal), at the end of that."""
        running = [request for request in requests if not request.done]
        self._cancelled.extend(running)
        if running and not self._turns.mine:
            self.between_steps(lambda: None)  # a turn ends them

    def step(self) -> None:
        """A step, unless one of another thread has ended meanwhile. What is interrupted or fails is computed again later."""
        seen = self._steps
        self.between_steps(lambda: self._step() if self._steps == seen else None)

    # --- in turn -----------------------------------------------------------------------------------------------------

    def _add(self, requests: list[Request]) -> None:
        for request in requests:
            runs = {sequence: run for sequence, run in request.runs.items() if not run.done}
            if runs:
                first, *rest = runs
                runs[first].followers = rest
                self.runs |= runs
                self.scheduler.add(first)

    def _end_cancelled(self) -> None:
        while self._cancelled:
            for sequence in self._cancelled[0].runs:
                if sequence in self.runs:
                    self.runs[sequence].output.end("cancelled")
                    self._finish(sequence)
            self._cancelled.popleft()

    def _finish(self, sequence: Sequence) -> None:
        """A sequence whose completion is whole."""
        self.scheduler.finish(sequence)
        self.runs[sequence].done = True
        del self.runs[sequence]

    def _in_turn(self, work: Callable[[], _Result]) -> _Result:
        if not self._whole:
            self._rebuild()
        self._whole = False
        result = work()
        self._end_cancelled()
        self._whole = True
        return result

    def _step(self) -> None:
        if not self._repeat():
            with own_modes(self.runner.cache.device):
                self._compute()
        self._steps += 1

    def _repeat(self) -> bool:
        """The next step of a steady batch, for which nothing is planned anew: 34 us of Python and not 95, behind a replay that has emptied the caches."""
        chunks = self._repeating
        if chunks is None or not self.runner.repeats or not self.scheduler.repeat(chunks):
            return False
        self._phase("schedule")
        token_ids = self.runner.again(chunks)
        self._finish_step(chunks, self._read_tokens(chunks, token_ids, None))
        return True

    def _compute(self) -> None:
        self._recompute_turned()
        chunks = self.scheduler.schedule()
        self._phase("schedule")
        launched = self._launch(chunks) if chunks else None
        repeats = bool(chunks) and self.runner.repeats and self.runner.decoder.rotary.recompute_after is None
        self._repeating = chunks if repeats else None
        if self._reads_late:
            launched, self.launched = self.launched, launched
        if launched is not None:
            self._read(launched)

    def _rebuild(self) -> None:
        """After a turn that came to no end. It may be interrupted itself: then it is done again from the start."""
        self.launched = self._repeating = None
        for sequence, run in list(self.runs.items()):
            run.output.read_again(sequence.max_tokens)
            sequence.output[:] = run.output.completion.token_ids
            if run.output.completion.finish_reason is not None:
                run.done = True
                del self.runs[sequence]
        followers = {follower for run in self.runs.values() for follower in run.followers}
        self.scheduler.rebuild([sequence for sequence in self.runs if sequence not in followers])

    def _recompute_turned(self) -> None:
        """A sequence that outgrows the trained length of a `longrope` model turns its keys otherwise: all are computed again."""
        limit = self.runner.decoder.rotary.recompute_after
        if limit is None:
            return
        running, waiting = self.scheduler.running, self.scheduler.waiting
        for sequence in [s for s in (*running, *waiting) if s.rotary_length <= limit < s.known]:
            sequence.rotary_length = sequence.known
            if sequence in running:
                self.scheduler.preempt(sequence)

    # --- launching a step --------------------------------------------------------------------------------------------

    def _launch(self, chunks: list[Chunk]) -> Launched:
        for chunk in chunks:
            self._give_row(chunk.sequence)
        return self.runner.launch(chunks, self._asked(chunks))

    def _give_row(self, sequence: Sequence) -> None:
        """Tells the sampler about a sequence that has just been given a row."""
        if not sequence.restarted:
            return
        sequence.restarted = False
        run = self.runs[sequence]
        self.runner.sampler.add(
            sequence.row, run.params, seed=run.seed, prompt_ids=sequence.prompt, output_ids=sequence.output,
            bad_words=run.bad_words,
        )  # fmt: skip

    def _asked(self, chunks: list[Chunk]) -> dict[Chunk, int]:
        """Chunks of prompts whose log-probabilities are asked for, and of how many of the likeliest tokens."""
        asked = {}
        for chunk in chunks:
            run = self.runs[chunk.sequence]
            wanted = run.output.completion.prompt_logprobs is not None  # of several outputs, the first has them
            if wanted and chunk.start < len(chunk.sequence.prompt) - 1:
                assert run.params.prompt_logprobs is not None
                asked[chunk] = run.params.prompt_logprobs
        return asked

    # --- reading a step ----------------------------------------------------------------------------------------------

    def _read(self, launched: Launched) -> None:
        if launched.done is not None:
            launched.done.synchronize()
            self._phase("wait")
        for chunk, logprobs in launched.prompt_logprobs:
            if (run := self.runs.get(chunk.sequence)) is not None:
                prompt_logprobs.append(run.output.completion, chunk, logprobs, self._text_of)
        sampled, ended = launched.sampled, list[Sequence]()
        if sampled is not None:
            ended = self._read_tokens(launched.chunks, sampled.token_ids.tolist(), sampled.logprobs)
        self._finish_step(launched.chunks, ended)

    def _finish_step(self, chunks: list[Chunk], ended: list[Sequence]) -> None:
        self.scheduler.publish(chunks)
        for sequence in ended:
            self._finish(sequence)

    def _read_tokens(self, chunks: list[Chunk], token_ids: list[int], logprobs: Logprobs | None) -> list[Sequence]:
        """Hands each sequence its token; returns those that have ended."""
        sampling = [chunk.sequence for chunk in chunks if chunk.samples]
        self._phase("read")
        ended = []
        for i, (sequence, token_id) in enumerate(zip(sampling, token_ids, strict=False)):
            sequence.pending -= 1
            run = self.runs.get(sequence)
            if run is None:  # it ended, or was cancelled, while this was computed
                continue
            sequence.output.append(token_id)
            for follower in run.followers:
                self.scheduler.add(follower)
            run.followers = []
            logprob = None
            if logprobs is not None and run.params.logprobs is not None:
                logprob = TokenLogprob.of(logprobs, i, token_id, run.params.logprobs, self._text_of)
            if run.empty:
                run.output.end("length")
            if run.empty or run.output.push(token_id, logprob, last=len(sequence.output) >= sequence.max_tokens):
                ended.append(sequence)
        self._phase("text")
        return ended
