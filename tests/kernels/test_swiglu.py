"""SwiGLU and GeGLU, forward and backward: parity, strides, edges, errors, and what PyTorch asks of an op."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_fast import ops
from llama_fast.kernels import reference
from llama_fast.kernels.swiglu import glu_backward_op, glu_op, plan_glu
from tests.parity import DTYPES, assert_parity, assert_same_bits, not_interpreted, not_on_cpu, on_cpu, triton_only

# name: ours, PyTorch's own ops for the same (the peer), the reference
ACTIVATIONS = {
    "silu": (ops.swiglu, lambda gate, up: F.silu(gate) * up, reference.swiglu),
    "gelu_tanh": (ops.geglu, lambda gate, up: F.gelu(gate, approximate="tanh") * up, reference.geglu),
    "gelu": (
        lambda gate, up: ops.geglu(gate, up, approximate="none"),
        lambda gate, up: F.gelu(gate) * up,
        lambda gate, up: reference.geglu(gate, up, approximate="none"),
    ),
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 64), (2, 3, 1000), (1, 5000), (70, 3), (3, 1)])
def test_matches_the_reference(shape, dtype, activation, device):
    assert_parity(*ACTIVATIONS[activation], torch.randn(2, *shape, device=device, dtype=dtype).unbind())


@settings(max_examples=15, deadline=None)
@given(rows=st.integers(1, 40), columns=st.integers(1, 1500), activation=st.sampled_from(list(ACTIVATIONS)))
def test_any_shape(device, rows, columns, activation):
    assert_parity(*ACTIVATIONS[activation], torch.randn(2, rows, columns, device=device).unbind())


@pytest.mark.parametrize(
    "layout", ["halves of a fused tensor", "transposed", "every other element", "expanded", "different"]
)
def test_strides(layout, device):
    gate, up = {
        "halves of a fused tensor": torch.randn(2, 6, 192, device=device).chunk(2, -1),
        "transposed": torch.randn(2, 96, 6, device=device).transpose(1, 2),
        "every other element": torch.randn(2, 6, 192, device=device)[..., ::2],
        "expanded": torch.randn(2, 1, 96, device=device).expand(2, 6, 96),
        "different": (torch.randn(6, 96, device=device), torch.randn(6, 200, device=device)[:, 10:106]),
    }[layout]
    for operands in ACTIVATIONS["silu"], ACTIVATIONS["gelu"]:
        assert_parity(*operands, [gate, up])


@triton_only
def test_halves_of_a_fused_tensor_are_not_copied(device, monkeypatch):
    fused = torch.randn(4, 6, 192, device=device)
    gate, up = fused.chunk(2, -1)
    seen = []
    monkeypatch.setattr(
        "llama_fast.kernels.swiglu.plan_glu",
        lambda *args, **options: seen.append(args) or plan_glu(*args, **options),
    )
    ops.swiglu(gate, up)
    assert [argument.data_ptr() for argument in seen[0][:2]] == [gate.data_ptr(), up.data_ptr()]


def test_upstream_gradient_may_have_strides(device):
    gate, up = torch.randn(2, 6, 96, device=device)
    dy = torch.randn(6, 200, device=device)[:, 10:106]
    strided = glu_backward_op(dy, gate, up, "silu")
    for a, b in zip(strided, glu_backward_op(dy.contiguous(), gate, up, "silu"), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("shape", [(0, 64), (3, 0), (0, 0), (64,), (1,)])
def test_empty_and_one_row(shape, device):
    assert_parity(*ACTIVATIONS["silu"], torch.randn(2, *shape, device=device).unbind())


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_large_values_neither_overflow_nor_vanish(activation, device):
    # exp(-gate) overflows float32 below -88; near zero gate * sigmoid(gate) must keep its digits
    gate = torch.tensor([-200.0, -90.0, -5.0, -1e-6, 0.0, 1e-6, 5.0, 90.0, 200.0], device=device)
    assert_parity(*ACTIVATIONS[activation], [gate, torch.randn(9, device=device)])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_slopes_where_the_sigmoid_is_nearly_one(activation, device):
    gate = torch.linspace(3.0, 5.0, 500, device=device)
    assert_parity(*ACTIVATIONS[activation], [gate, torch.ones_like(gate)])


def test_input_may_be_one_tensor(device):
    x = torch.randn(4, 64, device=device)
    assert_parity(lambda t: ops.swiglu(t, t), lambda t: F.silu(t) * t, lambda t: reference.swiglu(t, t), [x])


def test_same_bits_every_run(device):
    gate, up = torch.randn(2, 30, 100, device=device)

    def run():
        leaves = gate.clone().requires_grad_(), up.clone().requires_grad_()
        y = ops.swiglu(*leaves)
        return y, *torch.autograd.grad(y.square().sum(), leaves)

    assert_same_bits(run)


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh", "gelu"])
def test_opcheck(activation, requires_grad, device):
    # halves of a fused tensor: the fakes must give the real strides
    gate, up = torch.randn(3, 5, 140, device=device, requires_grad=requires_grad).chunk(2, -1)
    torch.library.opcheck(glu_op, (gate, up, activation))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_whole(dynamic, device):
    # leaves that are views: a chunk inside would have Inductor compile C++ for its backward, 14 s of nothing tested here
    compiled = torch.compile(ops.swiglu, fullgraph=True, dynamic=dynamic)
    for rows in (4, 7):
        halves = torch.randn(rows, 64, device=device).chunk(2, -1)
        eager, traced = [], []
        for function, found in ((ops.swiglu, eager), (compiled, traced)):
            leaves = [half.detach().requires_grad_() for half in halves]
            y = function(*leaves)
            found += [y, *torch.autograd.grad(y.square().sum(), leaves)]
        for a, b in zip(eager, traced, strict=True):
            torch.testing.assert_close(a, b)


def test_autocast_keeps_the_dtype(device):
    with torch.autocast(device.type, dtype=torch.bfloat16):
        assert ops.swiglu(*torch.randn(2, 4, 64, device=device)).dtype == torch.float32


@on_cpu
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck(activation):
    gate, up = torch.randn(2, 3, 10, dtype=torch.float64).unbind()
    assert torch.autograd.gradcheck(ACTIVATIONS[activation][0], (gate.requires_grad_(), up.requires_grad_()))


@not_on_cpu
def test_triton_refuses_float64(device):
    with pytest.raises(TypeError, match="gate is float64"):
        ops.swiglu(*torch.randn(2, 2, 4, device=device, dtype=torch.float64))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            dict(gate=torch.ones(2, 8), up=torch.ones(2, 7)),
            ValueError,
            r"up must have gate's shape, \(2, 8\), got \(2, 7\)",
        ),
        (dict(gate=torch.ones(8), up=torch.ones(8).half()), TypeError, "up must have gate's dtype"),
        (dict(gate=torch.ones(8, dtype=torch.int64), up=torch.ones(8)), TypeError, "gate must be float16"),
        (dict(gate=torch.ones(8), up=[1.0]), TypeError, "up must be a torch.Tensor, got list"),
        (dict(gate=torch.ones(()), up=torch.ones(())), ValueError, "gate must have at least one dimension"),
        (dict(gate=torch.ones(8), up=torch.ones(8, device="meta")), ValueError, "up must be on gate's device"),
    ],
)
@pytest.mark.parametrize("op", [ops.swiglu, ops.geglu])
def test_bad_arguments_are_named(op, arguments, error, message):
    with pytest.raises(error, match=message):
        op(**arguments)


def test_unknown_approximation_is_named():
    with pytest.raises(ValueError, match="approximate must be 'tanh' or 'none', got 'erf'"):
        ops.geglu(torch.ones(8), torch.ones(8), approximate="erf")


@not_interpreted
def test_meta_tensors_have_the_real_strides():
    y = ops.swiglu(*torch.empty(2, 6, 4, device="meta").transpose(1, 2))
    assert y.shape == (4, 6)
    assert y.is_contiguous()
