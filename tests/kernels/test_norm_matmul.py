"""The fused matrix products of a decoding step: parity, the plain ops beside them, the cache, bits of a row, errors, PDL.

Caches and outputs hold NaN where nothing may be written, or has to be.
"""

import dataclasses
from itertools import islice

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_fast import ops
from llama_fast.kernels import attention_decode, norm_heads, norm_qkv_rope, norm_swiglu, reference
from llama_fast.kernels.launch import GPUS, Gpu, gpu_of
from llama_fast.kernels.matmul import plan_linear
from llama_fast.kernels.norm_qkv_rope import norm_qkv_rope_op, plan_norm_qkv_rope
from llama_fast.kernels.norm_swiglu import norm_swiglu_op
from tests.parity import (
    DTYPES,
    assert_parity,
    assert_same_bits,
    compiles_kernels,
    not_interpreted,
    not_on_cpu,
    on_cpu,
    triton_only,
)

EPS = 1e-5


def example_plans(gpu):
    yield from norm_qkv_rope.example_plans(gpu)
    yield from norm_heads.example_plans(gpu)
    yield from norm_swiglu.example_plans(gpu)


def qkv_case(
    rows, device, *, hidden=96, heads=4, kv_heads=2, head_dim=16, rotary_dim=None, bias=False, block_size=4,
    dtype=torch.float32,
):  # fmt: skip
    """The tensors of norm_qkv_rope in order. Row i goes to slot 3 * i + 1; rows 2, 7, 12 are padding."""

    def randn(*shape):
        return torch.randn(*shape, device=device, dtype=dtype)

    outputs = (heads + 2 * kv_heads) * head_dim
    angles = torch.randn(rows, (rotary_dim or head_dim) // 2, device=device).repeat(1, 2)
    slots = torch.arange(rows, device=device) * 3 + 1
    slots[2::5] = -1
    caches = [torch.full((13, kv_heads, block_size, head_dim), torch.nan, device=device, dtype=dtype) for _ in "kv"]
    return [
        3 * randn(rows, hidden), randn(hidden), randn(outputs, hidden) / hidden**0.5, randn(outputs) if bias else None,
        angles.cos(), angles.sin(), *caches, slots,
    ]  # fmt: skip


def rows_at(cache, slots):
    """What stands in the cache at the slots of the rows that are no padding."""
    slots = slots[slots >= 0]
    return cache[slots // cache.shape[2], :, slots % cache.shape[2]]


def on_copies(function, heads):
    """`function` with caches of its own: (q, k, v) of the rows. Other slots must still be NaN."""

    def run(x, norm_weight, weight, bias, cos, sin, k_cache, v_cache, slots):
        frames = [
            torch.cat((cache[:2], cache)) for cache in (k_cache, v_cache)
        ]  # blocks before the first, for bad slots
        k_cache, v_cache = (frame[2:] for frame in frames)
        cos, sin = (angle.to(torch.promote_types(x.dtype, torch.float32)) for angle in (cos, sin))
        q = function(x, norm_weight, weight, bias, cos, sin, k_cache, v_cache, slots, eps=EPS, heads=heads)
        found = [rows_at(cache, slots).clone() for cache in (k_cache, v_cache)]
        used = slots[slots >= 0]
        for frame in frames:
            frame[2 + used // k_cache.shape[2], :, used % k_cache.shape[2]] = torch.nan
            assert frame.isnan().all(), "written outside the slots"
        return q, *found

    return run


def torch_rope_append(qkv, cos, sin, k_cache, v_cache, slots, *, heads, q_norm=None, k_norm=None, eps=EPS):
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


def torch_norm_qkv_rope(x, norm_weight, weight, bias, cos, sin, k_cache, v_cache, slots, *, eps, heads):
    """The same behind PyTorch's norm and product."""
    qkv = F.linear(F.rms_norm(x, x.shape[-1:], norm_weight, eps), weight, bias)
    return torch_rope_append(qkv, cos, sin, k_cache, v_cache, slots, heads=heads)[:, :, None]


def assert_norm_qkv_rope(case, heads=4):
    functions = (ops.norm_qkv_rope, torch_norm_qkv_rope, reference.norm_qkv_rope)
    assert_parity(*(on_copies(function, heads) for function in functions), case, gradients=False)


def swiglu_case(rows, device, *, hidden=96, intermediate=40, bias=False, dtype=torch.float32):
    x, norm_weight = torch.randn(rows, hidden, device=device), torch.randn(hidden, device=device)
    weight = torch.randn(2 * intermediate, hidden, device=device) / hidden**0.5
    tensors = [3 * x, norm_weight, weight, torch.randn(2 * intermediate, device=device) if bias else None]
    return [None if t is None else t.to(dtype) for t in tensors]


def torch_norm_swiglu(x, norm_weight, weight, bias):
    gate, up = F.linear(F.rms_norm(x, x.shape[-1:], norm_weight, EPS), weight, bias).chunk(2, -1)
    return F.silu(gate) * up


def assert_norm_swiglu(case):
    assert_parity(
        lambda *t: ops.norm_swiglu(*t, eps=EPS), torch_norm_swiglu, lambda *t: reference.norm_swiglu(*t, eps=EPS),
        case, gradients=False,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 2, 5, 16])
@pytest.mark.parametrize("bias", [False, True])
def test_matches_the_reference(rows, bias, dtype, device):
    assert_norm_qkv_rope(qkv_case(rows, device, bias=bias, dtype=dtype))
    assert_norm_swiglu(swiglu_case(rows, device, bias=bias, dtype=dtype))


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize(
    ("head_dim", "rotary_dim", "heads", "kv_heads"),
    [(16, 16, 2, 2), (64, 64, 3, 1), (80, 20, 4, 2), (80, 32, 1, 1), (96, 96, 2, 1), (128, 64, 2, 1), (18, 2, 4, 1)],
)
def test_heads_and_partial_rotation(head_dim, rotary_dim, heads, kv_heads, rows, device):
    case = qkv_case(
        rows, device, hidden=40, heads=heads, kv_heads=kv_heads, head_dim=head_dim, rotary_dim=rotary_dim, bias=True
    )
    assert_norm_qkv_rope(case, heads)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", [1, 31, 300, 1024, 3001])
@pytest.mark.parametrize("rows", [1, 7])
def test_hidden_sizes(rows, hidden, dtype, device):
    assert_norm_qkv_rope(qkv_case(rows, device, hidden=hidden, heads=2, kv_heads=1, dtype=dtype), 2)
    assert_norm_swiglu(swiglu_case(rows, device, hidden=hidden, intermediate=9, dtype=dtype))


@settings(max_examples=12, deadline=None)
@given(st.data())
def test_any_shape(device, data):
    rows, hidden = data.draw(st.integers(1, 16)), data.draw(st.integers(8, 200))
    kv_heads, group = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 3))
    half = data.draw(st.integers(1, 20))
    case = qkv_case(
        rows, device, hidden=hidden, heads=kv_heads * group, kv_heads=kv_heads, head_dim=2 * half,
        rotary_dim=2 * data.draw(st.integers(1, half)), bias=data.draw(st.booleans()),
        block_size=data.draw(st.integers(4, 17)),
    )  # fmt: skip
    assert_norm_qkv_rope(case, kv_heads * group)
    assert_norm_swiglu(swiglu_case(rows, device, hidden=hidden, intermediate=data.draw(st.integers(1, 70))))


