"""Attention for `transformers`, through its AttentionInterface, and the masks for it, through its AttentionMaskInterface.

transformers makes one mask a forward pass and hands it to every layer. Ours is one of four:

- None: causal over all keys;
- int32 (batch, 1, 1, 2 or 3), the range of keys of each row (`key_ranges`): batches padded on the left, caches longer than
  what they hold, sliding windows;
- uint8 (batch, 1, 1, keys): 0 for padding elsewhere than on the left, on top of causality;
- boolean (batch, 1, queries, keys), transformers' own: any other pattern.

Only the last grows with the square of the length and keeps the kernels from skipping what is masked.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from .neighbours import (
    ALL_ATTENTION_FUNCTIONS,
    ALL_MASK_ATTENTION_FUNCTIONS,
    OTHER_ATTENTION,
    and_masks,
    causal_mask_function,
    is_tracing,
    sdpa_mask,
    sliding_window_overlay,
)

IMPLEMENTATION = "llama_fast"
"""The name under which `config._attn_implementation` selects these functions."""


def fused_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Any = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Tensor | None:
    """The mask of a forward pass, as transformers asks for it.

    `q_offset` is the position of the first query (a tensor with static caches), `kv_offset` that of the first key in the
    cache (not 0 in the caches of sliding windows). `attention_mask` is boolean (batch, keys so far), True where no padding.
    """
    is_causal = mask_function is causal_mask_function
    is_sliding = not is_causal and _is_sliding_window(mask_function)
    end = q_offset + q_length - kv_offset  # where the keys of the last query end
    fills_cache = isinstance(end, int) and end == kv_length
    if is_causal or is_sliding:
        padding = 0 if attention_mask is None else _left_padding(attention_mask, q_offset, q_length)
        if is_causal and fills_cache and isinstance(padding, int) and q_length > 1:
            return None  # a single query takes ranges, for the decoding kernel
        if padding is not None:
            return key_ranges(batch_size, padding, end, kv_offset, local_size if is_sliding else None, device)
    if is_causal and fills_cache and attention_mask is not None:
        return _key_padding(attention_mask, kv_length, kv_offset)
    return sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,  # type: ignore[arg-type]  # transformers gives tensors too
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        allow_is_causal_skip=False,
        device=device,
        **{name: kwargs[name] for name in ("use_vmap", "allow_is_bidirectional_skip") if name in kwargs},
    )


def key_ranges(
    batch_size: int,
    start: int | Tensor,
    end: int | Tensor,
    kv_offset: int,
    window: int | None,
    device: torch.device | str,
) -> Tensor:
    """A causal pattern as int32 (batch, 1, 1, 2): the first key of each row, and the end of its keys, the last query's.

    With a sliding window a third column holds its size. It has four dimensions because transformers reads two as padding,
    and the columns lie one after the other in memory, so that each is a contiguous (batch,) vector.
    """
    columns = torch.zeros((2 if window is None else 3, batch_size), dtype=torch.int32, device=device)
    if isinstance(start, Tensor):
        columns[0] = (start - kv_offset).clamp_(min=0)
    columns[1] = end
    if window is not None:
        columns[2] = window
    return columns.T[:, None, None, :]


_AND_CODE = and_masks(causal_mask_function).__code__
_SLIDING_CODE = sliding_window_overlay(1).__code__


def _is_sliding_window(mask_function: Any) -> bool:
    """Whether it is transformers' own sum of a sliding window and causality: known by its code and what it closes over."""
    if is_tracing() or getattr(mask_function, "__code__", None) is not _AND_CODE:
        return False
    (parts,) = (cell.cell_contents for cell in mask_function.__closure__)
    return len(parts) == 2 and getattr(parts[0], "__code__", None) is _SLIDING_CODE and parts[1] is causal_mask_function


def _left_padding(attention_mask: Tensor, q_offset: int | Tensor, q_length: int) -> int | Tensor | None:
    """The number of padding tokens before each row: 0 if there are none, (batch,) if they are all on the left, else None.

    Reads the mask on the host, as transformers' own mask functions do; None while tracing, when that is impossible.
    """
    if is_tracing(attention_mask):
        return None
    end = int(q_offset) + q_length
    if attention_mask.shape[-1] < end:
        return None
    attention_mask = attention_mask[:, :end]
    if bool(attention_mask.all()):
        return 0
    padding = end - attention_mask.sum(-1)
    is_left = torch.arange(end, device=attention_mask.device) >= padding[:, None]
    return padding if torch.equal(attention_mask.bool(), is_left) else None


def _key_padding(attention_mask: Tensor, kv_length: int, kv_offset: int) -> Tensor:
    missing = kv_length + kv_offset - attention_mask.shape[-1]
    padding = F.pad(attention_mask, (0, max(missing, 0)))[:, kv_offset : kv_offset + kv_length]
    return padding.bool().view(torch.uint8)[:, None, None, :]


