"""Which tokens the next step computes: continuous batching over a paged cache.

There is one rule for prompts and for decoding. A sequence has `known` tokens, of which `computed` have their keys and values
in the cache; a step computes some of the rest. Decoding is the case where one token is left; a long prompt is computed in
chunks, beside the decoding of others; a sequence that lost its blocks computes everything again. Sequences are served in
the order of their arrival, and the last to arrive is the first to lose its blocks.
"""

import itertools
import operator
from collections import deque
from collections.abc import Sequence as AbstractSequence
from dataclasses import dataclass, field

from .cache import BlockPool, block_keys

_arrival = operator.attrgetter("arrival")

_arrivals = itertools.count()


@dataclass(eq=False)
class Sequence:
    """Tokens that grow by one a step. `known` counts tokens whose number is settled, though one may not be read back yet."""

    prompt: list[int]
    max_tokens: int  # to generate
    reuse_prefix: bool = True
    output: list[int] = field(default_factory=list)
    pending: int = 0  # tokens sampled on the device that the host has not read
    computed: int = 0
    reused: int = 0  # tokens of the prompt that were found in the cache
    blocks: list[int] = field(default_factory=list)
    published: int = 0  # blocks made known
    # the length that its positions are turned for at least: that of the prompt, until it outgrows the trained one
    rotary_length: int = 0
    restarted: bool = False  # it has been given a row that the sampler does not know of yet
    row: int = -1  # of the sampler's state, while it runs; else -1
    arrival: int = field(default_factory=lambda: next(_arrivals))
    _keys: list[bytes] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.rotary_length = max(self.rotary_length, len(self.prompt))

    @property
    def runs(self) -> bool:
        return self.row >= 0

    @property
    def known(self) -> int:
        return len(self.prompt) + len(self.output) + self.pending

    def reset(self, block_size: int) -> None:
        """Nothing of it is computed, and only what the host has read is known."""
        self.blocks, self.published, self.computed, self.pending, self.row = [], 0, 0, 0, -1
        self.rotary_length = len(self.prompt)
        del self._keys[self.known // block_size :]

    def span(self, start: int, end: int) -> list[int]:
        """Tokens [start, end); -1 - row for the one that only the device knows."""
        prompt = len(self.prompt)
        read = self.prompt[start:end] + self.output[max(0, start - prompt) : max(0, end - prompt)]
        return read + [-1 - self.row] * (end - start - len(read))

    def keys(self, tokens: int, block_size: int) -> list[bytes]:
        """The hashes of the full blocks of its first `tokens`. They are kept: tokens are added, and never changed."""
        full, done = tokens // block_size, len(self._keys)
        if done < full:
            parent = self._keys[-1] if self._keys else b""
            self._keys += block_keys(self.span(done * block_size, full * block_size), block_size, parent)
        return self._keys[:full]

    @property
    def complete(self) -> bool:
        """Whether all its tokens have been sampled."""
        return len(self.output) + self.pending >= self.max_tokens


@dataclass(eq=False, slots=True)  # frozen, it would take 0.5 us more to make
class Chunk:
    """Tokens [start, end) of a sequence, to be computed in this step; `samples` says that the next token is then sampled."""

    sequence: Sequence
    start: int
    end: int
    samples: bool

    @property
    def size(self) -> int:
        return self.end - self.start


def _is_long(chunk: Chunk) -> bool:
    return chunk.end - chunk.start > 1


class Scheduler:
    """Decides, step by step; touches no tensor.

    Args:
        pool: the blocks of the cache.
        max_batch: sequences that run at once.
        step_tokens: tokens of one step, decoding and prompts together.
    """

    def __init__(self, pool: BlockPool, *, max_batch: int, step_tokens: int) -> None:
        self.pool, self.max_batch, self.step_tokens = pool, max_batch, step_tokens
        self.waiting: deque[Sequence] = deque()
        self._free_rows = list(range(max_batch))
        self.running: list[Sequence] = []

    @property
    def idle(self) -> bool:
        return not self.waiting and not self.running

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def finish(self, sequence: Sequence) -> None:
        """Ends a sequence, whatever its state, and gives its blocks back."""
        if sequence in self.running:
            self._stop(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)

    def schedule(self) -> list[Chunk]:
        """The chunks of the next step: decoding sequences first, then prompts, oldest first.

        Every sequence must fit the pool alone, all its tokens to be generated included: then the oldest always proceeds.
        """
        chunks: list[Chunk] = []
        budget = self.step_tokens
        # those that decode go first: a long prompt must not hold them up
        missing = [(s, s.known - s.computed) for s in self.running if not s.complete]
        decoding = [s for s, count in missing if count == 1]
        prompts = [s for s, count in missing if count > 1]
        for sequence in (*sorted(decoding, key=_arrival), *sorted(prompts, key=_arrival)):
            if not budget:
                break
            while sequence.runs and not self._take_blocks(sequence):
                self.preempt(max(self.running, key=_arrival))
            if sequence.runs:
                chunks.append(self._chunk(sequence, budget))
                budget -= chunks[-1].size
        while budget and self.waiting and len(self.running) < self.max_batch:
            sequence = self.waiting[0]
            if sequence.pending or not self._admit(sequence):
                break
            self.running.append(self.waiting.popleft())
            sequence.row, sequence.restarted = self._free_rows.pop(), True
            chunks.append(self._chunk(sequence, budget))
            budget -= chunks[-1].size
        for chunk in chunks:
            # only decoding takes blocks, oldest first, so that who loses them has no chunk yet
            assert chunk.sequence.runs
            chunk.sequence.computed = chunk.end
        return sorted(chunks, key=_is_long) if any(map(_is_long, chunks)) else chunks

    def repeat(self, chunks: AbstractSequence[Chunk]) -> bool:
        """Whether the next step is the last one, `chunks` of one token each, a token further. Then they are moved there."""
        if self.waiting or len(chunks) != len(self.running):
            return False
        size = self.pool.block_size
        for chunk in chunks:
            sequence, end = chunk.sequence, chunk.end
            if (
                sequence.computed != end
                or sequence.known != end + 1
                or sequence.complete
                or end >= len(sequence.blocks) * size
            ):
                return False
        for chunk in chunks:
            chunk.start, chunk.end = chunk.end, chunk.end + 1
            chunk.sequence.computed = chunk.end
        return True

    def _chunk(self, sequence: Sequence, budget: int) -> Chunk:
        known, start = sequence.known, sequence.computed
        end = min(known, start + budget)
        return Chunk(sequence, start, end, samples=end == known)

    def _admit(self, sequence: Sequence) -> bool:
        """Blocks for all its tokens, known beginnings first; False, and nothing taken, when there are too few."""
        if sequence.reuse_prefix:
            # the last token is computed anyhow: its logits are what is asked for
            sequence.blocks = self.pool.reuse(sequence.keys(sequence.known - 1, self.pool.block_size))
            sequence.published = len(sequence.blocks)
            sequence.computed = sequence.reused = len(sequence.blocks) * self.pool.block_size
        if self._take_blocks(sequence):
            return True
        self._release(sequence)
        return False

    def _take_blocks(self, sequence: Sequence) -> bool:
        """Blocks for all tokens of a sequence; False, and nothing taken, when there are too few."""
        missing = -(-sequence.known // self.pool.block_size) - len(sequence.blocks)
        if missing <= 0:
            return True
        if missing > self.pool.free:
            return False
        for _ in range(missing):
            sequence.blocks.append(self.pool.take(sequence.blocks[-1] if sequence.blocks else None))
        return True

    def preempt(self, victim: Sequence) -> None:
        """Takes the blocks of a running sequence away; it waits in front of all others to compute everything again."""
        self._stop(victim)
        self.waiting.appendleft(victim)

    def rebuild(self, sequences: AbstractSequence[Sequence]) -> None:
        """These wait to be computed from the tokens that the host has read, and there is nothing else: no block is used or known."""
        for sequence in sequences:
            sequence.reset(self.pool.block_size)
        self.pool.reset()
        self._free_rows, self.running = list(range(self.max_batch)), []
        self.waiting = deque(sorted(sequences, key=lambda s: s.arrival))

    def _stop(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._free_rows.append(sequence.row)
        sequence.row = -1
        self._release(sequence)

    def _release(self, sequence: Sequence) -> None:
        self.pool.release(sequence.blocks)
        sequence.blocks, sequence.published, sequence.computed = [], 0, 0

    def publish(self, chunks: AbstractSequence[Chunk]) -> None:
        """Makes the blocks that a computed step has filled known, as far as the host knows their tokens."""
        size = self.pool.block_size
        for sequence in (chunk.sequence for chunk in chunks):
            filled = min(sequence.computed, len(sequence.prompt) + len(sequence.output))
            if filled // size > sequence.published:
                keys = sequence.keys(filled, size)
                for i in range(sequence.published, len(keys)):
                    self.pool.publish(sequence.blocks[i], keys[i])
                sequence.published = len(keys)
