"""LayerNorm, forward and backward: parity, rows far from zero, edges, errors, and what PyTorch asks of an op."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_fast import ops
from llama_fast.kernels import reference
from llama_fast.kernels.layer_norm import add_layer_norm_op, layer_norm_backward_op, layer_norm_op
from tests.parity import DTYPES, CalledOps, assert_parity, assert_same_bits, not_interpreted, not_on_cpu, on_cpu


def torch_layer_norm(x, weight=None, bias=None, residual=None, eps=1e-5):
    """PyTorch's own ops for the same: the peer."""
    h = x if residual is None else x + residual
    y = F.layer_norm(h, h.shape[-1:], weight, bias, eps)
    return y if residual is None else (y, h)


def assert_layer_norm(x, weight=None, bias=None, residual=None, **options):
    assert_parity(
        lambda x, w, b, r: ops.layer_norm(x, w, b, residual=r, **options),
        lambda x, w, b, r: torch_layer_norm(x, w, b, r, **options),
        lambda x, w, b, r: reference.layer_norm(x, w, b, residual=r, **options),
        [x, weight, bias, residual],
    )


@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 64), (2, 3, 1000), (1, 4096), (70, 128)])
def test_matches_the_reference(shape, dtype, with_residual, device):
    x, residual = torch.randn(2, *shape, device=device, dtype=dtype)
    weight, bias = torch.randn(2, shape[-1], device=device, dtype=dtype)
    assert_layer_norm(x, weight, bias, residual if with_residual else None)


@pytest.mark.parametrize(
    ("hidden", "dtype", "with_residual"),
    [
        (9000, torch.float32, True),  # only the backward pass cuts the row
        (
            20000,
            torch.float32,
            False,
        ),  # in bfloat16 the two means, about 1 / sqrt(hidden), would be lost in the rounding
        (20000, torch.bfloat16, True),
    ],
)
def test_rows_longer_than_a_program_holds(hidden, dtype, with_residual, device):
    x, residual = torch.randn(2, 3, hidden, device=device, dtype=dtype)
    weight, bias = torch.randn(2, hidden, device=device, dtype=dtype)
    assert_layer_norm(x, weight, bias, residual if with_residual else None)


def test_longest_row(device):
    # without parameters: the sums of their gradients would be 8192 programs more, seconds in the interpreter
    assert_layer_norm(torch.randn(1, 262144, device=device, dtype=torch.float16))


@pytest.mark.parametrize("hidden", [100, 4096, 20000])
@pytest.mark.parametrize("deviation", [1.0, 0.01])
def test_rows_far_from_zero(deviation, hidden, device):
    # E[x^2] - E[x]^2 in float32 would have no digit left: 1e6 has a spacing of 0.06
    assert_layer_norm(1000 + deviation * torch.randn(3, hidden, device=device))


