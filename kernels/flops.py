"""What the ops count for in `torch.utils.flop_counter`: as much as PyTorch's own for the same results, forward and backward.

So a product of (M, K) and (K, N) is 2MNK, attention is counted over all pairs of queries and keys, causal or not, backward
2.5 times as much (one product is made again), and no other product counts twice where a kernel makes it again to save memory.
(PyTorch has no formula for its own attention on the CPU, where a plain model counts too little.)
"""

from math import prod
from typing import Any

from torch import Tensor

from .attention_common import Pattern


def linear(x: Tensor, weight: Tensor, *_: Any, **__: Any) -> int:
    """Of `linear` and `linear_training`."""
    return 2 * x.numel() * weight.shape[0]


def linear_backward(dy: Tensor, x: Tensor | None, weight: Tensor | None, *_: Any, **__: Any) -> int:
    """dx = dy @ weight and dweight = dy^T @ x, where what they are made from is given."""
    dx = 0 if weight is None else 2 * dy.numel() * weight.shape[1]
    return dx + (0 if x is None else 2 * dy.numel() * x.shape[-1])


def linear_cross_entropy(hidden: Tensor, weight: Tensor, *arguments: Any, **_: Any) -> int:
    """The logits, and with them the gradients that are needed: (hidden_grad, weight_grad, bias_grad) come last."""
    return (1 + sum(arguments[-3:-1])) * linear(hidden, weight)


def linear_cross_entropy_backward(dloss: Tensor, hidden: Tensor, weight: Tensor, *arguments: Any, **_: Any) -> int:
    """The gradients alone."""
    return sum(arguments[-3:-1]) * linear(hidden, weight)


def norm_qkv_rope(x: Tensor, norm_weight: Tensor, weight: Tensor, *_: Any, **__: Any) -> int:
    """Of one matrix."""
    return linear(x, weight)


def norm_heads(
    x: Tensor, norm_weight: Tensor, q_weight: Tensor, k_weight: Any, v_weight: Any, *_: Any, **__: Any
) -> int:
    """Of one matrix, or three."""
    return sum(linear(x, weight) for weight in (q_weight, k_weight, v_weight) if weight is not None)


def norm_swiglu(
    x: Tensor, norm_weight: Tensor, weight: Tensor, bias: Any, up_weight: Tensor | None, *_: Any, **__: Any
) -> int:  # fmt: skip
    """Of one matrix, or two."""
    return linear(x, weight) * (1 if up_weight is None else 2)


def layer_tail(
    attended: Tensor, x: Tensor, o_weight: Any, o_bias: Any, norm_weight: Any, gate_weight: Any, up_weight: Any,
    gate_bias: Any, up_bias: Any, down_weight: Tensor, *_: Any, **__: Any,
) -> int:  # fmt: skip
    """Of the output projection, gate, up and down."""
    intermediate = down_weight.shape[1]
    return 2 * x.numel() * (attended.shape[-1] + 3 * intermediate)


def attention(q: Tensor, k: Tensor, v: Tensor, *options: Any, **_: Any) -> int:
    """Of whole sequences, or of each packed one."""
    pattern, pairs = Pattern(*options), q.shape[-2] * k.shape[-2]
    if pattern.cu_seqlens_q is not None and _has_values(pattern.cu_seqlens_q):
        of_keys = pattern.cu_seqlens_q if pattern.cu_seqlens_k is None else pattern.cu_seqlens_k
        pairs = int((pattern.cu_seqlens_q.diff().long() * of_keys.diff()).sum())
    return 4 * prod(q.shape[:-2]) * q.shape[-1] * pairs


def _has_values(x: Tensor) -> bool:
    """Not so a stand-in for a tensor (a FakeTensor, say): then all pairs count, the most there can be, as PyTorch has it."""
    return x.device.type != "meta" and type(x) is Tensor


def attention_backward(
    dout: Tensor, dlse: Any, q: Tensor, k: Tensor, v: Tensor, out: Any, lse: Any, *options: Any, **_: Any
) -> int:
    """Five products for the two of forward."""
    return attention(q, k, v, *options) * 5 // 2


def attention_decode(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, cache_lens: Any, key_start: Any, block_table: Tensor | None, *_: Any,
    **__: Any,
) -> int:  # fmt: skip
    """Over all keys that the cache has room for: what `scaled_dot_product_attention` with a mask counts."""
    keys = k_cache.shape[2] * (1 if block_table is None else block_table.shape[1])
    return 4 * q.numel() * keys
