"""What the `config.json` of much used models says: their fields, as facts, for the tests.

Sources, by the letter of each entry:
  M  read in mlc-ai/mlc-llm, python/mlc_llm/model/model_preset.py, without the fields that MLC adds
  Q  read as quoted in other public files: logs of training runs, READMEs, tests, benchmarks, model code of third parties
  S  the sizes and the RoPE base read in Lightning-AI/litgpt, litgpt/config.py; the other fields written from memory
  W  written from memory, not looked up; behind another letter it says which fields

Lists that say the same for each of a hundred models are short here: `auto_map` has one entry, `short_factor` and
`long_factor` of LongRoPE have about the published ends and a straight line between. `READ` holds, beside the config, the
number of parameters in billions as makers or the hub give it (from memory): a check of sizes, heads and tied embeddings
that owes nothing to the fields.
"""

from typing import Any

_SIZES = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "max_position_embeddings"]  # fmt: skip


def _config(base: dict[str, Any], *sizes: int, **more: Any) -> dict[str, Any]:
    return base | dict(zip(_SIZES, sizes, strict=True)) | more


_LLAMA1: dict[str, Any] = dict(
    architectures=["LlamaForCausalLM"], bos_token_id=1, eos_token_id=2, hidden_act="silu", initializer_range=0.02,
    model_type="llama", pad_token_id=0, rms_norm_eps=1e-5, tie_word_embeddings=False, torch_dtype="float16",
    transformers_version="4.28.0.dev0", use_cache=True,
)  # fmt: skip
_LLAMA2 = {k: v for k, v in _LLAMA1.items() if k != "pad_token_id"} | dict(
    pretraining_tp=1, rope_scaling=None, transformers_version="4.31.0.dev0"
)
_CODE_LLAMA = _LLAMA2 | dict(rope_theta=1000000, torch_dtype="bfloat16", transformers_version="4.33.0.dev0")
_LLAMA3 = _LLAMA2 | dict(
    attention_bias=False, attention_dropout=0.0, bos_token_id=128000, eos_token_id=128001, mlp_bias=False,
    rope_theta=500000.0, torch_dtype="bfloat16", transformers_version="4.40.0.dev0",
)  # fmt: skip
_LLAMA31 = _LLAMA3 | dict(
    eos_token_id=[128001, 128008, 128009], transformers_version="4.42.3",
    rope_scaling=dict(
        factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192, rope_type="llama3"
    ),
)  # fmt: skip
_LLAMA32 = _LLAMA31 | dict(
    rope_scaling=_LLAMA31["rope_scaling"] | dict(factor=32.0), tie_word_embeddings=True, transformers_version="4.45.0.dev0"
)  # fmt: skip
_SMOLLM = _LLAMA2 | dict(
    attention_bias=False, attention_dropout=0.0, mlp_bias=False, pad_token_id=2, rope_theta=10000.0,
    tie_word_embeddings=True, torch_dtype="bfloat16", transformers_version="4.42.3",
)  # fmt: skip
_SMOLLM2 = _SMOLLM | {
    "initializer_range": 0.041666666666666664, "is_llama_config": True, "rope_interleaved": False, "rope_theta": 100000,
    "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}},
}  # fmt: skip
_MISTRAL: dict[str, Any] = dict(
    architectures=["MistralForCausalLM"], bos_token_id=1, eos_token_id=2, hidden_act="silu", initializer_range=0.02,
    model_type="mistral", rms_norm_eps=1e-5, rope_theta=1000000.0, sliding_window=None, tie_word_embeddings=False,
    torch_dtype="bfloat16", transformers_version="4.42.0.dev0", use_cache=True, attention_dropout=0.0,
)  # fmt: skip
_MISTRAL1 = {k: v for k, v in _MISTRAL.items() if k != "attention_dropout"} | dict(
    rope_theta=10000.0, sliding_window=4096, transformers_version="4.34.0.dev0"
)
_QWEN2: dict[str, Any] = dict(
    architectures=["Qwen2ForCausalLM"], attention_dropout=0.0, bos_token_id=151643, eos_token_id=151645,
    hidden_act="silu", initializer_range=0.02, max_window_layers=28, model_type="qwen2", rms_norm_eps=1e-6,
    rope_theta=1000000.0, sliding_window=32768, tie_word_embeddings=True, torch_dtype="bfloat16",
    transformers_version="4.40.1", use_cache=True, use_sliding_window=False,
)  # fmt: skip
_QWEN3 = _QWEN2 | dict(
    architectures=["Qwen3ForCausalLM"], attention_bias=False, head_dim=128, model_type="qwen3", rope_scaling=None,
    rope_theta=1000000, sliding_window=None, transformers_version="4.51.0",
)  # fmt: skip
_PHI3: dict[str, Any] = dict(
    architectures=["Phi3ForCausalLM"], attention_bias=False, attention_dropout=0.0,
    auto_map={"AutoConfig": "configuration_phi3.Phi3Config"}, bos_token_id=1, embd_pdrop=0.0, eos_token_id=32000,
    hidden_act="silu", initializer_range=0.02, model_type="phi3", original_max_position_embeddings=4096,
    pad_token_id=32000, resid_pdrop=0.0, rms_norm_eps=1e-5, rope_scaling=None, rope_theta=10000.0, sliding_window=262144,
    tie_word_embeddings=False, torch_dtype="bfloat16", transformers_version="4.43.3", use_cache=True,
)  # fmt: skip
_STABLELM: dict[str, Any] = dict(
    architectures=["StableLmForCausalLM"], bos_token_id=0, eos_token_id=0, hidden_act="silu", initializer_range=0.02,
    layer_norm_eps=1e-5, model_type="stablelm", partial_rotary_factor=0.25, rope_theta=10000, tie_word_embeddings=False,
    torch_dtype="bfloat16", transformers_version="4.38.0", use_cache=True, use_qkv_bias=False,
)  # fmt: skip


