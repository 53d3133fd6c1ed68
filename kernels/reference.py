"""What every op means, in plain PyTorch: readable, right in float64, slow. The oracle of tests and benchmarks."""

from itertools import pairwise
from typing import Any

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


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> tuple[Tensor, Tensor]:
    """x * cos + rotated(x) * sin over the first rotary_dim elements of each head, where rotated turns (a, b) to (-b, a)."""

    def rotate(x: Tensor) -> Tensor:
        x, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
        if interleaved:
            rotated = torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
        else:
            a, b = x.chunk(2, dim=-1)
            rotated = torch.cat((-b, a), dim=-1)
        return torch.cat((x * cos.unsqueeze(-3) + rotated * sin.unsqueeze(-3), rest), dim=-1)

    return rotate(q), rotate(k)


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *,
    activation: str | None = None, residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """act(x @ weight.T + bias) + residual."""
    y = x @ weight.t()
    if bias is not None:
        y = y + bias
    if activation == "relu":
        y = y.clamp(min=0)
    elif activation == "silu":
        y = y * torch.sigmoid(y)
    elif activation == "gelu":
        y = y * 0.5 * (1 + torch.erf(y / 2**0.5))
    elif activation == "gelu_tanh":
        y = y * 0.5 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (y + 0.044715 * y**3)))
    return y if residual is None else y + residual


def cross_entropy(
    logits: Tensor, labels: Tensor, *, ignore_index: int = -100, label_smoothing: float = 0.0, z_loss: float = 0.0,
    softcap: float | None = None, reduction: str = "mean",
) -> Tensor:  # fmt: skip
    """-sum over classes of q * log softmax(z) + z_loss * logsumexp(z)^2, with z = softcap * tanh(logits / softcap).

    q is 1 - label_smoothing on the label plus label_smoothing / vocab on every class. A token with label `ignore_index`
    counts for nothing.
    """
    z = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    z, labels_1d = z.reshape(-1, z.shape[-1]), labels.reshape(-1)
    lse = torch.logsumexp(z, -1)
    valid = labels_1d != ignore_index
    label = torch.where(valid, labels_1d, 0)
    losses = lse - (1 - label_smoothing) * z.gather(-1, label[:, None])[:, 0] - label_smoothing * z.mean(-1)
    losses = torch.where(valid, losses + z_loss * lse**2, 0)
    if reduction == "none":
        return losses.view(labels.shape)
    return losses.sum() / (valid.sum() if reduction == "mean" else 1)


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, bias: Tensor | None = None, **options: Any
) -> Tensor:
    """The cross entropy of logits = hidden @ weight.T + bias."""
    return cross_entropy(linear(hidden, weight, bias), labels, **options)


def layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """(x - mean(x)) / sqrt(var(x) + eps) * weight + bias."""
    h = x if residual is None else x + residual
    centered = h - h.mean(-1, keepdim=True)
    y = centered * torch.rsqrt(centered.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        y = y * weight
    if bias is not None:
        y = y + bias
    return y if residual is None else (y, h)


def softmax(x: Tensor, dim: int = -1) -> Tensor:
    """exp(x) / sum(exp(x)) over `dim`, with the largest element taken off first."""
    e = torch.exp(x - x.amax(dim, keepdim=True))
    return e / e.sum(dim, keepdim=True)


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = True, scale: float | None = None, window: int | None = None,
    softcap: float | None = None, mask: Tensor | None = None, key_start: Tensor | None = None,
    key_end: Tensor | None = None, cu_seqlens_q: Tensor | None = None, cu_seqlens_k: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """softmax(scale * q k^T) v over the keys that each query may attend to; 0, and lse = -inf, where there are none.

    Query i stands at position key_end - seq_q + i, and with a window sees keys closer than that.
    """
    if cu_seqlens_q is not None:
        cu_seqlens_k = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
        out, lse = torch.zeros_like(q), q.new_full(q.shape[:-1], float("-inf"))
        bounds = pairwise(cu_seqlens_q.tolist()), pairwise(cu_seqlens_k.tolist())
        for (i, i_end), (j, j_end) in zip(*bounds, strict=True):
            rows, keys, values = q[None, :, i:i_end], k[None, :, j:j_end], v[None, :, j:j_end]
            one = attention(
                rows, keys, values, causal=causal, scale=scale, window=window, softcap=softcap, return_lse=True
            )
            out[:, i:i_end], lse[:, i:i_end] = (x[0] for x in one)
        return (out, lse) if return_lse else out
    allowed = allowed_keys(q, k, causal, window, mask, key_start, key_end)
    seq_k, group = k.shape[2], q.shape[1] // k.shape[1]
    s = q @ k.repeat_interleave(group, 1).mT * (q.shape[3] ** -0.5 if scale is None else scale)
    s = s if softcap is None else softcap * torch.tanh(s / softcap)
    empty = ~allowed.any(-1)
    # a row of nothing but -inf would have NaN for gradients
    s = torch.where(allowed, s, float("-inf")).masked_fill(empty.unsqueeze(-1), 0)
    out = (s.softmax(-1) @ v.repeat_interleave(group, 1)).masked_fill(empty.unsqueeze(-1), 0)
    lse = s.logsumexp(-1) if seq_k else s.new_zeros(empty.shape)
    return (out, lse.masked_fill(empty, float("-inf"))) if return_lse else out


def allowed_keys(
    q: Tensor, k: Tensor, causal: bool, window: int | None, mask: Tensor | None,
    key_start: Tensor | None, key_end: Tensor | None,
) -> Tensor:  # fmt: skip
    """Whether query i may attend to key j: boolean (batch, heads, seq_q, seq_k)."""
    batch, heads, seq_q, _ = q.shape
    seq_k = k.shape[2]
    start = torch.zeros(batch, device=q.device) if key_start is None else key_start
    end = torch.full((batch,), seq_k, device=q.device) if key_end is None else key_end.clamp(0, seq_k)
    start, end = start.view(-1, 1, 1, 1), end.view(-1, 1, 1, 1)
    j = torch.arange(seq_k, device=q.device)
    i = torch.arange(seq_q, device=q.device).view(-1, 1) + end - seq_q
    allowed = ((start <= j) & (j < end)).expand(batch, heads, seq_q, seq_k)
    if causal:
        allowed = allowed & (j <= i)
    if window is not None:
        allowed = allowed & ((i - j).abs() < window)
    return allowed if mask is None else allowed & mask


def _normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    y = rms_norm(x, weight, eps)
    assert isinstance(y, Tensor)  # a pair only with a residual
    return y


def norm_qkv_rope(
    x: Tensor, norm_weight: Tensor, qkv_weight: Tensor, qkv_bias: Tensor | None, cos: Tensor, sin: Tensor,
    k_cache: Tensor, v_cache: Tensor, slots: Tensor, *, eps: float, heads: int,
) -> Tensor:  # fmt: skip
    """q, after k and v of each row went to its slot of the caches."""
    qkv = linear(_normed(x, norm_weight, eps), qkv_weight, qkv_bias)
    return rope_append(qkv, cos, sin, k_cache, v_cache, slots, heads=heads)[:, :, None]


def rope_append(
    qkv: Tensor, cos: Tensor, sin: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor, *, heads: int,
    q_norm: Tensor | None = None, k_norm: Tensor | None = None, eps: float = 1e-6,
) -> Tensor:  # fmt: skip
    """The turned q (tokens, heads, head_dim), after k and v of each token went to its slot of the caches."""
    _, kv_heads, block_size, head_dim = k_cache.shape
    q, k, v = qkv.view(len(qkv), heads + 2 * kv_heads, 1, head_dim).split((heads, kv_heads, kv_heads), dim=1)
    if q_norm is not None and k_norm is not None:
        q, k = _normed(q, q_norm, eps), _normed(k, k_norm, eps)
    q, k = rope(q, k, cos[:, None], sin[:, None])
    for row, slot in enumerate(slots.tolist()):
        if slot >= 0:
            k_cache[slot // block_size, :, slot % block_size] = k[row, :, 0]
            v_cache[slot // block_size, :, slot % block_size] = v[row, :, 0]
    return q[:, :, 0]


def norm_swiglu(
    x: Tensor, norm_weight: Tensor, gate_up_weight: Tensor, bias: Tensor | None = None, *, eps: float
) -> Tensor:
    """silu(gate) * up of the two halves of a projection of rms_norm(x)."""
    return swiglu(*linear(_normed(x, norm_weight, eps), gate_up_weight, bias).chunk(2, dim=-1))
