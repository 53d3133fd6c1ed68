"""What the ops that write into a paged cache of keys and values share: checks, and the append by PyTorch's ops."""

import torch
from torch import Tensor

from .validate import require_floating, require_same, require_same_device, require_shape, require_tensors


def append(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
    """k, v (tokens, kv_heads, head_dim) to their slots; a negative one is padding's."""
    if (slots < 0).any():
        k, v, slots = (t[slots >= 0] for t in (k, v, slots))
    page = k_cache.shape[2]
    block, offset = slots // page, slots % page
    k_cache[block, :, offset], v_cache[block, :, offset] = k, v


def require_slots(k_cache: Tensor, slots: Tensor) -> None:
    """On the CPU, where looking costs nothing."""
    limit = k_cache.shape[0] * k_cache.shape[2]
    if (largest := max(slots.tolist(), default=-1)) >= limit:
        raise ValueError(f"slots must be below {limit}, those that k_cache holds, got {largest}")


def require_cache(
    x: Tensor, cos: Tensor, sin: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor, heads: int
) -> None:
    """What must hold of the caches, and of the angles and slots of x's rows."""
    require_floating(cos=cos, sin=sin)
    require_tensors(slots=slots)
    require_same(cos=cos, sin=sin)
    require_same_device(x=x, cos=cos, sin=sin, slots=slots)
    if k_cache.ndim != 4 or 0 in k_cache.shape[1:]:
        raise ValueError(f"k_cache must be (blocks, kv_heads, block_size, head_dim), got {tuple(k_cache.shape)}")
    require_shape("v_cache", v_cache, k_cache.shape)
    blocks, kv_heads, block_size, head_dim = k_cache.shape
    if blocks * block_size >= 2**31:  # kernels count them in 32 bits
        raise ValueError(f"k_cache must have fewer than 2**31 slots, got {blocks} blocks of {block_size}")
    if heads < 1 or heads % kv_heads:
        raise ValueError(f"heads must be a positive multiple of k_cache's {kv_heads} kv_heads, got {heads}")
    if cos.ndim != 2 or cos.shape[0] != x.shape[0] or cos.shape[1] % 2 or not 2 <= cos.shape[1] <= head_dim:
        raise ValueError(f"cos must be ({x.shape[0]}, even rotary_dim up to {head_dim}), got {tuple(cos.shape)}")
    if slots.dtype != torch.int64:
        raise TypeError(f"slots must be int64, got {slots.dtype}")
    require_shape("slots", slots, x.shape[:1])