@pytest.mark.parametrize("hidden", [300, 20000])
def test_rows_whose_mean_drifts(hidden, device):
    x = torch.linspace(-1000, 1000, hidden, device=device).repeat(2, 1)
    x[1, : hidden // 2] = 1e4
    assert_layer_norm(x + torch.randn_like(x))


@pytest.mark.parametrize("hidden", [70, 20000])
def test_constant_rows_give_the_bias(hidden, device):
    weight, bias = torch.randn(2, hidden, device=device)
    y = ops.layer_norm(torch.full((2, hidden), 123.456, device=device), weight, bias)
    torch.testing.assert_close(y, bias.expand(2, hidden), rtol=0, atol=1e-5)


@settings(max_examples=15, deadline=None)
@given(rows=st.integers(1, 40), hidden=st.integers(1, 300), weighted=st.booleans(), biased=st.booleans())
def test_any_shape(device, rows, hidden, weighted, biased):
    # eps = 0.1: in rows of one or two elements dx is a difference of nearly equal numbers, noise in any implementation
    x, (weight, bias) = torch.randn(rows, hidden, device=device), torch.randn(2, hidden, device=device)
    assert_layer_norm(x, weight if weighted else None, bias if biased else None, eps=0.1)


@pytest.mark.parametrize("layout", ["rows of a wider matrix", "transposed", "every other element", "expanded"])
def test_strides(layout, device):
    x = {
        "rows of a wider matrix": torch.randn(6, 200, device=device)[:, 10:106],
        "transposed": torch.randn(96, 6, device=device).t(),
        "every other element": torch.randn(6, 192, device=device)[:, ::2],
        "expanded": torch.randn(1, 96, device=device).expand(6, 96),
    }[layout]
    weight, bias = torch.randn(96, 2, device=device).unbind(1)
    assert_layer_norm(x, weight, bias, torch.randn(6, 300, device=device)[:, 10:106])


@pytest.mark.parametrize("hidden", [96, 9000])
def test_upstream_gradient_may_have_strides(hidden, device):
    x, weight = torch.randn(3, hidden, device=device), torch.randn(hidden, device=device)
    _, mean, rstd = layer_norm_op(x, weight, None, 1e-5)
    dy, dsum = torch.randn(3, 2 * hidden, device=device).chunk(2, dim=-1)
    strided, dense = (
        layer_norm_backward_op(*upstream, x, weight, None, mean, rstd, True, False)
        for upstream in ((dy, dsum), (dy.contiguous(), dsum.contiguous()))
    )
    for a, b in zip(strided, dense, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("shape", [(0, 64), (3, 0), (0, 0), (64,), (3, 1)])
def test_empty_and_one_row(shape, device):
    x = torch.randn(shape, device=device)
    assert_layer_norm(x, *torch.randn(2, shape[-1], device=device).unbind())


def test_float32_parameters_on_bfloat16_give_float32(device):
    x = torch.randn(4, 64, device=device, dtype=torch.bfloat16)
    assert ops.layer_norm(x, torch.ones(64, device=device)).dtype == torch.float32
    assert ops.layer_norm(x, bias=torch.ones(64, device=device)).dtype == torch.float32
    assert ops.layer_norm(x).dtype == torch.bfloat16


def test_residual_equals_adding_first(device):
    # float16: the interpreter rounds to bfloat16 another way than the hardware
    x, residual = torch.randn(2, 8, 256, device=device, dtype=torch.float16)
    weight, bias = torch.randn(2, 256, device=device, dtype=torch.float16)
    y, total = ops.layer_norm(x, weight, bias, residual=residual)
    assert torch.equal(total, x + residual)
    assert torch.equal(y, ops.layer_norm(x + residual, weight, bias))


@pytest.mark.parametrize("frozen", ["weight", "bias", "x"])
def test_frozen_inputs_get_no_gradient(frozen, device):
    tensors = dict(x=torch.randn(4, 64, device=device), weight=torch.randn(64, device=device))
    tensors["bias"] = torch.randn(64, device=device)
    for name, tensor in tensors.items():
        tensor.requires_grad_(name != frozen)
    ops.layer_norm(**tensors).sum().backward()
    for name, tensor in tensors.items():
        assert (tensor.grad is None) == (name == frozen), name


def test_same_bits_every_run(device):
    x, weight, bias = torch.randn(300, 128, device=device), *torch.randn(2, 128, device=device)

    def run():
        leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
        y = ops.layer_norm(*leaves)
        return y, *torch.autograd.grad(y.square().sum(), leaves)

    assert_same_bits(run)


@pytest.mark.parametrize("used", [0, 1])
def test_output_without_a_gradient_costs_no_zeros(used, device):
    x, residual = torch.randn(2, 4, 64, device=device).requires_grad_()
    output = ops.layer_norm(x, torch.ones(64, device=device, requires_grad=True), residual=residual)[used]
    with CalledOps() as called:
        torch.autograd.grad(output, (x, residual), torch.ones_like(output))
    assert not [name for name in called if "zeros" in name or "full" in name]


@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(requires_grad, device):
    x, residual = torch.randn(2, 3, 5, 70, device=device, requires_grad=requires_grad)
    weight, bias = torch.randn(2, 70, device=device, requires_grad=requires_grad).unbind()
    torch.library.opcheck(layer_norm_op, (x, weight, bias, 1e-5))
    torch.library.opcheck(add_layer_norm_op, (x, residual, weight, bias, 1e-5))
    torch.library.opcheck(add_layer_norm_op, (x.transpose(0, 1), residual.transpose(0, 1), weight, bias, 1e-5))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_whole(dynamic, device):
    def function(x, weight, bias, residual):
        return ops.layer_norm(x, weight, bias, residual=residual)

    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic)
    for rows in (4, 7):
        x, residual = torch.randn(2, rows, 64, device=device)
        tensors = x, *torch.randn(2, 64, device=device), residual
        eager, traced = [], []
        for candidate, found in ((function, eager), (compiled, traced)):
            leaves = [t.clone().requires_grad_() for t in tensors]
            y, total = candidate(*leaves)
            found += [y, total, *torch.autograd.grad((y * total).sum(), leaves)]
        for a, b in zip(eager, traced, strict=True):
            torch.testing.assert_close(a, b)


def test_autocast_keeps_the_dtype_rule(device):
    x = torch.randn(4, 64, device=device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        assert ops.layer_norm(x, torch.ones(64, device=device)).dtype == torch.float32


@on_cpu
def test_gradcheck():
    x, residual = torch.randn(2, 3, 10, dtype=torch.float64).unbind()
    weight, bias = torch.randn(2, 10, dtype=torch.float64).unbind()
    tensors = [t.requires_grad_() for t in (x, weight, bias, residual)]
    assert torch.autograd.gradcheck(lambda x, w, b, r: ops.layer_norm(x, w, b, residual=r), tensors)
    assert torch.autograd.gradcheck(ops.layer_norm, tensors[:3])


@not_on_cpu
def test_triton_refuses_float64(device):
    with pytest.raises(TypeError, match="x is float64"):
        ops.layer_norm(torch.randn(2, 4, device=device, dtype=torch.float64))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (dict(x=torch.ones(2, 8), weight=torch.ones(7)), ValueError, r"weight must have shape \(8,\), got \(7,\)"),
        (dict(x=torch.ones(2, 8), bias=torch.ones(2, 8)), ValueError, r"bias must have shape \(8,\), got \(2, 8\)"),
        (dict(x=torch.ones(2, 8, dtype=torch.int64)), TypeError, "x must be float16"),
        (dict(x=[1.0]), TypeError, "x must be a torch.Tensor, got list"),
        (dict(x=torch.ones(())), ValueError, "x must have at least one dimension"),
        (dict(x=torch.ones(2, 8), residual=torch.ones(8)), ValueError, "residual must have x's shape"),
        (dict(x=torch.ones(8), residual=torch.ones(8).half()), TypeError, "residual must have x's dtype"),
        (dict(x=torch.ones(8), bias=torch.ones(8, device="meta")), ValueError, "bias must be on x's device"),
    ],
)
def test_bad_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        ops.layer_norm(**arguments)


@not_interpreted
def test_meta_tensors_have_the_real_strides():
    y = ops.layer_norm(torch.empty(6, 4, device="meta").t())
    assert y.shape == (4, 6)
    assert y.is_contiguous()
