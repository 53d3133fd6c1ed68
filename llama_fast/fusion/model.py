"""Swaps fused layers into a live transformers model, and back."""

import copy
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from ..kernels.huge_pages import prefer_huge_pages
from . import structure
from .attention import IMPLEMENTATION, refusal
from .calls import Case, LayerCases, layer_cases, random_cases
from .layers import FusedAttention
from .modes import default_modes
from .neighbours import GradientCheckpointingLayer, PreTrainedModel, attention_of, base_layer, set_attention
from .report import FuseReport, Left, Swapped
from .structure import CALL_ERRORS, Found, Swap, first_line, untouchable
from .swap import Fused, is_wrapped, restore, swap
from .verify import Parity, check, check_attention, check_loss, faint

_CONFIGS = "_llama_fast_configs"
"""The attribute of a fused model that holds its own config and the copy it has while it is fused."""

_JUDGED_LOGITS = 4096  # of a head: all of a large one in float64 take gigabytes, and one has nothing to do with another


def fuse(model: nn.Module, *, mode: Literal["inference", "training"] = "inference", verify: bool = True) -> FuseReport:
    """Swaps fused layers into `model`, in place: norms, gated MLPs, RoPE, attention, residual sums; a large head on a CPU;
    in training the loss.

    Layers are found by structure and checked by numbers; what is not known, or fails its check, is left alone, with the
    reason in the report. Modules stay the same objects with the same names, parameters and hooks (`swap`); no class, no
    function and no other model changes. `generate`, `backward`, `save_pretrained`, `state_dict`, `copy.deepcopy`, pickling,
    `model.to`, gradient checkpointing, PEFT and `torch.compile` work as before. `unfuse` undoes it.

    While fused, the model has a config of its own, a copy whose attention implementation is "llama_fast".

    Hooks on a module see what they saw before, except on the activation inside an MLP, which is not called. Where no gradient is
    needed and rows are few (a decoding step), norms, attention, MLP and projections are not called but computed together, by kernels
    that read the same parameters where they lie; as soon as one of them has hooks, it is called. So are all while hooks are set on
    all modules at once (`register_module_forward_hook`), but for a projection whose kernel adds a residual, which has to have hooks
    of its own. `output_hidden_states` leaves hooks.

    Args:
        model: a transformers model, or PEFT's model around one. Others get their norms and MLPs swapped.
        mode: "training" also computes the loss of a causal language model without its logits: with `labels`, in
            `model.train()`, the output's `logits` is None. Attention with dropout is then left alone.
        verify: check each swapped layer against the layer it replaces, with random input in its own dtype on its own
            device, and against float64; in training its gradient too. Without, structure alone decides.

    Returns:
        What was swapped, what was left and why, and the errors seen.

    Raises:
        TypeError: `model` is not an nn.Module.
        ValueError: `mode` is unknown, or the model is fused already.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    if mode not in ("inference", "training"):
        raise ValueError(f"mode must be 'inference' or 'training', got {mode!r}")
    if any(isinstance(module, Fused) or _CONFIGS in module.__dict__ for module in model.modules()):
        raise ValueError("model is fused already: call llama_fast.unfuse(model) first")
    fusing = _Fusing(model, is_training=mode == "training", verify=verify)
    try:
        with default_modes():
            fusing.run()
    except BaseException:
        _restore(model)
        raise
    prefer_huge_pages(model.parameters())
    return FuseReport(mode, tuple(fusing.swapped), tuple(fusing.left))


def unfuse(model: nn.Module) -> None:
    """Gives `model` back its own layers, attention and config: the same objects, and nothing of ours left on them.

    Settings that were changed on `model.config` while it was fused are kept, an attention that was chosen then too. Whoever kept a
    bound `forward` of a fused layer (accelerate's `prepare`, `torch.compile`) may go on calling it: it runs the layer's own.

    Raises:
        TypeError: `model` is not an nn.Module.
        ValueError: the model is not fused, or its layers were given other classes since (by FSDP2).
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    if (wrapped := next((module for module in model.modules() if is_wrapped(module)), None)) is not None:
        raise ValueError(
            f"a fused layer is a {type(wrapped).__name__} now, made by others from ours: it cannot be undone"
        )
    if not _restore(model):
        raise ValueError("model is not fused: there is nothing to undo")


class _Fusing:
    """One run of `fuse`: the model, and what has been found so far."""

    def __init__(self, model: nn.Module, *, is_training: bool, verify: bool) -> None:
        self.model, self.is_training, self.verify = model, is_training, verify
        self.names = {module: name for name, module in model.named_modules()}
        self.swapped: list[Swapped] = []
        self.left: list[Left] = []

    def run(self) -> None:
        for module in self.names:
            self._norm(module)
            self._mlp(module)
        for root in self._outermost_models():
            layers = [module for module in root.modules() if isinstance(module, GradientCheckpointingLayer)]
            if (reason := _whole_model_reason(root)) is not None:
                self._leave_decoder(layers, reason)
            elif layers:
                self._decoder(root, layers)
            if self.is_training:
                self._loss(root)
            else:
                self._head(root)

    def _outermost_models(self) -> list[PreTrainedModel]:
        models = [module for module in self.names if isinstance(module, PreTrainedModel)]
        inner = {module for model in models for module in model.modules() if module is not model}
        return [model for model in models if model not in inner]

    def _leave_decoder(self, layers: Sequence[nn.Module], reason: str) -> None:
        self.left += [Left(self.names[layer], kind, reason) for layer in layers for kind in ("attention", "residual")]

    def _norm(self, module: Any) -> None:
        def verified(found: Swap) -> Parity:
            size = module.normalized_shape[0] if hasattr(module, "normalized_shape") else module.weight.shape[0]
            parameter = next(module.parameters(), next(self.model.parameters(), torch.empty(0)))
            return check(module, random_cases(size, parameter), _swapping(found), gradients=self.is_training)

        self._attempt("norm", module, structure.norm, verified)

    def _mlp(self, module: Any) -> None:
        def verified(found: Swap) -> Parity:
            weight = base_layer(module.down_proj).weight
            cases = random_cases(weight.shape[0], weight)
            return check(module, cases, _swapping(found), gradients=self.is_training)

        self._attempt("mlp", module, structure.mlp, verified)

    def _decoder(self, root: Any, layers: Sequence[nn.Module]) -> None:
        """RoPE, attention and residual sums: what needs to know how the model calls its layers."""
        own = attention_of(root.config)
        exact = own if own in ("eager", "sdpa") else "sdpa"  # which both run in float64
        _give_own_config(self.model, root)
        cases = [LayerCases()] * len(layers)
        if self.verify:
            try:
                cases = layer_cases(root.base_model, layers, (own, IMPLEMENTATION, exact))
            except CALL_ERRORS as error:
                return self._leave_decoder(layers, f"its layers cannot be checked one by one: {first_line(error)}")
        for layer, calls in zip(layers, cases, strict=True):
            for module in layer.modules():
                self._rope(module, calls, (own, own, exact))
            self._unknown_mlps(layer)
        ours = self._attention(root, layers, cases, (own, IMPLEMENTATION, exact))
        for layer, calls in zip(layers, cases, strict=True):
            self._residual(layer, calls, (own, ours, exact))

    def _rope(self, module: nn.Module, calls: LayerCases, implementations: tuple[str, str, str]) -> None:
        def verified(found: Swap) -> Parity:
            return check_attention(
                module,
                calls,
                _swapping(found),
                implementations=implementations,
                with_cache=True,
                gradients=self.is_training,
            )

        self._attempt("rope", module, structure.attention, verified)

    def _attention(
        self,
        root: Any,
        layers: Sequence[nn.Module],
        cases: Sequence[LayerCases],
        implementations: tuple[str, str, str],
    ) -> str:
        """Switches the whole model to our attention if every layer passes; returns the implementation it then has."""
        wants_weights = "the model's config asks for attention weights, which the kernels do not give"
        verdicts = {
            self.names[layer]: (wants_weights, None)
            if root.config.output_attentions
            else self._attention_of(layer, calls, implementations)
            for layer, calls in zip(layers, cases, strict=True)
            if any(structure.attention(module) is not None for module in layer.modules())
        }
        why = "the model has one attention for all layers, and another layer cannot take ours"
        if verdicts and all(reason is None for reason, _ in verdicts.values()):
            root.set_attn_implementation(IMPLEMENTATION)
            why = "the model does not let its attention be chosen"
        if attention_of(root.config) == IMPLEMENTATION:
            self.swapped += [_swapped(name, "attention", parity) for name, (_, parity) in verdicts.items()]
        else:
            self.left += [Left(name, "attention", reason or why) for name, (reason, _) in verdicts.items()]
        return attention_of(root.config)

    def _attention_of(
        self, layer: nn.Module, calls: LayerCases, implementations: tuple[str, str, str]
    ) -> tuple[str | None, Parity | None]:
        """The reason against our attention in a layer, and its numbers: alone where that is possible, else in the layer."""
        reason = untouchable(layer) or self._dropout(layer) or _head_dim(layer)
        if reason is not None or not self.verify:
            return reason, None
        module = next((module for module in layer.modules() if isinstance(module, FusedAttention)), layer)
        cases: Sequence[Case] = calls.prompts + calls.pieces + calls.masks
        cases = faint(cases) if module is layer else cases
        as_swapped = _with_classes_of(module)
        return _verdict(
            lambda: check(module, cases, as_swapped, implementations=implementations, gradients=self.is_training)
        )

    def _dropout(self, layer: nn.Module) -> str | None:
        rates = [getattr(module, "attention_dropout", 0.0) for module in layer.modules()]
        rate = max((rate for rate in rates if isinstance(rate, float)), default=0.0)
        return f"its attention drops out {rate:g}, which the kernels do not" if self.is_training and rate else None

    def _residual(self, layer: nn.Module, calls: LayerCases, implementations: tuple[str, str, str]) -> None:
        def verified(found: Swap) -> Parity:
            def change(twin: nn.Module) -> None:
                _with_classes_of(layer)(twin)
                swap(twin, found.kind, **found.options)

            cases = faint(calls.prompts + calls.pieces)
            return check(layer, cases, change, implementations=implementations, gradients=self.is_training)

        self._attempt("residual", layer, structure.decoder_layer, verified)

    def _loss(self, root: PreTrainedModel) -> None:
        self._attempt(
            "loss", root, structure.causal_lm, lambda found: check_loss(root, _swapping(found)), recurse=False
        )

    def _head(self, root: Any) -> None:
        head = root.get_output_embeddings()

        def verified(found: Swap) -> Parity:
            part = nn.Linear(head.in_features, 1, bias=False, device=head.weight.device, dtype=head.weight.dtype)
            part.weight = nn.Parameter(head.weight[:_JUDGED_LOGITS].detach(), requires_grad=False)
            return check(part, random_cases(head.in_features, head.weight), _swapping(found))

        if head in self.names:
            self._attempt("head", head, structure.head, verified)

    def _unknown_mlps(self, layer: nn.Module) -> None:
        """Names the MLPs that were not recognised: what else a decoder layer has with two or more projections."""
        for child in layer.children():
            linears = sum(isinstance(module, nn.Linear) for module in child.modules())
            if linears > 1 and structure.mlp(child) is None and structure.attention(child) is None:
                has = ", ".join(sorted(name for name, _ in child.named_children()))
                self.left.append(Left(self.names[child], "mlp", f"it has {has}, not gate, up and down projections"))

    def _attempt(
        self,
        kind: str,
        module: nn.Module,
        find: Callable[[Any], Found],
        verified: Callable[[Swap], Parity],
        *,
        recurse: bool = True,
    ) -> None:
        """Swaps `module` if `find` finds how, nothing speaks against it, and `verified` says it computes the same."""
        found, parity = find(module), None
        if found is None:
            return
        reason = found if isinstance(found, str) else untouchable(module, recurse=recurse)
        if isinstance(found, Swap) and reason is None and self.verify:
            reason, parity = _verdict(lambda: verified(found))
        if reason is not None:
            self.left.append(Left(self.names[module], kind, reason))
            return
        assert isinstance(found, Swap)
        swap(module, found.kind, **found.options)
        self.swapped.append(_swapped(self.names[module], kind, parity))


def _head_dim(layer: nn.Module) -> str | None:
    """Why the kernels do not take heads of the layer's size. Asked without checks too: a prompt may pass where decoding fails."""
    sizes = {getattr(module, "head_dim", None) for module in layer.modules()}
    return next((why for size in sizes if isinstance(size, int) and (why := refusal(size)) is not None), None)


def _swapping(found: Swap) -> Callable[[nn.Module], None]:
    return lambda twin: swap(twin, found.kind, **found.options)


def _with_classes_of(module: nn.Module) -> Callable[[nn.Module], None]:
    """Swaps in a copy what is swapped in `module`."""

    def change(twin: nn.Module) -> None:
        for original, copied in zip(module.modules(), twin.modules(), strict=True):
            copied.__class__ = type(original)

    return change


def _verdict(verified: Callable[[], Parity]) -> tuple[str | None, Parity | None]:
    """The reason against a swap, and its numbers."""
    try:
        parity = verified()
    except CALL_ERRORS as error:
        return f"its check failed: {first_line(error)}", None
    return (None if parity.passed else str(parity)), parity


def _swapped(name: str, kind: str, parity: Parity | None) -> Swapped:
    return Swapped(name, kind) if parity is None else Swapped(name, kind, parity.error, parity.peer_error)


def _whole_model_reason(root: PreTrainedModel) -> str | None:
    """Why the attention and the residual sums of a whole model stay as they are."""
    if root.config.sub_configs:
        return f"the model is composed of several ({', '.join(root.config.sub_configs)}): fuse its language model alone"
    return "the model has an encoder" if root.config.is_encoder_decoder else None


def _give_own_config(model: nn.Module, root: PreTrainedModel) -> None:
    """Other models may share the config, and the attention implementation is a setting of the config."""
    original, own = root.config, copy.copy(root.config)
    for module in model.modules():
        if module.__dict__.get("config") is original:
            module.__dict__["config"] = own
    root.__dict__[_CONFIGS] = _Configs(original, own)


class _Configs(NamedTuple):
    """What a fused model keeps: its own config, and the copy that it has while it is fused. Of a class of ours, so that whoever loads
    a pickled model imports its attention with it."""

    original: Any
    own: Any

    def give_back(self) -> None:
        """Settings that were changed meanwhile go into the original, an attention that was chosen meanwhile too."""
        attention = attention_of(self.original)
        self.original.__dict__.clear()
        self.original.__dict__.update(self.own.__dict__)
        if attention_of(self.own) == IMPLEMENTATION:
            set_attention(self.original, attention)


def _restore(model: nn.Module) -> bool:
    """Undoes what was done; whether anything was."""
    was_fused = False
    for module in model.modules():
        was_fused |= isinstance(module, Fused) or _CONFIGS in module.__dict__
        restore(module)
        if _CONFIGS not in module.__dict__:
            continue
        configs = module.__dict__.pop(_CONFIGS)
        configs.give_back()
        for holder in model.modules():
            if holder.__dict__.get("config") is configs.own:
                holder.__dict__["config"] = configs.original
    return was_fused
