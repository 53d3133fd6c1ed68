"""What must be done, counted from shapes: bytes that have to move and floating-point operations; and how long that takes at least."""

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Work:
    """Bytes read and written if each input is read once and each output written once, and FLOPs (a multiply-add is two)."""

    read: int = 0
    written: int = 0
    flops: int = 0

    @classmethod
    def moving(cls, *, reads: Iterable[Tensor], writes: Iterable[Tensor], flops: int = 0) -> "Work":
        """Reading and writing whole tensors."""
        return cls(sum(map(_bytes, reads)), sum(map(_bytes, writes)), flops)

    @property
    def bytes(self) -> int:
        return self.read + self.written

    def __add__(self, other: "Work") -> "Work":
        return Work(self.read + other.read, self.written + other.written, self.flops + other.flops)

    def __mul__(self, times: int) -> "Work":
        return Work(self.read * times, self.written * times, self.flops * times)


def _bytes(x: Tensor) -> int:
    return x.numel() * x.element_size()


def attended_pairs(seq_q: int, seq_k: int, *, causal: bool = True, window: int | None = None) -> int:
    """Pairs of a query and a key it attends to; queries are aligned to the end of the keys."""
    pairs = 0
    for i in range(seq_k - seq_q, seq_k):
        last = i if causal else seq_k - 1
        first = 0 if window is None else max(0, i - window + 1)
        pairs += max(0, last - first + 1) if i >= 0 or not causal else 0
    return pairs


def attention_flops(pairs: int, heads: int, head_dim: int, *, backward: bool = False) -> int:
    """Of `pairs` a head: two products forward (scores, values); five more backward (scores again, dv, dp, dq, dk)."""
    return (14 if backward else 4) * pairs * heads * head_dim
