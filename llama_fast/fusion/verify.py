"""Checks a fused layer against the layer it stands in for, on random input, by the error rule.

Everything runs on a copy of one layer at a time, without its hooks. The model itself is run only to see what its layers are called
with (`calls`); nothing of it is changed, and PyTorch's random numbers go on where they were. A copy answers three times: as it is (the peer), swapped, and, as it is again, in
float64 throughout (the reference).
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..kernels.parity import GRADIENT_FACTOR, OUTPUT_FACTOR, error_bound, relative_error
from .calls import Case, LayerCases, randn
from .neighbours import BaseModelOutputWithPast, DynamicCache, cache_name, set_attention, set_experts
from .swap import HOOKS, plain_copy, restore

_TRIES = 8
_LOUD = 8  # ten deviations of a projection of unit input, and no overflow of their products in float16


@dataclass(frozen=True)
class Parity:
    """How far a swapped layer is from the float64 reference, beside the layer it replaces."""

    error: float
    peer_error: float
    bound: float
    what: str = ""

    @property
    def passed(self) -> bool:
        return self.error <= self.bound

    def __str__(self) -> str:
        return (
            f"{self.what} is off by {self.error:.1e}, the original by {self.peer_error:.1e}: more than {self.bound:.1e}"
        )


Results = dict[str, Tensor]


def check(
    layer: nn.Module,
    cases: Sequence[Case],
    change: Callable[[nn.Module], None],
    *,
    implementations: tuple[str, str, str] = ("", "", ""),
    with_cache: bool = False,
    gradients: bool = False,
) -> Parity:
    """The worst parity over the cases of a copy of `layer` that `change` swaps.

    `implementations` name the attention of the peer, of the swapped layer and of the reference; `with_cache` compares what
    goes into a KV cache too, `gradients` the gradient of the hidden states.
    """
    own, ours, exact = implementations
    twin = plain_copy(layer)

    def results(implementation: str, dtype: torch.dtype | None) -> list[Results]:
        _set_attention(twin, implementation)
        return [_run(twin, case, implementation, dtype, with_cache=with_cache, gradients=gradients) for case in cases]

    peers = results(own, None)
    change(twin)
    swapped = results(ours, None)
    for submodule in twin.modules():
        restore(submodule)
    twin.double()
    _set_experts(twin, "eager")  # the others' grouped matmuls are not there in float64
    with InFloat64():
        references = results(exact, torch.float64)
    parities = [
        _parity(name, a[name], p[name], r[name])
        for a, p, r in zip(swapped, peers, references, strict=True)
        for name in r
    ]
    return worst(parities)


def worst(parities: Iterable[Parity]) -> Parity:
    """One that did not pass if there is one, else that with the largest error."""
    return max(parities, key=lambda parity: (not parity.passed, parity.error))


class InFloat64(TorchFunctionMode):
    """Layers round to float32 on their way (norms, softmax, losses): here they get float64 where they ask for float32."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.float:
            func = Tensor.double
        args = tuple(torch.float64 if arg is torch.float32 else arg for arg in args)
        kwargs = {name: torch.float64 if arg is torch.float32 else arg for name, arg in (kwargs or {}).items()}
        return func(*args, **kwargs)


def _run(
    layer: nn.Module, case: Case, implementation: str, dtype: torch.dtype | None, *, with_cache: bool, gradients: bool
) -> Results:
    """What the layer gives for the calls of a case, those of one name together. One that has a cache of its own gets no other."""
    gradients, with_cache = gradients and case.trains, with_cache and case.make_cache is None
    cache: Any = DynamicCache() if with_cache else case.make_cache() if case.make_cache is not None else None
    found: Results = {}
    with torch.set_grad_enabled(gradients):
        for call in case.calls:
            hidden = _as_dtype(call.hidden, dtype).detach().clone().requires_grad_(gradients)
            given = {name: _as_dtype(value, dtype) for name, value in call.arguments_of(implementation, cache).items()}
            if with_cache:
                given[cache_name(layer.forward) or ""] = cache
            out = layer(hidden, **given)
            out = out[0] if isinstance(out, tuple) else out
            out = out if call.counted is None else out[call.counted]
            found[call.what] = torch.cat((found[call.what], out)) if call.what in found else out
    if gradients:
        upstream = _as_dtype(randn(*found[call.what].shape, like=call.hidden, seed=1), dtype)
        found["gradient"] = torch.autograd.grad(found[call.what], hidden, upstream.to(found[call.what].dtype))[0]
    if with_cache:
        entry = next(entry for entry in cache.layers if entry.get_seq_length())  # the layers before have empty ones
        for name, states in (("key", entry.keys), ("value", entry.values)):  # (batch, heads, seq, head_dim)
            found[name] = states.transpose(1, 2)[call.counted]
    return {name: tensor.detach() for name, tensor in found.items()}


