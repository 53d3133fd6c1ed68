"""LoRA: of a model that is there only a product of two small matrices is learnt, beside each of some of its products.

    y = x W^T + alpha / rank * dropout(x) A^T B^T        A (rank, in) random, B (out, rank) zero at the start

Parameters are called as PEFT calls them, and a folder of theirs is PEFT's:

    adapter_config.json         rank, alpha, which products
    adapter_model.safetensors   base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight, ...

Source: Hu et al., LoRA, 2021 (arXiv:2106.09685).
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from .config import LoraConfig
from .dropout import Dropout, name_sites
from .model import Linear, TrainedDecoder, random_generator
from .ranks import assign

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_NOT_READ = (
    "use_dora", "use_rslora", "modules_to_save", "rank_pattern", "alpha_pattern", "fan_in_fan_out", "lora_bias", "layer_replication",
    "trainable_token_indices", "target_parameters", "alora_invocation_tokens", "use_qalora", "use_bdlora", "arrow_config",
    "kasa_config", "monteclora_config",
)  # fmt: skip
"""Of PEFT's settings those that change what is computed; each is off where it is false, empty or absent."""
_KEEPS_THE_BASE = (True, False, None, "gaussian", "orthogonal", "eva")
"""Values of `init_lora_weights` that leave the model's own weights as they are: others (PiSSA, CorDA, LoftQ, ...) change them."""