def fused_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention as transformers calls it: query (batch, heads, q, dim), key and value (batch, kv_heads, k, dim).

    Dropout, float masks and attention weights are not in the fused kernels: those calls run in PyTorch's own ops.

    Returns:
        (batch, q, heads, dim), and the attention weights if `output_attentions` asks for them, else None.

    Raises:
        NotImplementedError: the model asks for attention sinks, a position bias or a paged cache.
        TypeError: a mask of one's own is neither boolean nor floating point.
    """
    for name in OTHER_ATTENTION:
        if kwargs.get(name) is not None:
            raise NotImplementedError(
                f'the attention "{IMPLEMENTATION}" does not take {name}: call model.set_attn_implementation("sdpa") '
                "or llama_fast.unfuse(model)"
            )
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    has_float_mask = attention_mask is not None and attention_mask.is_floating_point()
    if dropout > 0.0 or has_float_mask or kwargs.get("output_attentions"):
        return eager_attention(
            module, query, key, value, attention_mask, dropout, scaling, is_causal=is_causal, softcap=softcap
        )
    heads = (query, key, value)
    options: dict[str, Any] = dict(scale=scaling, softcap=softcap)
    if attention_mask is None:
        out = ops.attention(*heads, causal=is_causal, **options)
    elif attention_mask.dtype == torch.int32:
        out = _attend_to_ranges(*heads, attention_mask, sliding_window, options)
    elif attention_mask.dtype == torch.uint8:
        out = ops.attention(*heads, causal=True, mask=attention_mask.view(torch.bool), **options)
    else:
        out = ops.attention(*heads, causal=False, mask=attention_mask, **options)
    return out.transpose(1, 2), None


def _attend_to_ranges(
    query: Tensor, key: Tensor, value: Tensor, ranges: Tensor, sliding_window: int | None, options: dict[str, Any]
) -> Tensor:
    if ranges.shape[-1] > 3:
        raise TypeError(f"attention_mask must be boolean or floating point, got {ranges.dtype} {tuple(ranges.shape)}")
    start, end, *window = ranges.flatten(0, 2).unbind(-1)  # each (batch,)
    if window and sliding_window is None:  # the layer does not say its window, which the kernels need as a number
        mask = _dense_ranges(ranges, query.shape[2], key.shape[2])
        return ops.attention(query, key, value, causal=False, mask=mask, **options)
    options["window"] = sliding_window if window else None
    needs_gradient = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
    if query.shape[2] == 1 and not needs_gradient:
        return ops.attention_decode(query, key, value, end, key_start=start, **options)
    return ops.attention(query, key, value, causal=True, key_start=start, key_end=end, **options)


def eager_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """The same in plain PyTorch, with dropout, float masks and attention weights."""
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    logits = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    mask = dense_mask(attention_mask, query.shape[2], key.shape[2], is_causal=is_causal, device=query.device)
    if mask is not None:
        is_float = mask.is_floating_point()
        logits = logits + mask if is_float else logits.masked_fill(~mask, torch.finfo(logits.dtype).min)
    weights = F.softmax(logits, dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32)).to(query.dtype)
    weights = F.dropout(weights, p=dropout)
    return (weights @ value).transpose(1, 2), weights


def dense_mask(
    attention_mask: Tensor | None,
    q_length: int,
    kv_length: int,
    *,
    is_causal: bool,
    device: torch.device | None = None,
) -> Tensor | None:
    """What a mask of ours means, as boolean (batch, 1, q, kv): True where a query may attend. Other masks stay."""
    if attention_mask is None:
        if not is_causal:
            return None
        attention_mask = torch.ones(1, 1, 1, kv_length, dtype=torch.uint8, device=device)
    if attention_mask.dtype == torch.uint8:
        whole = key_ranges(1, 0, kv_length, 0, None, attention_mask.device)
        return _dense_ranges(whole, q_length, kv_length) & attention_mask.bool()
    return _dense_ranges(attention_mask, q_length, kv_length) if attention_mask.dtype == torch.int32 else attention_mask


def _dense_ranges(ranges: Tensor, q_length: int, kv_length: int) -> Tensor:
    start, end, *window = (column[..., None] for column in ranges.unbind(-1))  # each (batch, 1, 1, 1)
    i_key = torch.arange(kv_length, device=ranges.device)
    i_query = torch.arange(q_length, device=ranges.device)[:, None] + end - q_length  # (batch, 1, q, 1)
    allowed = (i_key >= start) & (i_key <= i_query)
    return allowed & (i_key > i_query - window[0]) if window else allowed


def refusal(head_dim: int) -> str | None:
    """Why the kernels take no heads of that size, be it in a prompt or in decoding; None if they do."""
    keys = torch.empty(1, 1, 2, head_dim, device="meta")
    try:
        ops.attention(keys, keys, keys, scale=1.0)
        ops.attention_decode(keys[:, :, :1], keys, keys, torch.empty(1, dtype=torch.int32, device="meta"))
    except ValueError as error:
        return str(error)
    return None


# on import, so that a fused model that was pickled runs in a process that never called `fuse`; the first alone would lose the causal mask
ALL_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, fused_attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, fused_mask)
