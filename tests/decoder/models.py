"""Tiny models with random weights in Hugging Face folders, one of each family and rope type, and what transformers makes of them."""

import copy
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor

from llama_fast.engine.completion import TokenLogprob
from llama_fast.fusion.verify import InFloat64
from llama_fast.kernels.parity import error_bound, relative_error

VOCAB = 97
SIZES: dict[str, Any] = dict(
    vocab_size=VOCAB, hidden_size=64, intermediate_size=112, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=256, rms_norm_eps=1e-5, tie_word_embeddings=False,
    bos_token_id=1, eos_token_id=None, pad_token_id=0,
)  # fmt: skip
CHECKED = 40  # generated tokens whose log-probabilities are compared; from a short prompt on, past TRAINED
TRAINED = 32  # tokens: what rope types that stretch the context were "trained" for


def _rope(rope_type: str, **parameters: Any) -> dict[str, Any]:
    return dict(rope_type=rope_type, rope_theta=10000.0, **parameters)


_PHI = dict(short_factor=[1.0 + i / 8 for i in range(8)], long_factor=[1.5 + i for i in range(8)])
_LONGROPE = dict(
    rope_parameters=_rope("longrope", original_max_position_embeddings=TRAINED, **_PHI),
    original_max_position_embeddings=TRAINED,
)

# name: (model class, settings beside SIZES)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "tied": ("Llama", dict(tie_word_embeddings=True)),
    "head_dim apart": ("Llama", dict(hidden_size=48, head_dim=32)),
    "biases": ("Llama", dict(attention_bias=True, mlp_bias=True)),
    "mistral": ("Mistral", dict(sliding_window=9)),
    "qwen2": ("Qwen2", {}),
    "qwen2, some windows": (
        "Qwen2",
        dict(use_sliding_window=True, sliding_window=9, layer_types=["full_attention", "sliding_attention"]),
    ),
    "qwen3": ("Qwen3", dict(head_dim=32)),
    "phi3": ("Phi3", dict(sliding_window=9)),
    "stablelm": ("StableLm", dict(use_qkv_bias=True, partial_rotary_factor=0.25)),
    "linear": ("Llama", dict(rope_parameters=_rope("linear", factor=3.0))),
    "dynamic": ("Llama", dict(rope_parameters=_rope("dynamic", factor=2.0), max_position_embeddings=TRAINED)),
    "llama3": (
        "Llama",
        dict(
            rope_parameters=_rope(
                "llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=TRAINED
            )
        ),
    ),
    "yarn": ("Llama", dict(rope_parameters=_rope("yarn", factor=4.0, original_max_position_embeddings=TRAINED))),
    "longrope": ("Phi3", _LONGROPE),
}  # fmt: skip


def make(name: str = "llama", **settings: Any) -> Any:
    """A float32 model of transformers in eval mode, the same each time, with weights large enough for its tokens to differ."""
    family, more = MODELS[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**(SIZES | more | settings))
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.mul_(8.0 if ".layers." in name else 4.0)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def save(model: Any, folder: Path, *, bos: bool = True) -> Path:
    """Writes the model with a tokenizer of its own: token i is the word w<i>; w1 begins a text if `bos`."""
    model.save_pretrained(folder)
    vocab = {f"w{i}": i for i in range(model.config.vocab_size)}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos:
        backend.post_processor = processors.TemplateProcessing(single="w1 $A", special_tokens=[("w1", 1)])
    backend.save(str(folder / "tokenizer.json"))
    return folder


def random_ids(length: int, seed: int = 0) -> list[int]:
    return torch.randint(3, VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@dataclass(frozen=True)
class Expected:
    """What transformers generates greedily: its tokens, and the log-probabilities in float32 and, of the first ones, in float64."""

    token_ids: list[int]
    logprobs: Tensor  # (tokens, vocab)
    exact: Tensor  # (CHECKED, vocab)
    prompt_logprobs: Tensor  # (tokens of the prompt - 1, vocab)
    prompt_exact: Tensor


def expected(model: Any, prompt: list[int], count: int) -> Expected:
    ids, logprobs, prompt_logprobs = _generate(model, prompt, count)
    with InFloat64():
        exact_ids, exact, prompt_exact = _generate(copy.deepcopy(model).double(), prompt, CHECKED)
    assert exact_ids == ids[:CHECKED], "the model has ties that float32 cannot tell: choose another"
    return Expected(ids, logprobs, exact, prompt_logprobs, prompt_exact)


@torch.no_grad()
def _generate(model: Any, prompt: list[int], count: int) -> tuple[list[int], Tensor, Tensor]:
    model = copy.deepcopy(model)  # `dynamic` remembers the longest sequence it has seen, and this is to be the first
    ids = torch.tensor([prompt])
    prompt_logprobs = model(ids).logits[0, :-1].log_softmax(-1)
    options: dict[str, Any] = dict(do_sample=False, eos_token_id=None, output_logits=True, return_dict_in_generate=True)
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, pad_token_id=0, **options
    )  # fmt: skip
    return out.sequences[0, len(prompt) :].tolist(), torch.cat(out.logits).log_softmax(-1), prompt_logprobs


@functools.cache
def llama_tokens(prompt: tuple[int, ...], count: int) -> list[int]:
    """What the model "llama" gives greedily in transformers."""
    return _generate(make(), list(prompt), count)[0]


def as_tensor(logprobs: list[TokenLogprob] | None) -> Tensor:
    """(tokens, vocab) from log-probabilities that were asked for over the whole vocabulary."""
    assert logprobs is not None
    rows = [[entry.top[i] for i in range(len(entry.top))] for entry in logprobs]
    for entry, row in zip(logprobs, rows, strict=True):
        assert entry.logprob == row[entry.token_id]
    return torch.tensor(rows)


def assert_within_rule(what: str, actual: Tensor, peer: Tensor, exact: Tensor) -> None:
    error, peer_error = relative_error(actual, exact), relative_error(peer, exact)
    bound = error_bound(peer_error, actual.dtype)
    assert error <= bound, f"{what}: relative error {error:.3e}, transformers' {peer_error:.3e}, bound {bound:.3e}"
