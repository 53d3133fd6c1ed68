"""What a function launches, as a recording."""

import pytest
import torch

from llama_fast import ops
from llama_fast.kernels import cpu
from llama_fast.kernels.native.capture import NotRecordableError, record
from tests.kernels.native.handwritten import native
from tests.parity import not_interpreted

pytestmark = [native, not_interpreted]


def layer(x, norm, weight):
    return ops.linear(ops.rms_norm(x, norm), weight, residual=x)


def test_a_replay_computes_the_outputs_anew():
    x, norm, weight = torch.randn(3, 64), torch.randn(64), torch.randn(64, 64)
    with torch.inference_mode(), cpu.use("native"):
        output, recording = record(lambda: layer(x, norm, weight))
        assert torch.equal(output, layer(x, norm, weight))
        x.copy_(torch.randn(3, 64))
        recording.replay()
        assert torch.equal(output, layer(x, norm, weight))


def test_what_was_allocated_stays_with_the_recording():
    x, norm, weight = torch.randn(3, 64), torch.randn(64), torch.randn(64, 64)
    with torch.inference_mode(), cpu.use("native"):
        output, recording = record(lambda: layer(layer(x, norm, weight), norm, weight))
        for _ in range(20):  # would take memory that was freed
            torch.full((3, 64), torch.nan)
        recording.replay()
        assert torch.equal(output, layer(layer(x, norm, weight), norm, weight))


@pytest.mark.parametrize(
    ("function", "named"),
    [
        (lambda x: ops.softmax(x) + 1, "aten.add.Tensor"),
        (lambda x: ops.softmax(x.T.contiguous()), "aten.contiguous.default"),
        (lambda x: ops.softmax(x.half()), "aten.to.dtype"),
        (lambda x: ops.softmax(x).sum().item(), "aten.sum.default"),
    ],
)
def test_what_a_replay_would_leave_out_is_an_error(function, named):
    x = torch.randn(4, 8)
    with torch.inference_mode(), pytest.raises(NotRecordableError, match=named):
        record(lambda: function(x))


def test_an_op_that_copies_its_input_is_an_error():
    x = torch.randn(2, 3, 8).transpose(0, 1)  # rows that no view makes one row after the other
    weight = torch.ones(8)
    with torch.inference_mode(), pytest.raises(NotRecordableError, match=r"aten\.reshape\.default"):
        record(lambda: ops.rms_norm(x, weight))


def test_float64_is_an_error():
    x = torch.randn(4, 8, dtype=torch.float64)
    with torch.inference_mode(), pytest.raises(NotRecordableError, match=r"llama_fast::softmax .*float64"):
        record(lambda: ops.softmax(x))


def test_a_kernel_that_can_fail_is_an_error(monkeypatch):
    monkeypatch.setenv("LLAMA_FAST_CHECK_BOUNDS", "1")
    x = torch.randn(4, 8)
    with torch.inference_mode(), pytest.raises(NotRecordableError, match="can fail"):
        record(lambda: ops.softmax(x))


def test_ops_are_remembered_and_chosen_as_before_afterwards():
    x = torch.randn(4, 8)
    with torch.inference_mode(), cpu.use("pytorch"):
        expected = ops.softmax(x)
        record(lambda: ops.softmax(x))
        assert cpu.chosen() == "pytorch" and torch.equal(ops.softmax(x), expected)


def test_a_product_with_a_residual_is_remembered():
    """It asked PyTorch which dtype two equal ones make, which counted as an operator."""
    x, weight, residual = torch.randn(3, 64), torch.randn(64, 64), torch.randn(3, 64)
    with torch.inference_mode(), cpu.use("native"):
        ops.linear(x, weight, residual=residual)
        from llama_fast.kernels import library
        from llama_fast.kernels.linear import linear_op

        known = library._on_cpu[linear_op].known_call((x, weight, None, residual, None))
        assert known is not None and known is not library._on_cpu[linear_op]._kernel
