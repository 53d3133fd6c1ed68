"""A step of generation on the device: its input tensors, and the decoder's `Context` over the paged cache."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from . import ops
from .cache import KVCache
from .scheduler import Chunk


@dataclass(frozen=True)
class StepInputs:
    """What a step reads beside weights and cache. Rows that decode come first, tokens of prompts after them."""

    token_ids: Tensor  # (tokens,) int64; -1 - row stands for the token last sampled in that row
    positions: Tensor  # (tokens,) int64
    lengths: Tensor  # (tokens,) int64: of the token's sequence, as `RotaryTable.rows` counts it
    slots: Tensor  # (tokens,) int64: where its keys and values go
    cache_lens: Tensor  # (decoding rows,) int32
    block_table: Tensor  # (decoding rows, most blocks of a row) int32

    @classmethod
    def of(
        cls, chunks: Sequence[Chunk], cache: KVCache, device: torch.device, *, rows: int | None = None,
        blocks: int | None = None,
    ) -> "StepInputs":  # fmt: skip
        """The inputs of `chunks`; with `rows` and `blocks` padded to so many decoding rows and blocks a row.

        A padding row computes token 0 at position 0 and keeps it where nobody reads.
        """
        ids: list[int] = []
        positions: list[int] = []
        lengths: list[int] = []
        ends: list[int] = []
        slots: list[int] = []
        tables: list[list[int]] = []
        size = cache.block_size
        for chunk in chunks:
            sequence, span = chunk.sequence, range(chunk.start, chunk.end)
            ids += sequence.span(chunk.start, chunk.end)
            positions += span
            lengths += [max(sequence.rotary_length, i + 1) for i in span]
            ends.append(chunk.end)
            slots += [sequence.blocks[i // size] * size + i % size for i in span]
            if chunk.size == 1:
                tables.append(sequence.blocks)
        padding = 0 if rows is None else rows - len(tables)
        width = max(map(len, tables), default=0) if blocks is None else blocks
        tables = [table + [0] * (width - len(table)) for table in tables] + [[0] * width] * padding
        rest: dict[str, Any] = {"device": device}

        def tensor(values: Any, pad: int, dtype: torch.dtype) -> Tensor:
            return torch.tensor(values + [pad] * padding, dtype=dtype).to(device, non_blocking=True)

        return cls(
            tensor(ids, 0, torch.int64), tensor(positions, 0, torch.int64), tensor(lengths, 1, torch.int64),
            tensor(slots, cache.blocks * size, torch.int64),
            tensor(ends[: len(tables) - padding], 0, torch.int32),
            torch.tensor(tables, dtype=torch.int32).to(**rest),
        )  # fmt: skip

    def copy_(self, other: "StepInputs") -> None:
        """Takes over the values of `other`, in place: for a CUDA graph, which reads where it read when it was captured."""
        for field in fields(self):
            getattr(self, field.name).copy_(getattr(other, field.name), non_blocking=True)


class PagedContext:
    """The `Context` of a step over the paged cache."""

    def __init__(self, cache: KVCache, inputs: StepInputs, prompts: Sequence[Chunk] = ()) -> None:
        self._cache, self._inputs, self._prompts = cache, inputs, prompts
        self.positions, self.lengths, self.slots = inputs.positions, inputs.lengths, inputs.slots

    def cache(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer, (blocks, kv_heads, block_size, head_dim), for kernels that write them themselves."""
        return self._cache.layer(layer)

    def append(self, layer: int, k: Tensor, v: Tensor) -> None:
        keys, values = self._cache.tokens(layer)
        keys.index_copy_(1, self.slots, k)
        values.index_copy_(1, self.slots, v)

    def attend(self, layer: int, q: Tensor, window: int | None) -> Tensor:
        k_cache, v_cache = self._cache.layer(layer)
        rows = len(self._inputs.cache_lens)
        parts = []
        if rows:
            queries = q[:, :rows].transpose(0, 1).unsqueeze(2)  # (rows, heads, 1, head_dim)
            out = ops.attention_decode(
                queries, k_cache, v_cache, self._inputs.cache_lens, block_table=self._inputs.block_table, window=window
            )
            parts.append(out.flatten(1))
        start = rows
        for chunk in self._prompts:
            k, v = (self._keys(cache, chunk) for cache in (k_cache, v_cache))
            out = ops.attention(q[None, :, start : start + chunk.size], k[None], v[None], window=window)
            parts.append(out[0].transpose(0, 1).flatten(1))
            start += chunk.size
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _keys(self, cache: Tensor, chunk: Chunk) -> Tensor:
        """(kv_heads, keys, head_dim) up to the chunk's end; a view where the blocks are neighbours."""
        blocks = chunk.sequence.blocks[: -(-chunk.end // self._cache.block_size)]
        first, last = blocks[0], blocks[-1] + 1
        consecutive = blocks == list(range(first, last))
        chosen = cache[first:last] if consecutive else cache[torch.tensor(blocks, device=cache.device)]
        return chosen.transpose(0, 1).flatten(1, 2)[:, : chunk.end]
