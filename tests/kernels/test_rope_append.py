"""RoPE with the append to a paged cache: parity, head norms, partial rotation, edges, errors, and what PyTorch asks of an op."""

import pytest
import torch

from llama_fast.kernels import reference
from llama_fast.kernels.rope_append import rope_append, rope_append_op
from tests.kernels.test_norm_matmul import rows_at, torch_rope_append
from tests.parity import DTYPES, assert_parity, not_interpreted, on_cpu

EPS = 1e-6


def rope_case(tokens, device, *, heads=4, kv_heads=2, head_dim=16, rotary_dim=None, norms=False, dtype=torch.float32):
    def randn(*shape):
        return torch.randn(*shape, device=device, dtype=dtype)

    angles = torch.randn(tokens, (rotary_dim or head_dim) // 2, device=device).repeat(1, 2)
    slots = torch.arange(tokens, device=device) * 3 + 1
    slots[2::5] = -1
    blocks = (3 * tokens + 2) // 4 + 1
    caches = [torch.full((blocks, kv_heads, 4, head_dim), torch.nan, device=device, dtype=dtype) for _ in "kv"]
    weights = [randn(head_dim), randn(head_dim)] if norms else [None, None]
    return [3 * randn(tokens, (heads + 2 * kv_heads) * head_dim), *weights, angles.cos(), angles.sin(), *caches, slots]


def on_copies(function, heads):
    """`function` with caches of its own: (q, k, v) of the tokens. Other slots must still be NaN."""

    def run(qkv, q_norm, k_norm, cos, sin, k_cache, v_cache, slots):
        k_cache, v_cache = k_cache.clone(), v_cache.clone()
        cos, sin = (angle.to(torch.promote_types(qkv.dtype, torch.float32)) for angle in (cos, sin))
        options = dict(heads=heads, q_norm=q_norm, k_norm=k_norm, eps=EPS)
        q = function(qkv, cos, sin, k_cache, v_cache, slots, **options)
        found = [rows_at(cache, slots).clone() for cache in (k_cache, v_cache)]
        used = slots[slots >= 0]
        for cache in (k_cache, v_cache):
            cache[used // 4, :, used % 4] = torch.nan
            assert cache.isnan().all(), "written outside the slots"
        return q, *found

    return run


def assert_rope_append(case, heads=4):
    functions = (rope_append, torch_rope_append, reference.rope_append)
    assert_parity(*(on_copies(function, heads) for function in functions), case, gradients=False)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 2, 9])
@pytest.mark.parametrize("norms", [False, True])
def test_rope_append_matches_the_reference(tokens, norms, dtype, device):
    assert_rope_append(rope_case(tokens, device, norms=norms, dtype=dtype))


@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize(
    ("head_dim", "rotary_dim", "heads", "kv_heads"),
    [(16, 16, 2, 2), (64, 64, 3, 1), (80, 20, 4, 2), (5, 2, 1, 1), (96, 96, 2, 1), (128, 64, 2, 1), (33, 30, 4, 1)],
)
def test_rope_append_of_heads_and_partial_rotation(head_dim, rotary_dim, heads, kv_heads, norms, device):
    case = rope_case(3, device, heads=heads, kv_heads=kv_heads, head_dim=head_dim, rotary_dim=rotary_dim, norms=norms)
    assert_rope_append(case, heads)


@pytest.mark.parametrize("size", [1e-3, 1e3])
def test_rope_append_of_tiny_and_large_heads(size, device):
    qkv, *rest = rope_case(4, device, norms=True)
    assert_rope_append([size * qkv, *rest])


def test_rope_append_of_nothing(device):
    assert_rope_append(rope_case(0, device))


@on_cpu
def test_a_slot_past_the_cache():
    qkv, _, _, cos, sin, k_cache, v_cache, slots = rope_case(2, "cpu")
    slots[1] = 4 * len(k_cache)
    with pytest.raises(ValueError, match=f"slots must be below {4 * len(k_cache)}"):
        rope_append(qkv, cos, sin, k_cache, v_cache, slots, heads=4)


def test_one_norm_without_the_other(device):
    qkv, q_norm, _, *rest = rope_case(2, device, norms=True)
    with pytest.raises(ValueError, match="q_norm and k_norm must both be given, or neither"):
        rope_append(qkv, *rest, heads=4, q_norm=q_norm)


@not_interpreted
def test_opcheck(device):
    qkv, q_norm, k_norm, *rest = rope_case(2, device, norms=True)
    torch.library.opcheck(rope_append_op, (qkv, q_norm, k_norm, *rest, EPS, 4))
