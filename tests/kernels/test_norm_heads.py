"""The ops of a decoding step for weights as transformers keeps them: q, k, v and gate, up apart, keys and values as results."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from llama_fast import ops
from llama_fast.kernels import reference
from llama_fast.kernels.layer_tail import layer_tail, layer_tail_op
from llama_fast.kernels.norm_heads import norm_heads, norm_heads_op
from tests.parity import DTYPES, assert_parity, not_interpreted, on_cpu

EPS = 1e-5
HEADS, KV_HEADS, HEAD_DIM, HIDDEN, INNER = 4, 2, 16, 96, 40
SHAPES = [(1, 1), (5, 1), (1, 3), (2, 3), (16, 1)]


def randn(device, dtype, *shape, scale=1.0):
    return (scale * torch.randn(*shape, device=device)).to(dtype)


def linear(device, dtype, rows, columns, bias):
    return randn(device, dtype, rows, columns, scale=columns**-0.5), randn(device, dtype, rows) if bias else None


def heads_case(shape, device, *, bias=False, dtype=torch.float32, rotary_dim=HEAD_DIM, angles=None):
    """x, norm weight, the three weights and biases, cos, sin."""
    batch, seq = shape
    linears = [linear(device, dtype, n * HEAD_DIM, HIDDEN, bias) for n in (HEADS, KV_HEADS, KV_HEADS)]
    turns = torch.randn(angles or batch, seq, rotary_dim // 2, device=device).repeat(1, 1, 2)
    weights, biases = zip(*linears, strict=True)
    x, norm = randn(device, dtype, batch, seq, HIDDEN, scale=3.0), randn(device, dtype, HIDDEN)
    return [x, norm, *weights, *biases, turns.cos(), turns.sin()]


def separate(x, norm, q, k, v, q_bias, k_bias, v_bias, cos, sin):
    return norm_heads(x, norm, (q, k, v), (q_bias, k_bias, v_bias), cos, sin, eps=EPS, heads=HEADS, kv_heads=KV_HEADS)


def joined(x, norm, q, k, v, q_bias, k_bias, v_bias, cos, sin):
    bias = None if q_bias is None else torch.cat([q_bias, k_bias, v_bias])
    return norm_heads(x, norm, [torch.cat([q, k, v])], [bias], cos, sin, eps=EPS, heads=HEADS, kv_heads=KV_HEADS)


def with_ops_of(rms_norm, rope):
    def heads(x, norm, q, k, v, q_bias, k_bias, v_bias, cos, sin):
        normed = rms_norm(x, norm)
        projected = [
            F.linear(normed, weight, bias).unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2)
            for weight, bias in ((q, q_bias), (k, k_bias), (v, v_bias))
        ]
        return *rope(*projected[:2], cos, sin), projected[2]

    return heads


def turned(q, k, cos, sin):
    """transformers' rotation."""
    cos, sin = cos.to(q.dtype)[:, None], sin.to(q.dtype)[:, None]

    def turn(t):
        t, rest = t[..., : cos.shape[-1]], t[..., cos.shape[-1] :]
        a, b = t.chunk(2, -1)
        return torch.cat((t * cos + torch.cat((-b, a), -1) * sin, rest), -1)

    return turn(q), turn(k)


peer = with_ops_of(lambda x, w: F.rms_norm(x, x.shape[-1:], w, EPS), turned)
expected = with_ops_of(lambda x, w: reference.rms_norm(x, w, EPS), reference.rope)


def assert_heads(case):
    for ours in (separate, joined):
        assert_parity(ours, peer, expected, case, gradients=False)


def tail_case(rows, device, *, bias=False, dtype=torch.float32):
    """attended, x, and weights with their biases: output, gate, up, down; the norm's weight."""
    tensors = [randn(device, dtype, rows, 1, HEADS * HEAD_DIM), randn(device, dtype, rows, 1, HIDDEN)]
    for n, k in ((HIDDEN, HEADS * HEAD_DIM), (INNER, HIDDEN), (INNER, HIDDEN), (HIDDEN, INNER)):
        tensors += linear(device, dtype, n, k, bias)
    return [*tensors, randn(device, dtype, HIDDEN)]


def tail(attended, x, o, o_bias, gate, gate_bias, up, up_bias, down, down_bias, norm):
    gate_up = [(gate, gate_bias), (up, up_bias)]
    return layer_tail(attended, x, (o, o_bias), norm, gate_up, (down, down_bias), eps=EPS)


def tail_of_one_matrix(attended, x, o, o_bias, gate, gate_bias, up, up_bias, down, down_bias, norm):
    bias = None if gate_bias is None else torch.cat([gate_bias, up_bias])
    return layer_tail(attended, x, (o, o_bias), norm, [(torch.cat([gate, up]), bias)], (down, down_bias), eps=EPS)


def tail_with(rms_norm):
    def layer(attended, x, o, o_bias, gate, gate_bias, up, up_bias, down, down_bias, norm):
        h = x + F.linear(attended, o, o_bias)
        normed = rms_norm(h, norm)
        return h + F.linear(F.silu(F.linear(normed, gate, gate_bias)) * F.linear(normed, up, up_bias), down, down_bias)

    return layer


tail_peer = tail_with(lambda x, w: F.rms_norm(x, x.shape[-1:], w, EPS))
tail_expected = tail_with(lambda x, w: reference.rms_norm(x, w, EPS))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bias", [False, True])
def test_heads(bias, shape, dtype, device):
    assert_heads(heads_case(shape, device, bias=bias, dtype=dtype))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rotary_dim", [4, HEAD_DIM])
