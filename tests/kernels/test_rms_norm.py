"""RMSNorm, forward and backward: parity, edges, errors, and what PyTorch asks of an op."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_fast import ops
from llama_fast.kernels import reference
from llama_fast.kernels.rms_norm import add_rms_norm_op, rms_norm_op
from tests.parity import DTYPES, CalledOps, assert_parity, assert_same_bits, not_interpreted, not_on_cpu, on_cpu


def torch_rms_norm(x, weight, residual=None, eps=1e-6, offset=0.0):
    """PyTorch's own ops for the same: the peer."""
    h = x if residual is None else x + residual
    y = F.rms_norm(h, h.shape[-1:], None if weight is None else weight + offset, eps)
    return y if residual is None else (y, h)


def assert_rms_norm(x, weight, residual=None, **options):
    assert_parity(
        lambda x, w, r: ops.rms_norm(x, w, residual=r, **options),
        lambda x, w, r: torch_rms_norm(x, w, r, **options),
        lambda x, w, r: reference.rms_norm(x, w, residual=r, **options),
        [x, weight, residual],
    )


@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 64), (2, 3, 1000), (1, 4096), (70, 128), (3, 1)])
def test_matches_the_reference(shape, dtype, with_residual, device):
    x, residual = torch.randn(2, *shape, device=device, dtype=dtype)
    assert_rms_norm(x, torch.randn(shape[-1], device=device, dtype=dtype), residual if with_residual else None)


@pytest.mark.parametrize(
    ("hidden", "dtype", "with_residual", "offset"),
    [
        (9000, torch.float32, True, 1.0),  # only the backward pass cuts the row
        (20000, torch.float32, False, 1.0),  # in bfloat16 c, about 1 / sqrt(hidden), would be lost in the rounding
        (20000, torch.bfloat16, True, 0.0),
    ],
)
def test_rows_longer_than_a_program_holds(hidden, dtype, with_residual, offset, device):
    x, residual = torch.randn(2, 3, hidden, device=device, dtype=dtype)
    weight = torch.randn(hidden, device=device, dtype=dtype)
    assert_rms_norm(x, weight, residual if with_residual else None, offset=offset)


def test_longest_row(device):
    # without a weight: the sum of its gradient would be 4096 programs more, 10 s in the interpreter
    assert_rms_norm(torch.randn(1, 262144, device=device, dtype=torch.float16), None)


@settings(max_examples=15, deadline=None)
@given(rows=st.integers(1, 40), hidden=st.integers(1, 300), offset=st.sampled_from([0.0, 1.0]))
def test_any_shape(device, rows, hidden, offset):
    # eps = 0.1: in rows of one or two elements dx is a difference of nearly equal numbers, noise in any implementation
    x, weight = torch.randn(rows, hidden, device=device), torch.randn(hidden, device=device)
    assert_rms_norm(x, weight, offset=offset, eps=0.1)


def test_gemma_offset_and_no_weight(device):
    x = torch.randn(4, 96, device=device, dtype=torch.float16)
    assert_rms_norm(x, torch.randn(96, device=device, dtype=torch.float16), offset=1.0, eps=1e-5)
    assert_rms_norm(x, None)


@pytest.mark.parametrize("layout", ["rows of a wider matrix", "transposed", "every other element", "expanded"])
def test_strides(layout, device):
    x = {
        "rows of a wider matrix": torch.randn(6, 200, device=device)[:, 10:106],
        "transposed": torch.randn(96, 6, device=device).t(),
        "every other element": torch.randn(6, 192, device=device)[:, ::2],
        "expanded": torch.randn(1, 96, device=device).expand(6, 96),
    }[layout]
    assert_rms_norm(x, torch.randn(96, 2, device=device)[:, 0], torch.randn(96, 6, device=device).t())


@pytest.mark.parametrize("shape", [(0, 64), (3, 0), (0, 0), (64,)])
def test_empty_and_one_row(shape, device):
    assert_rms_norm(torch.randn(shape, device=device), torch.randn(shape[-1], device=device))


def test_float32_weight_on_bfloat16_gives_float32(device):
    x = torch.randn(4, 64, device=device, dtype=torch.bfloat16)
    assert ops.rms_norm(x, torch.ones(64, device=device)).dtype == torch.float32


def test_residual_equals_adding_first(device):
    # float16: the interpreter rounds to bfloat16 another way than the hardware
    x, residual = torch.randn(2, 8, 256, device=device, dtype=torch.float16)
    weight = torch.randn(256, device=device, dtype=torch.float16)
    y, total = ops.rms_norm(x, weight, residual=residual)
    assert torch.equal(total, x + residual)
    assert torch.equal(y, ops.rms_norm(x + residual, weight))


