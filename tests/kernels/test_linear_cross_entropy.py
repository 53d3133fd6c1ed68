"""Linear and cross entropy in one: parity, chunks, memory, ignored labels under compile, and what PyTorch asks of an op."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from llama_fast import ops
from llama_fast.kernels import linear_cross_entropy as module
from llama_fast.kernels import reference
from llama_fast.kernels.launch import INTERPRETED
from llama_fast.kernels.linear_cross_entropy import linear_cross_entropy_backward_op, linear_cross_entropy_op
from tests.kernels.test_cross_entropy import REDUCTIONS, torch_cross_entropy
from tests.parity import DTYPES, assert_parity, assert_same_bits, not_on_cpu, on_cpu, on_triton


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """About as many tokens in a chunk as `hidden` has features, 8 at least: a few dozen tokens are several chunks."""
    monkeypatch.setattr(module, "LEAST_CHUNK", 8)
    monkeypatch.setattr(module, "CHUNK_MULTIPLE", 8)


def torch_linear_cross_entropy(hidden, weight, labels, bias, **options):
    """PyTorch's own op where it has it and the loss is float32, else its two ops, the loss in float32: the peer."""
    if (
        hidden.dtype == torch.float32
        and hasattr(F, "linear_cross_entropy")
        and not {"z_loss", "softcap"} & set(options)
    ):
        rows = hidden.reshape(-1, hidden.shape[-1])
        loss = F.linear_cross_entropy(rows, weight, labels.reshape(-1), linear_bias=bias, **options)
        return loss.view(labels.shape) if options["reduction"] == "none" else loss
    return torch_cross_entropy(F.linear(hidden, weight, bias), labels, **options)


def assert_linear_cross_entropy(hidden, weight, labels, bias=None, reduction="mean", **options):
    options["reduction"] = reduction
    assert_parity(
        lambda h, w, b: ops.linear_cross_entropy(h, w, labels, bias=b, **options),
        lambda h, w, b: torch_linear_cross_entropy(h, w, labels, b, **options),
        lambda h, w, b: reference.linear_cross_entropy(h, w, labels, bias=b, **options),
        [hidden, weight, bias],
    )


def operands(shape, in_features, vocab, device, dtype=torch.float32):
    """hidden, weight, labels (every third ignored) and bias; logits of about 0.7."""
    hidden = torch.randn(*shape, in_features, device=device, dtype=dtype)
    weight = 0.6 * torch.randn(vocab, in_features, device=device, dtype=dtype) / max(1, in_features) ** 0.5
    labels = torch.randint(0, vocab, shape, device=device)
    labels.view(-1)[1::3] = -100
    return hidden, weight, labels, 0.3 * torch.randn(vocab, device=device, dtype=dtype)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "in_features", "vocab"), [((5,), 64, 100), ((2, 17), 16, 400), ((1,), 24, 300), ((50,), 20, 130)]
)
def test_matches_the_reference(shape, in_features, vocab, dtype, reduction, device):
    hidden, weight, labels, bias = operands(shape, in_features, vocab, device, dtype)
    assert_linear_cross_entropy(hidden, weight, labels, bias, reduction)
    assert_linear_cross_entropy(hidden, weight, labels, None, reduction)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_options(reduction, device):
    hidden, weight, labels, bias = operands((20,), 16, 200, device)
    options = dict(label_smoothing=0.2, z_loss=1e-2, softcap=3.0)
    assert_linear_cross_entropy(hidden, weight, labels, bias, reduction, **options)
    for name, value in options.items():
        assert_linear_cross_entropy(hidden, weight, labels, bias, reduction, **{name: value})


@settings(max_examples=10, deadline=None)
@given(
    count=st.integers(1, 40),
    in_features=st.integers(8, 40),
    vocab=st.integers(64, 200),
    reduction=st.sampled_from(REDUCTIONS),
)
def test_any_shape(device, count, in_features, vocab, reduction):
    # 8 in_features at least: a gradient of one number may be a sum that cancels, noise in any implementation
    torch.manual_seed(0)  # the same numbers when hypothesis repeats an example
    assert_linear_cross_entropy(*operands((count,), in_features, vocab, device), reduction)


