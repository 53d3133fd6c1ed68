"""A checkpoint as a GGUF file for llama.cpp: the same numbers, in the same precision, without a tokenizer."""

import importlib.util
from pathlib import Path

import torch

from llama_fast.decoder.checkpoint import load
from llama_fast.decoder.config import DecoderConfig
from llama_fast.decoder.gguf.model import slots_of

_KINDS = {torch.float32: ("F32", "ALL_F32"), torch.bfloat16: ("BF16", "MOSTLY_BF16")}


def why_not(config: DecoderConfig) -> str | None:
    """Why such a model cannot be written here; None: it can."""
    if importlib.util.find_spec("gguf") is None:
        return 'gguf is not installed: pip install "llama-fast[gguf]"'
    if config.model_type != "llama":
        return f"a GGUF file is written of a llama alone, and this is a {config.model_type}"
    if config.rope.rope_type != "default":
        return f"a GGUF file is written without scaled RoPE, and this has {config.rope.rope_type}"
    return None


def write_gguf(folder: Path, path: Path, dtype: torch.dtype) -> None:
    """Writes the checkpoint in `folder` to `path`: matrices in `dtype`, float32 or bfloat16, vectors in float32, as llama.cpp has them.

    Raises ValueError for a model that `why_not` names.
    """
    import gguf

    decoder = load(folder, device="cpu", dtype=dtype)
    config = decoder.config
    if reason := why_not(config):
        raise ValueError(reason)
    kind, file_type = gguf.GGMLQuantizationType[_KINDS[dtype][0]], gguf.LlamaFileType[_KINDS[dtype][1]]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_file_type(file_type)
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.max_positions)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope.theta)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_tokenizer_model("none")
    writer.add_vocab_size(config.vocab_size)
    for name, slot in slots_of(config).items():
        weight = slot.stored(decoder)
        if weight.ndim == 1:
            writer.add_tensor(name, weight.float().numpy())
        else:
            writer.add_tensor(name, weight.contiguous().view(torch.uint8).numpy(), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
