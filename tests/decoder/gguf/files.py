"""GGUF files as llama.cpp's converter writes them: tiny models of transformers in any type of tensor, and vocabularies alone."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter, TokenType
from tokenizers import pre_tokenizers
from torch import Tensor

NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "model.layers.": "blk.",
}  # fmt: skip
# K formats: where a block of random bytes has its float16 scales, for the package cannot quantise to them
SCALES = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}
KINDS = ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", *SCALES]


def write_model(path: Path, model: Any, kind: str = "F32", **more: Any) -> None:
    """Writes `model` with its matrices in `kind`, and gives it the numbers that this leaves of them.

    `more` are further keys of the metadata, None for one to leave out; those of the architecture begin with a dot.
    """
    config = model.config
    architecture = config.model_type
    writer = GGUFWriter(path, architecture)
    tokenizer = byte_level("llama-bpe", padded=config.vocab_size)
    add_metadata(writer, architecture, hyperparameters(config) | tokenizer | more)
    if "rope_freqs" in more:
        writer.add_tensor("rope_freqs.weight", more["rope_freqs"])
    for name, parameter in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        heads = 0
        if architecture == "llama" and ".self_attn." in name:
            heads = {"q": config.num_attention_heads, "k": config.num_key_value_heads}.get(
                name.split("_proj")[0][-1], 0
            )
        stored = permuted(parameter, heads) if heads else parameter
        if parameter.ndim == 1:
            writer.add_tensor(gguf_name(name), stored.numpy())
            continue
        type_ = GGMLQuantizationType[kind]
        data = quantised(stored, type_)
        writer.add_tensor(gguf_name(name), data, raw_dtype=type_)
        left = torch.from_numpy(gguf.dequantize(data, type_).astype(np.float32)).view(stored.shape)
        parameter.copy_(unpermuted(left, heads) if heads else left)
    close(writer)


def hyperparameters(config: Any) -> dict[str, Any]:
    return {
        ".block_count": config.num_hidden_layers, ".context_length": config.max_position_embeddings,
        ".embedding_length": config.hidden_size, ".feed_forward_length": config.intermediate_size,
        ".attention.head_count": config.num_attention_heads, ".attention.head_count_kv": config.num_key_value_heads,
        ".attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        ".rope.freq_base": float(config.rope_parameters["rope_theta"]),
    }  # fmt: skip


def add_metadata(writer: GGUFWriter, architecture: str, values: dict[str, Any]) -> None:
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    for key, value in values.items():
        key = f"{architecture}{key}" if key.startswith(".") else key
        if isinstance(value, list):
            writer.add_array(key, value)
        elif type(value) in add:
            add[type(value)](key, value)


def close(writer: GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_name(name: str) -> str:
    for theirs, ours in NAMES.items():
        name = name.replace(theirs, ours)
    return name


def permuted(weight: Tensor, heads: int) -> Tensor:
    """As `LlamaModel.permute` of llama.cpp's converter does."""
    return weight.view(heads, 2, weight.shape[0] // heads // 2, -1).transpose(1, 2).reshape(weight.shape)


def unpermuted(weight: Tensor, heads: int) -> Tensor:
    return weight.view(heads, weight.shape[0] // heads // 2, 2, -1).transpose(1, 2).reshape(weight.shape)


def quantised(weight: Tensor, type_: GGMLQuantizationType) -> Any:
    """The bytes of `weight` in `type_`; of a K format, bytes of another weight of that shape."""
    if type_.name not in SCALES:
        return gguf.quantize(weight.contiguous().numpy(), type_)
    elements, size = gguf.GGML_QUANT_SIZES[type_]
    data = np.random.default_rng(weight.numel()).integers(0, 256, (weight.numel() // elements, size), dtype=np.uint8)
    for at in SCALES[type_.name]:
        data[:, at : at + 2] = np.full((len(data), 1), 0.0005, np.float16).view(np.uint8)
    return data.reshape(weight.shape[0], -1)


# Vocabularies

# Every word is a token, and so is every beginning of one: a rule that does not cut them as llama.cpp does shows in the ids
_WORDS = (
    "123456 1234 12 99 007 ½² 'sa 'Sa 'LLa 'Dx 'S 'll 'LL 're it's don't I'M the ing hello Hello (hello x=y a1 1a a_b !! !? ... -> == "
    "$9 +1 <a> ^2 ~x |x `x é ñandu Ünï cafe\u0301 中文 中1 你好 ，你 日本語 こん 😀😀 👍🏽 привет \u0660\u0661"
)  # fmt: skip
_SPACED = " `/ 1/ 12/ a/ the/ hello/ 'sa/ (/ !/ 中文/ é/  /   /    /     / \n/\n\n/!\n/!\n\n/ !\n/\r\n/\t\t/\n a/  a/ \u00a0/\u3000a/a b/1 2/\n1/a\n"
WORDS = [*_WORDS.split(), *_SPACED.split("/")]
CONTROL, USER_DEFINED = ["<|begin|>", "<|im_start|>", "<|im_end|>"], ["<think>", "<|x|>"]
UNMARKED = "<|endoftext|>"  # a token that is special by its name alone


def byte_level(pre: str, *, padded: int = 0) -> dict[str, Any]:
    """256 bytes, the words and their beginnings, special tokens; token 0 begins a text. `padded`: as many tokens, at least."""
    tokens, merges = [*CONTROL, *sorted(pre_tokenizers.ByteLevel.alphabet())], []
    for word in WORDS:
        [(text, _)] = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(word)
        for i in range(1, len(text)):
            if text[: i + 1] not in tokens:
                tokens.append(text[: i + 1])
                merges.append(f"{text[:i]} {text[i]}")
    tokens += [*USER_DEFINED, UNMARKED]
    tokens += [f"[PAD{i}]" for i in range(padded - len(tokens))]
    types = dict.fromkeys(CONTROL, TokenType.CONTROL) | dict.fromkeys(USER_DEFINED, TokenType.USER_DEFINED)
    return tokenizer_keys(
        model="gpt2", pre=pre, tokens=tokens, merges=merges, bos_token_id=0, eos_token_id=2,
        token_type=[int(types.get(token, TokenType.NORMAL)) for token in tokens],
    )  # fmt: skip


def tokenizer_keys(**values: Any) -> dict[str, Any]:
    return {f"tokenizer.ggml.{key}": value for key, value in values.items()}


# Pieces from the best score to the worst, which is not the order of their ids
_PIECES = "▁t he in ▁a ▁▁ ▁the ▁▁▁▁ ab ba aba ababa el lo ello Hello ▁Hello ▁▁▁ 12 123 ▁1 中文 ▁中 你好 !! ▁( it 's it's ing ▁12 é1 \n▁ ▁é"
_CHARACTERS = "▁etaoinshrdlubcfgmpvwxyzHITAB0123456789.,!?'()é中文你好\n"


def sentencepiece(**more: Any) -> dict[str, Any]:
    """Unknown, begin, end, 256 bytes, the pieces, their characters, and a token that the user defined."""
    best_first = [*_PIECES.split(" "), *_CHARACTERS]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *sorted(best_first), "<think>"]
    types = dict.fromkeys(tokens, TokenType.NORMAL) | dict.fromkeys(tokens[3:259], TokenType.BYTE)
    types |= {"<unk>": TokenType.UNKNOWN, "<s>": TokenType.CONTROL, "</s>": TokenType.CONTROL}
    types |= {"<think>": TokenType.USER_DEFINED}
    ranks = {piece: i for i, piece in enumerate(best_first)}
    return tokenizer_keys(
        model="llama", pre="default", tokens=tokens, scores=[-float(ranks.get(token, 0)) for token in tokens],
        token_type=[int(types[token]) for token in tokens], **more,
    )  # fmt: skip


VOCABULARIES = ["llama-bpe", "qwen2", "smollm", "gpt-2", "default", "sentencepiece", "sentencepiece without prefix"]


def vocabulary_of(name: str) -> dict[str, Any]:
    if name.startswith("sentencepiece"):
        return sentencepiece(**({} if name == "sentencepiece" else dict(add_space_prefix=False)))
    return byte_level(name)


def write_vocabulary(path: Path, name: str, **more: Any) -> Path:
    """A file with a vocabulary and no model. `more` as in `write_model`, and names without a dot are the tokenizer's."""
    writer = GGUFWriter(path, "llama")
    keys = ["block_count", "context_length", "embedding_length", "feed_forward_length", "attention.head_count"]
    values = {f".{key}": 8 for key in keys} | {".attention.layer_norm_rms_epsilon": 1e-5} | vocabulary_of(name)
    values |= {key if "." in key else f"tokenizer.ggml.{key}": value for key, value in more.items()}
    add_metadata(writer, "llama", values)
    close(writer)
    return path