@pytest.mark.parametrize("layout", ["columns of a wider matrix", "transposed", "every other element"])
def test_strides(layout, device):
    def laid_out(m, n):
        return {
            "columns of a wider matrix": torch.randn(m, 2 * n, device=device)[:, 3 : n + 3],
            "transposed": torch.randn(n, m, device=device).t(),
            "every other element": torch.randn(m, 2 * n, device=device)[:, ::2],
        }[layout]

    labels = torch.randint(0, 90, (40,), device=device)[::2]
    for reduction in ("mean", "none"):
        assert_linear_cross_entropy(0.2 * laid_out(20, 16), laid_out(90, 16), labels, reduction=reduction)


def test_many_chunks_add_up_in_float32(device):
    """30 chunks: a weight gradient added up in float16 would be rounded 30 times."""
    assert_linear_cross_entropy(*operands((240,), 8, 100, device, torch.float16))


@pytest.mark.parametrize("shape", [(0,), (12,)])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_no_token_counts(reduction, shape, device):
    """As PyTorch: a mean over nothing is NaN, a sum is 0; the gradients are zero."""
    hidden, weight, _, bias = (t.requires_grad_(t.is_floating_point()) for t in operands(shape, 8, 50, device))
    loss = ops.linear_cross_entropy(
        hidden, weight, torch.full(shape, -100, device=device), bias=bias, reduction=reduction
    )
    loss.sum().backward()
    torch.testing.assert_close(loss.sum().item(), math.nan if reduction == "mean" else 0.0, equal_nan=True)
    for tensor in (hidden, weight, bias):
        assert torch.equal(tensor.grad, torch.zeros_like(tensor))


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("frozen", [0, 1, 3])
def test_frozen_inputs_get_no_gradient(frozen, reduction, device):
    inputs = [t.requires_grad_(i not in (2, frozen)) for i, t in enumerate(operands((12,), 8, 50, device))]
    hidden, weight, labels, bias = inputs
    ops.linear_cross_entropy(hidden, weight, labels, bias=bias, reduction=reduction).sum().backward()
    assert [t.grad is None for t in inputs] == [i in (2, frozen) for i in range(4)]


def test_a_loss_scale_saves_float16_gradients(device):
    """Gradients below float16's 6e-8, scaled up by the upstream gradient, as a GradScaler does: they must not vanish first."""
    hidden, weight, labels, _ = operands((64,), 16, 200, device, torch.float16)
    results = []
    for function, dtype in ((ops.linear_cross_entropy, torch.float16), (reference.linear_cross_entropy, torch.float64)):
        h, w = (t.detach().to(dtype).requires_grad_() for t in (1e-4 * hidden, weight))
        loss = function(h, w, labels)
        results.append(torch.autograd.grad(loss, (h, w), torch.tensor(2.0**15, device=device, dtype=loss.dtype)))
    for actual, expected in zip(*results, strict=True):
        error = torch.linalg.vector_norm(actual.double() - expected) / torch.linalg.vector_norm(expected)
        assert error < 5e-3


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_backward_twice_gives_the_same(reduction, device):
    """Each time its own tensors, for its own upstream gradient: the first ones stay as they were."""
    hidden, weight, labels, bias = (t.requires_grad_(t.is_floating_point()) for t in operands((20,), 8, 50, device))
    loss = ops.linear_cross_entropy(hidden, weight, labels, bias=bias, reduction=reduction).sum()
    first = torch.autograd.grad(loss, (hidden, weight, bias), retain_graph=True)
    kept = [gradient.clone() for gradient in first]
    again = torch.autograd.grad(loss, (hidden, weight, bias), torch.full_like(loss, 2.0), retain_graph=True)
    for before, a, b, c in zip(kept, first, again, torch.autograd.grad(loss, (hidden, weight, bias)), strict=True):
        assert torch.equal(a, before)
        assert torch.equal(b, 2 * before)
        assert torch.equal(c, before)


def test_backward_leaves_what_the_op_returned(device):
    """Who calls the op itself sees the gradients, for an upstream gradient of one."""
    hidden, weight, labels, bias = (t.requires_grad_(t.is_floating_point()) for t in operands((20,), 8, 50, device))
    loss, _, _, *gradients = linear_cross_entropy_op(
        hidden, weight, labels, bias, -100, 0.0, 0.0, None, "mean", 64, True, True, True
    )
    kept = [gradient.clone() for gradient in gradients]
    loss.backward()
    assert all(torch.equal(gradient, before) for gradient, before in zip(gradients, kept, strict=True))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_same_bits_every_run(reduction, device):
    hidden, weight, labels, bias = operands((50,), 8, 90, device)

    def run():
        leaves = [t.clone().requires_grad_() for t in (hidden, weight, bias)]
        loss = ops.linear_cross_entropy(*leaves[:2], labels, bias=leaves[2], reduction=reduction)
        return loss, *torch.autograd.grad(loss.square().sum(), leaves)

    assert_same_bits(run)