def test_frozen_weight_gets_no_gradient(device):
    x = torch.randn(4, 64, device=device, requires_grad=True)
    weight = torch.randn(64, device=device)
    ops.rms_norm(x, weight).sum().backward()
    assert weight.grad is None
    assert x.grad is not None


@pytest.mark.parametrize("transform", [torch.func.grad, lambda f: lambda x: torch.func.jvp(f, (x,), (x,))])
def test_transforms_of_functions_are_refused(transform, device):
    # and do not come back with a derivative of zero
    with pytest.raises(RuntimeError, match=r"autograd\.Function with functorch"):
        transform(lambda x: ops.rms_norm(x, None).sum())(torch.randn(4, 64, device=device))


def test_same_bits_every_run(device):
    x, weight = torch.randn(300, 128, device=device), torch.randn(128, device=device)

    def run():
        leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
        y = ops.rms_norm(*leaves)
        return y, *torch.autograd.grad(y.square().sum(), leaves)

    assert_same_bits(run)


@pytest.mark.parametrize("used", [0, 1])
def test_output_without_a_gradient_costs_no_zeros(used, device):
    x, residual = torch.randn(2, 4, 64, device=device).requires_grad_()
    output = ops.rms_norm(x, torch.ones(64, device=device, requires_grad=True), residual=residual)[used]
    with CalledOps() as called:
        torch.autograd.grad(output, (x, residual), torch.ones_like(output))
    assert not [name for name in called if "zeros" in name or "full" in name]


@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(requires_grad, device):
    x, residual = torch.randn(2, 3, 5, 70, device=device, requires_grad=requires_grad)
    weight = torch.randn(70, device=device, requires_grad=requires_grad)
    torch.library.opcheck(rms_norm_op, (x, weight, 1e-6, 0.0))
    torch.library.opcheck(add_rms_norm_op, (x, residual, weight, 1e-6, 1.0))
    torch.library.opcheck(add_rms_norm_op, (x.transpose(0, 1), residual.transpose(0, 1), weight, 1e-6, 1.0))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_whole(dynamic, device):
    compiled = torch.compile(
        lambda *args: ops.rms_norm(args[0], args[1], residual=args[2]), fullgraph=True, dynamic=dynamic
    )
    for rows in (4, 7):
        x, residual = torch.randn(2, rows, 64, device=device)
        weight = torch.randn(64, device=device)
        eager, traced = [], []
        for function, found in ((lambda *a: ops.rms_norm(a[0], a[1], residual=a[2]), eager), (compiled, traced)):
            leaves = [t.clone().requires_grad_() for t in (x, weight, residual)]
            y, total = function(*leaves)
            found += [y, total, *torch.autograd.grad((y * total).sum(), leaves)]
        for a, b in zip(eager, traced, strict=True):
            torch.testing.assert_close(a, b)


def test_autocast_keeps_the_dtype_rule(device):
    x = torch.randn(4, 64, device=device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        assert ops.rms_norm(x, torch.ones(64, device=device)).dtype == torch.float32


@on_cpu
def test_gradcheck():
    x, residual = torch.randn(2, 3, 10, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(10, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda *a: ops.rms_norm(a[0], a[1], residual=a[2], offset=1.0), (x, weight, residual)
    )
    assert torch.autograd.gradcheck(ops.rms_norm, (x, weight))


@not_on_cpu
def test_triton_refuses_float64(device):
    with pytest.raises(TypeError, match="x is float64"):
        ops.rms_norm(torch.randn(2, 4, device=device, dtype=torch.float64), None)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (dict(x=torch.ones(2, 8), weight=torch.ones(7)), ValueError, r"weight must have shape \(8,\), got \(7,\)"),
        (dict(x=torch.ones(2, 8, dtype=torch.int64), weight=None), TypeError, "x must be float16"),
        (dict(x=[1.0], weight=None), TypeError, "x must be a torch.Tensor, got list"),
        (dict(x=torch.ones(()), weight=None), ValueError, "x must have at least one dimension"),
        (dict(x=torch.ones(2, 8), weight=None, residual=torch.ones(8)), ValueError, "residual must have x's shape"),
        (dict(x=torch.ones(8), weight=None, residual=torch.ones(8).half()), TypeError, "residual must have x's dtype"),
        (dict(x=torch.ones(8), weight=torch.ones(8, device="meta")), ValueError, "weight must be on x's device"),
    ],
)
def test_bad_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        ops.rms_norm(**arguments)


@not_interpreted
def test_meta_tensors_have_the_real_strides():
    x = torch.empty(6, 4, device="meta").t()
    y = ops.rms_norm(x, None)
    assert y.shape == (4, 6)
    assert y.is_contiguous()