@triton_only
@pytest.mark.parametrize("rows", [1, 3])
def test_the_smaller_tiles(rows, device):
    """A GPU of many multiprocessors gets more, smaller programs, and deeper rings."""
    gpu = dataclasses.replace(gpu_of(device), multiprocessors=100)
    case = qkv_case(rows, device, head_dim=80)

    def qkv(x, norm_weight, weight, bias, cos, sin, k_cache, v_cache, slots, *, eps, heads):
        q = x.new_empty(rows, heads, 1, 80)
        (plan,) = plan_norm_qkv_rope(
            x, norm_weight, weight, bias, cos, sin, k_cache, v_cache, slots, q, eps=eps, gpu=gpu
        )
        assert plan.constants["BLOCK_P"] == (4 if rows == 1 and not gpu.is_cpu else 16)
        plan.launch()
        return q

    functions = (qkv, torch_norm_qkv_rope, reference.norm_qkv_rope)
    assert_parity(*(on_copies(function, 4) for function in functions), case, gradients=False)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("size", [1e-3, 1e3])
def test_tiny_and_large_rows(size, rows, dtype, device):
    x, *rest = qkv_case(rows, device, dtype=dtype)
    assert_norm_qkv_rope([size * x, *rest])
    x, *rest = swiglu_case(rows, device, dtype=dtype)
    assert_norm_swiglu([size * x, *rest])


