"""Cross entropy, forward and backward: parity, reductions, ignored labels, edges, and what PyTorch asks of an op."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_fast import ops
from llama_fast.kernels import reference
from llama_fast.kernels.cross_entropy import (
    cross_entropy_backward_op,
    cross_entropy_op,
    plan_cross_entropy,
    plan_cross_entropy_backward,
)
from llama_fast.kernels.launch import gpu_of
from llama_fast.kernels.objective import Objective
from tests.parity import DTYPES, assert_parity, assert_same_bits, not_interpreted, not_on_cpu, on_cpu, triton_only

REDUCTIONS = ["mean", "sum", "none"]


def torch_cross_entropy(logits, labels, *, z_loss=0.0, softcap=None, reduction="mean", ignore_index=-100, **options):
    """PyTorch's own ops for the same, in float32: the peer."""
    z = logits.float()
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    rows, flat = z.reshape(-1, z.shape[-1]), labels.reshape(-1)
    losses = F.cross_entropy(rows, flat, reduction=reduction, ignore_index=ignore_index, **options)
    if z_loss:
        counts = flat != ignore_index
        squares = torch.where(counts, z_loss * torch.logsumexp(rows, -1).square(), 0.0)
        losses = losses + {"mean": squares.sum() / counts.sum(), "sum": squares.sum(), "none": squares}[reduction]
    return losses.view(labels.shape) if reduction == "none" else losses


def assert_cross_entropy(logits, labels, **options):
    assert_parity(
        lambda x: ops.cross_entropy(x, labels, **options),
        lambda x: torch_cross_entropy(x, labels, **options),
        lambda x: reference.cross_entropy(x, labels, **options),
        [logits],
    )


def tokens(shape, vocab, device, dtype=torch.float32):
    """Logits and labels of as many tokens, every third of which is ignored.

    Losses are well above zero: one near it is a difference of numbers that are nearly equal, noise in any implementation.
    """
    labels = torch.randint(0, vocab, shape, device=device)
    labels.view(-1)[1::3] = -100
    return 0.7 * torch.randn(*shape, vocab, device=device, dtype=dtype), labels


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "vocab"), [((5,), 64), ((2, 3), 1000), ((1,), 5000), ((70,), 130)])
def test_matches_the_reference(shape, vocab, dtype, reduction, device):
    assert_cross_entropy(*tokens(shape, vocab, device, dtype), reduction=reduction)


@pytest.mark.parametrize(
    "options",
    [
        dict(label_smoothing=0.1),
        dict(z_loss=1e-2),
        dict(softcap=3.0),
        dict(label_smoothing=1.0),
        dict(label_smoothing=0.2, z_loss=1e-3, softcap=5.0),
    ],
    ids=str,
)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_options(dtype, reduction, options, device):
    assert_cross_entropy(*tokens((2, 4), 700, device, dtype), reduction=reduction, **options)


@pytest.mark.parametrize("vocab", [32000, 128256, 262144])
def test_vocabularies_of_models(vocab, device):
    assert_cross_entropy(*tokens((2,), vocab, device, torch.float16), label_smoothing=0.1, reduction="none")


@pytest.mark.parametrize("vocab", [2, 3, 7, 8, 9, 33])
def test_few_classes(vocab, device):
    assert_cross_entropy(*tokens((60,), vocab, device), reduction="none")


def test_one_class_is_certain(device):
    logits = torch.randn(4, 1, device=device, requires_grad=True)
    loss = ops.cross_entropy(logits, torch.zeros(4, device=device).long())
    loss.backward()
    assert loss == 0 and logits.grad.eq(0).all()


@settings(max_examples=15, deadline=None)
@given(count=st.integers(1, 40), vocab=st.integers(64, 400), reduction=st.sampled_from(REDUCTIONS))
def test_any_shape(device, count, vocab, reduction):
    assert_cross_entropy(*tokens((count,), vocab, device), reduction=reduction)


@pytest.mark.parametrize("layout", ["columns of a wider matrix", "transposed", "every other element", "shifted"])
def test_strides(layout, device):
    logits = {
        "columns of a wider matrix": torch.randn(6, 5, 200, device=device)[..., 10:106],
        "transposed": torch.randn(96, 5, 6, device=device).permute(2, 1, 0),
        "every other element": torch.randn(6, 5, 192, device=device)[..., ::2],
        "shifted": torch.randn(6, 6, 96, device=device)[:, :-1],
    }[layout]
    labels = torch.randint(0, 96, (5, 6), device=device).t()
    assert_cross_entropy(logits, labels, reduction="none")
    assert_cross_entropy(logits, labels)


def test_one_token_without_dimensions(device):
    assert_cross_entropy(torch.randn(50, device=device), torch.tensor(7, device=device), reduction="none")


