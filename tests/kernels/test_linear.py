"""The linear layer with its epilogue, forward and backward: parity, edges, errors, and what PyTorch asks of an op."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_fast import ops
from llama_fast.kernels import cpu, matmul, reference
from llama_fast.kernels.launch import GPUS
from llama_fast.kernels.linear import example_plans, linear_backward_op, linear_op, linear_training_op
from llama_fast.kernels.matmul import plan_linear
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

ACTIVATIONS = {
    "silu": F.silu,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


def torch_linear(x, weight, bias=None, residual=None, activation=None):
    """PyTorch's own ops for the same: the peer."""
    y = F.linear(x, weight, bias)
    if activation is not None:
        y = ACTIVATIONS[activation](y)
    return y if residual is None else y + residual


def assert_linear(x, weight, bias=None, residual=None, activation=None):
    assert_parity(
        lambda x, w, b, r: ops.linear(x, w, b, activation=activation, residual=r),
        lambda x, w, b, r: torch_linear(x, w, b, r, activation),
        lambda x, w, b, r: reference.linear(x, w, b, activation=activation, residual=r),
        [x, weight, bias, residual],
    )


def operands(shape, out_features, device, dtype=torch.float32):
    """x of `shape`, and weight, bias and residual that go with it; pre-activations of about unit size."""
    x = torch.randn(shape, device=device, dtype=dtype)
    weight = torch.randn(out_features, shape[-1], device=device, dtype=dtype) / max(1, shape[-1]) ** 0.5
    bias = torch.randn(out_features, device=device, dtype=dtype)
    return x, weight, bias, torch.randn(*shape[:-1], out_features, device=device, dtype=dtype)


# (shape of x, out_features): one row, one row with K split, few rows, few rows with K split, tiles of many rows, and
# more rows than the programs of the backward epilogue take in one round
SHAPES = [((1, 300), 70), ((1, 1, 9000), 5), ((2, 7, 130), 150), ((16, 3000), 20)]
SHAPES += [((3, 11, 128), 96), ((130, 200), 72), ((600, 20), 24)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "out_features"), SHAPES)
def test_matches_the_reference(shape, out_features, dtype, device):
    x, weight, bias, residual = operands(shape, out_features, device, dtype)
    assert_linear(x, weight, bias, residual)
    assert_linear(x, weight)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 5, 40])
def test_activations(rows, dtype, activation, device):
    x, weight, bias, residual = operands((rows, 96), 80, device, dtype)
    assert_linear(x, weight, bias, residual, activation)
    assert_linear(x, weight, None, None, activation)


@settings(max_examples=15, deadline=None)
@given(
    rows=st.integers(1, 80), out_features=st.integers(8, 100), in_features=st.integers(8, 200),
    activation=st.sampled_from([None, "silu"]),
)  # fmt: skip
def test_any_shape(device, rows, out_features, in_features, activation):
    # 8 features at least: where a gradient is one number, it may be a sum that cancels, noise in any implementation
    torch.manual_seed(0)  # the same numbers when hypothesis repeats an example
    assert_linear(*operands((rows, in_features), out_features, device), activation)


@triton_only
@pytest.mark.parametrize("tile", matmul._TILES + matmul._UNALIGNED_TILES, ids=str)
def test_every_tile(tile, device, monkeypatch):
    """Also those that plans take for large matrices only; every edge is ragged."""
    monkeypatch.setattr(matmul, "choose_tile", lambda *_: tile)
    shape, out_features = (tile.block_m + 9, tile.block_k + 13), tile.block_n + tile.block_n // 4 + 11
    assert_linear(*operands(shape, out_features, device, torch.float16), "gelu")


@pytest.mark.parametrize("rows", [4, 20])
@pytest.mark.parametrize("layout", ["columns of a wider matrix", "transposed", "every other element", "expanded"])
def test_strides(layout, rows, device):
    def laid_out(m, n):
        return {
            "columns of a wider matrix": torch.randn(m, 2 * n, device=device)[:, 3 : n + 3],
            "transposed": torch.randn(n, m, device=device).t(),
            "every other element": torch.randn(m, 2 * n, device=device)[:, ::2],
            "expanded": torch.randn(1, n, device=device).expand(m, n),
        }[layout]

    bias = torch.randn(120, device=device)[::2]
    assert_linear(laid_out(rows, 64), laid_out(60, 64), bias, laid_out(rows, 60), "gelu")