@pytest.mark.parametrize("rows", [1, 4])
def test_equals_the_separate_ops(rows, device):
    x, norm_weight, weight, bias, cos, sin, k_cache, v_cache, slots = qkv_case(rows, device, bias=True)
    q = ops.norm_qkv_rope(x, norm_weight, weight, bias, cos, sin, k_cache, v_cache, slots, eps=EPS, heads=4)
    qkv = ops.linear(ops.rms_norm(x, norm_weight, EPS), weight, bias).view(rows, 8, 1, 16)
    expected, k = ops.rope(qkv[:, :4], qkv[:, 4:6], cos[:, None], sin[:, None])
    torch.testing.assert_close(q, expected)
    torch.testing.assert_close(rows_at(k_cache, slots), k[slots >= 0, :, 0])
    torch.testing.assert_close(rows_at(v_cache, slots), qkv[slots >= 0, 6:, 0])
    x, norm_weight, weight, bias = swiglu_case(rows, device, bias=True)
    gate, up = ops.linear(ops.rms_norm(x, norm_weight, EPS), weight, bias).chunk(2, -1)
    torch.testing.assert_close(ops.norm_swiglu(x, norm_weight, weight, bias, eps=EPS), ops.swiglu(gate, up))


@pytest.mark.parametrize("layout", ["blocks of tokens", "head_dim first", "a part of a larger cache"])
@pytest.mark.parametrize("rows", [1, 4])
def test_strides_of_the_caches(layout, rows, device):
    case = qkv_case(rows, device)
    k_cache, v_cache, slots = case[6:]

    def laid_out(cache):
        if layout == "blocks of tokens":
            return cache.transpose(1, 2).contiguous().transpose(1, 2)
        if layout == "head_dim first":
            return cache.mT.contiguous().mT
        return torch.zeros(13, 5, 9, 40, device=device)[:, 1:3, 2:6, ::2][..., :16]

    k_strided, v_strided = laid_out(k_cache), laid_out(v_cache)
    q = ops.norm_qkv_rope(*case, eps=EPS, heads=4)
    strided = [*case[:6], k_strided, v_strided, slots]
    assert torch.equal(ops.norm_qkv_rope(*strided, eps=EPS, heads=4), q)
    assert torch.equal(rows_at(k_strided, slots), rows_at(k_cache, slots))
    assert torch.equal(rows_at(v_strided, slots), rows_at(v_cache, slots))


@pytest.mark.parametrize("rows", [1, 4])
def test_strides_of_the_operands(rows, device):
    case = qkv_case(rows, device, bias=True)
    expected = ops.norm_qkv_rope(*case, eps=EPS, heads=4)
    x, norm_weight, weight, bias, cos, sin, *rest = case
    framed = torch.full((rows, 120), torch.nan, device=device)
    framed[:, 3:99] = x
    strided = [
        framed[:, 3:99], norm_weight.repeat_interleave(2)[::2], weight.t().contiguous().t(),
        bias.repeat_interleave(2)[::2], cos.t().contiguous().t(), sin.repeat(1, 2)[:, :16],
    ]  # fmt: skip
    torch.testing.assert_close(ops.norm_qkv_rope(*strided, *rest, eps=EPS, heads=4), expected)
    wide = torch.full((97, 110), torch.nan, device=device)
    x, norm_weight, weight, bias = swiglu_case(rows, device)
    wide[:80, 5:101] = weight
    expected = ops.norm_swiglu(x, norm_weight, weight, eps=EPS)
    torch.testing.assert_close(ops.norm_swiglu(x, norm_weight, wide[:80, 5:101], eps=EPS), expected)