def _as_dtype(value: Any, dtype: torch.dtype | None) -> Any:
    if isinstance(value, tuple):
        return tuple(_as_dtype(part, dtype) for part in value)
    is_floating = isinstance(value, Tensor) and value.is_floating_point()
    return value.to(dtype) if is_floating and dtype is not None else value


def _parity(name: str, actual: Tensor, peer: Tensor, reference: Tensor) -> Parity:
    if actual.dtype != peer.dtype:
        raise TypeError(f"the {name} is {actual.dtype}, the original's {peer.dtype}")
    factor = GRADIENT_FACTOR if name == "gradient" else OUTPUT_FACTOR
    error, peer_error = relative_error(actual, reference), relative_error(peer, reference)
    return Parity(error, peer_error, error_bound(peer_error, actual.dtype, factor=factor), f"the {name}")


def _set_attention(layer: nn.Module, implementation: str) -> None:
    """Sets the attention of a copy, whose config is its own."""
    submodule: Any
    for submodule in layer.modules():
        if implementation and hasattr(submodule, "config"):
            set_attention(submodule.config, implementation)


def _set_experts(layer: nn.Module, implementation: str) -> None:
    submodule: Any
    for submodule in layer.modules():
        if hasattr(submodule, "config"):
            set_experts(submodule.config, implementation)


def faint(cases: Iterable[Case]) -> list[Case]:
    """Cases for a whole decoder layer: its norms undo the factor, so what it adds isn't lost beside what it adds it to."""
    return [case.scaled(1 / 64) for case in cases]


def check_attention(layer: Any, cases: LayerCases, change: Callable[[nn.Module], None], **options: Any) -> Parity:
    """`check` with hidden states as they are, and with large ones, which show whether queries, keys or values are clipped."""
    loud: Any = plain_copy(layer)
    loud.scaling = layer.scaling / _LOUD**2  # the softmax sees what it saw
    shouted = [case.scaled(_LOUD) for case in cases.prompts]
    return worst(
        [
            check(layer, cases.prompts + cases.pieces, change, **options),
            check(loud, shouted, change, **options),
        ]
    )


def check_loss(model: Any, change: Callable[[nn.Module], None]) -> Parity:
    """Checks the loss, token by token, and the gradient of all of them, on a copy of the model's head alone."""
    head = plain_copy(model.get_output_embeddings())
    weight: Any = head.weight
    hidden = randn(1, _TRIES + 1, weight.shape[1], like=weight)
    labels = torch.randint(weight.shape[0], (1, _TRIES + 1), generator=torch.Generator().manual_seed(1)).to(
        weight.device
    )
    with _only_head(model, head, hidden) as (twin, stub):
        peers = _losses(twin, stub, hidden, labels)
        change(twin)
        ours = _losses(twin, stub, hidden, labels)
        if twin(labels=labels).logits is not None:
            raise RuntimeError("its loss was computed from its logits")
        restore(twin)
        head.double()
        with InFloat64():
            reference = _losses(twin, stub, hidden.double(), labels)
    parities = [_parity(name, ours[name], peers[name], reference[name]) for name in reference]
    return worst(parities)


class _Stub(nn.Module):
    """In place of the decoder: hidden states that were there before."""

    embed_tokens = None  # a model without input embeddings would deny its head

    def __init__(self) -> None:
        super().__init__()
        self.hidden = torch.empty(0)

    def get_input_embeddings(self) -> None:
        return self.embed_tokens

    def forward(self, **_: Any) -> BaseModelOutputWithPast:
        return BaseModelOutputWithPast(last_hidden_state=self.hidden)


@contextmanager
def _only_head(model: Any, head: nn.Module, hidden: Tensor) -> Iterator[tuple[Any, _Stub]]:
    """The model in training mode, with its own settings, a copy of its head, and nothing in place of its decoder."""
    twin: Any = object.__new__(type(model))
    twin.__dict__.update(model.__dict__)
    twin.__dict__["_modules"] = dict(model._modules)
    for hooks in HOOKS:
        twin.__dict__[hooks] = {}
    stub = _Stub()
    setattr(twin, model.base_model_prefix, stub)
    twin.set_output_embeddings(head)
    twin.training = True
    yield twin, stub


def _losses(model: Any, stub: _Stub, hidden: Tensor, labels: Tensor) -> Results:
    """The losses with all labels but one ignored, one after the other, and the gradient of the loss with none ignored."""
    with torch.no_grad():
        stub.hidden = hidden
        alone = [model(labels=_only(labels, i)).loss for i in range(1, labels.shape[1])]
    stub.hidden = hidden.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(labels=labels).loss, stub.hidden)
    return {"loss": torch.stack(alone), "gradient": gradient}


def _only(labels: Tensor, i: int) -> Tensor:
    kept = torch.full_like(labels, -100)
    kept[:, i] = labels[:, i]
    return kept
