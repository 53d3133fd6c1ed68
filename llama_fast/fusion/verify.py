"""Checks a fused layer against the layer it stands in for, on random input, by the error rule.

Everything runs on a copy of one layer at a time, without its hooks: the model itself is neither run nor changed, and no
random number of PyTorch's is drawn. A copy answers three times: as it is (the peer), swapped, and, as it is again, in
float64 throughout (the reference). Attention and decoder layers need more than hidden states; what else they get (rotary angles, masks) is
recorded from one forward pass of the model in which stand-ins take the place of its layers and compute nothing.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast

from ..kernels.parity import GRADIENT_FACTOR, OUTPUT_FACTOR, error_bound, relative_error
from .swap import HOOKS, Fused, plain_copy, restore, swap

BATCH, SEQ, PADDING = 2, 12, 3
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


@dataclass(frozen=True)
class Case:
    """A call of a layer: hidden states (batch, seq, ...), the other arguments by attention, and which tokens count."""

    hidden: Tensor
    arguments: dict[str, dict[str, Any]] = field(default_factory=dict)
    counted: Tensor | None = None


Results = dict[str, Tensor]


def random_case(size: int, like: Tensor) -> Case:
    return Case(_randn(BATCH, SEQ, size, like=like))


def _randn(*shape: int, like: Tensor, seed: int = 0) -> Tensor:
    """The same numbers on every device and in every dtype, without touching PyTorch's own generators."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(like.device, like.dtype)


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
    hidden = _as_dtype(case.hidden, dtype).detach().clone().requires_grad_(gradients)
    arguments = {name: _as_dtype(value, dtype) for name, value in case.arguments.get(implementation, {}).items()}
    cache = DynamicCache() if with_cache else None
    if cache is not None:
        arguments["past_key_values"] = cache
    counted = torch.ones(hidden.shape[:2], dtype=torch.bool) if case.counted is None else case.counted
    with torch.set_grad_enabled(gradients):
        out = layer(hidden, **arguments)
        out = (out[0] if isinstance(out, tuple) else out)[counted]
    found = {"output": out.detach()}
    if gradients:
        upstream = _as_dtype(_randn(*out.shape, like=case.hidden, seed=1), dtype)
        found["gradient"] = torch.autograd.grad(out, hidden, upstream.to(out.dtype))[0]
    if cache is not None:
        entries: Any = cache.layers  # empty ones for the layers before this one
        entry = next(entry for entry in entries if entry.get_seq_length())
        for name, states in (("key", entry.keys), ("value", entry.values)):  # (batch, heads, seq, head_dim)
            found[name] = states.transpose(1, 2)[counted].detach()
    return found


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
            submodule.config._attn_implementation = implementation


def _set_experts(layer: nn.Module, implementation: str) -> None:
    submodule: Any
    for submodule in layer.modules():
        if hasattr(submodule, "config"):
            submodule.config._experts_implementation = implementation


def faint(case: Case) -> Case:
    """The case for a whole decoder layer: its norms undo the factor, so what it adds isn't lost beside what it adds it to."""
    return replace(case, hidden=case.hidden / 64)


def check_attention(layer: Any, cases: Sequence[Case], change: Callable[[nn.Module], None], **options: Any) -> Parity:
    """`check` with hidden states as they are, and with large ones, which show whether queries, keys or values are clipped."""
    loud: Any = plain_copy(layer)
    loud.scaling = layer.scaling / _LOUD**2  # the softmax sees what it saw
    shouted = [replace(case, hidden=case.hidden * _LOUD) for case in cases]
    return worst([check(layer, cases, change, **options), check(loud, shouted, change, **options)])


class _Recorder(Fused):
    """Stands in for a decoder layer: notes what it is called with, and returns its hidden states."""

    def __call__(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        self.__dict__["recorded"] = kwargs
        return hidden_states


def layer_cases(model: Any, layers: Sequence[nn.Module], implementations: Sequence[str]) -> list[list[Case]]:
    """For each decoder layer two calls, with the arguments that each attention asks for: one with left padding at the last
    positions that the model knows, where some scale their queries, and one at the first, without padding.

    The model's config must be its own: its attention is set for the time of the passes.
    """
    parameter = next(model.parameters())
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (BATCH, SEQ), generator=generator).to(parameter.device)
    cases: list[list[Case]] = [[] for _ in layers]
    for padding in (PADDING, 0):  # in this order: some rotary embeddings remember how far they went
        mask = torch.ones(BATCH, SEQ, dtype=torch.bool, device=parameter.device)
        mask[-1, :padding] = False
        inputs = dict(input_ids=ids) | (dict(attention_mask=mask, **_last_positions(model)) if padding else {})
        recorded = {name: _record(model, layers, name, **inputs) for name in implementations}
        for i, found in enumerate(cases):
            hidden = _randn(BATCH, SEQ, model.config.hidden_size, like=next(layers[i].parameters()), seed=i)
            found.append(Case(hidden, {name: calls[i] for name, calls in recorded.items()}, mask))
    return cases


def _last_positions(model: Any) -> dict[str, Tensor]:
    end = getattr(model.config, "max_position_embeddings", None)
    if not isinstance(end, int) or end < SEQ or "position_ids" not in inspect.signature(model.forward).parameters:
        return {}
    return dict(position_ids=torch.arange(end - SEQ, end, device=next(model.parameters()).device)[None])


def _record(model: Any, layers: Sequence[nn.Module], implementation: str, **inputs: Tensor) -> list[dict[str, Any]]:
    before = model.config._attn_implementation
    model.config._attn_implementation = implementation
    for layer in layers:
        swap(layer, _Recorder)
    try:
        with torch.no_grad():
            model.forward(**inputs, use_cache=False)
        return [layer.__dict__["recorded"] for layer in layers]
    finally:
        for layer in layers:
            restore(layer)
            layer.__dict__.pop("recorded", None)
        model.config._attn_implementation = before


def check_loss(model: Any, kind: type[Fused]) -> Parity:
    """Checks the loss, token by token, and the gradient of all of them, on a copy of the model's head alone."""
    head = plain_copy(model.get_output_embeddings())
    weight: Any = head.weight
    hidden = _randn(1, _TRIES + 1, weight.shape[1], like=weight)
    labels = torch.randint(weight.shape[0], (1, _TRIES + 1), generator=torch.Generator().manual_seed(1)).to(
        weight.device
    )
    with _only_head(model, head, hidden) as (twin, stub):
        peers = _losses(twin, stub, hidden, labels)
        swap(twin, kind)
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