@triton_only  # PyTorch's own ops make no such promise
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_bits_of_a_row_depend_on_that_row_alone(dtype, device):
    case = qkv_case(16, device, dtype=dtype)
    x, norm_weight, weight, bias, cos, sin, k_cache, v_cache, slots = case
    q = ops.norm_qkv_rope(*case, eps=EPS, heads=4)
    y_case = swiglu_case(16, device, dtype=dtype)
    y = ops.norm_swiglu(*y_case, eps=EPS)
    few = [] if gpu_of(device).is_cpu else [[0, 1], [9, 0, 4]]  # which have plans of their own there
    for rows in (*few, [12, 1, 3, 9, 0, 15, 2, 7, 8], list(range(15, -1, -1))):
        k_other, v_other = torch.full_like(k_cache, torch.nan), torch.full_like(v_cache, torch.nan)
        some = ops.norm_qkv_rope(
            x[rows], norm_weight, weight, bias, cos[rows], sin[rows], k_other, v_other, slots[rows], eps=EPS, heads=4
        )
        assert torch.equal(some, q[rows])
        assert torch.equal(rows_at(k_other, slots[rows]), rows_at(k_cache, slots[rows]))
        assert torch.equal(rows_at(v_other, slots[rows]), rows_at(v_cache, slots[rows]))
        assert torch.equal(ops.norm_swiglu(y_case[0][rows], *y_case[1:], eps=EPS), y[rows])


@pytest.mark.parametrize("rows", [1, 4])
def test_float16_does_not_overflow_before_the_norm(rows, device):
    x, norm_weight, weight, _ = swiglu_case(rows, device, dtype=torch.float16)
    assert_norm_swiglu([x * 2000, norm_weight * 30, weight / 30, None])
    assert_norm_swiglu([x / 500, norm_weight / 30, weight, None])


@pytest.mark.parametrize("slot", [-1, -7, -(2**31)])
def test_no_negative_slot_is_written(slot, device):
    for rows in (1, 3):
        case = qkv_case(rows, device)
        case[8].fill_(slot)
        ops.norm_qkv_rope(*case, eps=EPS, heads=4)
        assert case[6].isnan().all() and case[7].isnan().all()


@pytest.mark.parametrize("rows", [1, 3])
def test_a_slot_past_the_cache_is_an_error_on_the_cpu(rows, device):
    case = qkv_case(rows, device)
    case[-1][0] = 13 * 4
    if device.type == "cuda":
        pytest.skip("on a GPU looking would wait for the device")
    with pytest.raises(ValueError, match="slots must be below 52, those that k_cache holds, got 52"):
        ops.norm_qkv_rope(*case, eps=EPS, heads=4)


def test_no_rows(device):
    case = qkv_case(0, device)
    assert ops.norm_qkv_rope(*case, eps=EPS, heads=4).shape == (0, 4, 1, 16)
    assert case[6].isnan().all()
    assert ops.norm_swiglu(*swiglu_case(0, device), eps=EPS).shape == (0, 40)


def test_same_bits_every_run(device):
    case = qkv_case(5, device)
    assert_same_bits(lambda: on_copies(ops.norm_qkv_rope, 4)(*case))
    case_of_swiglu = swiglu_case(5, device, hidden=300)
    assert_same_bits(lambda: [ops.norm_swiglu(*case_of_swiglu, eps=EPS)])


