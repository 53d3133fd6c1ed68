"""RoPE, forward and backward: parity, layouts, strides, edges, errors, and what PyTorch asks of an op."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_fast import ops
from llama_fast.kernels import reference
from llama_fast.kernels.rope import rope_op
from tests.parity import DTYPES, assert_parity, assert_same_bits, not_interpreted, not_on_cpu, on_cpu


def angles(batch, seq, rotary_dim, *, interleaved=False, device="cpu", dtype=torch.float32):
    """cos and sin of random angles, each twice: as halves, or as neighbours."""
    angle = torch.randn(batch, seq, rotary_dim // 2, device=device) * 3
    angle = angle.repeat_interleave(2, -1) if interleaved else torch.cat((angle, angle), dim=-1)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def transformers_rope(q, k, cos, sin, *, interleaved=False):
    """The formula of transformers' models, in the dtype of q: the peer."""
    return reference.rope(q, k, cos.to(q.dtype), sin.to(q.dtype), interleaved=interleaved)


def assert_rope(q, k, cos, sin, **options):
    assert_parity(
        lambda q, k: ops.rope(q, k, cos, sin, **options),
        lambda q, k: transformers_rope(q, k, cos, sin, **options),
        lambda q, k: reference.rope(q, k, cos.double(), sin.double(), **options),
        [q, k],
    )


def projected(batch, heads, seq, head_dim, **options):
    """As transformers makes it: (batch, seq, heads, head_dim), transposed."""
    return torch.randn(batch, seq, heads, head_dim, **options).transpose(1, 2)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "seq", "head_dim", "rotary_dim"),
    [
        (4, 2, 7, 64, 64),
        (32, 8, 2, 128, 128),
        (3, 40, 2, 128, 128),
        (3, 1, 9, 80, 80),
        (2, 2, 5, 48, 12),
        (7, 7, 1, 34, 34),
        (1, 1, 3, 5, 2),
    ],
)
def test_matches_the_reference(heads, kv_heads, seq, head_dim, rotary_dim, dtype, interleaved, device):
    q = projected(2, heads, seq, head_dim, device=device, dtype=dtype)
    k = projected(2, kv_heads, seq, head_dim, device=device, dtype=dtype)
    cos, sin = angles(1, seq, rotary_dim, interleaved=interleaved, device=device)
    assert_rope(q, k, cos, sin, interleaved=interleaved)


@settings(max_examples=15, deadline=None)
@given(
    heads=st.integers(1, 9),
    kv_heads=st.integers(1, 5),
    seq=st.integers(1, 12),
    head_dim=st.integers(2, 70),
    half=st.integers(1, 35),
    interleaved=st.booleans(),
)
def test_any_shape(device, heads, kv_heads, seq, head_dim, half, interleaved):
    cos, sin = angles(1, seq, min(2 * half, head_dim // 2 * 2), interleaved=interleaved, device=device)
    q = projected(1, heads, seq, head_dim, device=device)
    assert_rope(q, projected(1, kv_heads, seq, head_dim, device=device), cos, sin, interleaved=interleaved)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "slices of a fused projection", "last dimension strided", "expanded"])
def test_strides(layout, interleaved, device):
    fused = torch.randn(2, 6, 6 * 32, device=device)  # 4 heads of q, 2 of k: each 32 long
    q, k = {
        "contiguous": (torch.randn(2, 4, 6, 32, device=device), torch.randn(2, 2, 6, 32, device=device)),
        "slices of a fused projection": (
            fused[..., :128].unflatten(-1, (4, 32)).transpose(1, 2),
            fused[..., 128:].unflatten(-1, (2, 32)).transpose(1, 2),
        ),
        "last dimension strided": (
            torch.randn(2, 32, 6, 4, device=device).transpose(1, 3),
            torch.randn(2, 2, 6, 64, device=device)[..., ::2],
        ),
        "expanded": (
            torch.randn(1, 1, 6, 32, device=device).expand(2, 4, 6, 32),
            torch.randn(2, 2, 6, 32, device=device),
        ),
    }[layout]
    cos, sin = angles(2, 6, 32, interleaved=interleaved, device=device)
    assert_rope(q, k, cos, sin, interleaved=interleaved)