def test_a_gradient_for_each_token(device):
    """reduction="none" multiplies each token's gradient by its own upstream gradient, also when that is expanded."""
    logits, labels = tokens((12,), 90, device)
    weights = torch.randn(12, device=device)
    for upstream in (weights, weights[:1].expand(12)):
        results = []
        for function, dtype in ((ops.cross_entropy, torch.float32), (reference.cross_entropy, torch.float64)):
            x = logits.to(dtype).requires_grad_()
            results.append(torch.autograd.grad(function(x, labels, reduction="none"), x, upstream.to(dtype))[0])
        torch.testing.assert_close(results[0].double(), results[1])


@pytest.mark.parametrize("ignore_index", [-100, 3, -1])
def test_ignored_tokens_have_no_loss_and_no_gradient(ignore_index, device):
    logits, labels = torch.randn(8, 50, device=device), torch.randint(4, 50, (8,), device=device)
    labels[::2] = ignore_index
    logits[0] = float("nan")  # not even what is in their logits counts
    x = logits.clone().requires_grad_()
    losses = ops.cross_entropy(x, labels, ignore_index=ignore_index, reduction="none")
    losses.sum().backward()
    assert torch.equal(losses[::2], torch.zeros(4, device=device))
    assert torch.equal(x.grad[::2], torch.zeros(4, 50, device=device))
    mean = ops.cross_entropy(logits, labels, ignore_index=ignore_index)
    torch.testing.assert_close(mean, F.cross_entropy(logits[1::2], labels[1::2]))


@pytest.mark.parametrize("shape", [(0,), (4,)])
def test_no_token_counts(shape, device):
    """As PyTorch: a mean over nothing is NaN, a sum is 0; the gradient is zero."""
    labels = torch.full(shape, -100, device=device)
    for reduction, expected in (("mean", math.nan), ("sum", 0.0)):
        x = torch.randn(*shape, 10, device=device, requires_grad=True)
        loss = ops.cross_entropy(x, labels, reduction=reduction)
        loss.backward()
        torch.testing.assert_close(loss.item(), expected, equal_nan=True)
        assert torch.equal(x.grad, torch.zeros_like(x))


