"""The models whose sizes the benchmarks use, in one table, and how many tokens on which device."""

from dataclasses import dataclass

import torch


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
    norm_eps: float = 1e-5

    @property
    def qkv(self) -> int:
        """Rows of the stacked projection of q, k and v."""
        return (self.heads + 2 * self.kv_heads) * self.head_dim


# From the config.json of each model on the Hugging Face hub.
LLAMA_3_2_1B = ModelShape("Llama-3.2-1B", 2048, 8192, 32, 8, 64, 16, 128256, tied=True)
LLAMA_3_1_8B = ModelShape("Llama-3.1-8B", 4096, 14336, 32, 8, 128, 32, 128256)
LLAMA_3_1_70B_LAYER = ModelShape("Llama-3.1-70B layer", 8192, 28672, 64, 8, 128, 1, 128256)
MISTRAL_7B = ModelShape("Mistral-7B", 4096, 14336, 32, 8, 128, 32, 32000, window=4096, rope_theta=10000.0)
QWEN3_8B = ModelShape(
    "Qwen3-8B", 4096, 12288, 32, 8, 128, 36, 151936, head_norm=True, rope_theta=1000000.0, norm_eps=1e-6
)
CPU_125M = ModelShape("125M", 768, 2048, 12, 12, 64, 12, 32000, rope_theta=10000.0)
"""Not a published model: what two CPU cores can run whole."""

MODELS = (LLAMA_3_2_1B, LLAMA_3_1_8B, LLAMA_3_1_70B_LAYER, MISTRAL_7B, QWEN3_8B)


def models(device: torch.device, *, quick: bool) -> tuple[ModelShape, ...]:
    """The models that a device has the time for: all on a GPU, or two if `quick`; the smallest on a CPU."""
    if device.type == "cuda":
        return (LLAMA_3_2_1B, LLAMA_3_1_8B) if quick else MODELS
    return (LLAMA_3_2_1B,) if quick else (LLAMA_3_2_1B, LLAMA_3_1_8B)


def prompt_tokens(device: torch.device, *, quick: bool) -> tuple[int, ...]:
    """Tokens of a batch of prompts, or of a training step's micro-batch."""
    if device.type == "cuda":
        return (8192,) if quick else (2048, 8192, 32768)
    return (128,) if quick else (128, 512)


def dtypes(device: torch.device) -> tuple[torch.dtype, ...]:
    """bfloat16, as models are run; on a CPU float32, which every CPU multiplies well."""
    return (torch.bfloat16,) if device.type == "cuda" else (torch.float32,)
