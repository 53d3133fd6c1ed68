"""The fields of published `config.json` files, by what they do to the result: data, which `config.py` reads.

A field is one of a family's own (`FAMILIES`, `ROPE_FIELDS`), or changes nothing (`WITHOUT_EFFECT`), or would change the
result and must have a value that leaves it alone (`NEUTRAL`). Any other one is refused by name.
"""

from typing import Any


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Each family's fields, with the values its transformers class has where a config.json leaves them out.
_COMMON: dict[str, Any] = dict(
    vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=None, head_dim=None, hidden_act="silu", max_position_embeddings=2048, rms_norm_eps=1e-6,
    tie_word_embeddings=False, bos_token_id=1, eos_token_id=2, layer_types=None,
)  # fmt: skip
_QWEN: dict[str, Any] = _COMMON | dict(
    vocab_size=151936, intermediate_size=22016, num_key_value_heads=32, max_position_embeddings=32768,
    bos_token_id=None, eos_token_id=None, use_sliding_window=False, sliding_window=4096, max_window_layers=28,
)  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": _COMMON | dict(attention_bias=False, mlp_bias=False),
    "mistral": _COMMON | dict(
        intermediate_size=14336, num_key_value_heads=8, max_position_embeddings=131072, sliding_window=4096,
    ),
    "qwen2": _QWEN,
    "qwen3": _QWEN | dict(head_dim=128, attention_bias=False),
    "phi3": _COMMON | dict(
        vocab_size=32064, hidden_size=3072, intermediate_size=8192, max_position_embeddings=4096, rms_norm_eps=1e-5,
        original_max_position_embeddings=4096, eos_token_id=32000, sliding_window=None,
    ),
    "stablelm": _COMMON | dict(
        vocab_size=50304, hidden_size=2560, intermediate_size=6912, num_key_value_heads=32,
        max_position_embeddings=4096, layer_norm_eps=1e-5, bos_token_id=0, eos_token_id=0, use_qkv_bias=False,
        partial_rotary_factor=0.25,
    ),
}  # fmt: skip
ARCHITECTURES = {
    "llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM", "phi3": "Phi3ForCausalLM", "stablelm": "StableLmForCausalLM",
}  # fmt: skip
PARTLY_ROTATED = ("phi3", "stablelm")  # transformers' other families rotate the whole head whatever the config says
ROPE_FIELDS = _names("rope_theta rope_scaling rope_parameters partial_rotary_factor original_max_position_embeddings")
SILU = ("silu", "swish")  # two names of one function

# Fields that change no number of the forward pass, whatever they hold
WITHOUT_EFFECT: frozenset[str] = frozenset().union(
    # bookkeeping, and what is asked of a forward pass beside its result
    _names(
        """architectures auto_map dtype finetuning_task is_decoder is_llama_config max_window_layers model_type
        output_attentions output_hidden_states output_scores prefix return_dict tf_legacy_loss tokenizer_class
        torch_dtype torchscript transformers.js_config transformers_version unsloth_fixed unsloth_version use_bfloat16"""
    ),
    # training
    _names(
        """attention_dropout attention_probs_dropout_prob attn_pdrop chunk_size_feed_forward classifier_dropout embd_pdrop
        gradient_checkpointing hidden_dropout hidden_dropout_prob id2label initializer_range label2id num_labels
        pretraining_tp problem_type resid_pdrop task_specific_params"""
    ),
    # how attention is computed, which comes to the same
    _names("attn_implementation use_cache use_flash_attention use_flash_attention_2 use_flash_attn"),
    # lengths for a tokenizer or a trainer: transformers looks at `max_position_embeddings` alone
    _names("max_sequence_length model_max_length seq_length tokenizer_model_max_length tokenizer_padding_side"),
    # special tokens, and defaults of generation from before there was a generation_config.json
    _names(
        """bad_words_ids begin_suppress_tokens cls_token_id decoder_start_token_id diversity_penalty do_sample
        early_stopping encoder_no_repeat_ngram_size exponential_decay_length_penalty forced_bos_token_id
        forced_eos_token_id length_penalty max_length min_length no_repeat_ngram_size num_beam_groups num_beams
        num_return_sequences pad_token_id remove_invalid_values repetition_penalty return_dict_in_generate sep_token_id
        suppress_tokens temperature top_k top_p typical_p unk_token_id"""
    ),
)
# Fields that change the result, with the values that leave it as it is; null always does
NEUTRAL: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(
        _names(
            """add_cross_attention apply_residual_connection_post_layernorm attention_bias bias is_encoder_decoder
            lm_head_bias mlp_bias qk_layernorm qk_norm qkv_bias rope_interleaved tie_encoder_decoder use_bias
            use_dynamic_ntk use_logn_attn use_mrope use_parallel_residual use_qk_norm use_qkv_bias use_sliding_window"""
        ),
        (False,),
    ),
    **dict.fromkeys(
        _names(
            """embedding_multiplier full_attn_mod interpolate_factor logit_scale logits_scaling residual_multiplier
            rotary_pct"""
        ),
        (1,),
    ),
    "activation": (*SILU, "swiglu"),
    "hidden_activation": SILU,
    "pruned_heads": ({},),
}
QUANTISED = ("quantization_config", "quantization", "compression_config")
META_FIELDS = _names(
    """dim n_layers n_heads n_kv_heads vocab_size multiple_of ffn_dim_multiplier norm_eps rope_theta use_scaled_rope
    rope_scaling_factor max_seq_len max_batch_size model_parallel_size"""
)

# rope_type: what it needs, what it may have. What one of them does not read changes nothing there: `finetuned` is a note
# of the YaRN authors, and some write the trained length beside every type.
_TRAINED = "original_max_position_embeddings"
ROPE_TYPES: dict[str, tuple[frozenset[str], frozenset[str]]] = {
    "default": (_names(""), _names(_TRAINED)),
    "linear": (_names("factor"), _names(_TRAINED)),
    "dynamic": (_names("factor"), _names(_TRAINED)),
    "llama3": (_names(f"factor low_freq_factor high_freq_factor {_TRAINED}"), _names("")),
    "yarn": (
        _names(_TRAINED),
        _names("factor attention_factor beta_fast beta_slow mscale mscale_all_dim truncate finetuned"),
    ),
    "longrope": (_names(f"short_factor long_factor {_TRAINED}"), _names("factor attention_factor")),
}
