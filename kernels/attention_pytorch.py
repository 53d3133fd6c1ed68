"""Attention on CPU tensors: PyTorch's own flash attention, with the cheapest mask that says the same.

It is the kernel behind `F.scaled_dot_product_attention` on the CPU, called by its own name because that one also gives
lse and takes it back in backward. What it lacks, softcap and the gradient of lse, is written out in PyTorch's ops, whose
softmax is computed again in backward: e^(s - lse) would lose what lse lost when it was rounded. Packed sequences are taken
one by one. Any dtype, float64 too.
"""

from collections.abc import Iterator
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention_common import Pattern, as_batch, as_empty_rows, empty_lse, empty_rows
from .rows import accumulation_dtype
from .torch_compat import flash_attention_cpu, flash_attention_cpu_backward, softmax_backward


def forward(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern) -> tuple[Tensor, Tensor]:
    """out in the layout of `empty_rows` and lse, contiguous, in float64."""
    if pattern.cu_seqlens_q is None:
        out, lse = _forward(q, k, v, pattern)
        return out, lse.double()
    out = empty_rows(q).zero_()
    lse = empty_lse(q).fill_(float("-inf"))
    for rows, keys in _sequences(pattern):
        _into((out[:, rows], lse[:, rows]), _forward(q[:, rows], k[:, keys], v[:, keys], _unpacked(pattern)))
    return out, lse


def backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, pattern: Pattern
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv, each in the layout of `empty_rows`."""
    lse, dlse = lse.to(accumulation_dtype(q)), None if dlse is None else dlse.to(accumulation_dtype(q))
    if pattern.cu_seqlens_q is None:
        dq, dk, dv = _backward(dout, q, k, v, out, lse, dlse, pattern)
        return as_empty_rows(dq), as_empty_rows(dk), as_empty_rows(dv)
    gradients = empty_rows(q).zero_(), empty_rows(k).zero_(), empty_rows(v).zero_()
    for rows, keys in _sequences(pattern):
        one = _backward(
            dout[:, rows], q[:, rows], k[:, keys], v[:, keys], out[:, rows], lse[:, rows].unsqueeze(0),
            None if dlse is None else dlse[:, rows].unsqueeze(0), _unpacked(pattern),
        )  # fmt: skip
        _into((gradients[0][:, rows], gradients[1][:, keys], gradients[2][:, keys]), one)
    return gradients


def _into(targets: tuple[Tensor, ...], sources: tuple[Tensor, ...]) -> None:
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source.view_as(target))


def _unpacked(pattern: Pattern) -> Pattern:
    return pattern._replace(cu_seqlens_q=None, cu_seqlens_k=None)


def _sequences(pattern: Pattern) -> Iterator[tuple[slice, slice]]:
    """The rows and the keys of each packed sequence."""
    assert pattern.cu_seqlens_q is not None
    of_keys = pattern.cu_seqlens_q if pattern.cu_seqlens_k is None else pattern.cu_seqlens_k
    bounds = pairwise(pattern.cu_seqlens_q.tolist()), pairwise(of_keys.tolist())
    for rows, keys in zip(*bounds, strict=True):
        yield slice(*rows), slice(*keys)


def _forward(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern) -> tuple[Tensor, Tensor]:
    q, k, v = as_batch(q), as_batch(k), as_batch(v)
    batch, heads, seq_q, head_dim = q.shape
    if not q.numel() or not k.numel():
        return empty_rows(q).zero_(), q.new_full(q.shape[:-1], float("-inf"), dtype=accumulation_dtype(q))
    k, v, inside = _only_in_range(k, v, pattern)
    square, allowed = _visible(q, k, inside, pattern)
    if pattern.softcap is not None:
        scores, _ = _scores(q, k, allowed, pattern)
        out = _probabilities(scores) @ v.to(scores.dtype)
        return as_empty_rows(out.view(q.shape).to(q.dtype)), torch.logsumexp(scores, -1).view(q.shape[:-1])
    if seq_q == 1 and allowed is None:  # the heads of a group as the queries of one: their keys are read once
        grouped = q.reshape(batch, k.shape[1], -1, head_dim)
        out, lse = flash_attention_cpu(grouped, k, v, 0.0, False, scale=pattern.scale)
        return out.reshape(q.shape), lse.reshape(batch, heads, 1)
    out, lse = flash_attention_cpu(q, k, v, 0.0, square, attn_mask=_additive(allowed, q), scale=pattern.scale)
    if allowed is not None:  # where there is nothing to attend to it says lse = 0
        lse = lse.masked_fill(~allowed.any(-1), float("-inf"))
    return as_empty_rows(out), lse.contiguous()


def _backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dlse: Tensor | None, pattern: Pattern
) -> tuple[Tensor, Tensor, Tensor]:
    dout, q, k, v = as_batch(dout), as_batch(q), as_batch(k), as_batch(v)
    if not q.numel() or not k.numel():
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    k, v, inside = _only_in_range(k, v, pattern)
    square, allowed = _visible(q, k, inside, pattern)
    if pattern.softcap is None and dlse is None:
        lse = lse.masked_fill(lse == float("-inf"), float("inf"))  # e^(s - lse) = 0 for any s
        mask = _additive(allowed, q)
        gradients: tuple[Tensor, Tensor, Tensor] = flash_attention_cpu_backward(
            dout, q, k, v, as_batch(out), lse, 0.0, square, attn_mask=mask, scale=pattern.scale
        )
        return gradients
    scores, slope = _scores(q, k, allowed, pattern)
    groups = q.shape[0], k.shape[1], -1
    p = _probabilities(scores)
    dout = dout.to(p.dtype).reshape(*groups, q.shape[3])
    ds = softmax_backward(dout @ v.to(p.dtype).mT, p, -1, p.dtype)
    if dlse is not None:
        ds += p * dlse.masked_fill(lse == float("-inf"), 0).reshape(*groups, 1)
    ds *= slope
    dq = (ds @ k.to(p.dtype)).view_as(q)
    dk = ds.mT @ q.to(p.dtype).reshape(*groups, q.shape[3])
    return dq.to(q.dtype), dk.to(k.dtype), (p.mT @ dout).to(v.dtype)


def _only_in_range(k: Tensor, v: Tensor, pattern: Pattern) -> tuple[Tensor, Tensor, Tensor | None]:
    """Keys and values with 0 outside of the key ranges: what lies there may be anything, and 0 * NaN is NaN.

    And which keys are inside, (batch, 1, 1, seq_k); None without ranges.
    """
    if pattern.key_start is None and pattern.key_end is None:
        return k, v, None
    key = torch.arange(k.shape[2], device=k.device)
    inside = None if pattern.key_start is None else key >= pattern.key_start.view(-1, 1, 1, 1)
    if pattern.key_end is not None:
        before_end = key < pattern.key_end.view(-1, 1, 1, 1)
        inside = before_end if inside is None else inside & before_end
    assert inside is not None
    outside = ~inside.mT
    return k.masked_fill(outside, 0), v.masked_fill(outside, 0), inside


def _visible(q: Tensor, k: Tensor, inside: Tensor | None, pattern: Pattern) -> tuple[bool, Tensor | None]:
    """Whether it is all of a square causal mask; and what may be attended to, as (batch, heads, seq_q, seq_k) or
    anything that broadcasts to it, None where no mask is needed."""
    seq_q, seq_k = q.shape[2], k.shape[2]
    window = None if pattern.window is None or pattern.window >= max(seq_q, seq_k) else pattern.window
    if pattern.mask is None and inside is None and window is None:
        if not pattern.causal or seq_q == 1:
            return False, None
        if seq_q == seq_k:
            return True, None
    allowed = torch.ones(1, 1, 1, seq_k, dtype=torch.bool, device=q.device) if inside is None else inside
    if (pattern.causal and seq_q > 1) or window is not None:
        end = seq_k if pattern.key_end is None else pattern.key_end.clamp(0, seq_k).view(-1, 1, 1, 1)
        key = torch.arange(seq_k, device=q.device)
        position = torch.arange(seq_q, device=q.device)[:, None] + (end - seq_q)
        if pattern.causal:
            allowed = allowed & (key <= position)
        if window is not None:
            allowed = allowed & ((key - position).abs() < window)
    return False, (allowed if pattern.mask is None else allowed & pattern.mask).expand(-1, -1, seq_q, -1)


def _additive(allowed: Tensor | None, q: Tensor) -> Tensor | None:
    if allowed is None:
        return None
    return torch.zeros(allowed.shape, dtype=q.dtype, device=q.device).masked_fill_(~allowed, float("-inf"))


def _scores(q: Tensor, k: Tensor, allowed: Tensor | None, pattern: Pattern) -> tuple[Tensor, Tensor]:
    """Scores (batch, kv_heads, group * seq_q, seq_k), -inf where not allowed, and their slope against q k^T."""
    batch, heads, seq_q, head_dim = q.shape
    dtype = accumulation_dtype(q)
    groups = batch, k.shape[1], -1
    products = q.to(dtype).reshape(*groups, head_dim) @ k.to(dtype).mT
    scores, slope = products * pattern.scale, torch.tensor(pattern.scale, dtype=dtype, device=q.device)
    if pattern.softcap is not None:
        tanh = torch.tanh(products * (pattern.scale / pattern.softcap))
        scores, slope = pattern.softcap * tanh, pattern.scale * (1 - tanh * tanh)
    if allowed is not None:
        allowed = allowed.expand(batch, heads, seq_q, -1).reshape(*groups, k.shape[2])
        scores = scores.masked_fill(~allowed, float("-inf"))
    elif pattern.causal and seq_q > 1:
        allowed = torch.ones(seq_q, k.shape[2], dtype=torch.bool, device=q.device).tril(k.shape[2] - seq_q)
        scores = scores.masked_fill(~allowed.repeat(heads // k.shape[1], 1), float("-inf"))
    return scores, slope


def _probabilities(scores: Tensor) -> Tensor:
    """Their softmax, and 0 for a query that may attend to nothing."""
    return torch.softmax(scores, -1).masked_fill_(scores == float("-inf"), 0)


def decode(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, cache_lens: Tensor, key_start: Tensor | None,
    block_table: Tensor | None, scale: float, window: int | None, softcap: float | None,
) -> Tensor:  # fmt: skip
    """Rows one by one over exactly their keys; all at once where these are the same slice of an unpaged cache."""
    ends = [max(end, 0) for end in cache_lens.tolist()]
    starts = [0] * len(ends) if key_start is None else [max(start, 0) for start in key_start.tolist()]
    if window is not None:
        starts = [max(start, end - window) for start, end in zip(starts, ends, strict=True)]
    ranges = list(zip(starts, ends, strict=True))
    # the query heads of a kv head are the queries of one call: no GQA left, nothing to repeat
    (batch, heads, _, head_dim), kv_heads = q.shape, k_cache.shape[1]
    queries = q.reshape(batch, kv_heads, heads // kv_heads, head_dim)
    pattern = Pattern(None, None, None, None, None, causal=False, window=None, scale=scale, softcap=softcap)
    if block_table is None and len(set(ranges)) == 1:
        if ranges[0] != (0, k_cache.shape[2]):
            keys = slice(*ranges[0])
            k_cache, v_cache = k_cache[:, :, keys], v_cache[:, :, keys]
        return _attend(queries, k_cache, v_cache, pattern).reshape(q.shape).contiguous()
    out = queries.new_empty(queries.shape)
    for i, (first, last) in enumerate(ranges):
        k, v = (_row_keys(cache, i, first, last, block_table) for cache in (k_cache, v_cache))
        out[i] = _attend(queries[i, None], k, v, pattern)[0]
    return out.reshape(q.shape)


def _row_keys(cache: Tensor, row: int, start: int, end: int, block_table: Tensor | None) -> Tensor:
    """Entries [start, end) of one row, (1, kv_heads, keys, head_dim)."""
    if block_table is None:
        return cache[row, None, :, start:end]
    page = cache.shape[2]
    first = start // page
    blocks = cache[block_table[row, first : max(first, -(-end // page))]]  # (blocks, kv_heads, page, head_dim)
    return blocks.transpose(0, 1).flatten(1, 2)[None, :, start - first * page : end - first * page]


def _attend(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern) -> Tensor:
    """q (batch, kv_heads, group, head_dim) over all of k, v (batch, kv_heads, keys, head_dim)."""
    if k.shape[2] == 0:
        return torch.zeros_like(q)
    if pattern.softcap is None:
        return F.scaled_dot_product_attention(q, k, v, scale=pattern.scale)
    scores, _ = _scores(q, k, None, pattern)
    return (_probabilities(scores) @ v.to(scores.dtype)).to(q.dtype)
