"""The KV cache: keys and values of all layers in blocks, and the book of which block holds what.

A sequence's tokens lie in blocks of `block_size` tokens that need not be neighbours; its block table lists them. A block may
be shared by sequences with the same beginning. A full block is known by a hash of its tokens and of all tokens before
them; it stays known after its last user has gone, until the space is needed, so that a later request with the same
beginning need not compute it again.

Source: Kwon et al., PagedAttention, 2023 (arXiv:2309.06180).
"""

import contextlib
import hashlib
import math
import mmap
from array import array
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ..decoder.config import DecoderConfig


class KVCache:
    """Storage for `blocks` blocks. One more, the last, takes what nobody reads: the tokens of padding rows.

    On a CPU it takes the memory of what has been written: a page (4 KB) becomes real when it is first touched.
    """

    def __init__(
        self, config: DecoderConfig, *, blocks: int, block_size: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.blocks, self.block_size, self.device, self.dtype = blocks, block_size, device, dtype
        # The tokens of neighbouring blocks are neighbours (heads outside, blocks inside): a sequence in consecutive blocks
        # is a view of the storage, which the CPU reads without a copy.
        shape = (config.num_layers, 2, config.num_kv_heads, blocks + 1, block_size, config.head_dim)
        on_cpu = device.type == "cpu"
        self._storage = (
            _untouched_zeros(shape, dtype=dtype) if on_cpu else torch.zeros(shape, dtype=dtype, device=device)
        )

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer, each (blocks, kv_heads, block_size, head_dim)."""
        k, v = self._storage[index]
        return k.transpose(0, 1), v.transpose(0, 1)

    def tokens(self, index: int) -> tuple[Tensor, Tensor]:
        """The same as (kv_heads, slots, head_dim); slot = block * block_size + offset."""
        k, v = self._storage[index].flatten(2, 3)
        return k, v


def _untouched_zeros(shape: Sequence[int], *, dtype: torch.dtype) -> Tensor:
    """`torch.zeros` that writes none of them: pages of zeros that the system gives one by one as they are touched."""
    size = math.prod(shape) * dtype.itemsize
    private = getattr(mmap, "MAP_PRIVATE", 0) | getattr(mmap, "MAP_ANONYMOUS", 0) | getattr(mmap, "MAP_NORESERVE", 0)
    pages = mmap.mmap(-1, size, flags=private) if private else mmap.mmap(-1, size)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):  # a huge page is 2 MB for the 4 KB that were touched
        with contextlib.suppress(OSError):  # a kernel without huge pages
            pages.madvise(mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(pages, dtype=dtype).view(shape)


def bytes_per_token(config: DecoderConfig, dtype: torch.dtype) -> int:
    """What one token takes in the cache, over all layers."""
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * dtype.itemsize


class BlockPool:
    """Which blocks are free, how many sequences use each, and which hold a known beginning. Touches no tensor.

    The block that has been free the longest is taken first. With `neighbours` it is the next one of the sequence, if that is free, and
    a new sequence starts in the middle of the widest gap, where it and those around it can grow.
    """

    def __init__(self, blocks: int, block_size: int, *, neighbours: bool = False) -> None:
        self.block_size, self._neighbours, self._blocks = block_size, neighbours, blocks
        self.reset()

    def reset(self) -> None:
        """Every block is free, and none is known."""
        self._users = [0] * self._blocks
        self._free: dict[int, None] = dict.fromkeys(range(self._blocks))  # longest first
        self._hash_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}

    @property
    def free(self) -> int:
        """Blocks that can be taken, those that still hold a known beginning too."""
        return len(self._free)

    def take(self, after: int | None = None) -> int:
        """A free block, of which there must be one, for a sequence whose last block is `after`."""
        assert self._free, "no block is free"
        if not self._neighbours:
            block = next(iter(self._free))
        elif after is not None and after + 1 in self._free:
            block = after + 1
        else:
            block = self._middle_of_widest_gap()
        del self._free[block]
        self._forget(block)
        self._users[block] = 1
        return block

    def _middle_of_widest_gap(self) -> int:
        """Of the free blocks that hold nothing known, if there are such. Nothing grows into block 0: it is as good a start."""
        free = sorted(self._free.keys() - self._hash_of.keys()) or sorted(self._free)
        runs: list[list[int]] = []
        for block in free:
            if runs and runs[-1][-1] == block - 1:
                runs[-1].append(block)
            else:
                runs.append([block])
        widest = max(runs, key=len)
        return widest[0] if widest[0] == 0 else widest[len(widest) // 2]

    def release(self, blocks: Sequence[int]) -> None:
        """Ends one use of each. The last ones are taken again first: a beginning is worth more than what follows it."""
        for block in reversed(blocks):
            self._users[block] -= 1
            assert self._users[block] >= 0, f"block {block} was released more often than taken"
            if self._users[block] == 0:
                self._free[block] = None

    def publish(self, block: int, key: bytes) -> None:
        """Makes a full block known by the hash of its tokens and all before; the first of two equals stays the known one."""
        if key not in self._block_of:
            self._forget(block)
            self._hash_of[block], self._block_of[key] = key, block

    def reuse(self, keys: Iterable[bytes]) -> list[int]:
        """The longest run of known blocks for these hashes, each now used once more."""
        blocks = []
        for key in keys:
            block = self._block_of.get(key)
            if block is None:
                break
            self._users[block] += 1
            self._free.pop(block, None)
            blocks.append(block)
        return blocks

    def forget(self) -> None:
        """Makes no block known any more."""
        self._hash_of.clear()
        self._block_of.clear()

    def _forget(self, block: int) -> None:
        key = self._hash_of.pop(block, None)
        if key is not None:
            del self._block_of[key]


def block_keys(token_ids: Sequence[int], block_size: int, parent: bytes = b"") -> list[bytes]:
    """The hash of each full block of a sequence: of its tokens and of the hash before it (`parent` before the first)."""
    keys = []
    for start in range(0, len(token_ids) - block_size + 1, block_size):
        tokens = array("q", token_ids[start : start + block_size]).tobytes()
        parent = hashlib.blake2b(parent + tokens, digest_size=16).digest()
        keys.append(parent)
    return keys
