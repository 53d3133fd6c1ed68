"""What is generated in a comparison, by which model, and how the text is judged: for sides in this process, and for engines in their own."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llama_fast.benchmarks.models import StoredModel, build_model
from llama_fast.benchmarks.shapes import ModelShape
from llama_fast.decoder.config import DecoderConfig
from llama_fast.decoder.tokenizer import Tokenizer
from llama_fast.fusion.verify import InFloat64
from llama_fast.profiler.measure.sides import load_transformers
from llama_fast.profiler.measure.subject import story_ids
from llama_fast.profiler.measure.work import Work, decoding_step_work, prompt_work

FIRST_TOKEN = "time to first token"
INTER_TOKEN = "inter-token latency"
MIN_ROUNDS = 5
JUDGED_PROMPT, JUDGED_NEW, JUDGED_ROWS = 256, 16, 2


@dataclass(frozen=True)
class Setting:
    """What is generated: `new` tokens after each of `batch` prompts, by a model of a shape with random weights, or a stored one.

    The prompt of a `chat` is `chat_ids`.
    """

    model: ModelShape | StoredModel
    dtype: torch.dtype
    batch: int
    prompt: int
    new: int
    chat: bool = False

    def __str__(self) -> str:
        kind = "chat" if self.chat else f"batch {self.batch}"
        return f"{self.model.name}, {kind}, {self.prompt} + {self.new} tokens"

    @property
    def config(self) -> DecoderConfig:
        """Of the model, as the engine sees it."""
        if isinstance(self.model, StoredModel):
            return self.model.config
        return DecoderConfig.from_huggingface(self.model.config())


def work_of(setting: Setting, direction: str) -> Work:
    """Of the prompts, with what they leave in the cache; or of a decoding step in the middle of the new tokens."""
    config = setting.config
    if direction == INTER_TOKEN:
        return decoding_step_work(config, setting.batch, setting.prompt + setting.new // 2, setting.dtype)
    kept = 2 * config.num_kv_heads * config.head_dim * config.num_layers * setting.prompt * setting.dtype.itemsize
    return prompt_work(config, setting.prompt, setting.dtype, batch=setting.batch) + Work(written=setting.batch * kept)


def chat_ids(model: StoredModel) -> list[int]:
    """A question as the model's chat template writes it."""
    return Tokenizer(model.path).chat([{"role": "user", "content": "Why is the sky blue? Explain it to a child."}])


def prompts_of(setting: Setting, device: torch.device) -> Tensor:
    """(batch, prompt) tokens: of a chat, or of stories, where a model can read."""
    model = setting.model
    if isinstance(model, StoredModel):
        if setting.chat:
            return torch.tensor([chat_ids(model)], device=device)
        tokenizer, vocab = Tokenizer(model.path), model.config.vocab_size
        rows = [story_ids(tokenizer, vocab, seed, setting.prompt) for seed in range(setting.batch)]
        return torch.tensor(rows, device=device)
    return torch.randint(3, model.vocab, (setting.batch, setting.prompt), device=device)


def model_and_prompts(setting: Setting, device: torch.device) -> tuple[Any, Tensor]:
    """transformers' model, and its prompts."""
    prompts, model = prompts_of(setting, device), setting.model
    if isinstance(model, StoredModel):
        return load_transformers(str(model.path), dtype=setting.dtype, device=device)[0], prompts
    return build_model(model, device, setting.dtype), prompts


def logits_of(reference: Any, ids: Tensor) -> Tensor:
    """The logits (tokens, vocab) of one sequence (tokens,) by a model in float64."""
    with torch.inference_mode(), InFloat64():
        logits: Tensor = reference(ids[None], use_cache=False).logits[0]
        return logits


def shares_of_best(reference: Any, prompt: Tensor, text: list[int]) -> Tensor:
    """The reference's logit of each token of a text, in the place where it was chosen, over the largest logit there."""
    tokens = torch.tensor(text, device=prompt.device)
    logits = logits_of(reference, torch.cat([prompt, tokens]))[len(prompt) - 1 : -1]
    return logits.gather(1, tokens[:, None]).squeeze(1) / logits.amax(1)
