"""What a decoding step runs beside its products: rows of an embedding, rotary angles, heads into the cache."""

import pytest
import torch
import torch.nn.functional as F

from llama_fast.kernels import cpu, reference
from llama_fast.kernels.embedding import embedding, embedding_op
from llama_fast.kernels.rope_append import rope_append, rope_append_op
from llama_fast.kernels.rotary_angles import rotary_angles, rotary_angles_op
from tests.kernels.test_norm_matmul import rows_at
from tests.parity import DTYPES, assert_parity, not_interpreted, on_cpu, on_triton

EPS = 1e-6


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "vocab", "hidden"), [(1, 1, 1), (0, 3, 5), (3, 50, 64), (17, 7, 4099)])
def test_embedding_gives_the_rows(rows, vocab, hidden, dtype, device):
    weight = torch.randn(vocab, hidden, device=device, dtype=dtype)
    index = torch.randint(0, vocab, (rows,), device=device)
    with torch.no_grad():
        assert torch.equal(embedding(index, weight), F.embedding(index, weight))
        assert torch.equal(embedding(index, weight.T.contiguous().T), F.embedding(index, weight))


@on_cpu
@pytest.mark.parametrize("wrong", [-1, 5])
def test_embedding_of_a_row_that_is_not_there(wrong):
    with pytest.raises(IndexError, match=f"index must be from 0 to 4, the rows of weight, got {wrong}"):
        embedding(torch.tensor([0, wrong]), torch.zeros(5, 4))


def test_embedding_has_no_gradient(device):
    weight = torch.zeros(5, 4, device=device, requires_grad=True)
    with pytest.raises(RuntimeError, match="embedding has no gradient"):
        embedding(torch.tensor([0], device=device), weight)


@pytest.mark.parametrize("rotary_dim", [2, 20, 128])
@pytest.mark.parametrize("has_long", [False, True])
def test_rotary_angles_match_the_reference(rotary_dim, has_long, device):
    positions = torch.tensor([0, 1, 77, 4095, 131071], device=device)
    lengths = torch.tensor([1, 900, 4096, 4097, 131072], device=device)
    frequencies, long = (
        (base ** -(torch.arange(rotary_dim // 2, device=device) / rotary_dim * 2)).repeat(2) for base in (1e4, 5e5)
    )

    def exact(frequencies, long):
        chosen = torch.where(lengths[:, None] > 4096, long, frequencies) if has_long else frequencies
        angles = (positions[:, None].float() * chosen.float()).double()
        return angles.cos() * 1.25, angles.sin() * 1.25

    def ours(frequencies, long):
        return rotary_angles(positions, lengths, frequencies, long=long if has_long else None, limit=4096, scaling=1.25)

    def pytorch(frequencies, long):
        chosen = torch.where(lengths[:, None] > 4096, long, frequencies) if has_long else frequencies
        angles = positions[:, None].float() * chosen
        return angles.cos() * 1.25, angles.sin() * 1.25

    with torch.no_grad():
        assert_parity(ours, pytorch, exact, [frequencies, long], gradients=False)


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


def torch_rope_append(qkv, cos, sin, k_cache, v_cache, slots, *, heads, q_norm, k_norm, eps):
    """PyTorch's own ops and transformers' rotation: the peer."""
    _, kv_heads, block_size, head_dim = k_cache.shape
    q, k, v = qkv.view(len(qkv), heads + 2 * kv_heads, head_dim).split((heads, kv_heads, kv_heads), 1)
    if q_norm is not None:
        q, k = F.rms_norm(q, (head_dim,), q_norm, eps), F.rms_norm(k, (head_dim,), k_norm, eps)
    rotary_dim, cos, sin = cos.shape[1], cos.to(qkv.dtype)[:, None], sin.to(qkv.dtype)[:, None]

    def turn(t):
        t, rest = t[..., :rotary_dim], t[..., rotary_dim:]
        a, b = t.chunk(2, -1)
        return torch.cat((t * cos + torch.cat((-b, a), -1) * sin, rest), -1)

    used = slots[slots >= 0]
    for cache, rows in ((k_cache, turn(k)), (v_cache, v)):
        cache[used // block_size, :, used % block_size] = rows[slots >= 0]
    return turn(q)


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
    index, weight = torch.tensor([0, 2], device=device), torch.randn(3, 8, device=device)
    torch.library.opcheck(embedding_op, (index, weight))
    torch.library.opcheck(rotary_angles_op, (index, index + 1, weight[0], None, 0, 1.0))
    qkv, q_norm, k_norm, *rest = rope_case(2, device, norms=True)
    torch.library.opcheck(rope_append_op, (qkv, q_norm, k_norm, *rest, EPS, 4))


@on_cpu
@pytest.mark.skipif(not on_triton, reason="asks for what runs natively by name")
def test_angles_are_pytorchs_unless_kernels_are_asked_for_by_name(device):
    """transformers' bits: a head turned by another's cosine is as right, but compares worse."""
    positions, frequencies = torch.arange(5000, device=device), torch.rand(64, device=device)
    with cpu.use("auto"):
        cos, _ = rotary_angles(positions, positions, frequencies)
    assert torch.equal(cos, (positions[:, None].float() * frequencies).cos())