@pytest.mark.parametrize("rows", [1, 5, 20])
def test_what_lies_beside_the_operands_is_not_read(rows, device):
    """NaN around x, weight, bias and residual; a product of NaN and a masked 0 would be NaN."""

    def framed(tensor):
        frame = torch.full([size + 9 for size in tensor.shape], float("nan"), device=device)
        inner = frame[tuple(slice(0, size) for size in tensor.shape)]
        return inner.copy_(tensor)

    inputs = operands((rows, 100), 30, device)
    x, weight, bias, residual = (framed(t).requires_grad_() for t in inputs)
    y = ops.linear(x, weight, bias, activation="silu", residual=residual)
    assert y.isfinite().all()
    assert all(g.isfinite().all() for g in torch.autograd.grad(y.sum(), (x, weight, bias, residual)))


@pytest.mark.parametrize(("shape", "out_features"), [((0, 8), 4), ((3, 8), 0), ((3, 0), 4), ((20, 0), 4), ((8,), 4)])
def test_empty_and_one_dimension(shape, out_features, device):
    assert_linear(*operands(shape, out_features, device), "silu")


@pytest.mark.parametrize("rows", [3, 30])
def test_float32_residual_on_float16_gives_float32(rows, device):
    x, weight, bias, residual = operands((rows, 64), 40, device, torch.float16)
    assert_linear(x, weight, bias, residual.float())
    assert ops.linear(x, weight, bias, residual=residual.float()).dtype == torch.float32


@triton_only
@pytest.mark.parametrize("rows", [3, 30])
def test_rounds_once(rows, device):
    """The bias and the residual cancel: F.linear and then an addition would leave the rounding at 1000, up to 0.25."""
    x, weight, bias, _ = operands((rows, 64), 40, device, torch.float16)
    bias.fill_(1000.0)
    y = ops.linear(x, weight, bias, residual=torch.full((rows, 40), -1000.0, device=device, dtype=torch.float16))
    torch.testing.assert_close(y.double(), x.double() @ weight.double().t(), atol=1e-3, rtol=1e-3)


