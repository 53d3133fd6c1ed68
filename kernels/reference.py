"""What every op means, in plain PyTorch: readable, right in float64, slow. The oracle of tests and benchmarks."""

import torch
from torch import Tensor


def rms_norm(
    x: Tensor, weight: Tensor | None, eps: float = 1e-6, *, residual: Tensor | None = None, offset: float = 0.0
) -> Tensor | tuple[Tensor, Tensor]:
    """x / sqrt(mean(x^2) + eps) * (weight + offset)."""
    h = x if residual is None else x + residual
    y = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        y = y * (weight + offset)
    return y if residual is None else (y, h)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up."""
    return gate * torch.sigmoid(gate) * up


def geglu(gate: Tensor, up: Tensor, *, approximate: str = "tanh") -> Tensor:
    """gelu(gate) * up, where gelu(x) = x * P(standard normal < x), or its tanh form."""
    if approximate == "tanh":
        probability = 0.5 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (gate + 0.044715 * gate**3)))
    else:
        probability = 0.5 * (1 + torch.erf(gate / 2**0.5))
    return gate * probability * up


def attention_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_lens: Tensor,
    *,
    key_start: Tensor | None = None,
    block_table: Tensor | None = None,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """softmax(scale * q @ K^T) @ V of one query a row, over the keys key_start <= j < cache_len, the last `window` of them."""
    batch, heads, _, head_dim = q.shape
    out = torch.zeros_like(q)
    for b in range(batch):
        end = int(cache_lens[b])
        start = max(0, 0 if key_start is None else int(key_start[b]), 0 if window is None else end - window)
        if start >= end:
            continue
        j = torch.arange(start, end, device=q.device)
        if block_table is None:
            k, v = k_cache[b][:, j], v_cache[b][:, j]  # (kv_heads, keys, head_dim)
        else:
            blocks, entries = block_table[b, j // k_cache.shape[2]].long(), j % k_cache.shape[2]
            k, v = (cache[blocks, :, entries].transpose(0, 1) for cache in (k_cache, v_cache))
        k, v = (x.repeat_interleave(heads // x.shape[0], dim=0) for x in (k, v))
        scores = q[b] @ k.mT * (head_dim**-0.5 if scale is None else scale)  # (heads, 1, keys)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        out[b] = scores.softmax(-1) @ v
    return out