@pytest.mark.parametrize("vocab", [10, 5000])
def test_forbidden_classes(vocab, device):
    """Classes masked with -inf, whole vectors of them at the start, have no probability and no gradient."""
    logits, labels = torch.randn(3, vocab, device=device), torch.tensor([vocab - 1, vocab - 1, -100], device=device)
    logits[:, : vocab // 2] = float("-inf")
    x = logits.clone().requires_grad_()
    loss = ops.cross_entropy(x, labels)
    loss.backward()
    torch.testing.assert_close(loss, F.cross_entropy(logits, labels))
    assert x.grad[:, : vocab // 2].eq(0).all()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("scale", [1e4, 1e-4])
def test_large_and_small_logits(scale, device):
    logits, labels = tokens((6,), 300, device)
    assert_cross_entropy(logits * scale, labels)
    assert_cross_entropy(logits * scale, labels, softcap=5.0 * scale)


def test_logits_stay_as_they_are(device):
    logits, labels = tokens((6,), 300, device, torch.float16)
    x = logits.clone().requires_grad_()
    ops.cross_entropy(x, labels).backward()
    assert torch.equal(x, logits)


@triton_only
@pytest.mark.parametrize("label", [50, 10**9, -1, -(10**9)])
def test_label_out_of_range_on_a_gpu_gives_nan(label, device):
    """The kernels themselves: on the CPU the op raises before. The tokens beside it are not touched."""
    logits, labels = torch.randn(3, 50, device=device), torch.tensor([1, label, 2], device=device)
    losses, lse, dlogits = torch.empty(3, device=device), torch.empty(3, 2, device=device), torch.empty_like(logits)
    objective = Objective(-100, 0.0, 0.0, None)
    plan_cross_entropy(logits, labels, losses, lse, objective, gpu=gpu_of(logits.device)).launch()
    plan_cross_entropy_backward(logits, labels, lse, dlogits, objective, dloss=None, count=None).launch()
    assert losses.isnan().tolist() == [False, True, False]
    assert dlogits.isnan().all(1).tolist() == [False, True, False]
    assert dlogits[::2].isfinite().all()


def test_label_out_of_range_on_the_cpu_is_an_error(device):
    if device.type != "cpu":
        pytest.skip("on a GPU the check would wait for the device")
    for label in (10, -1):
        with pytest.raises(ValueError, match=rf"labels must lie in \[0, 10\) or be ignore_index, -100, got {label}"):
            ops.cross_entropy(torch.randn(2, 10), torch.tensor([1, label]))


def test_same_bits_every_run(device):
    logits, labels = tokens((50,), 600, device)

    def run():
        x = logits.clone().requires_grad_()
        loss = ops.cross_entropy(x, labels, label_smoothing=0.1, softcap=5.0)
        return loss, *torch.autograd.grad(loss, x)

    assert_same_bits(run)


@pytest.mark.parametrize(
    ("reduction", "requires_grad"), [("mean", False), ("mean", True), ("sum", True), ("none", True)]
)
def test_opcheck(requires_grad, reduction, device):
    logits, labels = tokens((2, 3), 40, device)
    logits.requires_grad_(requires_grad)
    torch.library.opcheck(cross_entropy_op, (logits, labels, -100, 0.1, 1e-3, 5.0, reduction))


def test_opcheck_of_backward(device):
    logits, labels = tokens((2, 3), 40, device)
    loss, lse, count = cross_entropy_op(logits, labels, -100, 0.0, 0.0, None, "mean")
    torch.library.opcheck(
        cross_entropy_backward_op, (loss, logits, labels, lse, count, -100, 0.0, 0.0, None),
        test_utils=("test_schema", "test_faketensor"),
    )  # fmt: skip


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_whole(dynamic, reduction, device):
    def function(logits, labels):
        return ops.cross_entropy(logits, labels, softcap=5.0, reduction=reduction)

    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic)
    for count in (4, 7):
        logits, labels = tokens((2, count), 64, device)
        results = []
        for f in (function, compiled):
            x = logits.clone().requires_grad_()
            loss = f(x, labels)
            results.append((loss, torch.autograd.grad(loss.square().sum(), x)[0]))
        for eager, traced in zip(*results, strict=True):
            torch.testing.assert_close(eager, traced)


def test_autocast_leaves_the_loss_in_float32(device):
    logits, labels = tokens((4,), 64, device, torch.bfloat16)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        assert ops.cross_entropy(logits, labels).dtype == torch.float32
        assert ops.cross_entropy(logits.float(), labels).dtype == torch.float32


@on_cpu
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradcheck(reduction):
    logits, labels = tokens((2, 3), 7, "cpu", torch.float64)
    for options in ({}, dict(label_smoothing=0.1, z_loss=0.1, softcap=2.0)):
        assert torch.autograd.gradcheck(
            lambda x, options=options: ops.cross_entropy(x, labels, reduction=reduction, **options),
            logits.requires_grad_(),
        )


@not_on_cpu
def test_triton_refuses_float64(device):
    with pytest.raises(TypeError, match="logits is float64"):
        ops.cross_entropy(torch.ones(2, 4, device=device).double(), torch.zeros(2, device=device).long())


_GOOD = dict(logits=torch.ones(2, 8), labels=torch.tensor([0, 1]))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (dict(logits=[1.0]), TypeError, "logits must be a torch.Tensor, got list"),
        (dict(logits=torch.ones(2, 8).long()), TypeError, "logits must be float16"),
        (dict(logits=torch.ones(())), ValueError, r"logits must have shape \(..., vocab\)"),
        (dict(logits=torch.ones(2, 0)), ValueError, r"at least one class, got \(2, 0\)"),
        (dict(labels=[0, 1]), TypeError, "labels must be a torch.Tensor, got list"),
        (dict(labels=torch.tensor([0, 1], dtype=torch.int32)), TypeError, "labels must be int64, got torch.int32"),
        (dict(labels=torch.tensor([0, 1, 2])), ValueError, r"labels must have shape \(2,\), got \(3,\)"),
        (dict(labels=torch.tensor([0, 1], device="meta")), ValueError, "labels must be on logits's device"),
        (dict(ignore_index=None), TypeError, "ignore_index must be an int, got NoneType"),
        (dict(label_smoothing=1.5), ValueError, r"label_smoothing must lie in \[0, 1\], got 1.5"),
        (dict(z_loss=-1.0), ValueError, "z_loss must be at least 0 and finite, got -1.0"),
        (dict(softcap=0.0), ValueError, "softcap must be positive and finite, or None, got 0.0"),
        (dict(softcap=math.inf), ValueError, "softcap must be positive and finite, or None, got inf"),
        (dict(reduction="max"), ValueError, "reduction must be 'mean', 'sum' or 'none', got 'max'"),
    ],
)
def test_bad_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        ops.cross_entropy(**(_GOOD | arguments))


@not_interpreted
def test_meta_tensors_have_the_real_shapes():
    logits, labels = torch.empty(3, 4, 9, device="meta"), torch.empty(3, 4, dtype=torch.int64, device="meta")
    assert ops.cross_entropy(logits, labels).shape == ()
    assert ops.cross_entropy(logits, labels, reduction="none").shape == (3, 4)
