"""The work of one PyTorch op, from its arguments and results: bytes that must move, and FLOPs of products and attention.

What is not named here reads its inputs and writes its outputs once; a view, or a result in no new memory, moves nothing. What is done
element by element counts as memory alone.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...kernels import flops
from ..measure.work import Work, attended_pairs, attention_flops

if TYPE_CHECKING:
    from torch._ops import OpOverload

Arguments = Mapping[str, Any]


def work_of(op: "OpOverload", args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> Work:
    """What a call of `op` must do. On a GPU, waits for the lengths of caches."""
    name = op._schema.name.split("::")[1]
    arguments = bound(op, args, kwargs)
    outputs = _tensors(out)
    if name.startswith(_NOTHING) or _makes_nothing(op, arguments, outputs):
        return Work()
    if name in _SPECIAL:
        return _SPECIAL[name](arguments, outputs)
    return _default(op, arguments, outputs) + Work(flops=_product_flops(name, arguments, outputs))


_NOTHING = ("empty", "new_empty", "lift_fresh", "detach", "resolve_", "_unsafe_view")


def bound(op: "OpOverload", args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments by their names in the op's schema."""
    names = [argument.name for argument in op._schema.arguments]
    return dict(zip(names, args, strict=False)) | dict(kwargs)


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [x for each in value for x in _tensors(each)] if isinstance(value, list | tuple) else []


def _storage(x: Tensor) -> int | None:
    return None if x.is_mkldnn or not x.numel() else x.untyped_storage().data_ptr()


def _makes_nothing(op: "OpOverload", arguments: Arguments, outputs: list[Tensor]) -> bool:
    if op._schema.is_mutable or not outputs:
        return not outputs and not op._schema.is_mutable and not _tensors(list(arguments.values()))
    inputs = {_storage(x) for x in _tensors(list(arguments.values()))} - {None}
    return all(not x.numel() or _storage(x) in inputs for x in outputs)


def nbytes(x: Tensor) -> int:
    """Of its elements; those that a stride of 0 repeats count once."""
    count = 1
    for size, stride in zip(x.shape, [1] * x.dim() if x.is_mkldnn else x.stride(), strict=True):
        count *= size if stride else min(size, 1)
    return count * x.element_size()


def _moving(reads: Sequence[Tensor | None], writes: Sequence[Tensor], flops: int = 0) -> Work:
    return Work(sum(nbytes(x) for x in reads if x is not None), sum(map(nbytes, writes)), flops)


_OVERWRITES = {"copy_", "fill_", "zero_", "index_fill_", "masked_fill_"}


def _default(op: "OpOverload", arguments: Arguments, outputs: list[Tensor]) -> Work:
    name = op._schema.name.split("::")[1]
    read: list[Tensor] = []
    written: dict[int, Tensor] = {id(x): x for x in outputs}
    for argument in op._schema.arguments:
        tensors = _tensors(arguments.get(argument.name))
        if argument.is_write:
            written |= {id(x): x for x in tensors}
        if not (argument.is_write and (name in _OVERWRITES or argument.is_out)):
            read += tensors
    return _moving(list({id(x): x for x in read}.values()), list(written.values()))


# where the factors of a product stand: its FLOPs are 2 for each element of the first and column of the second
_PRODUCTS = {
    "mm": ("self", "mat2"), "addmm": ("mat1", "mat2"), "bmm": ("self", "mat2"), "baddbmm": ("batch1", "batch2"),
    "mv": ("self", "vec"), "addmv": ("mat", "vec"),
}  # fmt: skip
_LINEARS = {
    "linear": ("x", "weight"), "_linear_pointwise": ("X", "W"), "norm_swiglu": ("x", "gate_up_weight", "up_weight"),
    "norm_qkv_rope": ("x", "qkv_weight"), "norm_heads": ("x", "q_weight", "k_weight", "v_weight"),
    "mkldnn_linear": ("self", "weight"),
}  # fmt: skip


def _product_flops(name: str, arguments: Arguments, outputs: list[Tensor]) -> int:
    if name in _PRODUCTS:
        a, b = (arguments[each] for each in _PRODUCTS[name])
        return int(2 * a.numel() * (b.shape[-1] if b.dim() > 1 else 1))
    if name in _LINEARS:
        first, *weights = _LINEARS[name]
        x, given = arguments.get(first, arguments.get("input")), [arguments[weight] for weight in weights]
        return sum(int(2 * x.numel() * weight.shape[0]) for weight in given if weight is not None)
    if name == "layer_tail":
        return flops.layer_tail(**arguments)
    return 0


def _rows(arguments: Arguments, outputs: list[Tensor]) -> Work:
    """Looks rows up: reads those and their numbers, writes them."""
    indices = _tensors([arguments.get(name) for name in ("indices", "index")])
    return _moving([*indices, *outputs], outputs)


def _put_rows(arguments: Arguments, outputs: list[Tensor]) -> Work:
    """Writes given rows into a larger tensor, and nothing else of it."""
    index = _tensors([arguments.get("indices"), arguments.get("index")])
    given = _tensors([arguments.get(name) for name in ("source", "src", "values")])
    count = (given or index)[0].numel()  # a number is written to each place
    return _moving([*index, *given], []) + Work(written=count * arguments["self"].element_size())


def _add_rows(arguments: Arguments, outputs: list[Tensor]) -> Work:
    put = _put_rows(arguments, outputs)
    return put + Work(read=put.written)


def _appending(arguments: Arguments, outputs: list[Tensor], flops: int = 0) -> Work:
    """Of the caches the rows at the slots are written, and nothing is read."""
    k_cache, rows = arguments["k_cache"], arguments["slots"].shape[0]
    new_keys = 2 * rows * k_cache.shape[1] * k_cache.shape[3] * k_cache.element_size()
    read = _tensors([value for name, value in arguments.items() if name not in ("k_cache", "v_cache")])
    return _moving(read, outputs, flops) + Work(written=new_keys)