@pytest.mark.parametrize("rows", [1, 3])
def test_opcheck(rows, device):
    case = [None if t is None else t.nan_to_num() for t in qkv_case(rows, device)]
    torch.library.opcheck(norm_qkv_rope_op, (*case, EPS, 4))
    torch.library.opcheck(norm_swiglu_op, (*swiglu_case(rows, device), None, None, EPS))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_whole(dynamic, device):
    def step(*case):
        q = ops.norm_qkv_rope(*case, eps=EPS, heads=4)
        return q * 2, rows_at(case[6], case[8].clamp(min=1))

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic)
    with torch.inference_mode():
        for rows in (2, 4):
            case = qkv_case(rows, device)
            other = [None if t is None else t.clone() for t in case]
            for a, b in zip(compiled(*case), step(*other), strict=True):
                assert torch.equal(a.nan_to_num(), b.nan_to_num())
            assert torch.equal(case[6].nan_to_num(), other[6].nan_to_num())


def test_a_gradient_is_refused(device):
    case, swiglu = qkv_case(2, device), swiglu_case(2, device)
    case[2].requires_grad_()
    swiglu[0].requires_grad_()
    with pytest.raises(RuntimeError, match="norm_qkv_rope has no gradient"):
        ops.norm_qkv_rope(*case, eps=EPS, heads=4)
    with pytest.raises(RuntimeError, match="norm_swiglu has no gradient"):
        ops.norm_swiglu(*swiglu, eps=EPS)
    with torch.no_grad():
        assert not ops.norm_qkv_rope(*case, eps=EPS, heads=4).requires_grad


@on_cpu
def test_float64(device):
    case = qkv_case(4, device, bias=True, dtype=torch.float64)
    ours, expected = (on_copies(f, 4)(*case) for f in (ops.norm_qkv_rope, reference.norm_qkv_rope))
    torch.testing.assert_close(ours, expected)
    case = swiglu_case(4, device, dtype=torch.float64)
    torch.testing.assert_close(ops.norm_swiglu(*case, eps=EPS), reference.norm_swiglu(*case, eps=EPS))


@not_on_cpu
def test_triton_refuses_float64(device):
    with pytest.raises(TypeError, match="x is float64"):
        ops.norm_qkv_rope(*qkv_case(1, device, dtype=torch.float64), eps=EPS, heads=4)
    with pytest.raises(TypeError, match="x is float64"):
        ops.norm_swiglu(*swiglu_case(1, device, dtype=torch.float64), eps=EPS)


