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
    "rms_norm": dict(x=X, weight=X[0]),
    "rope": dict(q=HEADS, k=HEADS, cos=ANGLES, sin=ANGLES),
    "softmax": dict(x=X),
    "swiglu": dict(gate=X, up=X),
}


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
