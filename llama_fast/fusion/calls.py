"""Calls on which layers are checked: random hidden states, and for attention and decoder layers what the model hands them beside those.

The masks, angles and positions of a call are recorded from a forward pass of the model in which stand-ins take the place of its
layers and compute nothing. The calls together reach every branch that a fused model can take: prompts, padded on the left, on the right
and packed, then pieces of a prompt and single queries over caches.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from .neighbours import DynamicCache, StaticCache, attention_of, cache_name, set_attention
from .structure import attention
from .swap import Fused, restore, swap

BATCH, SEQ, PADDING = 2, 12, 3
# Of SEQ: a prompt, a chunk after it, and single queries, which have a kernel of their own. They are judged together: a single one
# has few heads, and in one of 90 calls of a trained model (SmolLM2) rounding alone gave 2.45 times the original's error, the median 1.01.
_PIECES = (5, 3, 1, 1, 1, 1)
_SLACK = 4  # of static caches: keys that are not there yet


class _TheCache:
    """Among the arguments of a call: in its place stands the cache that the calls of a case share."""


@dataclass(frozen=True)
class Call:
    """Hidden states (batch, seq, ...), the other arguments by attention, and which tokens (batch, seq) count."""

    hidden: Tensor
    arguments: dict[str, dict[str, Any]] = field(default_factory=dict)
    counted: Tensor | None = None
    what: str = "output"

    def arguments_of(self, implementation: str, cache: Any) -> dict[str, Any]:
        """The other arguments for an attention, with `cache` where the recorded call had one."""
        given = self.arguments.get(implementation, {})
        return {name: cache if value is _TheCache else value for name, value in given.items()}


@dataclass(frozen=True)
class Case:
    """Calls of a layer one after the other, over one cache where `make_cache` makes one. `trains`: gradients are compared too."""

    calls: tuple[Call, ...]
    make_cache: Callable[[], Any] | None = None
    trains: bool = True

    def scaled(self, factor: float) -> "Case":
        return replace(self, calls=tuple(replace(call, hidden=call.hidden * factor) for call in self.calls))


@dataclass(frozen=True)
class LayerCases:
    """For one decoder layer: whole `prompts`, one in `pieces` over a cache, and calls with the `masks` that neither of them has."""

    prompts: tuple[Case, ...] = ()
    pieces: tuple[Case, ...] = ()
    masks: tuple[Case, ...] = ()


def random_cases(size: int, like: Tensor) -> list[Case]:
    """For layers that take hidden states alone: a batch, and a single token, for which there are other kernels."""
    return [
        Case((Call(randn(BATCH, SEQ, size, like=like)),)),
        Case((Call(randn(1, 1, size, like=like, seed=1), what="output of one token"),), trains=False),
    ]


def randn(*shape: int, like: Tensor, seed: int = 0) -> Tensor:
    """The same numbers on every device and in every dtype, without touching PyTorch's own generators."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(like.device, like.dtype)


def layer_cases(model: Any, layers: Sequence[nn.Module], implementations: Sequence[str]) -> list[LayerCases]:
    """For each decoder layer the calls that `model` makes of it, with the arguments that each attention asks for.

    The prompts are one with left padding at the last positions that the model knows, where some scale their queries, and one at the
    first, without padding; in this order, because some rotary embeddings remember how far they went.

    The model's config must be its own: its attention is set for the time of the passes.
    """
    recording = _Recording(model, layers, tuple(dict.fromkeys(implementations)))
    left, right = recording.mask(left=PADDING), recording.mask(right=PADDING)
    prompts = [
        recording.whole("output", mask=left, **_positions(model, last=True)),
        recording.whole("output", mask=recording.mask()),
    ]
    masks = [recording.whole("output with padding on the right", mask=right)]
    if packed := _positions(model, last=False):
        masks.append(recording.whole("output of packed documents", **packed))
    pieces = []
    if cache_name(model.forward) is not None:
        config: Any = model.config
        pieces.append(recording.pieces(lambda: DynamicCache(config=config), "a cache", recording.mask()))
        masks.append(
            recording.pieces(lambda: StaticCache(config=config, max_cache_len=SEQ + _SLACK), "a static cache", left)
        )
    by_layer = (zip(*cases, strict=True) if cases else [()] * len(layers) for cases in (prompts, pieces, masks))
    return [LayerCases(*parts) for parts in zip(*by_layer, strict=True)]