class _LargestAllocation(TorchDispatchMode):
    """Bytes of the largest tensor that any op returned, and of all that are not views of another."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        outputs = func(*args, **(kwargs or {}))
        for tensor in outputs if isinstance(outputs, (tuple, list)) else (outputs,):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.untyped_storage().nbytes())
        return outputs


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_logits_are_never_whole(reduction, device):
    """Nothing larger than a chunk of logits is allocated: 64 of 2048 tokens."""
    if INTERPRETED:
        pytest.skip("the interpreter would take a minute; the chunks are the same")
    count, in_features, vocab, chunk = 2048, 16, 2000, 64
    hidden, weight, labels, _ = operands((count,), in_features, vocab, device)
    options = (None, -100, 0.0, 0.0, None)
    chunk_bytes, logits_bytes = chunk * vocab * 4, count * vocab * 4
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        linear_cross_entropy_op(hidden, weight, labels, *options, reduction, chunk, True, True, False)
        assert torch.cuda.max_memory_allocated() - before < 4 * chunk_bytes < logits_bytes / 4
        return
    with _LargestAllocation() as seen:  # below the op: what its implementation allocates
        _, lse, *_ = module._forward(hidden, weight, labels, *options, reduction, chunk, True, True, False)
        dloss = torch.ones(count)
        module._backward(dloss, hidden, weight, labels, None, lse, *options[1:], chunk, True, True, False)
    assert chunk_bytes <= seen.largest < 2 * chunk_bytes


def test_chunks_cover_the_tokens_evenly():
    for count in (0, 1, 23, 24, 25, 33, 64, 65):
        chunks = list(module._chunks(count, 24))
        sizes = [chunk.stop - chunk.start for chunk in chunks]
        assert [i for chunk in chunks for i in range(count)[chunk]] == list(range(count))
        assert all(0 < size <= 24 for size in sizes)
        assert all(size % module.CHUNK_MULTIPLE == 0 for size in sizes[:-1])
        assert len(sizes) == math.ceil(count / 24)


def test_chunks_are_whole_steps_of_the_product(monkeypatch):
    monkeypatch.undo()  # of the small chunks
    for in_features in (0, 1, 1025, 2880, 4096):
        assert module.chunk_tokens(in_features) % 64 == 0
        assert module.chunk_tokens(in_features) >= max(1024, in_features)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_no_features(reduction, device):
    """The logits are the bias."""
    hidden, weight, labels, bias = (t.requires_grad_(t.is_floating_point()) for t in operands((20,), 0, 50, device))
    loss = ops.linear_cross_entropy(hidden, weight, labels, bias=bias, reduction=reduction)
    expected = F.cross_entropy(bias.expand(20, 50), labels, reduction=reduction)
    torch.testing.assert_close(loss, expected)
    gradients = torch.autograd.grad(loss.sum(), (hidden, weight, bias))
    torch.testing.assert_close(gradients[2], torch.autograd.grad(expected.sum(), bias)[0])
    assert [g.shape for g in gradients] == [(20, 0), (50, 0), (50,)]


@pytest.mark.parametrize(("reduction", "requires_grad"), [("mean", False), ("mean", True), ("none", True)])
def test_opcheck(requires_grad, reduction, device):
    hidden, weight, labels, bias = operands((2, 6), 8, 40, device)
    hidden, weight, bias = (t.requires_grad_(requires_grad) for t in (hidden, weight, bias))
    arguments = (hidden, weight, labels, bias, -100, 0.1, 1e-3, 5.0, reduction, 8, False, False, False)
    torch.library.opcheck(linear_cross_entropy_op, arguments)


def test_opcheck_of_backward(device):
    hidden, weight, labels, bias = operands((2, 6), 8, 40, device)
    loss, lse, *_ = linear_cross_entropy_op(
        hidden, weight, labels, bias, -100, 0.0, 0.0, None, "none", 8, False, False, False
    )
    for needed in ((True, True, True), (False, True, False)):
        torch.library.opcheck(
            linear_cross_entropy_backward_op,
            (loss, hidden, weight, labels, bias, lse, -100, 0.0, 0.0, None, 8, *needed),
            test_utils=("test_schema", "test_faketensor"),
        )


@pytest.mark.parametrize(("reduction", "dynamic"), [("mean", False), ("mean", True), ("none", True)])
def test_compiles_whole_with_ignored_labels(dynamic, reduction, device):
    """Which labels are ignored, and how many, changes from call to call of one compiled function."""

    def function(hidden, weight, labels):
        return ops.linear_cross_entropy(hidden, weight, labels, reduction=reduction)

    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic)
    for count, ignored in ((12, 0), (12, 11), (20, 7)):
        hidden, weight, _, _ = operands((count,), 8, 64, device)
        labels = torch.randint(0, 64, (count,), device=device)
        labels[:ignored] = -100
        results = []
        for f in (function, compiled):
            leaves = [t.clone().requires_grad_() for t in (hidden, weight)]
            loss = f(*leaves, labels)
            results.append((loss, *torch.autograd.grad(loss.square().sum(), leaves)))
        for eager, traced in zip(*results, strict=True):
            torch.testing.assert_close(eager, traced)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_autocast(reduction, device):
    hidden, weight, labels, bias = operands((12,), 16, 64, device)
    dtype = torch.float16 if on_triton else torch.bfloat16
    leaves = [t.clone().requires_grad_() for t in (hidden, weight, bias)]
    with torch.autocast(device.type, dtype=dtype):
        loss = ops.linear_cross_entropy(leaves[0], leaves[1], labels, bias=leaves[2], reduction=reduction)
    loss.sum().backward()
    assert loss.dtype == torch.float32
    assert all(leaf.grad.dtype == torch.float32 for leaf in leaves)
    low = [t.to(dtype) for t in (hidden, weight, bias)]
    expected = ops.linear_cross_entropy(low[0], low[1], labels, bias=low[2], reduction=reduction)
    assert torch.equal(loss, expected)


@on_cpu
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradcheck(reduction):
    hidden, weight, labels, bias = operands((2, 9), 3, 7, "cpu", torch.float64)
    leaves = [t.requires_grad_() for t in (hidden, weight, bias)]
    for options in ({}, dict(label_smoothing=0.1, z_loss=0.1, softcap=2.0)):
        assert torch.autograd.gradcheck(
            lambda h, w, b, options=options: ops.linear_cross_entropy(
                h, w, labels, bias=b, reduction=reduction, **options
            ),
            leaves,
        )


@not_on_cpu
def test_triton_refuses_float64(device):
    hidden, weight, labels, _ = operands((4,), 8, 16, device, torch.float64)
    with pytest.raises(TypeError, match="hidden is float64"):
        ops.linear_cross_entropy(hidden, weight, labels)


_GOOD = dict(hidden=torch.ones(2, 8), weight=torch.ones(5, 8), labels=torch.tensor([0, 1]))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (dict(hidden=[1.0]), TypeError, "hidden must be a torch.Tensor, got list"),
        (dict(weight=torch.ones(5, 8).long()), TypeError, "weight must be float16"),
        (dict(hidden=torch.ones(())), ValueError, "hidden must have at least one dimension"),
        (dict(weight=torch.ones(5, 7)), ValueError, r"weight must have shape \(vocab, 8\), vocab > 0, got \(5, 7\)"),
        (dict(weight=torch.ones(0, 8)), ValueError, r"weight must have shape \(vocab, 8\), vocab > 0, got \(0, 8\)"),
        (dict(weight=torch.ones(5, 8).half()), TypeError, "weight must have the input's dtype, torch.float32"),
        (dict(weight=torch.ones(5, 8, device="meta")), ValueError, "weight must be on hidden's device"),
        (dict(bias=torch.ones(8)), ValueError, r"bias must have shape \(5,\), got \(8,\)"),
        (dict(bias=torch.ones(5).half()), TypeError, "bias must have the input's dtype"),
        (dict(labels=torch.tensor([0.0, 1.0])), TypeError, "labels must be int64, got torch.float32"),
        (dict(labels=torch.tensor([0, 1, 2])), ValueError, r"labels must have shape \(2,\), got \(3,\)"),
        (dict(labels=torch.tensor([0, 5])), ValueError, r"labels must lie in \[0, 5\) or be ignore_index, -100, got 5"),
        (dict(label_smoothing=-0.1), ValueError, r"label_smoothing must lie in \[0, 1\], got -0.1"),
        (dict(reduction="max"), ValueError, "reduction must be 'mean', 'sum' or 'none', got 'max'"),
    ],
)
def test_bad_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        ops.linear_cross_entropy(**(_GOOD | arguments))