@triton_only
def test_adds_to_its_own_output(device):
    """As the fused cross entropy uses it: the residual is the output."""
    x, weight, _, _ = operands((50, 64), 40, device, torch.float16)
    y = torch.randn(50, 40, device=device)
    expected = y + (x.double() @ weight.double().t())
    for plan in plan_linear(x, weight, None, y, y, gpu=GPUS["sm_90"]):
        plan.launch()
    torch.testing.assert_close(y.double(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("frozen", [0, 1, 2, 3])
def test_frozen_inputs_get_no_gradient(frozen, device):
    inputs = [t.requires_grad_(i != frozen) for i, t in enumerate(operands((4, 32), 24, device))]
    ops.linear(*inputs[:3], activation="silu", residual=inputs[3]).sum().backward()
    assert [t.grad is None for t in inputs] == [i == frozen for i in range(4)]


@pytest.mark.parametrize(
    ("trained", "kept"),
    [("x", {"weight", "preactivation"}), ("weight", {"x", "preactivation"}), ("bias", {"preactivation"}), ("residual", set())],
)  # fmt: skip
def test_keeps_only_what_its_gradients_need(trained, kept, device):
    inputs = dict(zip(("x", "weight", "bias", "residual"), operands((4, 32), 24, device), strict=True))
    inputs[trained].requires_grad_()
    names = {(4, 32): "x", (24, 32): "weight", (4, 24): "preactivation"}
    for activation in ("silu", None):
        found = set()
        with torch.autograd.graph.saved_tensors_hooks(lambda t, f=found: f.add(names[t.shape]) or t, lambda t: t):
            y = ops.linear(**inputs, activation=activation)
        assert found == (kept if activation else kept - {"preactivation"})
        y.sum().backward()


@pytest.mark.parametrize("rows", [1, 9, 70])
def test_same_bits_every_run(rows, device):
    inputs = operands((rows, 1500), 30, device)

    def run():
        leaves = [t.clone().requires_grad_() for t in inputs]
        y = ops.linear(*leaves[:3], activation="gelu", residual=leaves[3])
        return y, *torch.autograd.grad(y.square().sum(), leaves)

    assert_same_bits(run)


@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(requires_grad, device):
    x, weight, bias, residual = (t.requires_grad_(requires_grad) for t in operands((2, 3, 20), 12, device))
    torch.library.opcheck(linear_op, (x, weight, bias, residual, "silu"))
    torch.library.opcheck(linear_op, (x, weight, None, None, None))


def test_opcheck_of_the_inner_ops(device):
    x, weight, bias, residual = operands((2, 3, 20), 12, device)
    y, preactivation = linear_training_op(x, weight, bias, residual, "gelu")
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(linear_training_op, (x, weight, bias, residual, "gelu"), test_utils=tests)
    for arguments in ((x, weight, preactivation, "gelu", x.dtype, True), (None, weight, None, None, x.dtype, False)):
        torch.library.opcheck(linear_backward_op, (y, *arguments), test_utils=tests)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_whole(dynamic, device):
    def function(x, weight, bias, residual):
        return ops.linear(x, weight, bias, activation="silu", residual=residual)

    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic)
    for rows in (4, 7):
        inputs = operands((2, rows, 64), 48, device)
        results = []
        for f in (function, compiled):
            leaves = [t.clone().requires_grad_() for t in inputs]
            y = f(*leaves)
            results.append((y, *torch.autograd.grad(y.square().sum(), leaves)))
        for eager, traced in zip(*results, strict=True):
            torch.testing.assert_close(eager, traced)


@pytest.mark.parametrize("compiled", [False, True])
def test_autocast_casts_the_product_and_not_the_residual(compiled, device):
    x, weight, bias, residual = (t.requires_grad_() for t in operands((1, 64), 40, device))
    function = torch.compile(ops.linear, fullgraph=True) if compiled else ops.linear
    with torch.autocast(device.type, dtype=torch.bfloat16):
        assert ops.linear(x, weight, bias).dtype == torch.bfloat16
        y = function(x, weight, bias, residual=residual)
    assert y.dtype == torch.float32
    y.sum().backward()
    assert all(t.grad.dtype == torch.float32 for t in (x, weight, bias, residual))
    # The residual was not rounded to bfloat16 on its way
    product = ops.linear(x.bfloat16(), weight.bfloat16(), bias.bfloat16(), residual=torch.zeros_like(residual))
    torch.testing.assert_close(y, product + residual, atol=1e-6, rtol=1e-6)


@on_cpu
@not_interpreted
@pytest.mark.parametrize(
    ("rows", "dtype", "products"), [(16, torch.float32, 0), (17, torch.float32, 2), (17, torch.float64, 0)]
)
def test_many_rows_of_float32_are_onednns(rows, dtype, products):
    """y and dx; dweight is MKL's, and so is what few rows leave to PyTorch."""
    x, weight = (
        torch.randn(rows, 64, dtype=dtype, requires_grad=True),
        torch.randn(48, 64, dtype=dtype, requires_grad=True),
    )
    with cpu.use("pytorch"), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        ops.linear(x, weight).sum().backward()
    assert sum(event.name == "mkldnn::_linear_pointwise" for event in profile.events()) == products


@on_cpu
@not_interpreted
@pytest.mark.parametrize("choice", ["auto", "native", "pytorch"])
@pytest.mark.parametrize("rows", [16, 17])
def test_a_bias_may_have_any_stride(rows, choice):
    x, weight, bias = torch.randn(rows, 64), torch.randn(48, 64), torch.randn(48, 3)[:, 1]
    with cpu.use(choice):
        y = ops.linear(x, weight, bias)
    torch.testing.assert_close(y, x @ weight.T + bias, atol=1e-4, rtol=1e-5)


@on_cpu
@not_interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_among_many_has_the_bits_of_that_row_among_fewer(dtype):
    x, weight = torch.randn(700, 320, dtype=dtype), torch.randn(864, 320, dtype=dtype)
    y = ops.linear(x, weight)
    for rows in (slice(0, 17), slice(5, 133), slice(100, 612)):
        assert torch.equal(ops.linear(x[rows], weight), y[rows])


@on_cpu
def test_gradcheck():
    inputs = [t.double().requires_grad_() for t in operands((2, 3, 5), 4, "cpu")]
    for activation in (None, *ACTIVATIONS):
        assert torch.autograd.gradcheck(
            lambda x, w, b, r, activation=activation: ops.linear(x, w, b, activation=activation, residual=r), inputs
        )


@not_on_cpu
def test_triton_refuses_float64(device):
    with pytest.raises(TypeError, match="x is float64"):
        ops.linear(torch.ones(2, 4, device=device, dtype=torch.float64), torch.ones(3, 4, device=device).double())


@not_interpreted
def test_tf32_is_taken_only_where_pytorch_allows_it():
    x, weight, y = (torch.empty(*s, device="meta") for s in ((64, 256), (32, 256), (64, 32)))
    for allowed, precision in ((False, "ieee"), (True, "tf32")):
        (plan,) = plan_linear(x, weight, None, None, y, allow_tf32=allowed, gpu=GPUS["sm_90"])
        assert plan.constants["INPUT_PRECISION"] == precision


@not_interpreted
@pytest.mark.parametrize("rows", [1, 8, 16])
@pytest.mark.parametrize(
    ("out_features", "in_features"),
    [(4096, 4096), (1024, 4096), (6144, 4096), (14336, 4096), (28672, 4096), (4096, 14336), (128256, 4096)],
)
def test_few_rows_keep_enough_of_the_weight_in_flight(out_features, in_features, rows):
    """40 KB an SM, what 4.8 TB/s take at a latency of 1.1 us; with programs for one round where K is split."""
    gpu = GPUS["sm_90"]
    x, weight, y = (
        torch.empty(*s, dtype=torch.bfloat16, device="meta")
        for s in ((rows, in_features), (out_features, in_features), (rows, out_features))
    )
    plan, *add_splits = plan_linear(x, weight, None, y, y, gpu=gpu)
    block_m, block_n, block_k, stages = (plan.constants[n] for n in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "NUM_STAGES"))
    resident = gpu.shared_bytes // (2 * stages * (block_m + block_n) * block_k) * gpu.multiprocessors
    programs = plan.grid[0] * plan.grid[1]
    assert min(programs, resident) * 2 * (stages - 1) * block_n * block_k >= 40 * 1024 * gpu.multiprocessors
    assert programs <= resident or not add_splits