def _norm_qkv_rope(arguments: Arguments, outputs: list[Tensor]) -> Work:
    return _appending(arguments, outputs, _product_flops("norm_qkv_rope", arguments, outputs))


def _rotary_angles(arguments: Arguments, outputs: list[Tensor]) -> Work:
    """The lengths say which frequencies are read, where there are two tables of them."""
    lengths = arguments["lengths"] if arguments["long"] is not None else None
    return _moving([arguments["positions"], arguments["frequencies"], lengths], outputs)


def _attention_decode(arguments: Arguments, outputs: list[Tensor]) -> Work:
    """The keys that are attended to; of the block table the entries that lead to them."""
    q, k, lens, table = (arguments[name] for name in ("q", "k_cache", "cache_lens", "block_table"))
    start, window = arguments.get("key_start"), arguments.get("window")
    ends = lens.tolist()
    firsts = [0] * len(ends) if start is None else start.tolist()
    if window is not None:
        firsts = [max(first, end - window) for first, end in zip(firsts, ends, strict=True)]
    keys = sum(max(0, end - first) for first, end in zip(firsts, ends, strict=True))
    per_key = 2 * k.shape[1] * k.shape[3] * k.element_size()
    entries = 0 if table is None else sum(-(-end // k.shape[2]) for end in ends) * table.element_size()
    return _moving([q, lens, start], outputs, attention_flops(keys, q.shape[1], q.shape[3])) + Work(
        read=keys * per_key + entries
    )


def _attention(arguments: Arguments, outputs: list[Tensor]) -> Work:
    """llama_fast's own. lse is not counted: inference drops it."""
    q, k, window, causal = (arguments[name] for name in ("q", "k", "window", "causal"))
    if arguments.get("cu_seqlens_q") is not None:
        lengths = [arguments[f"cu_seqlens_{name}"].diff().tolist() for name in ("q", "k")]
        pairs = sum(attended_pairs(a, b, causal=causal, window=window) for a, b in zip(*lengths, strict=True))
        return _attention_moving(q, k, k.shape[-2], pairs * q.shape[0], outputs)
    allowed = _allowed(arguments, q.shape[-2], k.shape[-2])
    pairs = int(allowed.expand(len(q), -1, -1).sum())
    keys = int(allowed.any(-2).expand(len(q), -1).sum())
    return _attention_moving(q, k, keys / len(q), pairs * q.shape[1], outputs)


def _allowed(arguments: Arguments, seq_q: int, seq_k: int) -> Tensor:
    """(batch or 1, seq_q, seq_k): which keys a query attends to; of a mask that of the first head."""
    q = arguments["q"]
    j = torch.arange(seq_k, device=q.device)
    start, end, window = arguments.get("key_start"), arguments.get("key_end"), arguments["window"]
    ends = torch.tensor([seq_k], device=q.device) if end is None else end
    i = (ends[:, None] - seq_q + torch.arange(seq_q, device=q.device))[:, :, None]
    allowed = j < ends[:, None, None]
    allowed = allowed & (j <= i) if arguments["causal"] else allowed.expand(-1, seq_q, -1)
    if window is not None:
        allowed = allowed & (j > i - window)
    if start is not None:
        allowed = allowed & (j >= start[:, None, None])
    if arguments.get("mask") is not None:
        allowed = allowed & arguments["mask"].expand(len(q), q.shape[1], seq_q, seq_k)[:, 0]
    return allowed


def _attention_moving(q: Tensor, k: Tensor, keys: float, pairs_of_heads: int, outputs: list[Tensor]) -> Work:
    per_key = nbytes(k) / max(1, k.shape[-2])  # of all rows and heads
    flops = attention_flops(pairs_of_heads, 1, q.shape[-1])
    return _moving([q], outputs[:1], flops) + Work(read=round(2 * keys * per_key))


def _sdpa(arguments: Arguments, outputs: list[Tensor]) -> Work:
    """PyTorch's: causal ones are aligned to the start. A mask is read whole, and every pair of it computed."""
    q, k = arguments["query"], arguments["key"]
    seq_q, seq_k = q.shape[-2], k.shape[-2]
    pairs = seq_q * seq_k
    if arguments.get("is_causal"):
        pairs = sum(min(i + 1, seq_k) for i in range(seq_q))
    mask = next((arguments[name] for name in ("attn_mask", "attn_bias") if arguments.get(name) is not None), None)
    work = _attention_moving(q, k, seq_k, pairs * q.shape[0] * q.shape[1], outputs)
    return work if mask is None else work + Work(read=nbytes(mask))


_SPECIAL: dict[str, Callable[[Arguments, list[Tensor]], Work]] = {
    "embedding": _rows, "index": _rows, "index_select": _rows, "gather": _rows,
    "index_copy_": _put_rows, "index_put_": _put_rows, "_index_put_impl_": _put_rows, "scatter_": _put_rows,
    "index_add_": _add_rows,
    "norm_qkv_rope": _norm_qkv_rope, "rope_append": _appending, "rotary_angles": _rotary_angles,
    "attention_decode": _attention_decode,
    "attention": _attention,
    "_scaled_dot_product_flash_attention_for_cpu": _sdpa, "_scaled_dot_product_flash_attention": _sdpa,
    "_scaled_dot_product_efficient_attention": _sdpa, "_scaled_dot_product_cudnn_attention": _sdpa,
    "_scaled_dot_product_fused_attention_overrideable": _sdpa, "scaled_dot_product_attention": _sdpa,
}  # fmt: skip