NAMES = ("x", "norm_weight", "qkv_weight", "qkv_bias", "cos", "sin", "k_cache", "v_cache", "slots")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (dict(x=[1.0]), TypeError, "x must be a torch.Tensor, got list"),
        (dict(x=torch.zeros(17, 96)), ValueError, r"x must be \(rows, hidden\) with at most 16 rows, got \(17, 96\)"),
        (dict(x=torch.zeros(96)), ValueError, "x must be"),
        (dict(x=torch.zeros(2, 0)), ValueError, "x must be"),
        (dict(norm_weight=torch.zeros(95)), ValueError, r"norm_weight must have shape \(96,\), got \(95,\)"),
        (dict(norm_weight=torch.zeros(96).half()), TypeError, "norm_weight must have the input's dtype"),
        (dict(qkv_weight=torch.zeros(120, 96)), ValueError, r"qkv_weight must have shape \(128, 96\), got \(120"),
        (dict(qkv_weight=torch.zeros(128, 95)), ValueError, r"qkv_weight must have shape \(rows, 96\), got"),
        (dict(qkv_bias=torch.zeros(127)), ValueError, r"qkv_bias must have shape \(128,\), got \(127,\)"),
        (dict(k_cache=torch.zeros(13, 2, 4, 16).half()), TypeError, "k_cache must have the input's dtype"),
        (dict(k_cache=torch.zeros(13, 2, 4)), ValueError, r"k_cache must be \(blocks, kv_heads, block_size, even"),
        (dict(k_cache=torch.zeros(13, 2, 4, 15)), ValueError, "k_cache must be"),
        (
            dict.fromkeys(("k_cache", "v_cache"), torch.zeros(1, 1, 1, 1).expand(2**29, 2, 4, 16)), ValueError,
            r"k_cache must have fewer than 2\*\*31 slots, got 536870912 blocks of 4",
        ),
        (dict(v_cache=torch.zeros(13, 2, 5, 16)), ValueError, r"v_cache must have shape \(13, 2, 4, 16\), got"),
        (dict(heads=3), ValueError, "heads must be a positive multiple of k_cache's 2 kv_heads, got 3"),
        (dict(cos=torch.zeros(2, 15), sin=torch.zeros(2, 15)), ValueError, r"cos must be \(2, even rotary_dim up to 16"),
        (dict(cos=torch.zeros(2, 18), sin=torch.zeros(2, 18)), ValueError, r"cos must be \(2, even rotary_dim up to"),
        (dict(cos=torch.zeros(1, 16), sin=torch.zeros(1, 16)), ValueError, r"cos must be \(2, even rotary_dim up to"),
        (dict(sin=torch.zeros(2, 8)), ValueError, r"sin must have cos's shape, \(2, 16\), got \(2, 8\)"),
        (dict(slots=torch.zeros(2).int()), TypeError, "slots must be int64, got torch.int32"),
        (dict(slots=torch.zeros(3).long()), ValueError, r"slots must have shape \(2,\), got \(3,\)"),
        (dict(slots=torch.zeros(2, device="meta").long()), ValueError, "slots must be on x's device"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(changes, error, message):
    arguments = dict(zip(NAMES, qkv_case(2, torch.device("cpu")), strict=True), eps=EPS, heads=4) | changes
    with pytest.raises(error, match=message):
        ops.norm_qkv_rope(**arguments)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (dict(x=torch.zeros(17, 96)), ValueError, "at most 16 rows"),
        (dict(gate_up_weight=torch.zeros(79, 96)), ValueError, "gate_up_weight must have an even number of rows, got 79"),
        (dict(gate_up_weight=torch.zeros(80, 9)), ValueError, r"gate_up_weight must have shape \(rows, 96\), got"),
        (dict(bias=torch.zeros(79)), ValueError, r"bias must have shape \(80,\), got \(79,\)"),
    ],
)  # fmt: skip
def test_bad_arguments_of_swiglu_are_named(changes, error, message):
    names = ("x", "norm_weight", "gate_up_weight", "bias")
    arguments = dict(zip(names, swiglu_case(2, torch.device("cpu")), strict=True), eps=EPS) | changes
    with pytest.raises(error, match=message):
        ops.norm_swiglu(**arguments)


@compiles_kernels
def test_dependent_launch_is_in_the_plan_and_in_the_code():
    """On sm_90 nothing but the prefetch stands before the wait; other GPUs have none of it."""
    for arch, has_pdl in (("sm_80", False), ("sm_90", True), ("gfx942", False)):
        gpu = GPUS[arch]
        plans = [
            plan
            for shape, plan in example_plans(gpu)
            if shape.startswith(("1x2048", "4x2048")) and (gpu.is_nvidia or "apart" not in shape)
        ]
        assert len(plans) == (8 if gpu.is_nvidia else 4)
        for plan in plans + [plan for _, plan in islice(attention_decode.example_plans(gpu), 2)]:
            assert plan.pdl == plan.constants["PDL"] == plan.options.get("launch_pdl", False) == has_pdl
            assembly = plan.compile(gpu).asm["ptx" if gpu.is_nvidia else "amdgcn"]
            assert ("griddepcontrol" in assembly) == has_pdl
            if has_pdl:
                before, after = assembly.split("griddepcontrol.wait")
                assert ("prefetch.global.L2" in before) == any(plan is other for other in plans)
                assert before.count("@there prefetch") == before.count("prefetch")  # of no address outside the weight
                assert not any(access in before for access in ("ld.global", "cp.async", "st.global"))
                assert "griddepcontrol.launch_dependents" in after


