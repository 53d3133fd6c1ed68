"""What only a GPU can show, for every op: CUDA graphs, a second device, more elements than an int32 counts."""

import pytest
import torch

from llama_fast import ops
from llama_fast.kernels.launch import INTERPRETED
from tests.parity import assert_equal_bits

# those of a decoding step run in graphs, and on another device, in tests/engine/test_gpu.py
OPS = [op for op in ops.__all__ if op not in ("norm_qkv_rope", "norm_swiglu")]

pytestmark = pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="needs a GPU")


def arguments(op, device):
    """Positional arguments of `ops.<op>`, on which it runs a Triton kernel forward and, if it has one, backward."""

    def randn(*shape):
        return torch.randn(shape, device=device, dtype=torch.bfloat16, requires_grad=op != "attention_decode")

    def integers(*values, dtype):
        return torch.tensor(values, device=device, dtype=dtype)

    labels = integers(5, -100, 200, 0, 7, 1, 255, 90, dtype=torch.int64)
    return {
        "attention": lambda: (randn(2, 4, 130, 64), randn(2, 2, 130, 64), randn(2, 2, 130, 64)),
        "attention_decode": lambda: (
            randn(2, 4, 1, 64),
            randn(2, 2, 600, 64),
            randn(2, 2, 600, 64),
            integers(600, 17, dtype=torch.int32),
        ),
        "cross_entropy": lambda: (randn(8, 256), labels),
        "geglu": lambda: (randn(8, 300), randn(8, 300)),
        "layer_norm": lambda: (randn(8, 300), randn(300), randn(300)),
        "linear": lambda: (randn(70, 256), randn(136, 256), randn(136)),
        "linear_cross_entropy": lambda: (randn(8, 64), randn(256, 64), labels),
        "rms_norm": lambda: (randn(8, 300), randn(300)),
        "rope": lambda: (randn(2, 4, 30, 64), randn(2, 2, 30, 64), randn(30, 64), randn(30, 64)),
        "softmax": lambda: (randn(8, 300),),
        "swiglu": lambda: (randn(8, 300), randn(8, 300)),
    }[op]()


def outputs_and_gradients(op, tensors):
    outputs = getattr(ops, op)(*tensors)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    leaves = [tensor for tensor in tensors if tensor.requires_grad]
    if not leaves:
        return outputs
    gradients = torch.autograd.grad(outputs, leaves, [torch.ones_like(y) for y in outputs], allow_unused=True)
    return *outputs, *(gradient for gradient in gradients if gradient is not None)


@pytest.mark.parametrize("op", OPS)
def test_cuda_graph_replays_the_bits_of_eager(op, device):
    tensors = arguments(op, device)
    outputs_and_gradients(op, tensors)  # compiles the kernels, which a capture cannot
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = outputs_and_gradients(op, tensors)
    with torch.no_grad():
        for tensor in tensors:
            if tensor.is_floating_point():
                tensor.normal_()
    graph.replay()
    assert_equal_bits(captured, outputs_and_gradients(op, tensors))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("op", OPS)
def test_runs_on_the_device_of_its_tensors(op):
    tensors = arguments(op, torch.device("cuda:1"))
    with torch.cuda.device(1):
        expected = outputs_and_gradients(op, tensors)
    with torch.cuda.device(0):
        actual = outputs_and_gradients(op, tensors)
        assert torch.cuda.current_device() == 0
    assert_equal_bits(actual, expected)


@pytest.mark.parametrize(
    "function",
    [lambda x: ops.rms_norm(x, None), ops.softmax, lambda x: ops.swiglu(x, x)],
    ids=["rms_norm", "softmax", "swiglu"],
)
def test_more_elements_than_int32_counts(function, device):
    rows, hidden, last = 2**31 // 4096 + 64, 4096, 64
    needed = 8 * rows * hidden * torch.bfloat16.itemsize
    if torch.cuda.mem_get_info(device)[0] < needed:
        pytest.skip(f"needs {needed / 1e9:.0f} GB of free GPU memory")
    x = torch.empty(rows, hidden, device=device, dtype=torch.bfloat16).normal_()
    ends = []
    for part in (x, x[-last:]):  # the last rows, past 2^31, must be what they are alone
        leaf = part.detach().requires_grad_()
        y = function(leaf)
        (gradient,) = torch.autograd.grad(y, leaf, y.detach())
        ends.append((y.detach()[-last:].clone(), gradient[-last:].clone()))
        del y, gradient
    assert_equal_bits(*ends)
