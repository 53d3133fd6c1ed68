"""What `llama-fast train` is told: one TOML file. Every table and key is a field here, with its default."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from ..decoder.config import DecoderConfig, RopeConfig
from ..decoder.tokenizer import Tokenizer

DType = Literal["float32", "bfloat16"]


def _check_positive(config: Any, *names: str) -> None:
    for name in names:
        if (value := getattr(config, name)) is not None and not value > 0:  # NaN is not, either
            raise ValueError(f"{name} must be positive, got {value}")


def _check_not_negative(config: Any, *names: str) -> None:
    for name in names:
        if (value := getattr(config, name)) is not None and not value >= 0:
            raise ValueError(f"{name} must be at least 0, got {value}")


def _check_dropout(share: float) -> None:
    if not 0 <= share < 1:
        raise ValueError(f"dropout must be from 0 to below 1, got {share}")


@dataclass(frozen=True)
class ModelConfig:
    """The model: one to train further (`path`), or a LLaMA of these sizes with random weights.

    Attributes:
        path: a folder, a .gguf file, or a name on the hub; then no size may be given.
        head_dim: hidden_size / num_heads by default.
        init_std: of the random matrices; `embedding_std` of the embedding, the same by default.
        init_last_norm: what the last norm starts with. A small one keeps the first logits of a long embedding small, where it is the
            head too.
        dropout: the share of the embedding, and of what each layer adds to it, that a step leaves out.
    """

    path: str | None = None
    hidden_size: int | None = None
    intermediate_size: int | None = None
    num_layers: int | None = None
    num_heads: int | None = None
    num_kv_heads: int | None = None
    head_dim: int | None = None
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    tied_embeddings: bool = True
    init_std: float = 0.02
    embedding_std: float | None = None
    init_last_norm: float = 1.0
    dropout: float = 0.0

    def __post_init__(self) -> None:
        sizes = ("hidden_size", "intermediate_size", "num_layers", "num_heads")
        given = [name for name in (*sizes, "num_kv_heads", "head_dim") if getattr(self, name) is not None]
        if self.path is not None and given:
            raise ValueError(
                f"a model that is trained further has its own sizes: leave out path, or {', '.join(given)}"
            )
        if self.path is None and (missing := [name for name in sizes if name not in given]):
            raise ValueError(f"{', '.join(missing)}: give them, or the path of a model to train further")
        _check_positive(self, *given, "norm_eps", "rope_theta", "init_std", "embedding_std", "init_last_norm")
        _check_dropout(self.dropout)

    def decoder_config(self, tokenizer: Tokenizer, sequence_length: int) -> DecoderConfig:
        """The LLaMA of these sizes for a tokenizer. Raises ValueError where they do not fit each other."""
        assert self.hidden_size and self.intermediate_size and self.num_layers and self.num_heads
        if self.head_dim is None and self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size ({self.hidden_size}) must be a multiple of num_heads ({self.num_heads})")
        return DecoderConfig(
            model_type="llama",
            vocab_size=tokenizer.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads or self.num_heads,
            head_dim=self.head_dim or self.hidden_size // self.num_heads,
            max_positions=sequence_length,
            norm_eps=self.norm_eps,
            windows=(None,) * self.num_layers,
            rope=RopeConfig(theta=self.rope_theta),
            tied_embeddings=self.tied_embeddings,
            bos_token_id=tokenizer.bos_id,
            eos_token_ids=tokenizer.eos_ids,
        )


@dataclass(frozen=True)
class LoraConfig:
    """Adapters that are learnt instead of the model's own weights, as in PEFT: y = W x + alpha / rank * B A dropout(x).

    Attributes:
        path: the folder of an adapter, ours or PEFT's, to train further; then it has its own rank, alpha and targets.
        targets: names of products of the layers, or what they end with.
        dropout: the share of what an adapter reads that a step leaves out.
    """

    path: str | None = None
    rank: int = 16
    alpha: float = 32.0
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    dropout: float = 0.0

    def __post_init__(self) -> None:
        given = [name for name in ("rank", "alpha", "targets") if getattr(self, name) != getattr(LoraConfig, name)]
        if self.path is not None and given:
            raise ValueError(f"an adapter that is trained further has its own: leave out path, or {', '.join(given)}")
        _check_positive(self, "rank", "alpha")
        if not self.targets:
            raise ValueError("targets must name a product of the layers, such as q_proj")
        _check_dropout(self.dropout)


@dataclass(frozen=True)
class DataConfig:
    """What is learnt from, and its tokenizer.

    Attributes:
        train, validation: folders of shards, as `llama-fast data` writes them, or files of conversations (.jsonl): see
            `data.conversations`.
        tokenizer: a folder, or a model's .gguf file: what the shards were written with; by default that of model.path.
    """

    train: Path
    tokenizer: Path | None = None
    validation: Path | None = None


@dataclass(frozen=True)
class BatchConfig:
    """What one step learns from: micro_batches x rows x sequence_length tokens.

    Attributes:
        sequence_length: tokens of a row. Documents stand in it one after another, none sees another; a longer one goes on in the next.
        rows: of a micro-batch: as many as memory holds activations for.
        micro_batches: whose gradients are summed for a step.
    """

    sequence_length: int = 512
    rows: int = 4
    micro_batches: int = 4

    def __post_init__(self) -> None:
        _check_positive(self, "sequence_length", "rows", "micro_batches")

    @property
    def rows_per_step(self) -> int:
        return self.rows * self.micro_batches

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.rows_per_step * self.sequence_length


@dataclass(frozen=True)
class Group:
    """Parameters whose name matches a pattern (`*norm.weight`), and what differs for them. The first pattern that matches counts."""

    match: str
    weight_decay: float | None = None
    lr_factor: float = 1.0

    def __post_init__(self) -> None:
        _check_not_negative(self, "weight_decay", "lr_factor")


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW for all parameters, or Muon for the matrices of the layers and AdamW for the rest.

    Attributes:
        lr, muon_lr: peak learning rates of AdamW and of Muon.
        groups: exceptions by name; one that matches nothing is an error.
        clip_norm: the gradient is shortened to this norm; 0: never.
    """

    kind: Literal["adamw", "muon"] = "adamw"
    lr: float = 1e-3
    muon_lr: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    momentum: float = 0.95
    weight_decay: float = 0.1
    groups: tuple[Group, ...] = (Group("*norm.weight", weight_decay=0.0),)
    clip_norm: float = 1.0

    def __post_init__(self) -> None:
        _check_positive(self, "lr", "muon_lr", "eps")
        _check_not_negative(self, "weight_decay", "clip_norm")
        for name in ("beta1", "beta2", "momentum"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be from 0 to below 1, got {getattr(self, name)}")


@dataclass(frozen=True)
class ScheduleConfig:
    """How many steps, and the learning rate at each as a share of its peak.

    Attributes:
        kind: "cosine" falls from the end of the warm-up on; "wsd" stays, and falls as a line over the last `decay` share of the steps.
        warm_up: steps until the peak.
        final: the share at the end.
    """

    steps: int
    kind: Literal["cosine", "wsd"] = "cosine"
    warm_up: int = 0
    decay: float = 0.2
    final: float = 0.1

    def __post_init__(self) -> None:
        _check_positive(self, "steps")
        if not 0 <= self.warm_up <= self.steps:
            raise ValueError(f"warm_up must be from 0 to steps ({self.steps}), got {self.warm_up}")
        if not 0 < self.decay <= 1 or not 0 <= self.final <= 1:
            raise ValueError(f"decay and final are shares, from 0 to 1, got {self.decay} and {self.final}")


@dataclass(frozen=True)
class LossConfig:
    """Cross entropy, and what is added to it in training: as in `ops.cross_entropy`."""

    label_smoothing: float = 0.0
    z_loss: float = 0.0

    def __post_init__(self) -> None:
        _check_not_negative(self, "label_smoothing", "z_loss")
        if self.label_smoothing > 1:
            raise ValueError(f"label_smoothing is a share, from 0 to 1, got {self.label_smoothing}")


@dataclass(frozen=True)
class RanksConfig:
    """How the ranks of `torchrun` share the work; see `ranks`.

    Attributes:
        tensor_parallel: so many compute one micro-batch together; the rest of their number take micro-batches in turn.
    """

    tensor_parallel: int = 1

    def __post_init__(self) -> None:
        _check_positive(self, "tensor_parallel")


@dataclass(frozen=True)
class RunConfig:
    """Where the run lives, how it computes, and how often it looks up from it.

    Attributes:
        out: the run's folder. One that is there already is gone on with from its last checkpoint.
        seed: of the weights and of the order of documents.
        dtype: what layers compute in.
        weights: what weights, gradients and the optimizer's states are kept in; with adapters, which are float32, the rest of the
            model. In bfloat16, which has 8 bits, a weight does not change by less than a 256th of itself.
        compile: give the layers to `torch.compile`.
        exact: sum gradients so that the same micro-batches give the same bits however many ranks share them, a power of two. None: on
            a CPU. It keeps log2(micro_batches / ranks) gradients more at a time.
        evaluate_every, save_every: steps; 0: only at the end.
        validation_tokens: at most so many of the validation shards are read each time, whole documents.
        spike_factor: a step whose loss is more than so many times the median of the 100 before it is skipped; 0: none is.
        patience: evaluations in a row without a better one after which the run ends; 0: never.
        keep: the last so many checkpoints, and the best one.
        sample: a text to go on with at each evaluation; None: none.
        tensorboard: write out/tensorboard too.
    """

    out: Path
    seed: int = 0
    dtype: DType = "float32"
    weights: DType = "float32"
    compile: bool = False
    recompute: Literal["none", "selective", "full"] = "none"
    exact: bool | None = None
    log_every: int = 10
    evaluate_every: int = 100
    save_every: int = 100
    validation_tokens: int = 100_000
    spike_factor: float = 0.0
    patience: int = 0
    keep: int = 2
    sample: str | None = None
    sample_tokens: int = 40
    tensorboard: bool = False

    def __post_init__(self) -> None:
        _check_positive(self, "log_every", "keep", "validation_tokens", "sample_tokens")
        _check_not_negative(self, "seed", "evaluate_every", "save_every", "patience", "spike_factor")
        if self.sample == "":
            raise ValueError("sample must be a text to go on with: leave it out for none")
        if self.weights == "bfloat16" and self.dtype != "bfloat16":
            raise ValueError("weights in bfloat16 are for layers that compute in it: give dtype, too")
        if self.spike_factor and self.spike_factor <= 1:
            raise ValueError(f"spike_factor must be above 1, or 0 for none, got {self.spike_factor}")

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype


@dataclass(frozen=True)
class TrainConfig:
    """The whole file, a table for each."""

    data: DataConfig
    model: ModelConfig
    schedule: ScheduleConfig
    run: RunConfig
    batch: BatchConfig = field(default_factory=BatchConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    ranks: RanksConfig = field(default_factory=RanksConfig)
    lora: LoraConfig | None = None

    def __post_init__(self) -> None:
        if self.run.patience and self.data.validation is None:
            raise ValueError("run.patience counts evaluations: give data.validation")
        if self.optimizer.kind == "muon" and self.ranks.tensor_parallel > 1:
            raise ValueError(
                "optimizer.kind muon takes matrices whose rows alone are shared out: ranks.tensor_parallel must be 1"
            )
        if self.lora is not None and self.ranks.tensor_parallel > 1:
            raise ValueError("adapters are not cut: with lora, ranks.tensor_parallel must be 1")
        if self.data.tokenizer is None and self.model.path is None:
            raise ValueError("data.tokenizer is missing")
        if self.lora is not None and self.model.path is None:
            raise ValueError("lora is for a model that has learnt already: give model.path")

    def to_toml(self) -> str:
        """Every setting with its value, for `read_config`; what is None is left out."""
        return "\n".join(_toml(self, "")).lstrip() + "\n"


def _toml(value: Any, where: str) -> Iterator[str]:
    """Lines of a table: its own keys, then the tables in it."""
    inner = []
    for each in fields(value):
        what, name = getattr(value, each.name), f"{where}.{each.name}" if where else each.name
        if is_dataclass(what):
            inner += [f"\n[{name}]", *_toml(what, name)]
        elif isinstance(what, tuple) and what and is_dataclass(what[0]):
            for one in what:
                inner += [f"\n[[{name}]]", *_toml(one, name)]
        elif what is not None:
            yield f"{each.name} = {json.dumps(what, default=str, ensure_ascii=False)}"
    yield from inner