def _positions(model: Any, *, last: bool) -> dict[str, Tensor]:
    """The last positions that the model knows, or those of two documents in one row; nothing if it takes none."""
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return {}
    device = next(model.parameters()).device
    if not last:
        return dict(position_ids=torch.arange(SEQ, device=device)[None] % (SEQ // 2))
    end = getattr(model.config, "max_position_embeddings", None)
    if not isinstance(end, int) or end < SEQ:
        return {}
    return dict(position_ids=torch.arange(end - SEQ, end, device=device)[None])


class _Recording:
    """Forward passes of a model with nothing in its layers. Each gives one case for each layer."""

    def __init__(self, model: Any, layers: Sequence[nn.Module], implementations: tuple[str, ...]) -> None:
        self.model, self.layers, self.implementations = model, layers, implementations
        self.device = next(model.parameters()).device
        ids = torch.randint(model.config.vocab_size, (BATCH, SEQ), generator=torch.Generator().manual_seed(0))
        self.ids = ids.to(self.device)
        size = model.config.hidden_size
        self.hidden = [randn(BATCH, SEQ, size, like=next(layer.parameters()), seed=i) for i, layer in enumerate(layers)]

    def mask(self, *, left: int = 0, right: int = 0) -> Tensor:
        """(batch, seq), True where no padding is; only the last row has any."""
        mask = torch.ones(BATCH, SEQ, dtype=torch.bool, device=self.device)
        mask[-1, :left] = False
        mask[-1, SEQ - right :] = False
        return mask

    def whole(self, what: str, mask: Tensor | None = None, **inputs: Tensor) -> list[Case]:
        """One call with all tokens and no cache."""
        if mask is not None and not mask.all():
            inputs["attention_mask"] = mask
        recorded = {
            name: self._record(name, input_ids=self.ids, use_cache=False, **inputs) for name in self.implementations
        }
        return [
            Case((Call(hidden, {name: calls[i] for name, calls in recorded.items()}, mask, what),))
            for i, hidden in enumerate(self.hidden)
        ]

    def pieces(self, make_cache: Callable[[], Any], what: str, mask: Tensor) -> list[Case]:
        """Calls with `_PIECES` of the tokens over a cache."""
        recorded = {name: self._record_pieces(name, make_cache(), mask) for name in self.implementations}
        starts = [sum(_PIECES[:k]) for k in range(len(_PIECES))]
        cases = []
        for i, hidden in enumerate(self.hidden):
            calls = [
                Call(
                    hidden[:, start : start + length],
                    {name: pieces[k][i] for name, pieces in recorded.items()},
                    mask[:, start : start + length],
                    f"output of {'single' if length == 1 else length} queries over {what}",
                )
                for k, (start, length) in enumerate(zip(starts, _PIECES, strict=True))
            ]
            cases.append(Case(tuple(calls), make_cache, trains=False))
        return cases

    def _record_pieces(self, implementation: str, cache: Any, mask: Tensor) -> list[list[dict[str, Any]]]:
        """By piece and layer. The cache gets keys of no meaning: the model asks it for nothing but lengths."""
        recorded, start = [], 0
        name = cache_name(self.model.forward) or ""
        for length in _PIECES:
            end = start + length
            inputs = dict(
                input_ids=self.ids[:, start:end], **({} if mask.all() else dict(attention_mask=mask[:, :end]))
            )
            calls = self._record(implementation, **inputs, use_cache=True, **{name: cache})
            recorded.append([{k: _TheCache if v is cache else v for k, v in call.items()} for call in calls])
            empty = torch.zeros(BATCH, 1, length, 1, device=self.device)
            for layer in self.layers:
                for module in layer.modules():
                    if attention(module) is not None:
                        cache.update(empty, empty, module.layer_idx)
            start = end
        return recorded

    def _record(self, implementation: str, **inputs: Any) -> list[dict[str, Any]]:
        """What each layer is called with, beside hidden states."""
        with _recorders(self.layers), _attention(self.model.config, implementation), torch.no_grad():
            self.model.forward(**inputs)
            return [layer.__dict__["recorded"] for layer in self.layers]


class _Recorder(Fused):
    """Stands in for a decoder layer: notes what it is called with, and returns its hidden states."""

    def __call__(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        self.__dict__["recorded"] = kwargs
        return hidden_states


@contextmanager
def _recorders(layers: Sequence[nn.Module]) -> Iterator[None]:
    for layer in layers:
        swap(layer, _Recorder)
    try:
        yield
    finally:
        for layer in layers:
            restore(layer)
            layer.__dict__.pop("recorded", None)


@contextmanager
def _attention(config: Any, implementation: str) -> Iterator[None]:
    before = attention_of(config)
    set_attention(config, implementation)
    try:
        yield
    finally:
        set_attention(config, before)