def _longrope(pairs: int, short_end: float, long_end: float) -> dict[str, Any]:
    def line(end: float) -> list[float]:
        return [1.0 + (end - 1.0) * i / (pairs - 1) for i in range(pairs)]

    return dict(long_factor=line(long_end), short_factor=line(short_end), type="longrope")


# name: (billions of parameters, config)
READ: dict[str, tuple[str, dict[str, Any]]] = {
    # Llama and what is made of it
    "llama-65b": ("65.3", _config(_LLAMA1, 32000, 8192, 22016, 80, 64, 64, 2048, max_sequence_length=2048)),  # Q
    "Llama-2-7b-hf": ("6.74", _config(_LLAMA2, 32000, 4096, 11008, 32, 32, 32, 4096)),  # Q
    "Llama-2-13b-hf": ("13.0", _config(_LLAMA2, 32000, 5120, 13824, 40, 40, 40, 4096, pretraining_tp=2)),  # M, positions W
    "Llama-2-70b-hf": ("69.0", _config(_LLAMA2, 32000, 8192, 28672, 80, 64, 8, 4096)),  # M, positions W
    "vicuna-7b-v1.5-16k": (  # Q
        "6.74",
        _config(
            _LLAMA2, 32000, 4096, 11008, 32, 32, 32, 4096, max_sequence_length=16384, pad_token_id=0,
            rope_scaling={"factor": 4.0, "type": "linear"},
        ),
    ),
    "CodeLlama-7b-hf": ("6.74", _config(_CODE_LLAMA, 32016, 4096, 11008, 32, 32, 32, 16384)),  # M
    "CodeLlama-34b-hf": ("33.7", _config(_CODE_LLAMA, 32000, 8192, 22016, 48, 64, 8, 16384)),  # M, vocabulary W
    "TinyLlama-1.1B-Chat-v1.0": (  # M
        "1.10",
        _config(
            _LLAMA2, 32000, 2048, 5632, 22, 32, 4, 2048, attention_bias=False, rope_theta=10000.0, torch_dtype="bfloat16",
        ),
    ),
    "Nous-Hermes-2-SOLAR-10.7B": (  # Q
        "10.7",
        _config(
            _LLAMA2, 32002, 4096, 14336, 48, 32, 8, 4096, _name_or_path="upstage/SOLAR-10.7B-v1.0", attention_bias=False,
            attention_dropout=0.0, eos_token_id=32000, rope_theta=10000.0, use_cache=False,
        ),
    ),
    "Yi-6B": (  # Q
        "6.06",
        _config(_LLAMA2, 64000, 4096, 11008, 32, 32, 4, 4096, pad_token_id=0, rope_theta=5000000.0),
    ),
    "deepseek-llm-7b-chat": (  # Q up to the positions; layers, heads, RoPE and eps W
        "6.91",
        _config(
            _LLAMA3, 102400, 4096, 11008, 30, 32, 32, 4096, bos_token_id=100000, eos_token_id=100001, rms_norm_eps=1e-6,
            rope_theta=10000.0,
        ),
    ),
    "deepseek-coder-1.3b-instruct": (  # Q
        "1.35",
        _config(
            _LLAMA3, 32256, 2048, 5504, 24, 16, 16, 16384, bos_token_id=32013, eos_token_id=32021, pad_token_id=32014,
            rms_norm_eps=1e-6, rope_scaling={"factor": 4.0, "rope_type": "linear", "type": "linear"}, rope_theta=100000,
        ),
    ),
    "Meta-Llama-3-8B": ("8.03", _config(_LLAMA3, 128256, 4096, 14336, 32, 32, 8, 8192)),  # M
    "Meta-Llama-3-70B": ("70.6", _config(_LLAMA3, 128256, 8192, 28672, 80, 64, 8, 8192)),  # M
    "Hermes-2-Pro-Llama-3-8B": (  # Q
        "8.03",
        _config(_LLAMA3, 128288, 4096, 14336, 32, 32, 8, 8192, eos_token_id=128003, use_cache=False),
    ),
    "Llama-3.1-8B-Instruct": ("8.03", _config(_LLAMA31, 128256, 4096, 14336, 32, 32, 8, 131072)),  # M
    "Llama-3.1-70B-Instruct": ("70.6", _config(_LLAMA31, 128256, 8192, 28672, 80, 64, 8, 131072)),  # M
    "Llama-3.2-1B-Instruct": ("1.24", _config(_LLAMA32, 128256, 2048, 8192, 16, 32, 8, 131072, head_dim=64)),  # M
    "Llama-3.2-3B-Instruct": ("3.21", _config(_LLAMA32, 128256, 3072, 8192, 28, 24, 8, 131072, head_dim=128)),  # M
    "SmolLM-135M": ("0.135", _config(_SMOLLM, 49152, 576, 1536, 30, 9, 3, 2048)),  # M
    "SmolLM-1.7B": ("1.71", _config(_SMOLLM, 49152, 2048, 8192, 24, 32, 32, 2048)),  # M
    "SmolLM2-135M-Instruct": ("0.135", _config(_SMOLLM2, 49152, 576, 1536, 30, 9, 3, 8192)),  # M
    "SmolLM2-360M-Instruct": ("0.362", _config(_SMOLLM2, 49152, 960, 2560, 32, 15, 5, 8192)),  # M
    "SmolLM2-1.7B-Instruct": ("1.71", _config(_SMOLLM, 49152, 2048, 8192, 24, 32, 32, 8192, rope_theta=130000)),  # M
    "Falcon3-7B-Base": (  # S
        "7.46",
        _config(
            _LLAMA3, 131072, 3072, 23040, 28, 12, 4, 32768, activation="swiglu", bos_token_id=11, eos_token_id=11,
            head_dim=256, rms_norm_eps=1e-6, rope_theta=1000042,
        ),
    ),
    "open_llama_3b": ("3.43", _config(_LLAMA1, 32000, 3200, 8640, 26, 32, 32, 2048, rms_norm_eps=1e-6)),  # W
    "granite-3b-code-instruct": (  # W: Llama with biases everywhere
        "3.48",
        _config(
            _LLAMA3, 49152, 2560, 10240, 32, 32, 32, 2048, attention_bias=True, bos_token_id=0, eos_token_id=0,
            mlp_bias=True, rope_theta=10000, tie_word_embeddings=True,
        ),
    ),
    # Mistral
    "Mistral-7B-v0.1": ("7.24", _config(_MISTRAL1, 32000, 4096, 14336, 32, 32, 8, 32768)),  # M
    "zephyr-7b-beta": ("7.24", _config(_MISTRAL1, 32000, 4096, 14336, 32, 32, 8, 32768, pad_token_id=2)),  # W
    "Mistral-7B-Instruct-v0.2": ("7.24", _config(_MISTRAL, 32000, 4096, 14336, 32, 32, 8, 32768)),  # Q
    "Mistral-7B-Instruct-v0.3": ("7.25", _config(_MISTRAL, 32768, 4096, 14336, 32, 32, 8, 32768)),  # M
    "Mistral-Nemo-Base-2407": ("12.2", _config(_MISTRAL, 131072, 5120, 14336, 40, 32, 8, 128000, head_dim=128)),  # Q
    "Ministral-8B-Instruct-2410": (  # Q
        "8.02",
        _config(
            _MISTRAL, 131072, 4096, 12288, 36, 32, 8, 32768, head_dim=128, rope_theta=100000000.0, sliding_window=32768,
        ),
    ),
    "Mistral-Small-24B-Base-2501": (  # Q
        "23.6",
        _config(_MISTRAL, 131072, 5120, 32768, 40, 32, 8, 32768, head_dim=128, rope_theta=100000000.0),
    ),
    "h2o-danube2-1.8b-chat": (  # S
        "1.83",
        _config(_MISTRAL, 32000, 2560, 6912, 24, 32, 8, 8192, pad_token_id=0, rope_theta=10000),
    ),
    # Qwen
    "Qwen2-0.5B": ("0.49", _config(_QWEN2, 151936, 896, 4864, 24, 14, 2, 32768, max_window_layers=24)),  # M
    "Qwen2-1.5B": ("1.54", _config(_QWEN2, 151936, 1536, 8960, 28, 12, 2, 32768)),  # M
    "Qwen2-7B-Instruct": (  # M
        "7.62",
        _config(_QWEN2, 152064, 3584, 18944, 28, 28, 4, 32768, sliding_window=131072, tie_word_embeddings=False),
    ),
    "Qwen2.5-0.5B": (  # Q
        "0.49",
        _config(_QWEN2, 151936, 896, 4864, 24, 14, 2, 32768, eos_token_id=151643, max_window_layers=24, use_mrope=False),
    ),
    "Qwen2.5-1.5B": (  # Q
        "1.54",
        _config(_QWEN2, 151936, 1536, 8960, 28, 12, 2, 131072, eos_token_id=151643, sliding_window=131072, use_mrope=False),
    ),
    "Qwen2.5-3B-Instruct": ("3.09", _config(_QWEN2, 151936, 2048, 11008, 36, 16, 2, 32768, max_window_layers=70)),  # M
    "Qwen2.5-Coder-32B-Instruct": (  # S, with the YaRN of Qwen's README
        "32.8",
        _config(
            _QWEN2, 152064, 5120, 27648, 64, 40, 8, 32768, max_window_layers=70, rms_norm_eps=1e-5,
            rope_scaling={"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"},
            sliding_window=131072, tie_word_embeddings=False,
        ),
    ),
    "DeepSeek-R1-Distill-Qwen-1.5B": (  # Q
        "1.78",
        _config(
            _QWEN2, 151936, 1536, 8960, 28, 12, 2, 131072, eos_token_id=151643, max_window_layers=21, rope_theta=10000,
            sliding_window=4096, tie_word_embeddings=False, use_mrope=False,
        ),
    ),
    "DeepSeek-R1-Distill-Qwen-7B": (  # Q
        "7.62",
        _config(
            _QWEN2, 152064, 3584, 18944, 28, 28, 4, 131072, eos_token_id=151643, rope_theta=10000, sliding_window=4096,
            tie_word_embeddings=False, use_mrope=False,
        ),
    ),
    "Qwen3-0.6B": ("0.6", _config(_QWEN3, 151936, 1024, 3072, 28, 16, 8, 40960)),  # M
    "Qwen3-1.7B": ("1.7", _config(_QWEN3, 151936, 2048, 6144, 28, 16, 8, 40960)),  # M
    "Qwen3-4B-Instruct-2507": (  # M
        "4.0",
        _config(_QWEN3, 151936, 2560, 9728, 36, 32, 8, 262144, max_window_layers=36, rope_theta=5000000),
    ),
    "Qwen3-8B": (  # M
        "8.2",
        _config(_QWEN3, 151936, 4096, 12288, 36, 32, 8, 40960, max_window_layers=36, tie_word_embeddings=False),
    ),
    # Phi and StableLM
    "Phi-3-mini-4k-instruct": ("3.82", _config(_PHI3, 32064, 3072, 8192, 32, 32, 32, 4096, sliding_window=2047)),  # M
    "Phi-3.5-mini-instruct": (  # M
        "3.82",
        _config(_PHI3, 32064, 3072, 8192, 32, 32, 32, 131072, rope_scaling=_longrope(48, 2.84, 64.84)),
    ),
    "phi-4": (  # Q
        "14.7",
        _config(
            _PHI3, 100352, 5120, 17920, 40, 40, 10, 16384, bos_token_id=100257, eos_token_id=100257, rope_theta=250000,
            original_max_position_embeddings=16384, pad_token_id=100257, sliding_window=None,
        ),
    ),
    "Phi-4-mini-instruct": (  # M
        "3.84",
        _config(
            _PHI3, 200064, 3072, 8192, 32, 24, 8, 131072, bos_token_id=199999, eos_token_id=199999, full_attn_mod=1,
            interpolate_factor=1, lm_head_bias=False, mlp_bias=False, pad_token_id=199999, partial_rotary_factor=0.75,
            rope_scaling=_longrope(48, 1.0, 47.77), tie_word_embeddings=True,
        ),
    ),
    "stablelm-3b-4e1t": ("2.80", _config(_STABLELM, 50304, 2560, 6912, 32, 32, 32, 4096)),  # M
    "stablelm-2-zephyr-1_6b": (  # M
        "1.64",
        _config(_STABLELM, 100352, 2048, 5632, 24, 32, 32, 4096, bos_token_id=100257, eos_token_id=100257, use_qkv_bias=True),
    ),
}  # fmt: skip