def test_angles_for_all_rows_and_of_a_part(shape, rotary_dim, device):
    assert_heads(heads_case(shape, device, rotary_dim=rotary_dim, angles=1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 4, 16])
@pytest.mark.parametrize("bias", [False, True])
def test_tail(bias, rows, dtype, device):
    for ours in (tail, tail_of_one_matrix):
        assert_parity(ours, tail_peer, tail_expected, tail_case(rows, device, bias=bias, dtype=dtype), gradients=False)


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("bias", [False, True])
def test_gate_and_up_apart(rows, bias, device):
    *_, gate, gate_bias, up, up_bias, _, _, norm = tail_case(rows, device, bias=bias)
    x = torch.randn(rows, HIDDEN, device=device)
    one = ops.norm_swiglu(x, norm, torch.cat([gate, up]), torch.cat([gate_bias, up_bias]) if bias else None, eps=EPS)
    for each in (up, up.t().contiguous().t()):  # and with other strides than gate's
        apart = ops.norm_swiglu(x, norm, gate, gate_bias, up_weight=each, up_bias=up_bias, eps=EPS)
        torch.testing.assert_close(apart, one)


@pytest.mark.parametrize("layout", ["a transposed weight", "rows of a larger x", "strides of one"])
def test_strides(layout, device):
    case = heads_case((3, 1), device, bias=True)
    want = separate(*case)
    if layout == "a transposed weight":
        case[3] = case[3].t().contiguous().t()
    elif layout == "rows of a larger x":
        case[0] = torch.cat([case[0], torch.full_like(case[0], torch.nan)], -1)[..., :HIDDEN]
    else:
        case[5], case[8] = case[5].repeat_interleave(2)[::2], case[8].transpose(0, 2).contiguous().transpose(0, 2)
    torch.testing.assert_close(separate(*case), want)


@not_interpreted
def test_flops_are_those_of_separate_ops(device):
    case, tail_tensors = heads_case((3, 1), device), tail_case(3, device)
    for ours, theirs, tensors in ((separate, peer, case), (joined, peer, case), (tail, tail_peer, tail_tensors)):
        counts = []
        for function in (ours, theirs):
            with FlopCounterMode(display=False) as counter:
                function(*tensors)
            counts.append(counter.get_total_flops())
        assert counts[0] == counts[1] > 0


@not_interpreted
@pytest.mark.parametrize("shape", [(1, 1), (2, 3)])
def test_opcheck(shape, device):
    case = heads_case(shape, device, bias=True)
    torch.library.opcheck(norm_heads_op, (*case, EPS, HEADS, KV_HEADS))
    attended, x, o, o_bias, gate, gate_bias, up, up_bias, down, down_bias, norm = tail_case(3, device, bias=True)
    arguments = (attended, x, o, o_bias, norm, gate, up, gate_bias, up_bias, down, down_bias, EPS)
    torch.library.opcheck(layer_tail_op, arguments)


@on_cpu
def test_float64(device):
    case = heads_case((2, 1), device, bias=True, dtype=torch.float64)
    torch.testing.assert_close(separate(*case), expected(*case))
    case = tail_case(2, device, bias=True, dtype=torch.float64)
    torch.testing.assert_close(tail(*case), tail_expected(*case))


def test_a_gradient_is_refused(device):
    case, of_tail = heads_case((1, 1), device), tail_case(1, device)
    case[3].requires_grad_()
    of_tail[-1].requires_grad_()
    with pytest.raises(RuntimeError, match="norm_heads has no gradient"):
        separate(*case)
    with pytest.raises(RuntimeError, match="layer_tail has no gradient"):
        tail(*of_tail)


BAD_HEADS = [
    (0, torch.zeros(17, 1, HIDDEN), "at most 16 rows"),
    (0, torch.zeros(1, HIDDEN), r"x must be \(batch, seq, hidden\), got \(1, 96\)"),
    (1, torch.zeros(95), "norm_weight must have shape"),
    (3, torch.zeros(48, HIDDEN), r"weights\[1\] must have shape \(32, 96\), got \(48, 96\)"),
    (4, torch.zeros(32, 95), r"weights\[2\] must have shape \(rows, 96\)"),
    (6, torch.zeros(32), "biases must be tensors, or None, all of them"),
    (8, torch.zeros(3, 1, 16), "sin must have cos's shape"),
]


@pytest.mark.parametrize(("place", "value", "message"), BAD_HEADS)
def test_bad_arguments_of_heads_are_named(place, value, message):
    case = heads_case((2, 1), torch.device("cpu"))
    separate(*case)  # what is known from calls before excuses none
    case[place] = value
    with pytest.raises(ValueError, match=message):
        separate(*case)


BAD_TAILS = [
    (0, torch.zeros(3, 1, HEADS * HEAD_DIM), ValueError, r"attended must have shape \(2, 1, 64\)"),
    (0, torch.zeros(2, 1, HEADS * HEAD_DIM).half(), TypeError, "attended must have the input's dtype"),
    (3, torch.zeros(95), ValueError, r"output\[1\] must have shape \(96,\)"),
    (6, torch.zeros(39, HIDDEN), ValueError, r"gate_up\[1\]\[0\] must have shape \(40, 96\), got \(39, 96\)"),
    (7, torch.zeros(40), ValueError, "gate_up must have two biases, or none"),
    (8, torch.zeros(HIDDEN, 39), ValueError, r"down\[0\] must have shape \(96, 40\)"),
]


@pytest.mark.parametrize(("place", "value", "error", "message"), BAD_TAILS)
def test_bad_arguments_of_tails_are_named(place, value, error, message):
    case = tail_case(2, torch.device("cpu"))
    tail(*case)
    case[place] = value
    with pytest.raises(error, match=message):
        tail(*case)
