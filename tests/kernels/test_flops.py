"""What `torch.utils.flop_counter` counts for an op: as much as for PyTorch's own ops with the same results."""

import importlib
import pkgutil

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from llama_fast import kernels, ops

WITHOUT_PRODUCTS = {
    "add_layer_norm", "add_rms_norm", "cross_entropy", "cross_entropy_backward", "dropout", "embedding", "embedding_backward", "glu",
    "glu_backward", "layer_norm", "layer_norm_backward", "rms_norm", "rms_norm_backward", "rope", "rope_append", "rotary_angles", "sample",
    "softmax", "softmax_backward",
}  # fmt: skip

# PyTorch has formulas for its attention on a GPU alone
ON_THE_CPU = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda *shapes, **_: sdpa_flop_count(*shapes[:3]),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda *shapes, **_: sdpa_backward_flop_count(
        *shapes[:4]
    ),
}


def count(function, *tensors, backward=True):
    """The FLOPs of forward, and of forward with backward for the tensors that require a gradient."""
    with FlopCounterMode(display=False, custom_mapping=ON_THE_CPU) as counter:
        out = function(*tensors)
        forward = counter.get_total_flops()
        if backward:
            out.sum().backward()
    assert forward > 0
    return forward, counter.get_total_flops()


def randn(device, *shape, trained=True):
    return torch.randn(shape, device=device, requires_grad=trained)


def sdpa(q, k, v, causal=False):
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)


@pytest.mark.parametrize("trained", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("rows", [1, 20])
def test_linear(rows, activation, trained, device):
    x, weight, bias = (
        randn(device, 2, rows, 24, trained=trained[0]),
        randn(device, 8, 24, trained=trained[1]),
        randn(device, 8),
    )
    plain = count(lambda x, w, b: F.silu(F.linear(x, w, b)) if activation else F.linear(x, w, b), x, weight, bias)
    assert count(lambda *tensors: ops.linear(*tensors, activation=activation), x, weight, bias) == plain


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("trained", [(True, True), (True, False), (False, True)])
def test_linear_cross_entropy(trained, reduction, device):
    hidden, weight = randn(device, 7, 24, trained=trained[0]), randn(device, 50, 24, trained=trained[1])
    labels = torch.arange(7, device=device)
    plain_forward, plain = count(
        lambda h, w: F.cross_entropy(F.linear(h, w), labels, reduction=reduction), hidden, weight
    )
    forward, total = count(lambda h, w: ops.linear_cross_entropy(h, w, labels, reduction=reduction), hidden, weight)
    assert total == plain
    assert forward == (plain_forward if reduction == "none" else plain)  # the mean makes its gradients in forward


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("seq_q", "seq_k"), [(20, 20), (1, 30), (9, 30)])
def test_attention(seq_q, seq_k, causal, device):
    q, k, v = randn(device, 2, 4, seq_q, 16), randn(device, 2, 2, seq_k, 16), randn(device, 2, 2, seq_k, 16)
    assert count(lambda *x: ops.attention(*x, causal=causal), q, k, v) == count(sdpa, q, k, v)


def test_packed_attention(device):
    """Sequence by sequence; of a stand-in, whose lengths nobody knows, all pairs at most."""
    q, k, v = (randn(device, heads, 20, 16) for heads in (4, 2, 2))
    ends = torch.tensor([0, 5, 20], dtype=torch.int32, device=device)

    def plain(q, k, v):
        return sum(sdpa(*(x[None, :, rows] for x in (q, k, v))).sum() for rows in (slice(0, 5), slice(5, 20)))

    assert count(lambda *x: ops.attention(*x, cu_seqlens_q=ends), q, k, v) == count(plain, q, k, v)
    tensors = [x.detach() for x in (q, k, v, ends)]
    with FakeTensorMode() as fake:
        *stand_ins, ends = (fake.from_tensor(x) for x in tensors)
        bound, _ = count(lambda *x: ops.attention(*x, cu_seqlens_q=ends), *stand_ins, backward=False)
    assert bound == 4 * 4 * 16 * 20 * 20


@pytest.mark.parametrize("page", [None, 4])
def test_attention_decode(page, device):
    """As much as a mask over the whole cache: how much of it is full is not looked at."""
    q, k = randn(device, 2, 4, 1, 16, trained=False), randn(device, 2, 2, 12, 16, trained=False)
    lens = torch.tensor([12, 5], dtype=torch.int32, device=device)
    plain = count(sdpa, q, k, k, backward=False)
    table = None
    if page:
        table = torch.arange(6, dtype=torch.int32, device=device).view(2, 3)
    cache = k if page is None else randn(device, 6, 2, page, 16, trained=False)
    assert count(lambda q: ops.attention_decode(q, cache, cache, lens, block_table=table), q, backward=False) == plain


def test_products_of_a_decoding_step(device):
    x, norm_weight, weight = (randn(device, *shape, trained=False) for shape in ((3, 24), (24,), (64, 24)))
    cos, cache = randn(device, 3, 8, trained=False), randn(device, 2, 2, 4, 8, trained=False)
    slots = torch.arange(3, device=device)
    plain = count(F.linear, x, weight, backward=False)
    assert count(lambda x: ops.norm_swiglu(x, norm_weight, weight, eps=1e-5), x, backward=False) == plain
    function = lambda x: ops.norm_qkv_rope(  # noqa: E731
        x, norm_weight, weight, None, cos, cos, cache, cache.clone(), slots, eps=1e-5, heads=4
    )
    assert count(function, x, backward=False) == plain


def test_every_op_with_products_has_a_formula():
    for file in pkgutil.iter_modules(kernels.__path__):  # each registers its own
        importlib.import_module(f"llama_fast.kernels.{file.name}")
    importlib.import_module("llama_fast.train.dropout")  # the one op that is no kernel's
    registered = {
        name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("llama_fast::")
    }
    counted = {name for name in registered if getattr(torch.ops.llama_fast, name) in flop_registry}
    assert registered - counted == WITHOUT_PRODUCTS