@dataclass(frozen=True)
class Adapter:
    """What an adapter is beside its weights.

    Attributes:
        targets: names of modules, or what they end with after a dot; a regular expression of the whole name is a string, as in PEFT.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...] | str

    @classmethod
    def of(cls, config: LoraConfig) -> "Adapter":
        return read(config.path) if config.path is not None else cls(config.rank, config.alpha, config.targets)

    def is_target(self, name: str) -> bool:
        if isinstance(self.targets, str):
            return re.fullmatch(self.targets, name) is not None
        return any(f".{name}".endswith(f".{target}") for target in self.targets)


class AdaptedLinear(Linear):
    """A product whose weight stays as it is, and the adapter beside it."""

    def __init__(self, base: Linear, rank: int, scale: float, dropout: float) -> None:
        nn.Module.__init__(self)
        self.weight, self.bias, self.scale = base.weight, base.bias, scale
        out_features, in_features = base.weight.shape
        self.lora_A, self.lora_B = Linear(in_features, rank), Linear(rank, out_features)
        self.lora_dropout = Dropout(dropout)

    def forward(self, x: Tensor, residual: Tensor | None = None, key: Tensor | None = None) -> Tensor:
        inner = self.lora_A(self.lora_dropout(x, key)) * self.scale
        y: Tensor = self.lora_B(inner, super().forward(x, residual))
        return y

    @torch.no_grad()
    def merged(self) -> Linear:
        """The one product that computes the same."""
        out_features, in_features = self.weight.shape
        merged = Linear(in_features, out_features)
        change = self.scale * (self.lora_B.weight @ self.lora_A.weight)
        merged.weight = nn.Parameter((self.weight.float() + change).to(self.weight.dtype))
        merged.bias = self.bias
        return merged


def add(model: TrainedDecoder, config: LoraConfig) -> None:
    """Freezes a model and gives it adapters, without weights: see `fill`.

    Raises:
        ValueError: a target is no product of a layer, or `config.path` is no adapter.
    """
    adapter = Adapter.of(config)
    model.requires_grad_(False)
    _check_targets(model, adapter)
    for name, linear in _linears(model):
        if adapter.is_target(name):
            model.set_submodule(name, AdaptedLinear(linear, adapter.rank, adapter.alpha / adapter.rank, config.dropout))
    name_sites(model)


def fill(model: TrainedDecoder, config: LoraConfig, *, seed: int) -> None:
    """Gives the adapters of a model their weights: new ones, or those of `config.path`.

    Raises:
        ValueError: the folder does not fit the model.
    """
    if config.path is None:
        _initialise(model, seed)
    else:
        _read_weights(model, Path(config.path))


def merge(model: TrainedDecoder) -> None:
    """Makes each product and its adapter one."""
    for name, module in list(model.named_modules()):
        if isinstance(module, AdaptedLinear):
            model.set_submodule(name, module.merged())


def save(model: TrainedDecoder, config: LoraConfig, folder: Path, *, base: str) -> None:
    """Writes the adapters of a model to a folder that is there; `base` is what the model without them is called."""
    adapter = Adapter.of(config)
    targets = adapter.targets if isinstance(adapter.targets, str) else list(adapter.targets)
    settings = dict(
        peft_type="LORA", task_type="CAUSAL_LM", base_model_name_or_path=base, inference_mode=True, bias="none",
        r=adapter.rank, lora_alpha=adapter.alpha, lora_dropout=config.dropout, target_modules=targets,
    )  # fmt: skip
    (folder / CONFIG).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    tensors = {_PREFIX + name: tensor.contiguous() for name, tensor in model.learnt().items()}
    safetensors.torch.save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def read(folder: str | Path) -> Adapter:
    """What an adapter's folder says of it.

    Raises:
        ValueError: there is none, or it is of a kind that is not known here.
    """
    path = Path(folder) / CONFIG
    if not path.is_file():
        raise ValueError(f"{folder} holds no adapter: it has no {CONFIG}")
    try:
        settings: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        rank, alpha, targets = (settings[name] for name in ("r", "lora_alpha", "target_modules"))
    except (ValueError, KeyError) as error:
        raise ValueError(f"{path} is no adapter's config: {error!r}") from None
    unknown = [name for name in _NOT_READ if settings.get(name)]
    if settings.get("init_lora_weights", True) not in _KEEPS_THE_BASE:
        unknown.append(f"init_lora_weights={settings['init_lora_weights']!r}")
    if settings.get("peft_type") != "LORA" or settings.get("bias", "none") != "none" or unknown:
        what = unknown[0] if unknown else f"bias={settings.get('bias')!r}, peft_type={settings.get('peft_type')!r}"
        raise ValueError(f"{path}: only plain LoRA is read, without biases, and this has {what}")
    return Adapter(rank, alpha, targets if isinstance(targets, str) else tuple(sorted(targets)))


def _linears(model: TrainedDecoder) -> Iterator[tuple[str, Linear]]:
    """The products of the layers, by name."""
    for name, module in list(model.named_modules()):
        if isinstance(module, Linear) and name.startswith("model.layers."):
            yield name, module


def _check_targets(model: TrainedDecoder, adapter: Adapter) -> None:
    names = [name for name, _ in _linears(model)]
    each = [adapter.targets] if isinstance(adapter.targets, str) else adapter.targets
    for target in each:
        one = target if isinstance(adapter.targets, str) else (target,)
        if not any(Adapter(1, 1, one).is_target(name) for name in names):
            there = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in names))
            raise ValueError(f"lora.targets: {target!r} is no product of a layer; there are {there}")


@torch.no_grad()
def _initialise(model: TrainedDecoder, seed: int) -> None:
    """As PEFT does, but each matrix a function of the seed and its name."""
    for name, parameter in model.learnt().items():
        if name.endswith("lora_A.weight"):
            bound = parameter.shape[1] ** -0.5
            generator = random_generator(seed, name)
            assign(parameter, (torch.rand(parameter.shape, generator=generator) * 2 - 1) * bound)
        else:
            parameter.zero_()


def _read_weights(model: TrainedDecoder, folder: Path) -> None:
    path = folder / WEIGHTS
    if not path.is_file():
        raise ValueError(f"{folder} has no {WEIGHTS}: save the adapter as safetensors")
    stored = {name.removeprefix(_PREFIX): tensor for name, tensor in safetensors.torch.load_file(path).items()}
    ours = model.learnt()
    differ = sorted(stored.keys() ^ ours.keys()) + [
        f"{name} {tuple(stored[name].shape)}, expected {tuple(tensor.shape)}"
        for name, tensor in ours.items()
        if name in stored and stored[name].shape != tensor.shape
    ]
    if differ:
        raise ValueError(f"{path} does not fit the model: {', '.join(differ[:3])}")
    for name, tensor in ours.items():
        assign(tensor, stored[name])
