"""A step on the device: the decoder over the paged cache, then the choice of tokens.

A step of decoding rows alone is recorded once and replayed by one call (`recorded_steps`). The host waits for no GPU here: what it
reads of a step comes in pinned memory, once the step is `done`.
"""

import contextlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from rich.console import Console
from torch import Tensor

from ..decoder.model import Decoder, Fusions
from ..kernels import cpu
from ..kernels.launch import INTERPRETED
from ..kernels.matmul import FEW_ROWS
from . import prompt_logprobs
from .cache import KVCache
from .paged import PagedContext, StepInputs
from .placement import upload
from .recorded_steps import CudaGraphs, NativeRecordings, RecordedSteps
from .sampling import Logprobs, Needs, Sampled, Sampler
from .scheduler import Chunk


@dataclass(frozen=True)
class Launched:
    """A step on its way: what the host reads when it is done."""

    chunks: list[Chunk]
    sampled: Sampled | None
    prompt_logprobs: list[tuple[Chunk, Logprobs]]
    done: torch.cuda.Event | None


class Runner:
    """Runs steps. What they depend on from one to the next is in `cache`, in `sampler`, and in the tokens last sampled.

    Args:
        decoder, cache, sampler: on one device.
        natively: they are on a CPU, which runs the Triton kernels.
        reads_late: the host does not know the token last sampled in a row when it launches the next step.
        phase: is told the name of each phase of a step as it ends on the host.
    """

    def __init__(
        self, decoder: Decoder, cache: KVCache, sampler: Sampler, *, natively: bool, reads_late: bool, phase: Callable[[str], None]
    ) -> None:  # fmt: skip
        self.decoder, self.cache, self.sampler = decoder, cache, sampler
        self.steps: RecordedSteps[Sampled | Tensor] | None = None
        self._natively, self._reads_late, self._phase = natively, reads_late, phase
        self._triton = natively or INTERPRETED or cache.device.type != "cpu"
        # where the tokens of the last step are read, if it may be done again: a replay on a CPU that chose tokens and nothing else
        self._tokens: memoryview | None = None
        self.last_tokens = torch.zeros(sampler.padding_row + 1, dtype=torch.int64, device=cache.device)

    def record_steps(self, *, longest: int, console: Console) -> None:
        """From now on decoding steps are recorded and replayed, for sequences of at most `longest` tokens."""
        self.steps = RecordedSteps(
            self.decode, NativeRecordings() if self._natively else CudaGraphs(self.cache.device), self.cache,
            padding_row=self.sampler.padding_row, longest=longest, console=console, phase=self._phase,
        )  # fmt: skip
        self.use(self.decoder.fusions)

    def use(self, fusions: Fusions) -> None:
        """Computes steps with these kernels from now on."""
        self.decoder.fusions, self._tokens = fusions, None
        if self.steps is not None:
            self.steps.use(fusions)

    def launch(self, chunks: list[Chunk], asked: Mapping[Chunk, int]) -> Launched:
        """Computes the chunks and samples where they say so.

        Args:
            chunks: of sequences whose rows the sampler knows.
            asked: chunks of prompts whose log-probabilities are asked for, with those of how many of the likeliest tokens.
        """
        sampling = [chunk for chunk in chunks if chunk.samples]
        needs = self.sampler.needs(chunk.sequence.row for chunk in sampling)
        of_prompts: list[tuple[Chunk, Logprobs]] = []
        self._tokens = None
        sampled = self._replay(chunks, needs) if self._is_recorded(chunks, asked) else None
        if sampled is None:
            inputs = StepInputs.of(chunks, self.cache, self.cache.device)
            self._phase("inputs")
            with self._recorded_kernels(len(inputs.token_ids)):
                hidden = self.forward(inputs, chunks)
            with self._recorded_kernels():
                of_prompts = self._prompt_logprobs(chunks, asked, hidden)
                sampled = self._sample_ends(chunks, hidden, inputs, needs) if sampling else None
        for chunk in sampling:
            chunk.sequence.pending += 1
        if self.cache.device.type == "cpu":
            return Launched(chunks, sampled, of_prompts, None)
        on_host = None if sampled is None else sampled.to_host()
        of_prompts = [(chunk, logprobs.to_host()) for chunk, logprobs in of_prompts]
        done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        done.record()
        self._phase("launch")
        return Launched(chunks, on_host, of_prompts, done)

    @property
    def repeats(self) -> bool:
        """Whether `again` can follow the last step."""
        return self._tokens is not None

    def again(self, chunks: list[Chunk]) -> list[int]:
        """The tokens of the next step, of the last one's chunks moved on. It calls nothing of PyTorch's, so no mode of this thread matters."""
        assert self.steps is not None and self._tokens is not None
        self.steps.again(chunks)
        self._phase("forward")
        for chunk in chunks:
            chunk.sequence.pending += 1
        return self._tokens.tolist()

    def _is_recorded(self, chunks: Sequence[Chunk], asked: Mapping[Chunk, int]) -> bool:
        """Whether it is a step of decoding rows alone, and on a CPU of so few that the kernels of few rows take them."""
        if self.steps is None or asked or (self._natively and len(chunks) > FEW_ROWS):
            return False
        return all(chunk.samples and chunk.size == 1 for chunk in chunks)

    def _replay(self, chunks: Sequence[Chunk], needs: Needs) -> Sampled | None:
        """None for a step that cannot be recorded (`dynamic` rotary embeddings are computed by PyTorch's ops)."""
        assert self.steps is not None
        # on a CPU log-probabilities and bad words are PyTorch's ops
        logits_alone = self._natively and (needs.logprobs is not None or needs.bad_words is not None)
        replayed = self.steps.replay(chunks, None if logits_alone else needs)
        self._phase("forward")
        if isinstance(replayed, Sampled) and self._natively:
            self._tokens = replayed.token_ids.numpy().data
        if replayed is None or isinstance(replayed, Sampled):
            return replayed
        rows = torch.tensor([chunk.sequence.row for chunk in chunks])
        return self._sample(replayed, rows, needs)

    def _recorded_kernels(self, rows: int = 1) -> contextlib.AbstractContextManager[None]:
        """Inside, ops on a CPU run the kernels of recorded steps, or a request's numbers would change with what runs beside it; but not of
        more rows than these take. Products of those are oneDNN's where it is faster: a prompt of 512 tokens in float32 takes 491 ms so and not
        532 (125M, two cores of an AMD EPYC)."""
        return cpu.use("native") if self._natively and rows <= FEW_ROWS else contextlib.nullcontext()

    def decode(self, inputs: StepInputs, needs: Needs | None) -> Sampled | Tensor:
        """A whole step of decoding rows: what is recorded. Without `needs` its logits, which the caller samples from."""
        hidden = self.forward(inputs)
        return self.decoder.logits(hidden) if needs is None else self.sample(hidden, inputs.rows, needs)

    def forward(self, inputs: StepInputs, chunks: Sequence[Chunk] = ()) -> Tensor:
        ids = inputs.token_ids
        if self._reads_late:
            ids = torch.where(ids < 0, self.last_tokens[(-1 - ids).clamp(min=0)], ids)
        hidden: Tensor = self.decoder(ids, PagedContext(self.cache, inputs, chunks, triton=self._triton))
        return hidden

    def sample(self, hidden: Tensor, rows: Tensor, needs: Needs) -> Sampled:
        logits = self.decoder.logits(hidden)
        self._phase("forward")
        return self._sample(logits, rows, needs)

    def _sample(self, logits: Tensor, rows: Tensor, needs: Needs) -> Sampled:
        sampled = self.sampler.sample(logits, rows, needs, self.last_tokens)
        self._phase("sample")
        return sampled

    def _sample_ends(self, chunks: list[Chunk], hidden: Tensor, inputs: StepInputs, needs: Needs) -> Sampled:
        """Samples after the last token of each chunk that says so."""
        ends = [end for chunk, end in zip(chunks, _ends(chunks), strict=True) if chunk.samples]
        if len(ends) == len(hidden):
            return self.sample(hidden, inputs.rows, needs)
        last = upload(ends, self.cache.device)
        return self.sample(hidden[last], inputs.rows[last], needs)

    def _prompt_logprobs(
        self, chunks: list[Chunk], asked: Mapping[Chunk, int], hidden: Tensor
    ) -> list[tuple[Chunk, Logprobs]]:
        return [
            (chunk, prompt_logprobs.compute(self.decoder, chunk, hidden[end + 1 - chunk.size : end + 1], asked[chunk]))
            for chunk, end in zip(chunks, _ends(chunks), strict=True)
            if chunk in asked
        ]


def _ends(chunks: Sequence[Chunk]) -> list[int]:
    """The index of each chunk's last token among the tokens of the step."""
    return [end - 1 for end in itertools.accumulate(chunk.size for chunk in chunks)]
