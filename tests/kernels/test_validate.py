"""Arguments that are no tensors: every op names them before anything else happens."""

import inspect

import pytest
import torch
from torch import Tensor

from llama_fast import ops

X, LABELS = torch.ones(2, 8), torch.zeros(2, dtype=torch.int64)
HEADS, ANGLES = torch.ones(2, 4, 1, 16), torch.ones(1, 1, 16)

GOOD = {
    "attention": dict(q=HEADS, k=HEADS, v=HEADS),
    "attention_decode": dict(q=HEADS, k_cache=HEADS, v_cache=HEADS, cache_lens=torch.ones(2, dtype=torch.int32)),
    "cross_entropy": dict(logits=X, labels=LABELS),
    "geglu": dict(gate=X, up=X),
    "layer_norm": dict(x=X),
    "linear": dict(x=X, weight=X),
    "linear_cross_entropy": dict(hidden=X, weight=X, labels=LABELS),
    "norm_qkv_rope": dict(
        x=X, norm_weight=X[0], qkv_weight=torch.ones(64, 8), qkv_bias=torch.ones(64), cos=torch.ones(2, 16),
        sin=torch.ones(2, 16), k_cache=torch.ones(4, 1, 2, 16), v_cache=torch.ones(4, 1, 2, 16),
        slots=torch.arange(2), eps=1e-5, heads=2,
    ),
    "norm_swiglu": dict(x=X, norm_weight=X[0], gate_up_weight=X, bias=X[:, 0], eps=1e-5),
    "rms_norm": dict(x=X, weight=X[0]),
    "rope": dict(q=HEADS, k=HEADS, cos=ANGLES, sin=ANGLES),
    "softmax": dict(x=X),
    "swiglu": dict(gate=X, up=X),
}  # fmt: skip


def tensor_arguments():
    """(op, argument, a value that it must refuse)"""
    for op in ops.__all__:
        for name, parameter in inspect.signature(getattr(ops, op)).parameters.items():
            if parameter.annotation is Tensor:
                yield op, name, None
                yield op, name, [1.0]
            elif parameter.annotation == Tensor | None:
                yield op, name, [1.0]


@pytest.mark.parametrize(("op", "name", "value"), list(tensor_arguments()))
def test_what_is_no_tensor_is_named(op, name, value):
    with pytest.raises(TypeError, match=rf"^{name} must be an? .*[tT]ensor, got {type(value).__name__}$"):
        getattr(ops, op)(**GOOD[op] | {name: value})