@pytest.mark.parametrize("batch", [1, 3, None])
@pytest.mark.parametrize("strided", [False, True])
def test_shapes_and_strides_of_the_angles(batch, strided, device):
    cos, sin = angles(batch or 1, 5, 16, device=device)
    if batch is None:
        cos, sin = cos[0], sin[0]
    if strided:  # and no longer equal in strides
        cos = torch.stack((cos, cos), dim=-1)[..., 0]
    assert_rope(torch.randn(3, 2, 5, 16, device=device), torch.randn(3, 1, 5, 16, device=device), cos, sin)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_angles_in_the_dtype_of_q(dtype, device):
    q, k = projected(2, 4, 5, 32, device=device, dtype=dtype), projected(2, 2, 5, 32, device=device, dtype=dtype)
    cos, sin = angles(2, 5, 32, device=device, dtype=dtype)
    assert_rope(q, k, cos, sin)


@pytest.mark.parametrize("shape", [(0, 4, 3, 8), (2, 4, 0, 8), (2, 0, 3, 8), (1, 1, 1, 2)])
def test_empty_and_one_row(shape, device):
    cos, sin = angles(1, shape[2], shape[3], device=device)
    k = torch.randn(shape[0], 1, *shape[2:], device=device)
    assert_rope(torch.randn(shape, device=device), k, cos, sin)


def test_inputs_stay_as_they_were(device):
    q, k = torch.randn(2, 1, 2, 4, 8, device=device)
    before = q.clone(), k.clone()
    ops.rope(q, k, *angles(1, 4, 8, device=device))
    assert torch.equal(q, before[0])
    assert torch.equal(k, before[1])


def test_turning_back_restores_the_input(device):
    q, k = torch.randn(2, 2, 3, 5, 16, device=device)
    cos, sin = angles(1, 5, 16, device=device)
    turned = rope_op(*rope_op(q, k, cos, sin, False, False), cos, sin, False, True)
    torch.testing.assert_close(turned, (q, k))


def test_memory_order_follows_the_input(device):
    cos, sin = angles(1, 6, 32, device=device)
    sliced = projected(2, 4, 6, 64, device=device)[..., :32]
    q, k = ops.rope(sliced, torch.randn(2, 2, 6, 32, device=device), cos, sin)
    assert q.transpose(1, 2).is_contiguous()
    assert k.is_contiguous()


def test_no_gradient_for_the_angles(device):
    q, k = torch.randn(2, 2, 3, 5, 16, device=device, requires_grad=True)
    cos, sin = (t.requires_grad_() for t in angles(1, 5, 16, device=device))
    sum(t.sum() for t in ops.rope(q, k, cos, sin)).backward()
    assert cos.grad is None
    assert sin.grad is None


def test_same_bits_every_run(device):
    q, k = torch.randn(2, 2, 3, 5, 16, device=device)
    cos, sin = angles(1, 5, 16, device=device)

    def run():
        leaves = q.clone().requires_grad_(), k.clone().requires_grad_()
        outputs = ops.rope(*leaves, cos, sin)
        return *outputs, *torch.autograd.grad(sum(t.square().sum() for t in outputs), leaves)

    assert_same_bits(run)


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
def test_opcheck(interleaved, requires_grad, device):
    q = projected(2, 3, 5, 10, device=device).requires_grad_(requires_grad)
    k = torch.randn(2, 1, 5, 10, device=device, requires_grad=requires_grad)
    torch.library.opcheck(rope_op, (q, k, *angles(1, 5, 8, device=device), interleaved, False))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_whole(dynamic, device):
    compiled = torch.compile(ops.rope, fullgraph=True, dynamic=dynamic)
    for seq in (4, 7):
        q, k = projected(2, 4, seq, 16, device=device), projected(2, 2, seq, 16, device=device)
        cos, sin = angles(1, seq, 16, device=device)
        eager, traced = [], []
        for function, found in ((ops.rope, eager), (compiled, traced)):
            leaves = [t.detach().requires_grad_() for t in (q, k)]
            outputs = function(*leaves, cos, sin)
            found += [*outputs, *torch.autograd.grad(sum(t.square().sum() for t in outputs), leaves)]
        for a, b in zip(eager, traced, strict=True):
            torch.testing.assert_close(a, b)
        assert [t.stride() for t in eager[:2]] == [t.stride() for t in traced[:2]]