# name: (what the error must say, what the config has beside the sizes)
REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "Mixtral-8x7B-v0.1": (  # M
        r"got 'mixtral', whose config has num_experts_per_tok \(2\), num_local_experts \(8\)",
        _MISTRAL | dict(
            architectures=["MixtralForCausalLM"], model_type="mixtral", num_experts_per_tok=2, num_local_experts=8,
            output_router_logits=False, router_aux_loss_coef=0.02,
        ),
    ),
    "Qwen1.5-MoE-A2.7B": (  # M
        r"got 'qwen2_moe', whose config has decoder_sparse_step \(1\), .*num_experts \(60\)",
        _QWEN2 | dict(
            decoder_sparse_step=1, model_type="qwen2_moe", moe_intermediate_size=1408, norm_topk_prob=False,
            num_experts=60, num_experts_per_tok=4, shared_expert_intermediate_size=5632,
        ),
    ),
    "Qwen2.5-7B-Instruct-1M": (  # Q
        "qwen2 config has fields that are not supported: dual_chunk_attention_config",
        _QWEN2 | dict(
            dual_chunk_attention_config=dict(
                chunk_size=262144, local_size=8192, original_max_position_embeddings=262144
            ),
            max_position_embeddings=1010000, rope_theta=10000000.0,
        ),
    ),
    "gemma-2b": ("got 'gemma'", _LLAMA2 | dict(head_dim=256, hidden_act="gelu", model_type="gemma")),  # M
    "gemma-2-2b": (  # M
        r"got 'gemma2', whose config has attn_logit_softcapping \(50.0\).*query_pre_attn_scalar \(256\)",
        _LLAMA2 | dict(
            attn_logit_softcapping=50.0, cache_implementation="hybrid", final_logit_softcapping=30.0,
            hidden_activation="gelu_pytorch_tanh", model_type="gemma2", query_pre_attn_scalar=256, sliding_window=4096,
        ),
    ),
    "granite-3.2-8b-instruct": (  # Q
        r"got 'granite', whose config has attention_multiplier \(0.0078125\), embedding_multiplier \(12.0\)",
        _LLAMA3 | dict(
            attention_multiplier=0.0078125, embedding_multiplier=12.0, logits_scaling=16.0, model_type="granite",
            residual_multiplier=0.22,
        ),
    ),
    "OLMo-1B-hf": ("got 'olmo'", _LLAMA2 | dict(clip_qkv=None, model_type="olmo")),  # Q
    "SmolLM3-3B": (  # Q
        r"got 'smollm3', whose config has no_rope_layer_interval \(4\), no_rope_layers",
        _LLAMA3 | dict(model_type="smollm3", no_rope_layer_interval=4, no_rope_layers=[1, 1, 1, 0] * 9),
    ),
    "aya-23-8B": (r"got 'cohere', whose config has logit_scale \(0.0625\)", _LLAMA3 | dict(
        layer_norm_eps=1e-5, logit_scale=0.0625, model_type="cohere", use_qk_norm=False)),  # M
    "MiniCPM-2B-sft-bf16": (  # M
        r"got 'minicpm', whose config has scale_emb \(12\), dim_model_base \(256\), scale_depth \(1.4\)",
        _LLAMA2 | dict(model_type="minicpm", scale_emb=12, dim_model_base=256, scale_depth=1.4),
    ),
    "internlm2_5-7b": ("got 'internlm2'", _LLAMA2 | dict(
        bias=False, model_type="internlm2", rope_scaling={"type": "dynamic", "factor": 2.0})),  # M
    "Baichuan2-7B-Base": ("got 'baichuan'", _LLAMA1 | dict(model_max_length=4096, model_type="baichuan")),  # M
    "DeepSeek-V2-Lite": (r"got 'deepseek_v2', whose config has .*kv_lora_rank \(512\)", _LLAMA2 | dict(
        first_k_dense_replace=1, kv_lora_rank=512, model_type="deepseek_v2", n_routed_experts=64)),  # M
    "llava-1.5-7b-hf": (  # M
        r"got 'llava', whose config has .*text_config \(\{.*vision_config",
        dict(
            architectures=["LlavaForConditionalGeneration"], ignore_index=-100, image_token_index=32000,
            model_type="llava", text_config={"architectures": ["LlamaForCausalLM"], "model_type": "llama"},
            vision_config={"model_type": "clip_vision_model"},
        ),
    ),
    "stablelm-2-12b": (  # W
        r"stablelm config has .*qk_layernorm \(True\), use_parallel_residual \(True\)",
        _STABLELM | dict(qk_layernorm=True, use_parallel_residual=True),
    ),
    "Meta-Llama-3-8B-Instruct, 4 bits": (  # Q
        "quantization_config: quantised checkpoints are not supported",
        _LLAMA3 | dict(quantization_config={"_load_in_4bit": True, "quant_method": "bitsandbytes"}),
    ),
    "Llama-3.2-3B-Instruct, 4 bits of MLX": (  # W
        "quantization: quantised checkpoints are not supported",
        _LLAMA32 | dict(quantization={"group_size": 64, "bits": 4}),
    ),
}  # fmt: skip