@compiles_kernels
def test_products_are_not_waited_for_one_by_one():
    """On sm_90 the HGMMAs of a step run back to back: one wait in the loop, and one behind it."""
    products = [(shape, plan) for shape, plan in example_plans(GPUS["sm_90"]) if "INPUT_PRECISION" in plan.constants]
    for shape, plan in products:
        if max(plan.constants["BLOCK_M"], plan.constants["BLOCK_N"]) < 64 or plan.constants["BLOCK_M"] == 1:
            continue  # one row takes no tensor core, and a product of fewer than 64 rows not this one
        sass = plan.compile(GPUS["sm_90"]).asm["sass"]
        assert sass.count("HGMMA") >= 4, shape
        assert sass.count("WARPGROUP.DEPBAR") <= 2, shape


_X = dict(x=torch.ones(2, 8))
_XW = dict(x=torch.ones(2, 8), weight=torch.ones(4, 8))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (dict(x=[1.0], weight=torch.ones(4, 8)), TypeError, "x must be a torch.Tensor, got list"),
        (dict(x=torch.ones(2, 8).long(), weight=torch.ones(4, 8)), TypeError, "x must be float16"),
        (dict(x=torch.ones(()), weight=torch.ones(4, 8)), ValueError, "x must have at least one dimension"),
        (_X | dict(weight=torch.ones(4, 7)), ValueError, r"weight must have shape \(out_features, 8\), got \(4, 7\)"),
        (_X | dict(weight=torch.ones(8)), ValueError, r"weight must have shape \(out_features, 8\), got \(8,\)"),
        (_X | dict(weight=torch.ones(4, 8).half()), TypeError, "weight must have the input's dtype, torch.float32"),
        (_X | dict(weight=torch.ones(4, 8, device="meta")), ValueError, "weight must be on x's device"),
        (_XW | dict(bias=torch.ones(8)), ValueError, r"bias must have shape \(4,\), got \(8,\)"),
        (_XW | dict(bias=torch.ones(4).half()), TypeError, "bias must have the input's dtype"),
        (_XW | dict(residual=torch.ones(4)), ValueError, r"residual must have shape \(2, 4\), got \(4,\)"),
        (_XW | dict(activation="tanh"), ValueError, "activation must be one of silu, relu, gelu, gelu_tanh or None"),
        (_XW | dict(activation=["silu"]), ValueError, "activation must be one of silu, relu, gelu, gelu_tanh or None"),
    ],
)
def test_bad_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        ops.linear(**arguments)


@not_interpreted
def test_meta_tensors_have_the_real_strides():
    x, weight = torch.empty(6, 4, device="meta").t(), torch.empty(5, 6, device="meta")
    y = ops.linear(x, weight)
    assert y.shape == (4, 5)
    assert y.is_contiguous()
