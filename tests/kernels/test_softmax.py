"""Softmax, forward and backward: parity, any dimension, infinities, edges, errors, and what PyTorch asks of an op."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_fast import ops
from llama_fast.kernels import reference
from llama_fast.kernels.launch import INTERPRETER
from llama_fast.kernels.softmax import plan_softmax, softmax_backward_op, softmax_op
from tests.parity import DTYPES, assert_parity, assert_same_bits, not_interpreted, not_on_cpu, on_cpu

INF = float("inf")


def assert_softmax(x, dim=-1):
    assert_parity(
        lambda x: ops.softmax(x, dim), lambda x: torch.softmax(x, dim), lambda x: reference.softmax(x, dim), [x]
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 64), (2, 3, 1000), (1, 16384), (70, 129)])
def test_matches_the_reference(shape, dtype, device):
    # shorter rows in float32 only (test_any_shape): with two or three elements dx is a difference of nearly equal numbers,
    # and what is left of it hangs on how y was rounded
    assert_softmax(3 * torch.randn(shape, device=device, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [0, 1, 2, -2])
def test_any_dimension(dim, dtype, device):
    assert_softmax(3 * torch.randn(5, 33, 70, device=device, dtype=dtype), dim)


@pytest.mark.parametrize(
    ("shape", "dim"),
    [
        ((20000, 3), 0),
        ((2, 300, 65), 1),
        ((1000, 2, 9), 0),
        ((3, 1, 5), 1),
        ((3, 7, 1), 1),
        ((4, 3, 2, 5), 1),
        ((9,), 0),
    ],
)
def test_slices_that_are_no_rows(shape, dim, device):
    # (2, 300, 65): more than a program holds; (20000, 3): many tiles of few columns
    assert_softmax(3 * torch.randn(shape, device=device), dim)


@pytest.mark.parametrize(("n", "dtype"), [(16385, torch.float32), (20000, torch.bfloat16), (262144, torch.float16)])
def test_rows_longer_than_a_program_holds(n, dtype, device):
    assert_softmax(3 * torch.randn(2, n, device=device, dtype=dtype))


@pytest.mark.parametrize("ascending", [True, False])
def test_running_maximum(ascending, device):
    # rising and falling by 400: the maximum changes in every tile, or in the first only
    x = torch.linspace(-200, 200, 30000, device=device)[None]
    assert_softmax(x if ascending else x.flip(1))


@settings(max_examples=15, deadline=None)
@given(shape=st.lists(st.integers(1, 24), min_size=1, max_size=4), data=st.data())
def test_any_shape(device, shape, data):
    assert_softmax(torch.randn(shape, device=device), data.draw(st.integers(-len(shape), len(shape) - 1)))


@pytest.mark.parametrize("layout", ["rows of a wider matrix", "transposed", "every other element", "expanded"])
@pytest.mark.parametrize("dim", [0, 1])
def test_strides(layout, dim, device):
    x = {
        "rows of a wider matrix": torch.randn(6, 200, device=device)[:, 10:106],
        "transposed": torch.randn(96, 6, device=device).t(),
        "every other element": torch.randn(6, 192, device=device)[:, ::2],
        "expanded": torch.randn(1, 96, device=device).expand(6, 96),
    }[layout]
    assert_softmax(x, dim)


@pytest.mark.parametrize(("shape", "dim"), [((6, 200), 1), ((6, 200), 0), ((2, 9000, 4), 1), ((2, 20000), 1)])
def test_upstream_gradient_may_have_strides(shape, dim, device):
    y = torch.randn(shape, device=device).softmax(dim)
    dy = torch.randn(*shape[:-1], 2 * shape[-1], device=device)[..., : shape[-1]]
    assert torch.equal(softmax_backward_op(dy, y, dim), softmax_backward_op(dy.contiguous(), y, dim))


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_slices_of_a_contiguous_tensor_are_not_copied(dim, device):
    x = torch.randn(3, 4, 5, device=device)
    plan = plan_softmax(x, torch.empty_like(x), dim, gpu=INTERPRETER)
    assert plan.arguments["p_x"].data_ptr() == x.data_ptr()


def infinities(n, device):
    """Rows with -inf (masked), only -inf, +inf, both, NaN, and the lowest finite numbers."""
    x = torch.randn(7, n, device=device)
    x[0, : n - 3] = -INF  # the first tiles of a long row hold nothing else
    x[1] = -INF
    x[2, n // 2] = INF
    x[3, 0], x[3, n - 1] = INF, -INF
    x[4, n // 3] = float("nan")
    x[5] = torch.finfo(torch.float32).min
    x[6, 1:] = -INF
    return x


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("n", [50, 20000])
def test_infinities_as_in_pytorch(n, dim, device):
    x = infinities(n, device)
    x = x.t().contiguous() if dim == 0 else x
    torch.testing.assert_close(ops.softmax(x, dim), torch.softmax(x, dim), equal_nan=True)


@pytest.mark.parametrize(
    ("shape", "dim"), [((0, 64), 1), ((3, 0), 1), ((3, 0), 0), ((0, 0), 0), ((64,), 0), ((1, 1), 0)]
)
def test_empty_and_one_row(shape, dim, device):
    x = torch.randn(shape, device=device)
    assert_parity(lambda x: ops.softmax(x, dim), lambda x: torch.softmax(x, dim), lambda x: torch.softmax(x, dim), [x])


@pytest.mark.parametrize("dim", [0, 1])
def test_same_bits_every_run(dim, device):
    x = torch.randn(300, 128, device=device)

    def run():
        leaf = x.clone().requires_grad_()
        y = ops.softmax(leaf, dim)
        return y, *torch.autograd.grad(y.square().sum(), leaf)

    assert_same_bits(run)


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("dim", [0, 2])
def test_opcheck(dim, requires_grad, device):
    x = torch.randn(5, 70, 3, device=device).transpose(0, 2).requires_grad_(requires_grad)
    torch.library.opcheck(softmax_op, (x, dim))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_whole(dynamic, device):
    compiled = torch.compile(ops.softmax, fullgraph=True, dynamic=dynamic)
    for rows in (4, 7):
        x, upstream = torch.randn(2, rows, 64, device=device)
        eager, traced = [], []
        for function, found in ((ops.softmax, eager), (compiled, traced)):
            leaf = x.clone().requires_grad_()
            y = function(leaf, 0)
            found += [y, *torch.autograd.grad(y, leaf, upstream)]
        for a, b in zip(eager, traced, strict=True):
            torch.testing.assert_close(a, b)


def test_autocast_keeps_the_dtype(device):
    x = torch.randn(4, 64, device=device, dtype=torch.bfloat16)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        assert ops.softmax(x).dtype == torch.bfloat16
        assert ops.softmax(x.float()).dtype == torch.float32


@on_cpu
@pytest.mark.parametrize("dim", [0, 1, 2])
def test_gradcheck(dim):
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: ops.softmax(x, dim), x)


@not_on_cpu
def test_triton_refuses_float64(device):
    with pytest.raises(TypeError, match="x is float64"):
        ops.softmax(torch.randn(2, 4, device=device, dtype=torch.float64))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (dict(x=torch.ones(2, 8), dim=2), ValueError, "dim must be from -2 to 1 for 2 dimensions, got 2"),
        (dict(x=torch.ones(2, 8), dim=-3), ValueError, "dim must be from -2 to 1 for 2 dimensions, got -3"),
        (dict(x=torch.ones(2, 8), dim=1.0), TypeError, "dim must be an int, got float"),
        (dict(x=torch.ones(2, 8, dtype=torch.int64)), TypeError, "x must be float16"),
        (dict(x=[1.0]), TypeError, "x must be a torch.Tensor, got list"),
        (dict(x=torch.ones(())), ValueError, "x must have at least one dimension"),
    ],
)
def test_bad_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        ops.softmax(**arguments)


@not_interpreted
def test_meta_tensors_have_the_real_strides():
    y = ops.softmax(torch.empty(6, 4, device="meta").t())
    assert y.shape == (4, 6)
    assert y.is_contiguous()
