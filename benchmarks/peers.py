"""Who we are compared with, one function for each op: its implementations by name, each a function of the same inputs.

"PyTorch" is the plain one in eager mode, what a transformers model does, and the one whose own error an implementation's is judged
beside. "llama-fast" is ours. A peer that cannot run here is an `Unavailable` with the reason: results list it by name.
"""

import functools
import importlib
import importlib.util
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from llama_fast import ops

OURS = "llama-fast"
BASELINE = "PyTorch"

EPS = 1e-5
"""Of every norm."""


@dataclass(frozen=True)
class Unavailable:
    """Why a peer cannot run here."""

    reason: str


Implementation = Callable[..., Any]
Implementations = dict[str, Implementation | Unavailable]


def compiled(function: Implementation, *, tune: bool = True) -> Implementations:
    """`function` by torch.compile: as it is by default, and with its kernels tuned, which takes it up to some ten seconds."""
    name, tuned_name = "torch.compile", "torch.compile max-autotune"
    if torch.cuda.is_available():
        # without its own graphs: all are captured alike
        tuned = torch.compile(function, dynamic=False, mode="max-autotune-no-cudagraphs")
        untuned = Unavailable("it is compared at the sizes of Llama-3.1-8B only")
        return {name: torch.compile(function, dynamic=False), tuned_name: tuned if tune else untuned}
    missing = Unavailable("it tunes the kernels of a GPU, and there is none")
    if shutil.which("g++") is None:
        return {name: Unavailable("it needs a C++ compiler, and there is no g++"), tuned_name: missing}
    return {name: torch.compile(function, dynamic=False), tuned_name: missing}


def liger(implementation: Implementation) -> Implementations:
    """Liger-Kernel's, written for its release 0.8."""
    if importlib.util.find_spec("liger_kernel") is None:
        return {"Liger": Unavailable("liger-kernel is not installed")}
    if not torch.cuda.is_available():
        return {"Liger": Unavailable("liger-kernel has no CPU implementation")}
    return {"Liger": implementation}


@functools.cache
def _liger() -> Any:
    """Its functions, not imported before one is called: what fails then is that peer's failure alone."""
    return importlib.import_module("liger_kernel.ops")


def rms_norm() -> Implementations:
    """x (tokens, hidden), weight (hidden,)."""

    def ours(x: Tensor, weight: Tensor) -> Any:
        return ops.rms_norm(x, weight, EPS)

    def pytorch(x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, weight.shape, weight, EPS)

    def theirs(x: Tensor, weight: Tensor) -> Any:  # False: not in place, which would overwrite dy
        return _liger().LigerRMSNormFunction.apply(x, weight, EPS, 0.0, "llama", False)

    return {OURS: ours, BASELINE: pytorch} | compiled(pytorch) | liger(theirs)


