"""A step of generation on the device: its input tensors, and the decoder's `Context` over the paged cache."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import ops
from .cache import KVCache
from .placement import upload
from .scheduler import Chunk


class StepInputs:
    """What a step reads beside weights and cache, in two tensors, so that two copies bring it to a GPU.

    Chunks of one token (decoding rows) come first, tokens of longer chunks after them.

    Attributes:
        token_ids: (tokens,) int64; -1 - row stands for the token last sampled in that row.
        positions: (tokens,) int64, of each token in its own sequence.
        lengths: (tokens,) int64, of its sequence, as `RotaryTable.rows` counts it.
        slots: (tokens,) int64, where its keys and values go.
        rows: (tokens,) int64, the sampler's row of its sequence.
        cache_lens: (decoding rows,) int32.
        block_table: (decoding rows, most blocks of a row) int32.
    """

    def __init__(self, of_tokens: Tensor, of_rows: Tensor, rows: int) -> None:
        self._of_tokens, self._of_rows = of_tokens, of_rows
        self.token_ids, self.positions, self.lengths, self.slots, self.rows = of_tokens.unbind(0)
        width = (len(of_rows) - rows) // max(1, rows)
        self.cache_lens, self.block_table = of_rows[:rows], of_rows[rows:].view(rows, width)

    @classmethod
    def of(
        cls, chunks: Sequence[Chunk], cache: KVCache, device: torch.device, *, rows: int | None = None,
        blocks: int | None = None, padding_row: int = 0,
    ) -> "StepInputs":  # fmt: skip
        """The inputs of `chunks`; with `rows` and `blocks` padded to so many decoding rows and blocks a row.

        A padding row computes token 0 at position 0, keeps it where nobody reads, and is `padding_row` of the sampler.
        """
        of_tokens: list[list[int]] = [[], [], [], [], []]
        token_ids, positions, lengths, slots, sampler_rows = of_tokens
        cache_lens: list[int] = []
        tables: list[list[int]] = []
        size = cache.block_size
        for chunk in chunks:
            sequence, span = chunk.sequence, range(chunk.start, chunk.end)
            token_ids += sequence.span(chunk.start, chunk.end)
            positions += span
            lengths += [max(sequence.rotary_length, i + 1) for i in span]
            slots += [sequence.blocks[i // size] * size + i % size for i in span]
            sampler_rows += [sequence.row] * chunk.size
            if chunk.size == 1:
                cache_lens.append(chunk.end)
                tables.append(sequence.blocks)
        padding = 0 if rows is None else rows - len(tables)
        for values, pad in zip(of_tokens, (0, 0, 1, cache.blocks * size, padding_row), strict=True):
            values += [pad] * padding
        cache_lens += [0] * padding
        width = max(map(len, tables), default=0) if blocks is None else blocks
        for table in [*tables, *[[]] * padding]:
            cache_lens += table
            cache_lens += [0] * (width - len(table))
        pinned = device.type == "cuda"
        return cls(
            torch.tensor(of_tokens, dtype=torch.int64, pin_memory=pinned).to(device, non_blocking=True),
            torch.tensor(cache_lens, dtype=torch.int32, pin_memory=pinned).to(device, non_blocking=True),
            len(tables) + padding,
        )

    def copy_(self, other: "StepInputs") -> None:
        """Takes over the values of `other`, in place: for a recorded step, which reads where it read when it was recorded."""
        self._of_tokens.copy_(other._of_tokens, non_blocking=True)
        self._of_rows.copy_(other._of_rows, non_blocking=True)


class RowWriter:
    """Writes the inputs of a recorded step on a CPU: two microseconds a row, and its block table where that has changed."""

    def __init__(self, inputs: StepInputs, block_size: int) -> None:
        self._block_size = block_size
        columns = (inputs.token_ids, inputs.positions, inputs.lengths, inputs.slots, inputs.rows, inputs.cache_lens)
        self._columns = [column.numpy().data for column in columns]
        self._table = inputs.block_table
        # of each row, the list of its blocks (a sequence that loses them starts another) and how many of them are written
        self._written: list[tuple[list[int], int]] = [([], 0)] * len(self._table)

    def write(self, chunks: Sequence[Chunk]) -> None:
        """The inputs of so many chunks of one token as there are rows."""
        assert len(chunks) == len(self._written)
        size = self._block_size
        token_ids, positions, lengths, slots, rows, cache_lens = self._columns
        for i, chunk in enumerate(chunks):
            sequence, position = chunk.sequence, chunk.start
            blocks, output = sequence.blocks, sequence.output
            token_ids[i] = output[-1] if output else sequence.prompt[-1]  # of a decoding row, and the host has read it
            positions[i] = position
            lengths[i] = max(sequence.rotary_length, position + 1)
            slots[i] = blocks[position // size] * size + position % size
            rows[i] = sequence.row
            cache_lens[i] = position + 1
            written, count = self._written[i]
            if written is not blocks or count != len(blocks):
                self._table[i, : len(blocks)] = torch.tensor(blocks, dtype=torch.int32)
                self._written[i] = blocks, len(blocks)


class PagedContext:
    """The `Context` of a step over the paged cache.

    Rows that decode are one `attention_decode` where Triton runs, which follows their block tables. On PyTorch's ops each reads its
    keys as a view of the cache, if its blocks are neighbours, as they mostly are on a CPU; so does every chunk of a prompt.
    """

    def __init__(self, cache: KVCache, inputs: StepInputs, chunks: Sequence[Chunk] = (), *, triton: bool) -> None:
        self._cache, self._inputs = cache, inputs
        self.positions, self.lengths, self.slots = inputs.positions, inputs.lengths, inputs.slots
        self._rows = len(inputs.cache_lens) if triton else 0
        self._chunks = [(chunk.size, chunk.end, self._blocks(chunk)) for chunk in chunks[self._rows :]]

    def _blocks(self, chunk: Chunk) -> slice | Tensor:
        """What picks a chunk's keys from the cache: a slice of neighbouring blocks, or their list."""
        blocks = chunk.sequence.blocks[: -(-chunk.end // self._cache.block_size)]
        first, end = blocks[0], blocks[0] + len(blocks)
        if blocks == list(range(first, end)):
            return slice(first, end)
        return upload(blocks, self._cache.device)

    def cache(self, layer: int) -> tuple[Tensor, Tensor]:
        return self._cache.layer(layer)

    def append(self, layer: int, k: Tensor, v: Tensor) -> None:
        keys, values = self._cache.tokens(layer)
        keys.index_copy_(1, self.slots, k.to(keys.dtype))
        values.index_copy_(1, self.slots, v.to(keys.dtype))

    def attend(self, layer: int, q: Tensor, window: int | None) -> Tensor:
        caches, parts, dtype = self._cache.layer(layer), [], q.dtype
        q = q.to(self._cache.dtype)
        if self._rows:
            queries = q[:, : self._rows].transpose(0, 1).unsqueeze(2)  # (rows, heads, 1, head_dim)
            inputs = self._inputs
            out = ops.attention_decode(
                queries, *caches, inputs.cache_lens, block_table=inputs.block_table, window=window
            )  # fmt: skip
            parts.append(out.flatten(1))
        start = self._rows
        for size, end, blocks in self._chunks:
            k, v = (cache[blocks].transpose(0, 1).flatten(1, 2)[None, :, :end] for cache in caches)
            out = ops.attention(q[None, :, start : start + size], k, v, window=window)
            parts.append(out[0].transpose(0, 1).flatten(1))
            start += size
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).to(dtype)


class OneSequence:
    """The `Context` of one whole sequence, without a cache."""

    slots = None

    def __init__(self, tokens: int, device: torch.device) -> None:
        self.positions = torch.arange(tokens, device=device)
        self.lengths = torch.full_like(self.positions, tokens)
        self._k = self._v = torch.empty(0)

    def append(self, layer: int, k: Tensor, v: Tensor) -> None:
        self._k, self._v = k, v

    def attend(self, layer: int, q: Tensor, window: int | None) -> Tensor:
        return ops.attention(q[None], self._k[None], self._v[None], window=window)[0].transpose(0, 1).flatten(1)

    def cache(self, layer: int) -> tuple[Tensor, Tensor]:
        raise AssertionError("there is no cache")