@compiles_kernels
@pytest.mark.parametrize("arch", ["sm_86", "sm_120"])
@pytest.mark.parametrize(("hidden", "heads", "kv_heads"), [(576, 9, 3), (2048, 8, 1), (4096, 20, 1)])
def test_the_ring_fits_a_small_shared_memory(arch, hidden, heads, kv_heads):
    """99 KB a program, as on GeForce cards; few programs would have 11 stages of 12 KB."""
    gpu = Gpu(arch, multiprocessors=84, shared_bytes=99 * 1024)
    for dtype in (torch.bfloat16, torch.float32):
        x, norm_weight, weight, q, cache = (
            torch.empty(*shape, dtype=dtype, device="meta")
            for shape in (
                (4, hidden), (hidden,), ((heads + 2 * kv_heads) * 64, hidden), (4, heads, 1, 64), (9, kv_heads, 16, 64)
            )
        )  # fmt: skip
        cos, slots = torch.empty(4, 64, device="meta"), torch.empty(4, dtype=torch.int64, device="meta")
        plans = plan_norm_qkv_rope(
            x, norm_weight, weight, None, cos, cos, cache, cache, slots, q, eps=EPS, gpu=gpu, allow_tf32=True
        )
        for plan in plans + plan_linear(x, weight, None, None, x.new_empty(4, len(weight)), allow_tf32=True, gpu=gpu):
            assert plan.compile(gpu).metadata.shared <= gpu.shared_bytes


@compiles_kernels
def test_a_step_of_another_size_needs_no_other_binary():
    """2 to 16 rows, any width of the block table, wherever the numbers of a step lie: no step waits for the compiler."""
    gpu, binaries = GPUS["sm_90"], {}

    def meta(*shape, dtype=torch.bfloat16):
        return torch.empty(shape, dtype=dtype, device="meta")

    norm_weight, weight, cache = meta(256), meta(512, 256), meta(64, 2, 16, 64)
    for rows, width in ((2, 1), (3, 16), (5, 7), (16, 32)):
        x, q, cos = meta(rows, 256), meta(rows, 4, 1, 64), meta(rows, 64, dtype=torch.float32)
        slots = meta(5, rows, dtype=torch.int64)[3]
        of_rows = meta(rows * (1 + width), dtype=torch.int32)
        lens, table = of_rows[:rows], of_rows[rows:].view(rows, width)
        for plan in (
            *plan_norm_qkv_rope(x, norm_weight, weight, None, cos, cos, cache, cache, slots, q, eps=EPS, gpu=gpu),
            *attention_decode.plan_attention_decode(q, cache, cache, lens, q, block_table=table, scale=1.0, gpu=gpu),
            *plan_linear(x, weight, None, None, meta(rows, 512), gpu=gpu),
        ):
            binaries.setdefault((plan.kernel, str(plan.constants), plan.arguments.get("STATS") is None), set()).add(
                plan.compile(gpu).hash
            )
    assert all(len(found) == 1 for found in binaries.values()), binaries
    assert len(binaries) == 5  # attention of a single split is another than of several


@not_interpreted
def test_one_launch_and_enough_of_the_weight_in_flight():
    for arch in ("sm_80", "sm_90", "sm_100"):
        gpu = GPUS[arch]
        for shape, plan in example_plans(gpu):
            constants = plan.constants
            stage = 2 * constants["BLOCK_P"] * constants["BLOCK_K"] * 2
            resident = min(plan.grid[0], 4 * gpu.multiprocessors)
            in_flight = resident * stage * (constants["NUM_STAGES"] - 1) / gpu.multiprocessors
            assert in_flight >= 48 * 1024, f"{arch} {shape}: {in_flight:.0f} bytes"


@not_interpreted
def test_meta_tensors_have_the_real_strides():
    case = [None if t is None else t.to("meta") for t in qkv_case(3, torch.device("cpu"))]
    q = ops.norm_qkv_rope(*case, eps=EPS, heads=4)
    assert q.shape == (3, 4, 1, 16) and q.is_contiguous()
    y = ops.norm_swiglu(*(None if t is None else t.to("meta") for t in swiglu_case(3, torch.device("cpu"))), eps=EPS)
    assert y.shape == (3, 40) and y.is_contiguous()