def test_autocast_keeps_the_dtype(device):
    q, k = torch.randn(2, 2, 3, 5, 16, device=device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        assert ops.rope(q, k, *angles(1, 5, 16, device=device))[0].dtype == torch.float32


@on_cpu
@pytest.mark.parametrize("interleaved", [False, True])
def test_gradcheck(interleaved):
    q = torch.randn(2, 2, 3, 6, dtype=torch.float64, requires_grad=True)
    k = torch.randn(2, 1, 3, 6, dtype=torch.float64, requires_grad=True)
    cos, sin = angles(1, 3, 4, interleaved=interleaved, dtype=torch.float64)
    check = lambda q, k: ops.rope(q, k, cos, sin, interleaved=interleaved)  # noqa: E731
    assert torch.autograd.gradcheck(check, (q, k))
    assert torch.autograd.gradgradcheck(check, (q, k))


@not_on_cpu
def test_triton_refuses_float64(device):
    q = torch.randn(1, 1, 2, 4, device=device, dtype=torch.float64)
    with pytest.raises(TypeError, match="q is float64"):
        ops.rope(q, q, *angles(1, 2, 4, device=device))


HEADS, ANGLES = torch.ones(2, 4, 3, 8), torch.ones(1, 3, 8)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        (dict(q=torch.ones(4, 3, 8)), ValueError, r"q must be \(batch, heads, seq, head_dim\), got \(4, 3, 8\)"),
        (dict(k=torch.ones(8)), ValueError, r"k must be \(batch, heads, seq, head_dim\), got \(8,\)"),
        (dict(k=torch.ones(2, 4, 5, 8)), ValueError, "k must have q's batch, seq and head_dim"),
        (dict(k=torch.ones(2, 4, 3, 8).half()), TypeError, "k must have q's dtype, torch.float32, got torch.float16"),
        (dict(q=torch.ones(2, 4, 3, 8).int()), TypeError, "q must be float16"),
        (dict(cos=[1.0]), TypeError, "cos must be a torch.Tensor, got list"),
        (dict(sin=torch.ones(1, 3, 6)), ValueError, r"sin must have cos's shape, \(1, 3, 8\), got \(1, 3, 6\)"),
        (dict(sin=torch.ones(1, 3, 8).half()), TypeError, "sin must have cos's dtype"),
        (dict(cos=torch.ones(8), sin=torch.ones(8)), ValueError, r"cos must be \(batch or 1, seq, rotary_dim\) or"),
        (dict(cos=torch.ones(1, 4, 8), sin=torch.ones(1, 4, 8)), ValueError, "cos must have batch 2 or 1 and seq 3"),
        (dict(cos=torch.ones(3, 3, 8), sin=torch.ones(3, 3, 8)), ValueError, "cos must have batch 2 or 1 and seq 3"),
        (dict(cos=torch.ones(3, 7), sin=torch.ones(3, 7)), ValueError, "cos must have an even rotary_dim from 2"),
        (dict(cos=torch.ones(3, 10), sin=torch.ones(3, 10)), ValueError, "to head_dim 8, got 10"),
        (dict(sin=torch.ones(1, 3, 8, device="meta")), ValueError, "sin must be on q's device"),
    ],
)
def test_bad_arguments_are_named(changed, error, message):
    with pytest.raises(error, match=message):
        ops.rope(**(dict(q=HEADS, k=HEADS, cos=ANGLES, sin=ANGLES) | changed))


@not_interpreted
def test_meta_tensors_have_the_real_strides():
    q, k = torch.empty(2, 6, 4, 8, device="meta").transpose(1, 2), torch.empty(2, 2, 6, 8, device="meta")
    angle = torch.empty(6, 8, device="meta")
    q_out, k_out = ops.rope(q, k, angle, angle)
    assert q_out.stride() == q.stride()
    assert k_out.stride() == k.stride()
