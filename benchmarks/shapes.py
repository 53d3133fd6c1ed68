"""The models whose sizes the benchmarks use, in one table, and how many tokens on which device."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llama_fast.kernels.cpu import multiplies


@dataclass(frozen=True)
class ModelShape:
    """What a decoder's kernels see of a model."""

    name: str
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    layers: int
    vocab: int
    window: int | None = None
    head_norm: bool = False  # RMSNorm of each head of q and k
    tied: bool = False
    rope_theta: float = 500000.0
    rope_factor: float | None = None  # of Llama 3's scaling of long wavelengths
    norm_eps: float = 1e-5
    context: int = 131072

    @property
    def qkv(self) -> int:
        """Rows of the stacked projection of q, k and v."""
        return (self.heads + 2 * self.kv_heads) * self.head_dim

    def config(self, layers: int | None = None) -> dict[str, Any]:
        """The fields of its config.json, for transformers and for `DecoderConfig`; with only its first `layers`."""
        rope: dict[str, Any] = dict(rope_type="default", rope_theta=self.rope_theta)
        if self.rope_factor is not None:
            rope |= dict(
                rope_type="llama3", factor=self.rope_factor, low_freq_factor=1.0, high_freq_factor=4.0,
                original_max_position_embeddings=8192,
            )  # fmt: skip
        values: dict[str, Any] = dict(
            model_type="qwen3" if self.head_norm else "llama" if self.window is None else "mistral",
            vocab_size=self.vocab, hidden_size=self.hidden, intermediate_size=self.intermediate,
            num_hidden_layers=self.layers if layers is None else layers, num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads, head_dim=self.head_dim, max_position_embeddings=self.context,
            rms_norm_eps=self.norm_eps, tie_word_embeddings=self.tied, rope_parameters=rope,
        )  # fmt: skip
        return values if self.window is None else values | {"sliding_window": self.window}


# From the config.json of each model on the Hugging Face hub.
LLAMA_3_2_1B = ModelShape("Llama-3.2-1B", 2048, 8192, 32, 8, 64, 16, 128256, tied=True, rope_factor=32.0)
LLAMA_3_1_8B = ModelShape("Llama-3.1-8B", 4096, 14336, 32, 8, 128, 32, 128256, rope_factor=8.0)
LLAMA_3_1_70B_LAYER = ModelShape("Llama-3.1-70B layer", 8192, 28672, 64, 8, 128, 1, 128256, rope_factor=8.0)
MISTRAL_7B = ModelShape(
    "Mistral-7B", 4096, 14336, 32, 8, 128, 32, 32000, window=4096, rope_theta=10000.0, context=32768
)
QWEN3_8B = ModelShape(
    "Qwen3-8B", 4096, 12288, 32, 8, 128, 36, 151936, head_norm=True, rope_theta=1000000.0, norm_eps=1e-6, context=40960
)
CPU_125M = ModelShape("125M", 768, 2048, 12, 12, 64, 12, 32000, rope_theta=10000.0, context=2048)
"""Not a published model: what two CPU cores can run whole."""
CPU_10M = ModelShape("10M", 320, 864, 5, 5, 64, 7, 4096, tied=True, rope_theta=10000.0, context=2048)
CPU_7M = ModelShape("7M", 256, 704, 4, 4, 64, 4, 8000, rope_theta=10000.0, context=2048)
"""Not published models either: what they can even train or generate with while somebody waits."""
EMBEDDED = ModelShape("0.9M", 128, 256, 4, 2, 64, 4, 1136, tied=True, rope_theta=200000.0, norm_eps=1e-6, context=512)
"""The embedded model's."""

MODELS = (LLAMA_3_2_1B, LLAMA_3_1_8B, LLAMA_3_1_70B_LAYER, MISTRAL_7B, QWEN3_8B)


def models(device: torch.device, *, quick: bool) -> tuple[ModelShape, ...]:
    """The models that a device has the time for: all on a GPU, or two if `quick`; the smallest on a CPU."""
    if device.type == "cuda":
        return (LLAMA_3_2_1B, LLAMA_3_1_8B) if quick else MODELS
    return (LLAMA_3_2_1B,) if quick else (LLAMA_3_2_1B, LLAMA_3_1_8B)


def decoding_models(device: torch.device, *, quick: bool) -> tuple[ModelShape, ...]:
    """The models whose decoding steps are compared op by op."""
    if device.type != "cuda":
        return (CPU_125M,)
    return (LLAMA_3_1_8B,) if quick else (LLAMA_3_1_8B, LLAMA_3_2_1B, LLAMA_3_1_70B_LAYER)


def rows_and_widths(device: torch.device, *, quick: bool) -> list[tuple[int, int]]:
    """Tokens and hidden size of what a norm sees: the models' widths at one number of tokens, three numbers at one width."""
    if device.type != "cuda":
        return [(128, 2048)] if quick else [(512, 2048), (512, 4096)]
    sizes = [(8192, 4096), (8192, 2048), (8192, 8192), (2048, 4096), (32768, 4096)]
    return sizes[:1] if quick else sizes


def prompt_tokens(device: torch.device, *, quick: bool) -> tuple[int, ...]:
    """Tokens of a batch of prompts, or of a training step's micro-batch."""
    if device.type == "cuda":
        return (8192,) if quick else (2048, 8192, 32768)
    return (128,) if quick else (128, 512)


def dtypes(device: torch.device, *, quick: bool) -> tuple[torch.dtype, ...]:
    """bfloat16, as models are run; on a CPU float32, which every CPU multiplies well, and bfloat16 where it multiplies that."""
    if device.type == "cuda":
        return (torch.bfloat16,)
    return (torch.float32,) if quick or not multiplies(torch.bfloat16) else (torch.float32, torch.bfloat16)


def angles(model: ModelShape, positions: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of RoPE, each (positions, head_dim) float32, each angle twice."""
    rates = model.rope_theta ** -(torch.arange(0, model.head_dim, 2, device=positions.device) / model.head_dim)
    angle = (positions[:, None] * rates).repeat(1, 2)
    return angle.cos(), angle.sin()