def add_rms_norm() -> Implementations:
    """x (tokens, hidden), weight (hidden,), residual like x; returns the norm of the sum, and the sum."""

    def ours(x: Tensor, weight: Tensor, residual: Tensor) -> Any:
        return ops.rms_norm(x, weight, EPS, residual=residual)

    def pytorch(x: Tensor, weight: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        total = x + residual
        return F.rms_norm(total, weight.shape, weight, EPS), total

    def theirs(x: Tensor, weight: Tensor, residual: Tensor) -> Any:
        return _liger().LigerFusedAddRMSNormFunction.apply(x, residual, weight, EPS, 0.0, "llama", False)

    return {OURS: ours, BASELINE: pytorch} | compiled(pytorch) | liger(theirs)


def layer_norm() -> Implementations:
    """x (tokens, hidden), weight and bias (hidden,)."""

    def ours(x: Tensor, weight: Tensor, bias: Tensor) -> Any:
        return ops.layer_norm(x, weight, bias, EPS)

    def pytorch(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.layer_norm(x, weight.shape, weight, bias, EPS)

    def theirs(x: Tensor, weight: Tensor, bias: Tensor) -> Any:
        return _liger().LigerLayerNormFunction.apply(x, weight, bias, EPS)

    return {OURS: ours, BASELINE: pytorch} | compiled(pytorch) | liger(theirs)


def softmax() -> Implementations:
    """x (rows, classes)."""

    def pytorch(x: Tensor) -> Tensor:
        return F.softmax(x, -1)

    def theirs(x: Tensor) -> Any:
        return _liger().LigerSoftmaxFunction.apply(x)

    return {OURS: ops.softmax, BASELINE: pytorch} | compiled(pytorch) | liger(theirs)


def rope() -> Implementations:
    """q (batch, heads, seq, head_dim), k (batch, kv_heads, seq, head_dim), cos and sin (1, seq, head_dim)."""

    def theirs(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Any:  # overwrites q and k, forward, and dq and dk
        return _liger().LigerRopeFunction.apply(q, k, cos, sin)

    return {OURS: ops.rope, BASELINE: rotate_half} | compiled(rotate_half) | liger(theirs)


def rotate_half(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """RoPE as transformers' models write it; cos and sin (batch, seq, head_dim)."""

    def rotate(x: Tensor) -> Tensor:
        a, b = x.chunk(2, dim=-1)
        return x * cos.unsqueeze(1) + torch.cat((-b, a), dim=-1) * sin.unsqueeze(1)

    return rotate(q), rotate(k)


def swiglu() -> Implementations:
    """gate and up (tokens, intermediate)."""

    def pytorch(gate: Tensor, up: Tensor) -> Tensor:
        return F.silu(gate) * up

    def theirs(gate: Tensor, up: Tensor) -> Any:  # its backward overwrites gate and up
        return _liger().LigerSiLUMulFunction.apply(gate, up)

    return {OURS: ops.swiglu, BASELINE: pytorch} | compiled(pytorch) | liger(theirs)


def geglu() -> Implementations:
    """gate and up (tokens, intermediate); GELU in its tanh form."""

    def pytorch(gate: Tensor, up: Tensor) -> Tensor:
        return F.gelu(gate, approximate="tanh") * up

    def theirs(gate: Tensor, up: Tensor) -> Any:  # its backward overwrites gate and up
        return _liger().LigerGELUMulFunction.apply(gate, up)

    return {OURS: ops.geglu, BASELINE: pytorch} | compiled(pytorch) | liger(theirs)


def cross_entropy() -> Implementations:
    """logits (tokens, vocab), labels (tokens,); the mean. PyTorch's is in float32, as in transformers' loss."""

    def pytorch(logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits.float(), labels)

    def theirs(logits: Tensor, labels: Tensor) -> Any:  # overwrites the logits with their gradient, where they want one
        return _liger().LigerCrossEntropyFunction.apply(logits, labels, None)[0]

    return {OURS: ops.cross_entropy, BASELINE: pytorch} | compiled(pytorch) | liger(theirs)


def linear_cross_entropy(*, tune: bool) -> Implementations:
    """hidden (tokens, in_features), weight (vocab, in_features), labels (tokens,); the mean. PyTorch's loss is in float32."""

    def pytorch(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(hidden, weight).float(), labels)

    def theirs(hidden: Tensor, weight: Tensor, labels: Tensor) -> Any:
        return _liger().LigerFusedLinearCrossEntropyFunction.apply(hidden, weight, labels)[0]

    return (
        {OURS: ops.linear_cross_entropy, BASELINE: pytorch}
        | compiled(pytorch, tune=tune)
        | {"F.linear_cross_entropy": _pytorch_linear_cross_entropy()}
        | liger(theirs)
    )


def _pytorch_linear_cross_entropy() -> Implementation | Unavailable:
    """PyTorch's own, in chunks: without the options it would store all logits."""
    fused = getattr(F, "linear_cross_entropy", None)
    options = getattr(torch.nn, "LinearCrossEntropyOptions", None)
    if fused is None or options is None:
        return Unavailable(f"PyTorch {torch.__version__} has no linear_cross_entropy in chunks")
    return functools.partial(fused, options=options())


def linear(*, residual: bool, tune: bool) -> Implementations:
    """x (rows, in_features), weight (out_features, in_features), and a residual (rows, out_features)."""
    if not residual:
        plain: Implementations = {OURS: ops.linear, BASELINE: F.linear}
        return plain | compiled(F.linear, tune=tune)

    def ours(x: Tensor, weight: Tensor, residual: Tensor) -> Tensor:
        return ops.linear(x, weight, residual=residual)

    def pytorch(x: Tensor, weight: Tensor, residual: Tensor) -> Tensor:
        return F.linear(x, weight) + residual

    def addmm(x: Tensor, weight: Tensor, residual: Tensor) -> Tensor:
        return torch.addmm(residual, x, weight.t())

    peers: Implementations = {OURS: ours, BASELINE: pytorch, "torch.addmm": addmm}
    return peers | compiled(pytorch, tune=tune)


_BACKENDS = {
    "SDPA flash": SDPBackend.FLASH_ATTENTION, "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION,
    "SDPA efficient": SDPBackend.EFFICIENT_ATTENTION, "SDPA math": SDPBackend.MATH,
}  # fmt: skip
_MOST_MATH_BYTES = 8e9


def _sdpa_backends(attend: Implementation, *, math_bytes: float, masked: bool) -> Implementations:
    """`attend`, which calls SDPA, with each of its backends. `math_bytes` is what the plain one stores on the way."""
    peers: Implementations = {}
    for name, backend in _BACKENDS.items():
        if backend == SDPBackend.MATH and math_bytes > _MOST_MATH_BYTES:
            peers[name] = Unavailable(f"it would store {1e-9 * math_bytes:.0f} GB on the way")
        elif not torch.cuda.is_available() and backend not in (SDPBackend.FLASH_ATTENTION, SDPBackend.MATH):
            peers[name] = Unavailable("it has no CPU implementation")
        elif masked and backend == SDPBackend.FLASH_ATTENTION:
            peers[name] = Unavailable("it takes no mask, and SDPA has no other way to say a window")
        else:
            peers[name] = functools.partial(_with_backend, backend, attend)
    return peers


def _with_backend(backend: SDPBackend, attend: Implementation, *inputs: Any) -> Any:
    # this one alone has no grouped heads
    repeat = {"repeat_heads": True} if backend == SDPBackend.EFFICIENT_ATTENTION else {}
    with sdpa_kernel(backend):
        return attend(*inputs, **repeat)


def _sdpa(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, causal: bool = False, repeat_heads: bool = False
) -> Tensor:
    """As transformers calls it: grouped heads are SDPA's own affair, but with a mask k and v are repeated."""
    group = q.shape[1] // k.shape[1]
    if group > 1 and (repeat_heads or mask is not None):
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1]
    )


def attention(*, causal: bool, window: int | None, scores: int) -> Implementations:
    """q (batch, heads, seq, head_dim), k and v (batch, kv_heads, seq, head_dim); `scores` is batch * heads * seq * seq."""

    @functools.cache  # made once, as a model makes it once for all its layers
    def window_mask(seq: int, device: torch.device) -> Tensor:
        return torch.ones(seq, seq, dtype=torch.bool, device=device).tril().triu(1 - (window or seq))

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return ops.attention(q, k, v, causal=causal, window=window)

    def pytorch(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        if window is None:
            return _sdpa(q, k, v, causal=causal, **options)
        return _sdpa(q, k, v, mask=window_mask(q.shape[2], q.device), **options)

    return (
        {OURS: ours, BASELINE: pytorch}
        | _sdpa_backends(pytorch, math_bytes=12.0 * scores, masked=window is not None)
        | {"FlexAttention": _flex_attention(causal, window)}
    )


def _flex_attention(causal: bool, window: int | None) -> Implementation | Unavailable:
    """PyTorch's compiled attention for patterns that SDPA does not know, such as a window."""
    if not torch.cuda.is_available():
        return Unavailable("its CPU implementation has no gradient: it is compared on GPUs only")
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    attend = torch.compile(flex_attention, dynamic=False)

    def allowed(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return i >= j if window is None else (i >= j) & (i - j < window)

    @functools.cache
    def pattern(seq: int, device: torch.device) -> Any:
        return create_block_mask(allowed, None, None, seq, seq, device=str(device)) if causal else None

    def flex(q: Tensor, k: Tensor, v: Tensor) -> Any:
        mask = pattern(q.shape[2], q.device)
        return attend(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1])

    return flex


@dataclass(frozen=True)
class Paged:
    """The same keys and values in blocks: k, v (blocks, kv_heads, block_size, head_dim), table (batch, blocks of a row)."""

    k: Tensor
    v: Tensor
    table: Tensor


def attention_decode(*, math_bytes: float) -> Implementations:
    """q (batch, heads, 1, head_dim), k and v (batch, kv_heads, context, head_dim), lens (batch,), all full, and them paged."""

    def ours(q: Tensor, k: Tensor, v: Tensor, lens: Tensor, paged: Paged) -> Tensor:
        return ops.attention_decode(q, k, v, lens)

    def ours_paged(q: Tensor, k: Tensor, v: Tensor, lens: Tensor, paged: Paged) -> Tensor:
        return ops.attention_decode(q, paged.k, paged.v, lens, block_table=paged.table)

    def pytorch(q: Tensor, k: Tensor, v: Tensor, lens: Tensor, paged: Paged) -> Tensor:
        return _sdpa(q, k, v)

    def grouped(q: Tensor, k: Tensor, v: Tensor, lens: Tensor, paged: Paged, **_: Any) -> Tensor:
        """The heads of a group as queries of one head: the best way to ask, as no backend has to repeat k and v for it."""
        rows = q.view(q.shape[0], k.shape[1], -1, q.shape[3])
        return F.scaled_dot_product_attention(rows, k, v).view(q.shape)

    return {OURS: ours, f"{OURS} paged": ours_paged, BASELINE: pytorch} | _sdpa_backends(
        grouped, math_bytes=math_bytes, masked=False
    )


def norm_qkv_rope(*, heads: int, kv_heads: int) -> Implementations:
    """x (rows, hidden), norm_weight, qkv_weight, cos and sin (rows, head_dim), the caches, slots (rows,); returns q.

    The caches are (blocks, kv_heads, block_size, head_dim), a transposed (kv_heads, blocks, ...), as in the engine.
    """

    def ours(
        x: Tensor, norm: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, k: Tensor, v: Tensor, slots: Tensor
    ) -> Any:
        return ops.norm_qkv_rope(x, norm, weight, None, cos, sin, k, v, slots, eps=EPS, heads=heads)

    def in_steps(normed: Implementation, product: Implementation, turned: Implementation) -> Implementation:
        def run(
            x: Tensor, norm: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, k: Tensor, v: Tensor, slots: Tensor
        ) -> Any:
            qkv = product(normed(x, norm), weight).view(x.shape[0], -1, 1, k.shape[-1])
            new_q, new_k, new_v = qkv.split((heads, kv_heads, kv_heads), dim=1)
            new_q, new_k = turned(new_q, new_k, cos[:, None], sin[:, None])
            for cache, new in ((k, new_k), (v, new_v)):
                cache.transpose(0, 1).flatten(1, 2).index_copy_(1, slots, new[:, :, 0].transpose(0, 1))
            return new_q

        return run

    pytorch = in_steps(_pytorch_norm, F.linear, rotate_half)
    unfused = in_steps(_our_norm, ops.linear, ops.rope)
    return {OURS: ours, f"{OURS} unfused": unfused, BASELINE: pytorch} | compiled(pytorch)


def norm_swiglu() -> Implementations:
    """x (rows, hidden), norm_weight (hidden,), gate_up_weight (2 * intermediate, hidden)."""

    def ours(x: Tensor, norm: Tensor, weight: Tensor) -> Any:
        return ops.norm_swiglu(x, norm, weight, eps=EPS)

    def unfused(x: Tensor, norm: Tensor, weight: Tensor) -> Any:
        return ops.swiglu(*ops.linear(_our_norm(x, norm), weight).chunk(2, dim=-1))

    def pytorch(x: Tensor, norm: Tensor, weight: Tensor) -> Tensor:
        gate, up = F.linear(_pytorch_norm(x, norm), weight).chunk(2, dim=-1)
        return F.silu(gate) * up

    return {OURS: ours, f"{OURS} unfused": unfused, BASELINE: pytorch} | compiled(pytorch)


def _our_norm(x: Tensor, weight: Tensor) -> Any:
    return ops.rms_norm(x, weight, EPS)


def _pytorch_norm(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, EPS)
